"""Rows of token tensors into the shards of a data set of activations (activations.py), as they are computed.

A forward's rows are copied into a buffer of a shard's size, so that memory stays the same however long a run
is. A full buffer becomes a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from qwenedit.checks import whole_number
from qwenedit.files import remove_leftovers, replacing_file
from qwenedit.foreign import printable_name, shown
from qwenedit.instruments import activations
from qwenedit.instruments.activations import COLUMNS, FORMAT, Activations, group_code, shards_of
from qwenedit.instruments.groups import in_group, require_tokens, stream_groups, stream_of
from qwenedit.shards import only_one
from qwenedit.switches import own_generator
from qwenedit.taps import Site

__all__ = ["ActivationWriter"]


class _Chosen(NamedTuple):
    """The tokens that are kept of a stream in one forward: their places in (B S), and their columns."""

    places: Tensor
    row: Tensor
    group: Tensor
    position: Tensor


class ActivationWriter:
    """The rows that a `Recorder(to=folder, tokens=...)` keeps, into its folder.

    Args:
        tokens: "all", a group, or places in the tensor.
        dtype: of the rows; None: the folder's, or that of the first tensor.
        sample: how many of the tokens to draw, for each forward and row of the batch; None: all. The draw
            depends on the edit's name, step, branch and row, so that all blocks have the same tokens.

    Raises:
        ValueError: bad arguments, or a folder with activations that these cannot be added to.
    """

    def __init__(
        self, folder: Path, tokens: str | Sequence[int], dtype: torch.dtype | None, sample: int | None
    ) -> None:
        require_tokens(None if tokens == "all" else tokens)
        if not len(tokens):
            raise ValueError(f"tokens is {tokens!r}, wanted at least one place")
        self._folder, self._tokens, self._dtype = folder, tokens, dtype
        self._sample = None if sample is None else whole_number("sample", sample)
        self._edit: tuple[int, str] | None = None  # that runs
        self._choices: dict[tuple[Any, ...], _Chosen] = {}  # of the edit
        self._look()

    def __str__(self) -> str:
        edits = f"{len(self.edits):,} edits, {'open' if self._open else 'not open'}"
        return f"a data set in {shown(self._folder)}, tokens {shown(self._tokens)}: {edits}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Write into the folder for the length of a `with` block; at its end, the last shard."""
        with only_one(self._folder, "recording") as alone:
            if alone:
                remove_leftovers(self._folder)  # of a run that was killed
            self._look()
            self._open = True
            try:
                yield
            finally:
                self._open = False
                if self._count or self._ended:
                    self._write()

    def _look(self) -> None:
        """Note what the folder has already; nothing new is there yet."""
        self._open = False
        self._buffer: dict[str, Tensor] | None = None
        self._count = self._start = 0  # rows in the buffer, and where those of the running edit begin
        self._ended: dict[int, str] = {}  # edits since the last shard
        self.edits: dict[str, int] = {}  # those that have ended
        self._names: dict[str, list[str]] = {"tap": [], "branch": []}
        self._number = self._next_edit = 0
        self._width: int | None = None
        if paths := shards_of(self._folder):
            data = Activations(self._folder)
            if self._dtype not in (None, data.dtype):
                raise ValueError(
                    f"dtype is {self._dtype}, but the rows in {shown(self._folder)} are {data.dtype}"
                )
            self._dtype, self._width = data.dtype, data.width
            self.edits = {name: number for number, name in data.names["edit"].items()}
            self._names = {column: list(data.names[column].values()) for column in self._names}
            self._number = 1 + int(paths[-1].stem.partition("-")[2])
            self._next_edit = data.next_edit

    @contextmanager
    def edit(self, name: str) -> Iterator[None]:
        """The rows that are recorded in the block are of this edit; if it raises, they are dropped."""
        printable_name(name, "the edit's name")
        if not self._open:
            raise ValueError(f"edit {name!r}: the recorder is not open, wanted `with recorder:` around it")
        if self._edit is not None:
            raise ValueError(f"edit {name!r} begins inside of {self._edit[1]!r}, wanted one after the other")
        if name in self.edits:
            raise ValueError(
                f"edit {name!r} is recorded already, wanted a name that is not in recorder.edits"
            )
        number = self._next_edit
        self._next_edit, self._start, self._edit = number + 1, self._count, (number, name)
        self._choices = {}
        try:
            yield
        except BaseException:
            self._count = self._start
            raise
        finally:
            self._edit = None
        self.edits[name] = number
        self._ended[number] = name

    def check(self, site: Site) -> None:
        """Raise a ValueError for a tap without tokens of the kind that is wanted."""
        stream = stream_of(site.full)
        of = {"text": ("txt",), "all": ("txt", "img")}.get(str(self._tokens), ("img",))
        if stream not in (of if isinstance(self._tokens, str) else ("txt", "img")):
            what = {"txt": "text tokens", "img": "image tokens", None: "no tokens of a stream"}[stream]
            raise ValueError(f"tap {site.full} has {what}, but tokens is {self._tokens!r}")

    def add(self, x: Tensor, site: Site) -> None:
        """Append the tokens of one tensor (B, S, ...) that are wanted."""
        if self._edit is None:
            raise ValueError(f"tap {site.full}: no edit runs, wanted `with recorder.edit(name):` around it")
        labels = site.labels
        if x.ndim < 3 or "heads" in labels:
            raise ValueError(f"tap {site.full} has shape {tuple(x.shape)}, wanted tokens (B, S, ...)")
        chosen = self._choice(x, site)
        picked = x.detach().flatten(0, 1).flatten(1).index_select(0, chosen.places.to(x.device))
        width = picked.shape[1]
        if self._width not in (None, width):
            raise ValueError(
                f"tap {site.full} is {width} wide, but the rows before it are {self._width}: wanted a "
                "folder for each width"
            )
        self._width, self._dtype = width, self._dtype or x.dtype
        found = re.search(r"(?:^|\.)blocks\.(\d+)(?=\.)", site.full)
        tap = site.full if found is None else f"{site.full[: found.start(1)]}*{site.full[found.end(1) :]}"
        columns = {
            "edit": self._edit[0], "step": labels.get("step", -1), "sigma": labels.get("sigma", math.nan),
            "branch": self._code("branch", labels.get("branch", "none")), "tap": self._code("tap", tap),
            "block": -1 if found is None else int(found[1]),
            "row": chosen.row, "group": chosen.group, "position": chosen.position,
        }  # fmt: skip
        self._append({"x": picked.to("cpu", self._dtype), **columns}, len(picked))

    def _code(self, column: str, name: str) -> int:
        names = self._names[column]
        if name not in names:
            if len(names) > torch.iinfo(COLUMNS[column]).max:
                raise ValueError(
                    f"{column} {name!r} is one too many, wanted at most {len(names)} in a folder"
                )
            names.append(name)
        return names.index(name)

    def _append(self, rows: dict[str, Any], total: int) -> None:
        """Copy rows into the buffer, by column, a number for all of them or a tensor; write it where full."""
        if self._buffer is None:
            width, dtype = rows["x"].shape[1], rows["x"].dtype
            most = max(1, activations.SHARD // (width * dtype.itemsize))
            columns = {name: torch.empty(most, dtype=kind) for name, kind in COLUMNS.items()}
            self._buffer = {"x": torch.empty(most, width, dtype=dtype), **columns}
        most, done = len(self._buffer["x"]), 0
        while done < total:
            if self._count == most:
                self._write()
            fitting = min(total - done, most - self._count)
            for name, column in self._buffer.items():
                value = rows[name]
                part = value[done : done + fitting] if isinstance(value, Tensor) else value
                column[self._count : self._count + fitting] = part
            self._count, done = self._count + fitting, done + fitting

    def _write(self) -> None:
        """The buffer as a shard; it is empty afterwards."""
        if self._buffer is None:  # edits without rows, into a folder whose width is not known
            return
        tensors = {name: column[: self._count] for name, column in self._buffer.items()}
        named = {"edit": self._ended, **self._names}
        metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in named.items()}}
        with replacing_file(self._folder / f"activations-{self._number:06d}.safetensors") as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata)
        self._number, self._count, self._start, self._ended = self._number + 1, 0, 0, {}

    def _choice(self, x: Tensor, site: Site) -> _Chosen:
        """The wanted tokens; all taps of a stream in a forward have the same."""
        labels, (batch, size) = site.labels, x.shape[:2]
        rows, lengths = tuple(labels.get("rows", range(batch))), tuple(labels.get("text_lengths") or ())
        stream = stream_of(site.full), batch, size, rows, lengths, labels.get("layout")
        if stream not in self._choices:
            self._choices[stream] = self._every(x, site, rows, lengths)
        if self._sample is None:
            return self._choices[stream]
        forward = *stream, labels.get("step"), labels.get("branch")
        if forward not in self._choices:
            self._choices[forward] = self._drawn(self._choices[stream], rows, *forward[-2:])
        return self._choices[forward]

    def _every(self, x: Tensor, site: Site, rows: tuple[int, ...], lengths: tuple[int, ...]) -> _Chosen:
        """All tokens of the wanted groups, without padding."""
        groups, (batch, size) = stream_groups(site), x.shape[:2]
        if len(rows) != batch or max((one.stop for one in groups.values()), default=0) != size:
            raise ValueError(
                f"tap {site.full} has shape {tuple(x.shape)}, wanted tokens of a stream (B, S, ...)"
            )
        group, position = torch.zeros(2, size, dtype=torch.int64)
        for name, places in groups.items():
            group[places] = group_code(name)
            position[places] = torch.arange(places.stop - places.start)
        wanted = self._wanted(groups, size, site)
        padded = "text" in groups and lengths
        kept = [wanted[wanted < lengths[k]] if padded else wanted for k in range(batch)]
        of_rows = [torch.full_like(own, row) for row, own in zip(rows, kept, strict=True)]
        places_of_all = torch.cat([k * size + own for k, own in enumerate(kept)])
        return _Chosen(places_of_all, torch.cat(of_rows), group[torch.cat(kept)], position[torch.cat(kept)])

    def _wanted(self, groups: dict[str, slice], size: int, site: Site) -> Tensor:
        """The wanted places of a stream of `size` tokens, in ascending order."""
        every = torch.arange(size)
        if not isinstance(self._tokens, str):
            if outside := [place for place in self._tokens if place >= size]:
                raise ValueError(f"tap {site.full} has {size} places, but tokens has {outside[0]}")
            return every[sorted(set(self._tokens))]
        names = [name for name in groups if self._tokens == "all" or in_group(name, self._tokens)]
        if not names:
            raise ValueError(f"tap {site.full} has {', '.join(groups)}, but tokens is {self._tokens!r}")
        return torch.cat([every[groups[name]] for name in names])

    def _drawn(self, every: _Chosen, rows: tuple[int, ...], step: object, branch: object) -> _Chosen:
        """`sample` of the tokens of each row, in order."""
        assert self._edit is not None and self._sample is not None
        kept = []
        for row in rows:
            own = (every.row == row).nonzero().flatten()
            generator = own_generator(0, "activations", self._edit[1], step, branch, row)
            kept.append(own[torch.randperm(len(own), generator=generator)[: self._sample].sort().values])
        return _Chosen(*(column[torch.cat(kept)] for column in every))
