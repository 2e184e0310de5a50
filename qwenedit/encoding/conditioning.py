"""The conditioning of a run as one value that can be saved, loaded, moved and changed.

From a saved conditioning an edit can be repeated without the text encoder and the VAE's encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qwenedit.checks import whole_number
from qwenedit.files import read_tensors, replacing_file
from qwenedit.foreign import parse_json, shown
from qwenedit.latents import Grid

__all__ = ["Conditioning", "Prompt", "RowGroup"]

_FORMAT = "qwenedit conditioning 1"
_MOST = 100_000  # frames, rows or columns of a grid


@dataclass(frozen=True, eq=False)
class Prompt:
    """The embeddings of a batch of prompts.

    Shapes: `embeds` (B, T, D), right-padded with zeros; `mask` (B, T) bool, True at real tokens, or None
        without padding.

    >>> mask = torch.tensor([[True, True, False], [True, True, True]])
    >>> Prompt(torch.zeros(2, 3, 8), mask).rows(torch.tensor([1])).mask is None
    True
    """

    embeds: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3 or not self.embeds.numel() or not self.embeds.is_floating_point():
            raise ValueError(
                f"prompt embeddings have shape {tuple(self.embeds.shape)} and are {self.embeds.dtype}, "
                "wanted (B, T, D), floats"
            )
        if self.mask is not None and (
            self.mask.dtype != torch.bool or self.mask.shape != self.embeds.shape[:2]
        ):
            raise ValueError(
                f"prompt mask is {self.mask.dtype} {tuple(self.mask.shape)}, wanted bool "
                f"{tuple(self.embeds.shape[:2])}"
            )

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of real tokens of each row."""
        rows, length, _ = self.embeds.shape
        return (length,) * rows if self.mask is None else tuple(self.mask.sum(dim=1).tolist())

    def rows(self, index: Tensor) -> Prompt:
        """Some rows, in any order; a mask that is True everywhere is dropped."""
        mask = None if self.mask is None else self.mask[index]
        return Prompt(self.embeds[index], None if mask is None or mask.all() else mask)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows of a batch that share a token layout, ready for the transformer."""

    rows: list[int]
    index: Tensor  # the same numbers on the device: rows that are picked with a list are copied from the host
    grids: tuple[Grid, ...]  # of the target, then of each reference
    references: Tensor | None  # (B, tokens of all references, C)
    prompt: Prompt
    negative: Prompt | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Conditioning:
    """The prompts' embeddings, the reference latents, the grids, and their provenance.

    Attributes:
        prompt, negative: embeddings of B prompts and of their negative prompts (None: no guidance possible).
        target_grid: (1, rows, columns) of tokens of the picture to make. For Layered the frames are the whole
            picture and its layers.
        reference_latents: for each row, for each of its pictures, normalised packed latents (S_k, C).
        reference_grids: likewise, the grid of each.
        provenance: prompts, variant, version and switches as text. It is saved too; a run only compares the
            switches with its own.

    Raises:
        ValueError: parts that do not fit together.

    Two prompts for a target of 2x3 tokens, the first with a reference picture of 2x2:

    >>> conditioning = Conditioning(
    ...     prompt=Prompt(torch.zeros(2, 5, 8)),
    ...     negative=None,
    ...     target_grid=(1, 2, 3),
    ...     reference_latents=((torch.zeros(4, 64),), ()),
    ...     reference_grids=(((1, 2, 2),), ()),
    ... )
    >>> conditioning.batch, conditioning.repeat(3).batch
    (2, 6)
    >>> [(group.rows, group.grids) for group in conditioning.groups()]
    [([0], ((1, 2, 3), (1, 2, 2))), ([1], ((1, 2, 3),))]
    """

    prompt: Prompt
    negative: Prompt | None
    target_grid: Grid
    reference_latents: tuple[tuple[Tensor, ...], ...]
    reference_grids: tuple[tuple[Grid, ...], ...]
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch = self.prompt.embeds.shape[0]
        for what, count in (
            ("negative prompts", batch if self.negative is None else self.negative.embeds.shape[0]),
            ("rows of reference latents", len(self.reference_latents)),
            ("rows of reference grids", len(self.reference_grids)),
        ):
            if count != batch:
                raise ValueError(f"conditioning has {count} {what}, wanted {batch}, one for each prompt")
        widths = [one.embeds.shape[2] for one in (self.negative, self.prompt) if one is not None]
        if len(set(widths)) > 1:
            raise ValueError(f"negative prompts have width {widths[0]}, wanted {widths[1]}, the prompts'")
        _grid("target_grid", self.target_grid)
        every = [x for of_row in self.reference_latents for x in of_row]
        fit = all(x.ndim == 2 and x.is_floating_point() for x in every)
        if not fit or len({x.shape[1] for x in every}) > 1:
            kinds = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in every[:4])
            raise ValueError(f"reference latents are {kinds}, wanted floats (S, C), the same C for all")
        for row, (latents, grids) in enumerate(
            zip(self.reference_latents, self.reference_grids, strict=True)
        ):
            for grid in grids:
                _grid(f"a reference grid of row {row}", grid)
            got, wanted = [x.shape[0] for x in latents], [math.prod(grid) for grid in grids]
            if got != wanted:
                raise ValueError(
                    f"reference latents of row {row} have {got} tokens, wanted {wanted} for {grids}"
                )

    @property
    def batch(self) -> int:
        return self.prompt.embeds.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same conditioning on another device, or in another floating dtype."""

        def move(prompt: Prompt) -> Prompt:
            mask = None if prompt.mask is None else prompt.mask.to(device)
            return Prompt(prompt.embeds.to(device=device, dtype=dtype), mask)

        latents = tuple(
            tuple(x.to(device=device, dtype=dtype) for x in row) for row in self.reference_latents
        )
        negative = None if self.negative is None else move(self.negative)
        return dataclasses.replace(
            self, prompt=move(self.prompt), negative=negative, reference_latents=latents
        )

    def repeat(self, count: int) -> Conditioning:
        """Every row `count` times, prompt-major: p0, p0, p1, p1, ...

        The reference pipelines interleave embeddings like this, but tile masks and reference latents (p0, p1,
        p0, p1), which pairs a prompt with another prompt's mask and picture.
        """
        count = whole_number("count", count)
        if count == 1:
            return self
        index = torch.arange(self.batch).repeat_interleave(count)
        rows = index.tolist()
        return dataclasses.replace(
            self,
            prompt=self.prompt.rows(index),
            negative=None if self.negative is None else self.negative.rows(index),
            reference_latents=tuple(self.reference_latents[row] for row in rows),
            reference_grids=tuple(self.reference_grids[row] for row in rows),
        )

    def groups(self) -> Iterator[RowGroup]:
        """The rows grouped by token layout; usually the whole batch is one group."""
        by_layout: dict[tuple[Grid, ...], list[int]] = {}
        for row, grids in enumerate(self.reference_grids):
            by_layout.setdefault(grids, []).append(row)
        device = self.prompt.embeds.device
        for grids, rows in by_layout.items():
            # Usually no copy from the host, which waits for the device.
            alone = len(rows) == self.batch
            index = torch.arange(self.batch, device=device) if alone else torch.tensor(rows, device=device)
            references = None
            if grids:
                references = torch.stack([torch.cat(self.reference_latents[row]) for row in rows])
            yield RowGroup(
                rows=rows,
                index=index,
                grids=(self.target_grid, *grids),
                references=references,
                prompt=self.prompt.rows(index),
                negative=None if self.negative is None else self.negative.rows(index),
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {"prompt_embeds": self.prompt.embeds}
        if self.prompt.mask is not None:
            tensors["prompt_embeds_mask"] = self.prompt.mask
        if self.negative is not None:
            tensors["negative_prompt_embeds"] = self.negative.embeds
            if self.negative.mask is not None:
                tensors["negative_prompt_embeds_mask"] = self.negative.mask
        for row, latents in enumerate(self.reference_latents):
            for k, x in enumerate(latents):
                tensors[f"reference_latents.{row}.{k}"] = x
        metadata = {
            "format": _FORMAT,
            "target_grid": json.dumps(self.target_grid),
            "reference_grids": json.dumps(self.reference_grids),
            "provenance": json.dumps(self.provenance, ensure_ascii=False),
        }
        owned = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        with replacing_file(path) as temporary:
            safetensors.torch.save_file(owned, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Conditioning:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or not a conditioning.
        """
        tensors, metadata = read_tensors(path, "conditioning")
        if metadata.get("format") != _FORMAT:
            got = shown(repr(metadata.get("format")))
            raise ValueError(f"{shown(path)} has format {got}, wanted {_FORMAT!r}")
        try:
            return cls._from_tensors(tensors, metadata)
        except ValueError as error:
            raise ValueError(f"{shown(path)} is a broken conditioning: {error}") from error

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Conditioning:
        def prompt(name: str) -> Prompt:
            mask = left.pop(f"{name}_mask", None)
            made = Prompt(tensor(name), mask)
            if mask is not None and not (mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
                raise ValueError(f"{name}_mask has gaps, wanted True at each row's first tokens only")
            return made

        def tensor(name: str) -> Tensor:
            if name not in left:
                raise ValueError(f"there is no {name}")
            return left.pop(name)

        def field_of(name: str) -> Any:
            if name not in metadata:
                raise ValueError(f"its metadata lacks {name}")
            return parse_json(metadata[name], f"its {name}")

        left = dict(tensors)
        rows, provenance = field_of("reference_grids"), field_of("provenance")
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise ValueError(f"reference_grids is {shown(repr(rows))}, wanted a list of grids for each row")
        if not isinstance(provenance, dict) or not all(isinstance(one, str) for one in provenance.values()):
            raise ValueError(f"provenance is {shown(repr(provenance))}, wanted texts by name")
        grids = tuple(
            tuple(_grid(f"a reference grid of row {k}", grid) for grid in row) for k, row in enumerate(rows)
        )
        conditioning = cls(
            prompt=prompt("prompt_embeds"),
            negative=prompt("negative_prompt_embeds") if "negative_prompt_embeds" in left else None,
            target_grid=_grid("target_grid", field_of("target_grid")),
            reference_latents=tuple(
                tuple(tensor(f"reference_latents.{row}.{k}") for k in range(len(of_row)))
                for row, of_row in enumerate(grids)
            ),
            reference_grids=grids,
            provenance=provenance,
        )
        if left:
            raise ValueError(f"it has more tensors: {', '.join(sorted(left)[:4])}")
        return conditioning


def _grid(name: str, value: Any) -> Grid:
    """The value as a grid.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError(f"{name} is {shown(repr(value))}, wanted frames, rows and columns")
    frames, rows, columns = (whole_number(name, one, most=_MOST) for one in value)
    return frames, rows, columns
