"""A list of edits, made one after the other: `qwenedit batch EDITS.jsonl`, `qwenedit.batch(edits, folder)`.

lines.py describes the list. The folder of results has

    NAME.png        the result of each edit; it says of which one, so that it is not made again
    records.jsonl   a line for every edit: settings, sizes, seconds, environment, or why it failed
                    (records-0-of-4.jsonl and so on of shards, until a run without a shard merges them)

A result belongs to its line, pictures, LoRA, model, kind of device, dtype and version of this package: if one
of them changes, it is made anew. A batch that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qwenedit.ablation.intervening import lora
from qwenedit.ablation.model import Model, pipe_fingerprint, require_single
from qwenedit.batches.lines import Edits, Line, lines_of, opened, raw_lines
from qwenedit.call import Call
from qwenedit.checks import device_of, dtype_of, progress_bar
from qwenedit.family import Preset, preset_of
from qwenedit.files import (
    append_line,
    read_lines,
    remove_leftovers,
    replacing_file,
    require_folder,
    write_lines,
)
from qwenedit.foreign import inner_name, plain_file, shown
from qwenedit.inputs.pictures import open_picture
from qwenedit.instruments.provenance import made_by
from qwenedit.instruments.provenance import seconds as clock
from qwenedit.networks.mmdit import MMDiT
from qwenedit.pipeline import QwenImageEdit, load
from qwenedit.shards import only_one, record_file, shard_files, shard_of
from qwenedit.version import __version__
from qwenedit.weights.checkpoints import fingerprint, pieces_of, resolve
from qwenedit.weights.lora_files import read_lora

__all__ = ["RECORDS", "Batch", "Maker", "batch", "edits_left", "identity_of", "make"]

RECORDS = "records"  # the stem of the files of records
Record = dict[str, Any]
_CHUNK = "qwenedit"  # the key of the text in a result's file that says to which edit it belongs


@dataclass(frozen=True, eq=False)
class Batch:
    """A list of edits that has been made: the record of every edit, in the list's order."""

    folder: Path
    records: list[Record]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "failed"]

    def __repr__(self) -> str:
        return f"Batch of {len(self.records)} edits in {shown(self.folder)}, {len(self.failed)} failed"


@dataclass(frozen=True, eq=False, kw_only=True)
class Maker:
    """What makes the edits, known before weights are read: `identity` changes with whatever it computes."""

    name: str
    parts: Model
    preset: Preset
    identity: str
    load: Callable[[], QwenImageEdit]


def batch(
    edits: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    pipe: QwenImageEdit | None = None,
    model: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    options: Mapping[str, Any] | None = None,
    shard: str | None = None,
    progress: bool = True,
) -> Batch:
    """Make the edits of a list whose results are not yet in the folder.

    Everything is checked before weights are read, and all faults are listed. An edit that fails later is
    recorded, and the others go on; the next batch tries it again. At most one edit is lost when a batch is
    stopped.

    Args:
        edits: a JSON Lines file, or dicts like its lines (`qwenedit.batches.lines`), which may have PIL
            pictures in place of names.
        folder: for the results; it may have some already.
        pipe: a pipeline, as it is: with its LoRAs, in its memory mode.
        model, device, dtype: as for `qwenedit.load`, in place of a pipe. Without either the embedded model.
        options: what lines have that do not say it themselves. Then steps, scale and negative prompt are
            those that the checkpoint's model card recommends; of a given pipe, the defaults of `edit`.
        shard: "i/n", i from 0 to n - 1: make that part of the list only. Shards may run side by side, on any
            machines with the same kind of device; a run without a shard then makes what is missing.
        progress: progress bars on stderr, if that is a terminal.

    Returns:
        The batch, of a shard with its own edits alone.

    Raises:
        ValueError: bad lines, or what the model cannot run; a folder that cannot be written, or a file in it
            that is in a result's place and is none.
    """
    if isinstance(edits, (str, os.PathLike)):
        raw, base = raw_lines(edits), Path(edits).parent
    else:
        raw, base = [(f"edit {number}", one) for number, one in enumerate(edits)], Path()
    if pipe is None:
        source = None if model is None else os.fspath(model)
        where = device_of(device)
        wanted = dtype_of(dtype, where)
        checkpoint = resolve(source, progress=progress)
        maker = Maker(
            name=source or "the embedded model",
            parts=Model.of_folder(checkpoint),
            preset=preset_of(checkpoint),
            identity=identity_of(checkpoint, where, wanted),
            load=lambda: load(checkpoint, device=where, dtype=wanted, progress=progress),
        )
    else:
        given = [name for name, x in (("model", model), ("device", device), ("dtype", dtype)) if x]
        if given:
            raise ValueError(f"there are a pipe and {' and '.join(given)}, wanted the pipe's own")
        require_single(pipe)
        maker = Maker(
            name="the given pipeline",
            parts=Model.of_pipe(pipe),
            preset=Preset(name="none"),
            identity=f"{pipe_fingerprint(pipe)} {pipe.device.type} {pipe.dtype}",
            load=lambda: pipe,
        )
    listed = lines_of(raw, base, options or {}, maker.preset)
    return make(listed, Path(folder), maker, shard=shard, progress=progress)


def identity_of(checkpoint: Path, device: torch.device, dtype: torch.dtype | None, *others: Any) -> str:
    """A hash of what a checkpoint computes, and of all `others` that are given: LoRAs, files in its place."""
    parts = [fingerprint(checkpoint), device.type, dtype, *(one for one in others if one)]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:20]


def make(
    edits: Edits, folder: Path, maker: Maker, *, shard: str | None = None, progress: bool = True
) -> Batch:
    """Make the results that are not yet in the folder; as `batch`."""
    part = None if shard is None else shard_of(shard)
    mine = edits.lines if part is None else part.part_of(edits.lines)
    keys = _checked(edits, mine, folder, maker, progress)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder, "batch", part) as alone:
        known, results = _known(folder), record_file(folder, RECORDS, part)
        done = _done(mine, keys, folder, known)
        todo = [line for line in mine if line.file not in done]
        write_lines(results, (known if part is None else _read(results)).values())  # none that was cut off
        if alone:
            _tidy(folder, mine)
        for line, record in _run(todo, keys, folder, maker, progress):
            done[line.file] = record
            append_line(results, record)
        made = Batch(folder, [done[line.file] | {"place": line.place} for line in mine])
        if part is None:
            names = {line.file for line in mine}
            others = [record for file, record in _known(folder).items() if file not in names]
            write_lines(results, [*others, *made.records])
        return made


def edits_left(edits: Edits, folder: Path, maker: Maker, *, progress: bool = True) -> int:
    """How many edits `make` would make, after its checks."""
    keys = _checked(edits, edits.lines, folder, maker, progress)
    return len(edits.lines) - len(_done(edits.lines, keys, folder, _known(folder)))


def _checked(edits: Edits, mine: list[Line], folder: Path, maker: Maker, progress: bool) -> dict[str, str]:
    """The keys of these lines by file, after everything that can be checked without weights.

    Raises:
        ValueError: all faults.
    """
    require_folder(folder)
    faults, keys, loras = [], {}, dict[Path, str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runs themselves warn
        for line in progress_bar(mine, progress=progress, desc="checking", unit="edit"):
            try:
                keys[line.file] = _key(line, folder, maker, loras)
            except ValueError as error:
                faults.append((line.number, f"{line.place}: {error}"))
    edits.require_good(faults)
    return keys


def _key(line: Line, folder: Path, maker: Maker, loras: dict[Path, str]) -> str:
    """The key of a line that is checked: a hash of all that its result depends on."""
    call, digest = _call(line), hashlib.sha256()
    maker.parts.require_call(call)
    others = [opened(one) for one in (*line.copies.values(), line.size_of) if one is not None]
    for picture in (*(call.image or ()), call.mask_image, *others):
        text = "none" if picture is None else f"{picture.mode} {picture.size}"
        digest.update(text.encode() + (b"" if picture is None else picture.tobytes()))
    if line.lora is not None and line.lora not in loras:
        with torch.device("meta"):
            read_lora(line.lora, MMDiT(maker.parts.config))
        loras[line.lora] = hashlib.sha256(b"".join(pieces_of(line.lora))).hexdigest()
    for file in line.files:
        _require_free(folder, file)
    settings = [
        __version__, maker.identity, digest.hexdigest(), line.settings, line.sampler or maker.parts.sampler,
        loras[line.lora] if line.lora else None, line.size_of is not None, list(line.copies),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def _call(line: Line) -> Call:
    """The line's call, its pictures opened."""
    return Call(
        image=[opened(one) for one in line.pictures] or None,
        mask_image=None if line.mask is None else opened(line.mask),
        strength=line.strength, padding_mask_crop=line.mask_crop, prompt=line.prompt,
        negative_prompt=line.negative_prompt, true_cfg_scale=line.true_cfg_scale,
        num_inference_steps=line.num_inference_steps, height=line.height, width=line.width,
        sampler=line.sampler, switches=line.switches,
    )  # fmt: skip


def _require_free(folder: Path, file: str) -> None:
    """Raise a ValueError if there is something at a result's place, or above it, that no batch has made."""
    path = folder / file
    inside = [one for one in path.parents if one != folder and folder in one.parents]
    if blocking := [one for one in inside if os.path.lexists(one) and not one.is_dir()]:
        raise ValueError(f"cannot write {shown(path)}: {shown(blocking[0])} is no folder")
    if os.path.lexists(path) and _key_in(path) is None:
        raise ValueError(f"{shown(path)} is there and is no result of a batch: wanted another name or folder")


def _key_in(path: Path) -> str | None:
    """The key that a result's file names; None of other files."""
    try:
        with Image.open(plain_file(path), formats=["PNG"]) as picture:
            key = picture.info.get(_CHUNK)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return key if isinstance(key, str) else None


def _done(
    lines: list[Line], keys: dict[str, str], folder: Path, known: dict[str, Record]
) -> dict[str, Record]:
    """The records of the lines whose results are there, by file."""
    found = {line.file: (known.get(line.file), line) for line in lines}
    return {
        file: record
        for file, (record, line) in found.items()
        if record is not None and _is_done(record, keys[file], folder, line)
    }


def _is_done(record: Record, key: str, folder: Path, line: Line) -> bool:
    if record["status"] != "done" or record["key"] != key:
        return False
    try:
        for file in line.files:
            open_picture(folder / file)
    except ValueError:
        return False
    return all(_key_in(folder / file) == key for file in line.files)


def _known(folder: Path) -> dict[str, Record]:
    """The records by result, those of shards included; of two, one whose result is there."""
    found: dict[str, Record] = {}
    for path in (*shard_files(folder, RECORDS), record_file(folder, RECORDS)):
        for file, record in _read(path).items():
            if file not in found or record["key"] == _key_in(folder / file):
                found[file] = record
    return found


def _read(path: Path) -> dict[str, Record]:
    records = read_lines(path, _record, "record of a batch (take another folder)")
    return {record["file"]: record for record in records}


def _record(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"it is {shown(repr(value))}, wanted an object")
    for name in ("file", "key", "status"):
        if not isinstance(value.get(name), str):
            raise ValueError(f"{name} is {shown(repr(value.get(name)))}, wanted a text")
    inner_name(value["file"], "file")
    if value["status"] not in ("done", "failed"):
        raise ValueError(f"status is {shown(value['status'])}, wanted done or failed")
    return value


def _tidy(folder: Path, lines: list[Line]) -> None:
    """Remove what merged shards and killed processes have left, now that none runs."""
    for path in shard_files(folder, RECORDS):
        path.unlink()
    remove_leftovers(*{folder, *((folder / file).parent for line in lines for file in line.files)})


def _run(
    lines: list[Line], keys: dict[str, str], folder: Path, maker: Maker, progress: bool
) -> Iterator[tuple[Line, Record]]:
    """Make one result after another, and yield its record."""
    if not lines:
        return
    pipe = maker.load()
    made_with = {"model": maker.name, "identity": maker.identity, **made_by(pipe)}
    for line in progress_bar(lines, progress=progress, desc="editing", unit="edit"):
        key = keys[line.file]
        sampler = line.sampler or maker.parts.sampler
        record = {
            "key": key, **line.settings, **line.sources, "sampler": sampler, **made_with, "at": _now()
        }  # fmt: skip
        for file in line.files:  # of another edit, or of one that was stopped: never taken for this one's
            (folder / file).unlink(missing_ok=True)
        try:
            record |= {"status": "done", **_made(pipe, line, folder, key)}
        except Exception as error:
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        yield line, record


def _made(pipe: QwenImageEdit, line: Line, folder: Path, key: str) -> Record:
    """Make a line's result and write it; its part of the record."""
    call, start = _call(line), clock(pipe.device)
    given = {"strength": call.strength, "mask_image": call.mask_image}
    options: dict[str, Any] = {
        **{name: value for name, value in given.items() if value is not None},
        "padding_mask_crop": call.padding_mask_crop, "negative_prompt": call.negative_prompt,
        "true_cfg_scale": call.true_cfg_scale, "num_inference_steps": call.num_inference_steps,
        "height": call.height, "width": call.width, "sampler": call.sampler, "switches": call.switches,
        "generator": torch.Generator().manual_seed(line.seed),
    }  # fmt: skip
    with lora(pipe, line.lora, line.lora_scale):
        if call.image is None:
            (picture,) = pipe.generate(line.prompt, **options).images
        else:
            (picture,) = pipe.edit(call.image, line.prompt, **options).images
    made, took = picture.size, clock(pipe.device) - start
    if line.size_of is not None and (size := opened(line.size_of).size) != made:
        picture = picture.resize(size)
    for name, other in line.copies.items():
        _write(opened(other), folder / name, key)
    _write(picture, folder / line.file, key)
    return {
        "seconds": round(took, 4), "sizes": [list(one.size) for one in call.image or ()],
        "made": list(made), "written": list(picture.size),
    }  # fmt: skip


def _write(picture: Image.Image, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        picture = picture.convert("RGB")  # PNG has no other modes
    chunk = PngInfo()
    chunk.add_text(_CHUNK, key)
    with replacing_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunk)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
