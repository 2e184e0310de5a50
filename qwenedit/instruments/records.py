"""Recorded tensors, by tap, step and branch.

    recorder = Recorder(steps=[0, 5], branch="cond")
    with taps(pipe.mmdit, {"blocks.*.img_out": recorder}):
        pipe.edit(picture, "make the circle red")
    recorder["blocks.3.img_out", 5]

Many edits become a data set of rows (activations.py) in a folder:

    recorder = Recorder(to=Path("acts"), tokens="target", dtype=torch.bfloat16, every=5, sample=64)
    with recorder, taps(pipe.mmdit, {"blocks.*.img_out": recorder}):
        with recorder.edit("red circle"):
            pipe.edit(picture, "make the circle red")

Functions on one tap run outer context first: attach a recorder innermost to see the others' replacements.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from qwenedit.checks import dtype_of, require_numbers, whole_number
from qwenedit.files import header_and_metadata, read_tensors, replacing_file
from qwenedit.foreign import parse_json, shown
from qwenedit.instruments.activation_writer import ActivationWriter
from qwenedit.instruments.activations import shards_of
from qwenedit.taps import Site, current_labels, scope

__all__ = ["Key", "Recorder", "Records", "Wanted", "key_of"]

_FORMAT = "qwenedit record 1"


class Key(NamedTuple):
    """Where a record was made: the tap's full name and the labels in force (None: no such label).

    `rows` are the rows of the batch that ran together, `heads` is (start, stop) of a part of the heads
    (`mmdit_layers.by_heads`), and `call` counts from 0 if the rest repeats, as in a second edit. `control` is
    the number of the control whose net ran; None for the other networks.
    """

    name: str
    step: int | None = None
    branch: str | None = None
    rows: tuple[int, ...] | None = None
    heads: tuple[int, int] | None = None
    call: int = 0
    control: int | None = None


class Records(Mapping[Key, Tensor]):
    """Tensors by `Key`, in the order in which they were recorded.

    A key may be cut short as long as it is unambiguous: `records[name]`, `records[name, step]`,
    `records[name, step, branch]`, `records[name, step, branch, rows]`, and so on; `of` lists whole ones.

    Raises:
        KeyError: no record, or several, under a key; the message lists those that come close.
    """

    def __init__(self) -> None:
        self._records: dict[Key, Tensor | Path] = {}
        self._named: dict[str, list[Key]] = {}
        self._calls: Counter[Key] = Counter()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Records:
        """The records that a `Recorder(to=folder)` has written; tensors are read lazily.

        Raises:
            ValueError: no such folder, or a file in it is no record.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"no records at {folder}: no such folder")
        records = Records()
        for path in sorted(Path(folder).glob("[!.]*.safetensors")):
            key = _stored_key(path)
            if key in records:
                raise ValueError(f"{shown(path)} is a record of {shown(tuple(key))}, and so is another file")
            records._add(key, path)
        return records

    def __repr__(self) -> str:
        """How many records there are, of which taps, steps and branches, and what they take of memory."""
        if not self._records:
            return f"{type(self).__name__}: no records"
        names = list(self._named)
        held = [x for x in self._records.values() if isinstance(x, Tensor)]
        size = sum(x.numel() * x.element_size() for x in held) / 2**20
        files = len(self._records) - len(held)
        lines = [
            f"{type(self).__name__}: {len(self)} records, {size:.1f} MiB"
            + (f" and {files} files" if files else ""),
            f"  taps: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
        ]
        for part in ("step", "branch", "control"):
            values = sorted({x for key in self._records if (x := getattr(key, part)) is not None})
            if values:
                shown = values if len(values) < 9 else [*values[:4], "...", values[-1]]
                lines.append(f"  {part}: {', '.join(map(str, shown))}")
        return "\n".join(lines)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        record = self._records[self._find(key)]
        if isinstance(record, Tensor):
            return record
        tensors, _ = read_tensors(record, "record")
        (tensor,) = tensors.values()
        return tensor

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

    def of(self, name: str) -> list[Key]:
        """The keys of a tap, in the order in which they were recorded."""
        return list(self._named.get(name, ()))

    def _add(self, key: Key, record: Tensor | Path) -> None:
        self._records[key] = record
        self._named.setdefault(key.name, []).append(key)

    def _next(self, key: Key) -> Key:
        self._calls[key] += 1
        return key._replace(call=self._calls[key] - 1)


def _stored_key(path: Path) -> Key:
    """The key of a record's file.

    Raises:
        ValueError: the file is no record.
    """
    tensors, metadata = header_and_metadata(path)
    if metadata.get("format") != _FORMAT:
        got = shown(repr(metadata.get("format")))
        raise ValueError(f"{shown(path)} has format {got}, wanted {_FORMAT!r}")
    parts = parse_json(metadata.get("key", ""), f"{shown(path)}: its key")
    if len(tensors) != 1:
        raise ValueError(f"{shown(path)} holds {len(tensors)} tensors, wanted one, the record")
    most = len(Key._fields)
    if not isinstance(parts, list) or len(parts) not in (most - 1, most):
        raise ValueError(f"{shown(path)}: its key is {shown(parts)}, wanted {most - 1} or {most} values")
    parts += [None] * (most - len(parts))  # without a control
    name, step, branch, rows, heads, call, control = parts
    wanted = {
        "a name": isinstance(name, str) and name.isprintable() and name in tensors,
        "a step": step is None or _counts(step),
        "a branch": branch is None or isinstance(branch, str),
        "rows": rows is None or (isinstance(rows, list) and all(map(_counts, rows))),
        "heads": heads is None or (isinstance(heads, list) and len(heads) == 2 and all(map(_counts, heads))),
        "a call": _counts(call),
        "a control": control is None or _counts(control),
    }
    for (what, fits), value in zip(wanted.items(), parts, strict=True):
        if not fits:
            raise ValueError(f"{shown(path)}: its key has {shown(repr(value))} where {what} is wanted")
    return Key._make(tuple(one) if isinstance(one, list) else one for one in parts)


def _counts(value: object) -> bool:
    return type(value) is int and value >= 0


def key_of(name: str) -> Key:
    """The key of a tap under the labels in force."""
    labels = current_labels()
    rows, heads = labels.get("rows"), labels.get("heads")
    return Key(
        name,
        labels.get("step"),
        labels.get("branch"),
        None if rows is None else tuple(rows),
        None if heads is None else (heads.start, heads.stop),
        control=labels.get("control"),
    )


def _listed(keys: Sequence[Key]) -> str:
    return ", ".join(str(tuple(key)) for key in keys[:6]) + (", ..." if len(keys) > 6 else "")


@dataclass(frozen=True)
class Wanted:
    """A filter of taps by the labels in force; None lets all through."""

    steps: Collection[int] | None
    branch: str | None
    where: Callable[[Site], bool] | None = None
    every: int = 1  # n-th step, from step 0

    def __post_init__(self) -> None:
        require_numbers("steps", self.steps)
        whole_number("every", self.every)
        if self.where is not None and not callable(self.where):
            raise ValueError(f"where is {type(self.where).__name__}, wanted a function of a Site")
        if self.branch not in (None, "cond", "uncond"):
            raise ValueError(f"branch is {self.branch!r}, wanted 'cond' or 'uncond', or None for both")

    def __call__(self, site: Site) -> bool:
        labels = site.labels
        steps, branch, every = self.steps, self.branch, self.every
        for name, limited, fits in (
            ("step", steps is not None, lambda step: step in (steps or ())),
            ("step", every > 1, lambda step: step % every == 0),
            ("branch", branch is not None, lambda one: one == branch),
        ):
            if limited and name not in labels:
                raise ValueError(f"tap {site.full}: a {name} is wanted, but no label {name!r} is in force")
            if limited and not fits(labels[name]):
                return False
        return self.where is None or self.where(site)


class Recorder(Records):
    """A tap function that keeps the tensors that it is given.

    Args:
        where: predicate on the `Site` (module, names, labels).
        steps, branch: the wanted labels; `steps` is a collection (a `range`, not the interval of a switch).
        to: the device for the copies, the CPU by default; or, as a `Path`, a folder for files.
        detach: False keeps the tensors of the graph themselves, neither copied nor detached, so that
            gradients flow to and from them (`torch.autograd.grad(loss, recorder[...])`). In-place changes
            then change the record.
        padding: False leaves out the padding of the shorter texts in a batch. Tensors with text tokens then
            become one record for each row, with `rows` = (row,).
        dtype: of the records; None: the tensors' own.
        every: record every n-th step, from step 0.
        tokens, sample: make a data set of rows of the folder `to`, in place of whole tensors:
            tokens are "all", "text", "target", "reference" (all of them), "reference 2" or a list of places
            in the tensor; `sample` draws that many of them for each forward and row of the batch, the same
            ones in every block and whenever an edit of this name runs. Padding is left out.

    A folder gets one safetensors file per record, numbered in order and written whole or not at all: a run
    that is killed keeps its records. `Records.load` reads the folder.

    A data set is written inside of `with recorder:`, and each edit inside of `with recorder.edit(name):`. A
    recorder for a folder with activations goes on there: what is in `recorder.edits` need not run again.
    `Activations(folder)` reads it, also meanwhile. All of its rows have one width.

    Raises:
        ValueError: `to` is no device; the folder is not empty, or cannot be made or written; `to` or `dtype`
            with detach=False; `tokens` or `sample` without a folder, or for taps without such tokens; while
            recording, `steps`, `branch` or `every` where no such label is in force.

    >>> from qwenedit.networks.mmdit_layers import MLP
    >>> from qwenedit.taps import scope, taps
    >>> mlp, recorder = MLP(4), Recorder(steps=[1, 2])
    >>> with taps(mlp, {"*": recorder}):
    ...     for step in range(3):
    ...         with scope(step=step):
    ...             y = mlp(torch.ones(1, 5, 4))
    >>> [(key.name, key.step) for key in recorder]
    [('mlp_hidden', 1), ('mlp_hidden', 2)]
    >>> recorder["mlp_hidden", 2].shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        *,
        where: Callable[[Site], bool] | None = None,
        steps: Collection[int] | None = None,
        branch: str | None = None,
        to: torch.device | str | Path | None = None,
        detach: bool = True,
        padding: bool = True,
        tokens: str | Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        every: int = 1,
        sample: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("to", to), ("dtype", dtype)):
            if value is not None and not detach:
                raise ValueError(
                    f"{name} is {value!r} with detach=False, wanted None: the graph's tensors are kept"
                )
        self._wanted = Wanted(steps, branch, where, every)
        self._detach = detach
        self._padding = padding
        self._dtype = None if dtype is None else dtype_of(dtype, torch.device("cpu"))
        self._writer = None
        self._opened = ExitStack()
        if tokens is not None or sample is not None:
            if not isinstance(to, Path):
                raise ValueError(
                    f"to is {to!r} with tokens or sample, wanted the Path of a folder for a data set of them"
                )
            _make_folder(to, filled_with=shards_of)
            self._writer = ActivationWriter(to, "all" if tokens is None else tokens, self._dtype, sample)
        self._folder = None if self._writer or not isinstance(to, Path) else _make_folder(to)
        try:
            self._device = torch.device("cpu" if to is None or isinstance(to, Path) else to)
        except RuntimeError:
            raise ValueError(f"to is {to!r}, which is no device; for a folder pass Path({to!r})") from None

    def __repr__(self) -> str:
        return super().__repr__() if self._writer is None else f"{type(self).__name__}: {self._writer}"

    def __enter__(self) -> Recorder:
        """Open the data set; its last rows are written when the `with` block ends."""
        if self._writer is not None:
            self._opened.enter_context(self._writer.opened())
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def edits(self) -> Collection[str]:
        """The names of the edits that are in the data set, whole."""
        return () if self._writer is None else self._writer.edits.keys()

    @contextmanager
    def edit(self, name: str) -> Iterator[None]:
        """Name the edit that runs in a `with` block, for the data set and as the label `edit`.

        Raises:
            ValueError: of a data set: outside of `with recorder:`, or a name that it has already.
        """
        with scope(edit=name), nullcontext() if self._writer is None else self._writer.edit(name):
            yield

    def check(self, site: Site) -> None:
        """Check that a tap has a data set's tokens; `taps` calls this before anything runs."""
        if self._writer is not None:
            self._writer.check(site)

    def __call__(self, x: Tensor, site: Site) -> None:
        if not self._wanted(site):
            return
        if self._writer is not None:
            self._writer.add(x, site)
            return
        key, rows = key_of(site.full), None if self._padding else _rows_without_padding(x, site)
        if rows is None:
            self._keep(self._next(key), x)
            return
        for number, row in zip(key.rows or range(len(rows)), rows, strict=True):
            self._keep(self._next(key._replace(rows=(number,))), row)

    def _keep(self, key: Key, x: Tensor) -> None:
        if not self._detach:
            self._add(key, x)
        elif self._folder is None:
            self._add(key, x.detach().to(self._device, self._dtype or x.dtype, copy=True))
        else:
            stored = x.detach().to("cpu", self._dtype or x.dtype)
            path = self._folder / f"{len(self):06d}-{key.name}.safetensors"
            parts = key[:-1] if key.control is None else key  # older versions read six
            metadata = {"format": _FORMAT, "key": json.dumps(parts)}
            with replacing_file(path) as temporary:
                safetensors.torch.save_file({key.name: stored.contiguous()}, temporary, metadata)
            self._add(key, path)


def _rows_without_padding(x: Tensor, site: Site) -> list[Tensor] | None:
    """Each row without its padded text tokens; None for a tensor without text tokens.

    Those of the transformer's text stream are called txt_..., and its attention maps begin with the text.
    The text encoder, which has no `layout`, has text tokens alone.
    """
    lengths, layout = site.labels.get("text_lengths"), site.labels.get("layout")
    padded = layout.text if layout else max(lengths or (0,))
    if lengths is None or x.shape[0] != len(lengths):
        return None
    if site.name in ("scores", "probs"):
        kept = [torch.cat([torch.arange(n), torch.arange(padded, x.shape[-1])]).to(x.device) for n in lengths]
        return [x[i : i + 1, :, k][..., k] for i, k in enumerate(kept)]
    text = layout is None or any(part.startswith("txt_") for part in site.full.split("."))
    if not text or x.ndim < 3 or x.shape[1] != padded:
        return None
    return [x[i : i + 1, :n] for i, n in enumerate(lengths)]


def _make_folder(folder: Path, filled_with: Callable[[Path], Sequence[Path]] = lambda _: ()) -> Path:
    """The folder, which is made if it is not there, and has nothing but the files of `filled_with`."""
    try:
        folder.mkdir(exist_ok=True)
        known = filled_with(folder)
        filled = any(path.name[0] != "." and path not in known for path in folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot record to {folder}: {error.strerror or error}") from error
    if filled:
        raise ValueError(f"cannot record to {folder}: it is not empty, and a recording overwrites nothing")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot record to {folder}: no permission to write there")
    return folder
