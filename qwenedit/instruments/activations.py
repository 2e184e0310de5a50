"""Data sets of activations: the rows of token tensors, with where each was computed, in a folder of shards.

    recorder = Recorder(to=Path("acts"), tokens="target", dtype=torch.bfloat16, every=5, sample=64)
    with recorder, taps(pipe.mmdit, {"blocks.*.img_out": recorder}):
        with recorder.edit("red circle"):
            pipe.edit(picture, "make the circle red")

    data = Activations("acts").where(block=3, branch="cond")
    data[0].x, data[0].step, data[[5, 6, 7]].x          # (D,), a number, (3, D)

A shard is a safetensors file: at most `SHARD` bytes of activations, and a tensor for each other column of
`Rows`. Its metadata names the edits that end in it, the taps and the branches. Shards are memory-mapped when
read, and written whole or not at all. A run that is killed loses the shard that it was filling, and the rows
of an edit that did not end are never read.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qwenedit.files import FLOATS, TensorInfo, header_and_metadata, read_tensors
from qwenedit.foreign import parse_json, printable_name, shown

__all__ = ["COLUMNS", "FORMAT", "Activations", "Rows", "group_code", "shards_of"]

FORMAT = "qwenedit activations 1"
SHARD = 2**26  # bytes of activations in a shard
COLUMNS = {  # of every row, in the shard's tensors of the same names
    "edit": torch.int32, "step": torch.int16, "sigma": torch.float32, "branch": torch.uint8,
    "tap": torch.uint8, "block": torch.int16, "row": torch.int16, "group": torch.uint8,
    "position": torch.int32,
}  # fmt: skip
_NAMED = ("edit", "branch", "tap", "group")  # columns of numbers that stand for names


class Rows(NamedTuple):
    """Activations and where they were computed, as tensors: of one row without the first axis, of n with it.

    Attributes:
        x: (n, D), as stored. A tensor with more axes, as queries (B, S, H, K), has its last ones flattened.
        edit, branch, tap, group: numbers of names, which `Activations.names` lists. A tap's name has * in
            place of its block's number. Groups are 0 text, 1 target, 2 reference 1, 3 reference 2, ...
        step, block: -1 where there is none.
        sigma: of the step, 1 = noise; NaN without.
        row: of the batch.
        position: within the group, from 0: of a picture, row by row of its token grid.
    """

    x: Tensor
    edit: Tensor
    step: Tensor
    sigma: Tensor
    branch: Tensor
    tap: Tensor
    block: Tensor
    row: Tensor
    group: Tensor
    position: Tensor


class Activations(Dataset[Rows]):
    """A folder of activations as a torch data set of `Rows`, memory-mapped.

    `data[5]` is one row, `data[[5, 6]]` and `data[0:100]` several at once. For batches in random order:

        loader = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 4096, True))

    Raises:
        ValueError: no such folder, none in it, or a file that is no shard of the same data set.
        IndexError: a row that is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"no activations at {shown(folder)}: no such folder")
        paths = shards_of(self.folder)
        if not paths:
            raise ValueError(f"no activations at {shown(folder)}: no shard is finished")
        self._shards, self.names = _opened(paths)
        sizes = torch.tensor([len(shard.x) for shard in self._shards])
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        ended = torch.tensor(sorted(self.names["edit"]), dtype=torch.int32)
        whole = [torch.isin(shard.edit, ended) for shard in self._shards]
        every = all(bool(part.all()) for part in whole)
        self._chosen = None if every else torch.cat(whole).nonzero().flatten()  # in ascending order

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __repr__(self) -> str:
        names = {name: [shown(one) for one in self.names[name].values()] for name in ("tap", "branch")}
        return (
            f"{type(self).__name__}: {len(self):,} rows of {self.width} ({self.dtype}) in "
            f"{shown(self.folder)}\n  {len(self.names['edit']):,} edits, {len(self._shards)} shards\n  taps: "
            f"{', '.join(names['tap'])}\n  branches: {', '.join(names['branch'])}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers of a `DataLoader` open the files again: the tensors are not sent to them."""
        return _again, (self.folder, self._chosen)

    @property
    def width(self) -> int:
        """D."""
        return self._shards[0].x.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._shards[0].x.dtype

    @property
    def next_edit(self) -> int:
        """A number that no edit has, nor one that did not end."""
        last = [int(shard.edit.max()) for shard in self._shards if len(shard.x)]
        return 1 + max([-1, *self.names["edit"], *last])

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Rows:
        size = len(self)
        if isinstance(index, slice):
            index = torch.arange(*index.indices(size))
        places = torch.as_tensor(index, dtype=torch.int64)
        places = torch.where(places < 0, places + size, places)
        if places.ndim > 1 or bool(((places < 0) | (places >= size)).any()):
            raise IndexError(f"row {shown(index)} of {size}")
        places = places if self._chosen is None else self._chosen[places]
        of_shard = torch.searchsorted(self._starts, places, right=True) - 1
        if places.ndim == 0:
            shard, place = int(of_shard), int(places - self._starts[of_shard])
            return Rows(*(column[place] for column in self._shards[shard]))
        found = Rows(*(column.new_empty((len(places), *column.shape[1:])) for column in self._shards[0]))
        for number in of_shard.unique().tolist():
            here = (of_shard == number).nonzero().flatten()
            local = places[here] - self._starts[number]
            for column, stored in zip(found, self._shards[number], strict=True):
                column[here] = stored[local]
        return found

    def where(self, **wanted: Any) -> Activations:
        """The rows of these values of the columns; no activation is read.

        A value is a number, a name for `edit`, `branch`, `tap` and `group` ("reference" stands for all
        references), a collection of these, or a function of the column that returns a tensor of bools:

            data.where(block=range(2, 5), group="target", sigma=lambda sigma: sigma > 0.5)

        Raises:
            ValueError: no such column, or no such name.
        """
        tests = {column: self._test(column, value) for column, value in wanted.items()}
        kept = []
        for number, rows in self._by_shard():
            shard, keep = self._shards[number], torch.ones(len(rows), dtype=torch.bool)
            for column, test in tests.items():
                keep &= test(getattr(shard, column)[rows])
            kept.append(rows[keep] + self._starts[number])
        chosen = copy.copy(self)
        chosen._chosen = torch.cat(kept)
        return chosen

    def shards(self) -> Iterator[Rows]:
        """The rows, a shard at a time; those of a shard that is wanted whole are memory-mapped."""
        for number, rows in self._by_shard():
            shard = self._shards[number]
            if len(rows) == len(shard.x):
                yield shard
            elif len(rows):
                yield Rows(*(column[rows] for column in shard))

    def _by_shard(self) -> Iterator[tuple[int, Tensor]]:
        """The number of each shard, and its chosen rows."""
        for number, (start, stop) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            if self._chosen is None:
                yield number, torch.arange(int(stop - start))
            else:
                first, last = torch.searchsorted(self._chosen, torch.stack([start, stop])).tolist()
                yield number, self._chosen[first:last] - start

    def _test(self, column: str, value: Any) -> Callable[[Tensor], Tensor]:
        if column not in COLUMNS:
            raise ValueError(f"no column is called {shown(column)!r}, wanted one of {', '.join(COLUMNS)}")
        if callable(value):
            test: Callable[[Tensor], Tensor] = value
            return test
        values = [value] if isinstance(value, str) or not isinstance(value, Collection) else list(value)
        codes = torch.tensor([code for one in values for code in self._codes(column, one)])
        return lambda stored: torch.isin(stored.to(torch.float64), codes.to(torch.float64))

    def _codes(self, column: str, value: Any) -> list[float]:
        if not isinstance(value, str):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{column} is {shown(repr(value))}, wanted a number, a name, or several")
            return [value]
        if column not in _NAMED:
            raise ValueError(f"{column} is {shown(repr(value))}, wanted a number")
        known = self.names[column]
        found = [
            code for code, name in known.items()
            if name == value or (column == "group" and value == "reference" and code > 1)
        ]  # fmt: skip
        if not found:
            some = ", ".join(shown(name) for name in list(known.values())[:8])
            raise ValueError(f"no {column} is {shown(value)!r}, wanted one of {some or 'none'}")
        return list(found)


def _again(folder: Path, chosen: Tensor | None) -> Activations:
    data = Activations(folder)
    data._chosen = chosen
    return data


def shards_of(folder: Path) -> list[Path]:
    """The finished shards of a folder, in order."""
    return sorted(folder.glob("activations-*.safetensors"))


def group_code(name: str) -> int:
    """The number of a group of tokens.

    >>> [group_code(name) for name in ("text", "target", "reference 1", "reference 2")]
    [0, 1, 2, 3]
    """
    return ("text", "target").index(name) if name in ("text", "target") else 1 + int(name.split()[1])


def _group_name(code: int) -> str:
    return ("text", "target")[code] if code < 2 else f"reference {code - 1}"


def _opened(paths: Sequence[Path]) -> tuple[list[Rows], dict[str, dict[int, str]]]:
    """The shards' tensors, and the names that their numbers stand for.

    Raises:
        ValueError: a file that is no shard, or shards that do not belong together.
    """
    shards: list[Rows] = []
    edits: dict[int, str] = {}
    groups: set[int] = set()
    named: dict[str, list[str]] = {"tap": [], "branch": []}
    for path in paths:
        header, metadata = header_and_metadata(path)
        _require_shard(path, header, metadata)
        tensors, _ = read_tensors(path, "shard")
        shard = Rows(*(tensors[name] for name in Rows._fields))
        if shards and (shard.x.dtype, shard.x.shape[1]) != (shards[0].x.dtype, shards[0].x.shape[1]):
            raise ValueError(
                f"{shown(path)} has rows of {shard.x.shape[1]} ({shard.x.dtype}), wanted "
                f"{shards[0].x.shape[1]} ({shards[0].x.dtype}), as the shards before it"
            )
        for column, known in named.items():
            given = _texts(path, metadata, column)
            if given[: len(known)] != known:
                raise ValueError(f"{shown(path)} is of another data set: its {column}s are {shown(given)}")
            known += given[len(known) :]
            if len(shard.x) and int(getattr(shard, column).max()) >= len(known):
                raise ValueError(f"{shown(path)} has a {column} without a name")
        edits |= _edits(path, metadata)
        groups |= set(shard.group.unique().tolist())
        shards.append(shard)
    names = {column: dict(enumerate(known)) for column, known in named.items()}
    return shards, {"edit": edits, **names, "group": {code: _group_name(code) for code in sorted(groups)}}


def _require_shard(path: Path, header: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        got = shown(repr(metadata.get("format")))
        raise ValueError(f"{shown(path)} has format {got}, wanted {FORMAT!r}")
    if set(header) != set(Rows._fields):
        raise ValueError(f"{shown(path)} holds {shown(sorted(header))}, wanted {', '.join(Rows._fields)}")
    x = header["x"]
    if x.dtype not in FLOATS or len(x.shape) != 2:
        raise ValueError(f"{shown(path)}: x is {x.dtype} {x.shape}, wanted rows of floats")
    for name, dtype in COLUMNS.items():
        info = header[name]
        if info.dtype != dtype or info.shape != x.shape[:1]:
            raise ValueError(
                f"{shown(path)}: {name} is {info.dtype} {info.shape}, wanted {dtype} {x.shape[:1]}"
            )


def _texts(path: Path, metadata: dict[str, str], name: str) -> list[str]:
    what = f"{shown(path)}: its list of {name}"
    values = parse_json(metadata.get(name, ""), what)
    if not isinstance(values, list):
        raise ValueError(f"{what} is {shown(values)}, wanted names")
    return [printable_name(value, what) for value in values]


def _edits(path: Path, metadata: dict[str, str]) -> dict[int, str]:
    what = f"{shown(path)}: its edits"
    values = parse_json(metadata.get("edit", ""), what)
    if not isinstance(values, dict) or not all(re.fullmatch(r"\d{1,10}", number) for number in values):
        raise ValueError(f"{what} are {shown(values)}, wanted names by number")
    return {int(number): printable_name(name, what) for number, name in values.items()}
