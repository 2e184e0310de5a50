"""Instruments on top of the taps: record and replay tensors, share them in the batch, attention maps.

    recorder = Recorder(steps=[0, 5], branch="cond")
    with taps(pipe.mmdit, {"blocks.*.img_out": recorder}):
        pipe.edit(picture, "make the circle red")
    recorder["blocks.3.img_out", 5]

    maps = AttentionMaps(rows="target", columns="reference 1", blocks=[3])
    with maps.attached(pipe.mmdit):
        pipe.edit(picture, "make the circle red")
    maps["blocks.3.attn", 5, "cond"]

Functions on one tap run outer context first: attach an instrument innermost to see what others have replaced.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwenedit.conditioning import replacing_file
from qwenedit.latents import Layout
from qwenedit.mmdit import joint_key_mask
from qwenedit.taps import Site, TapFunction, current_labels, taps

__all__ = [
    "AttentionMaps", "Key", "Recorder", "Records", "attention_map", "patch_from", "share_from",
    "token_groups", "zero",
]  # fmt: skip

CHUNK = 2**26  # elements of the attention scores that exist at once while a map is made
_FORMAT = "qwenedit record 1"


class Key(NamedTuple):
    """Where a record was made: the tap's full name and the labels in force, None where there was none.

    `rows` are the rows of the batch that ran together, `heads` the first and last + 1 of a part of the heads
    (`taps.by_heads`), `call` counts from 0 where the rest repeats, as in a second edit.
    """

    name: str
    step: int | None = None
    branch: str | None = None
    rows: tuple[int, ...] | None = None
    heads: tuple[int, int] | None = None
    call: int = 0


class Records(Mapping[Key, Tensor]):
    """Tensors by where they were seen, in that order.

    A key may be cut short where what is left out is not needed to tell records apart: `records[name]`,
    `records[name, step]`, `records[name, step, branch]`, `records[name, step, branch, rows]`.

    Raises:
        KeyError: no record, or several, under a key; what there is instead is listed.
    """

    def __init__(self) -> None:
        self._records: dict[Key, Tensor | Path] = {}
        self._named: dict[str, list[Key]] = {}
        self._calls: Counter[Key] = Counter()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Records:
        """What a `Recorder(to=folder)` has written; tensors are read when they are asked for.

        Raises:
            ValueError: no such folder, or a file in it is no record.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"no records at {folder}: no such folder")
        records = Records()
        for path in sorted(Path(folder).glob("[!.]*.safetensors")):
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} has format {metadata.get('format')!r}, wanted {_FORMAT!r}")
            parts = json.loads(metadata["key"])
            records._add(Key._make(tuple(x) if isinstance(x, list) else x for x in parts), path)
        return records

    def __iter__(self) -> Iterator[Key]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        record = self._records[self._find(key)]
        if isinstance(record, Tensor):
            return record
        with safetensors.safe_open(record, framework="pt") as file:
            return next(file.get_tensor(name) for name in file.keys())

    def _find(self, key: str | tuple[Any, ...]) -> Key:
        whole: tuple[Any, ...] = (key,) if isinstance(key, str) else key
        parts = tuple(tuple(x) if isinstance(x, list) else x for x in whole)
        name = str(parts[0]) if parts else ""
        named = self._named.get(name, [])
        found = [one for one in named if one[: len(parts)] == parts]
        if len(found) == 1:
            return found[0]
        if found:
            raise KeyError(f"{len(found)} records match {key!r}, say which: {_listed(found)}")
        if named:
            raise KeyError(f"{key!r} was not recorded; of that name there are {_listed(named)}")
        close = difflib.get_close_matches(name, self._named, n=5, cutoff=0.4)
        raise KeyError(
            f"{key!r} was not recorded; "
            + (f"close names: {', '.join(close)}" if close else f"there are {len(self._named)} other names")
        )

    def _add(self, key: Key, record: Tensor | Path) -> None:
        self._records[key] = record
        self._named.setdefault(key.name, []).append(key)

    def _next(self, name: str) -> Key:
        key = _key(name)
        self._calls[key] += 1
        return key._replace(call=self._calls[key] - 1)


def _key(name: str) -> Key:
    labels = current_labels()
    rows, heads = labels.get("rows"), labels.get("heads")
    return Key(
        name,
        labels.get("step"),
        labels.get("branch"),
        None if rows is None else tuple(rows),
        None if heads is None else (heads.start, heads.stop),
    )


def _listed(keys: Sequence[Key]) -> str:
    return ", ".join(str(tuple(key)) for key in keys[:6]) + (", ..." if len(keys) > 6 else "")


@dataclass(frozen=True)
class _Wanted:
    """Which firings are wanted, by the labels in force; None wants all."""

    steps: Collection[int] | None
    branch: str | None
    where: Callable[[Site], bool] | None = None

    def __call__(self, site: Site) -> bool:
        labels = site.labels
        for name, filtered in (("step", self.steps), ("branch", self.branch)):
            if filtered is not None and name not in labels:
                raise ValueError(f"tap {site.full}: a {name} is wanted, but no label {name!r} is in force")
        if self.steps is not None and labels["step"] not in self.steps:
            return False
        if self.branch is not None and labels["branch"] != self.branch:
            return False
        return self.where is None or self.where(site)


class Recorder(Records):
    """A tap function that keeps what it sees.

    Args:
        where: predicate on the `Site` (module, names, labels).
        steps, branch: the same for the labels that are asked for most.
        to: the device for the copies, the CPU by default; or, as a `Path`, a folder for files.
        detach: False keeps the very tensors of the graph where they are, neither copied nor detached, so that
            gradients flow from them, and to them (`torch.autograd.grad(loss, recorder[...])`). Such a tensor
            changes if anybody changes it in place.

    A folder is given one safetensors file a record, numbered in their order, each whole or not at all: a run
    that is killed leaves all that it has recorded. `Records.load` reads it.

    Raises:
        ValueError: `to` is no device; the folder has something in it, or cannot be made or written; `to` with
            detach=False; while recording, `steps` or `branch` where no such label is in force.
    """

    def __init__(
        self,
        *,
        where: Callable[[Site], bool] | None = None,
        steps: Collection[int] | None = None,
        branch: str | None = None,
        to: torch.device | str | Path | None = None,
        detach: bool = True,
    ) -> None:
        super().__init__()
        if to is not None and not detach:
            raise ValueError(
                f"to is {to!r} with detach=False, wanted None: the graph's tensors stay where they are"
            )
        self._wanted = _Wanted(steps, branch, where)
        self._detach = detach
        self._folder = _new_folder(to) if isinstance(to, Path) else None
        try:
            self._device = torch.device("cpu" if to is None or isinstance(to, Path) else to)
        except RuntimeError:
            raise ValueError(f"to is {to!r}, which is no device; for a folder pass Path({to!r})") from None

    def __call__(self, x: Tensor, site: Site) -> None:
        if not self._wanted(site):
            return
        key = self._next(site.full)
        if not self._detach:
            self._add(key, x)
        elif self._folder is None:
            self._add(key, x.detach().to(self._device, copy=True))
        else:
            path = self._folder / f"{len(self):06d}-{site.full}.safetensors"
            metadata = {"format": _FORMAT, "key": json.dumps(key)}
            with replacing_file(path) as temporary:
                safetensors.torch.save_file({site.full: x.detach().cpu().contiguous()}, temporary, metadata)
            self._add(key, path)


def _new_folder(folder: Path) -> Path:
    try:
        folder.mkdir(exist_ok=True)
        filled = any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot record to {folder}: {error.strerror or error}") from error
    if filled:
        raise ValueError(f"cannot record to {folder}: it is not empty, and a recording overwrites nothing")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot record to {folder}: no permission to write there")
    return folder


def zero(x: Tensor, site: Site) -> Tensor:  # noqa: ARG001
    """A tap function that puts zeros in the tensor's place."""
    return torch.zeros_like(x)


def patch_from(records: Records) -> TapFunction:
    """A tap function that puts there what was recorded at the same tap, step, branch and rows.

    Raises:
        KeyError: while running, there is no such record, or several (two edits in one recording).
    """

    def patch(x: Tensor, site: Site) -> Tensor:
        return records[_key(site.full)[:-1]].to(x.device, copy=True)

    return patch


def share_from(row: int = 0) -> TapFunction:
    """A tap function that gives every row of the batch what `row` has, as Stable Flow (arXiv 2411.14430) does
    with keys and values.

    Raises:
        ValueError: while running, the row is not among those that run together, or the tensor's first axis is
            not the batch (`temb` with zero_cond_t).
    """

    def share(x: Tensor, site: Site) -> Tensor:
        rows = list(site.labels.get("rows", range(x.shape[0])))
        if row not in rows:
            raise ValueError(f"tap {site.full}: row {row} does not run here, wanted one of {rows}")
        if x.shape[0] != len(rows):
            raise ValueError(
                f"tap {site.full} has {x.shape[0]} rows, wanted {len(rows)}, one for each of {rows}"
            )
        return x[rows.index(row), None].expand_as(x).contiguous()

    return share


# ---- attention maps


def token_groups(layout: Layout) -> dict[str, slice]:
    """The groups of the joint sequence by name, in order: text, target, reference 1, reference 2, ..."""
    groups = {"text": slice(0, layout.text), "target": layout.in_joint(layout.target)}
    for number, tokens in enumerate(layout.references, 1):
        groups[f"reference {number}"] = layout.in_joint(tokens)
    return groups


def attention_map(
    q: Tensor,
    k: Tensor,
    rows: slice | Sequence[slice] = slice(None),
    columns: slice | Sequence[slice] = slice(None),
    *,
    txt_mask: Tensor | None = None,
    mean_heads: bool = False,
) -> Tensor:
    """A part of the attention probabilities, with denominators over all keys, or how much groups attend to
    groups.

    Args:
        q, k: queries and keys of the joint sequence [text, image], after RoPE.
        rows: a slice of the queries; or a list of them: the mean over the real tokens of each.
        columns: a slice of the keys; or a list of them: the sum over each.
        txt_mask: as the transformer was given it: padded text is no key.
        mean_heads: average over the heads.

    Shapes: `q`, `k` (B, J, H, K); `txt_mask` (B, T) bool. Returns (B, H, rows, columns) in at least float32,
        without H where `mean_heads`; a list of n counts n.
    Differentiable. Queries are taken some at a time, so that no more than `CHUNK` scores exist at once, also
        for the backward pass, which computes them again.
    """
    batch, keys, heads, dim = k.shape
    mask = None if txt_mask is None else joint_key_mask(txt_mask, keys - txt_mask.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    k_t = k.to(wide).permute(0, 2, 3, 1)  # B H K J
    at_once = max(1, CHUNK // (batch * heads * keys))

    def part(queries: Tensor, weights: Tensor | None = None) -> Tensor:
        scores = queries.to(wide).transpose(1, 2) @ k_t * dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        if isinstance(columns, slice):
            probs = probs[..., columns]
        else:
            probs = torch.stack([probs[..., tokens].sum(-1) for tokens in columns], dim=-1)
        if weights is not None:
            probs = (probs * weights[:, None, :, None]).sum(-2, keepdim=True)
        return probs.mean(1) if mean_heads else probs

    def lean(queries: Tensor, weights: Tensor | None = None) -> Tensor:
        return checkpoint(part, queries, weights, use_reentrant=False, preserve_rng_state=False)

    if isinstance(rows, slice):
        return torch.cat([lean(chunk) for chunk in q[:, rows].split(at_once, dim=1)], dim=-2)
    means = []
    for tokens in rows:
        chosen = q[:, tokens]
        real = torch.ones(chosen.shape[:2], dtype=wide, device=q.device)
        if mask is not None:  # padding counts in no mean
            real = real * mask[:, 0, 0, tokens]
        weights = (real / real.sum(-1, keepdim=True)).split(at_once, dim=1)
        sums = [lean(*pair) for pair in zip(chosen.split(at_once, dim=1), weights, strict=True)]
        means.append(torch.stack(sums).sum(0))
    return torch.cat(means, dim=-2)


_PARTS = ("img_q_rot", "img_k_rot", "txt_q_rot", "txt_k_rot")


class AttentionMaps(Records):
    """Attention maps of the transformer's blocks while it runs, as records under `blocks.3.attn`.

    Args:
        rows, columns: "all", or a group of tokens ("text", "target", "reference 1", ...); or a list of
            groups: rows are then averaged and columns summed over each, so that rows=["target"] and
            columns=["text", "target", "reference 1"] tell how much the target attends to each.
        blocks, steps, branch: which; all of them by default.
        mean_heads: average over the heads.
        detach: False lets gradients flow through the maps and keeps them on their device; otherwise they are
            kept on the CPU.

    Shapes: as of `attention_map`.
    Raises:
        ValueError: while running, a group that the layout has not, or labels `layout` and `txt_mask` not in
            force: the sampler declares them, and who calls the transformer by hand does it with `scope`.

    The fused attention stays as it is: maps are computed beside it, from the queries and keys.
    """

    def __init__(
        self,
        rows: str | Sequence[str] = "target",
        columns: str | Sequence[str] = "all",
        *,
        blocks: Collection[int] | None = None,
        steps: Collection[int] | None = None,
        branch: str | None = None,
        mean_heads: bool = False,
        detach: bool = True,
    ) -> None:
        super().__init__()
        self._rows, self._columns = rows, columns
        self._blocks = blocks
        self._wanted = _Wanted(steps, branch)
        self._mean_heads = mean_heads
        self._detach = detach
        self._parts: dict[str, Tensor] = {}  # of the one attention that is running

    @contextmanager
    def attached(self, mmdit: nn.Module) -> Iterator[AttentionMaps]:
        """Collect for the length of a `with` block."""
        blocks = ["*"] if self._blocks is None else self._blocks
        try:
            with taps(mmdit, {f"blocks.{n}.attn.{part}": self._collect for n in blocks for part in _PARTS}):
                yield self
        finally:
            self._parts.clear()

    def _collect(self, x: Tensor, site: Site) -> None:
        if not self._wanted(site):
            return
        self._parts[site.name] = x
        if site.name != _PARTS[-1]:
            return
        parts, self._parts = self._parts, {}
        labels = site.labels
        if missing := {"layout", "txt_mask"} - labels.keys():
            raise ValueError(
                f"tap {site.full}: no label {' or '.join(sorted(missing))} is in force, wanted "
                "scope(layout=Layout(...), txt_mask=a mask or None)"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detach):
            value = attention_map(
                torch.cat([parts["txt_q_rot"], parts["img_q_rot"]], dim=1),
                torch.cat([parts["txt_k_rot"], parts["img_k_rot"]], dim=1),
                _resolve(self._rows, labels["layout"]),
                _resolve(self._columns, labels["layout"]),
                txt_mask=labels["txt_mask"],
                mean_heads=self._mean_heads,
            )
        self._add(self._next(site.full.rpartition(".")[0]), value.cpu() if self._detach else value)


def _resolve(names: str | Sequence[str], layout: Layout) -> slice | list[slice]:
    groups = {**token_groups(layout), "all": slice(None)}
    for name in [names] if isinstance(names, str) else names:
        if name not in groups:
            raise ValueError(f"no group of tokens is {name!r}, wanted one of {', '.join(groups)}")
    return groups[names] if isinstance(names, str) else [groups[name] for name in names]
