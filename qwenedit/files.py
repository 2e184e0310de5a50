"""safetensors files, JSON Lines, and files that are replaced whole.

Headers are checked as strictly as the safetensors library checks them, so that every file accepted here can
be loaded.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor

from qwenedit.foreign import inner_name, parse_json, plain_file, printable_name, read_json, shown

__all__ = [
    "FLOATS", "MAX_HEADER", "TensorInfo", "append_line", "component_headers", "header_and_metadata",
    "is_leftover", "new_folder", "read_header", "read_lines", "read_tensors", "remove_leftovers",
    "replacing_file", "require_folder", "require_new", "write_lines",
]  # fmt: skip

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # dtypes that weights run in
_TEMPORARY = ".qwenedit-"  # how names of temporary files begin
MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# First bytes of torch's zip files, and of pickles of protocol 2 to 5. A safetensors file may begin with them,
# too: they are the lowest bytes of its header's length.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry in a safetensors header. `start` is the offset in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Raises:
        ValueError: no such plain file; empty, truncated or broken otherwise; a name that is not printable.
    """
    return header_and_metadata(path)[0]


def read_tensors(
    path: str | os.PathLike[str], what: str = "file"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a small safetensors file, and its metadata.

    Raises:
        ValueError: as `read_header`.
    """
    path = plain_file(path, what)
    _, metadata = header_and_metadata(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{what} {shown(path)} is not a safetensors file: {error}") from error


def header_and_metadata(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The header of a safetensors file, and its metadata: texts by name. Raises as `read_header`."""
    plain_file(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ValueError(
                    f"{path} is {size} bytes long: too short for a safetensors file; download it again"
                )
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, MAX_HEADER):
                if head.startswith(_PICKLES):
                    raise ValueError(
                        f"{shown(path)} is a pickle, which can run code: wanted safetensors or GGUF"
                    )
                raise ValueError(
                    f"{path} is truncated or no safetensors file: its header is said to have {length} bytes, "
                    f"but the file has {size}"
                )
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    header = parse_json(text, f"{path} is no safetensors file: its header", unique=True)
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: its header's __metadata__ is {shown(metadata)}, wanted texts by name")
    tensors = {
        printable_name(name, f"{path}: the name of a tensor"): _entry(
            entry, 8 + length, f"{path}: its header's entry for {name}"
        )
        for name, entry in header.items()
    }
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if info.start != end:
            got, wanted = info.start - 8 - length, end - 8 - length
            raise ValueError(f"{path}: {name} starts at byte {got}, wanted {wanted}: gaps or overlaps")
        end += info.bytes
    if size != end:
        state = "truncated" if size < end else "too long"
        raise ValueError(
            f"{path} is {state}: it has {size} bytes, its header asks for {end}; download it again"
        )
    return tensors, metadata


def _entry(entry: Any, data: int, what: str) -> TensorInfo:
    """A checked entry; `data` is where the header ends."""
    try:
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be read: {error!r}") from error
    for number in (*shape, start, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"{what} has {number!r}, wanted whole numbers from 0")
    wanted = math.prod(shape) * dtype.itemsize
    if end - start != wanted:
        raise ValueError(
            f"{what} has {end - start} bytes, wanted {wanted} for {entry['dtype']} of shape {list(shape)}"
        )
    return TensorInfo(dtype, shape, data + start, wanted)


def component_headers(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a component's folder, with the file that holds it: a single file, or indexed shards.

    Files of a variant, like x.fp16.safetensors, count only if there are no others.

    Raises:
        ValueError: no weights, or several; an index that names files outside the folder; a missing shard, a
            tensor that is not in its shard, or a broken file.
    """
    found = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.safetensors")]
    found = _without_variant(path for path in found if not is_leftover(path))
    indexes, files = ([path for path in found if path.suffix == end] for end in (".json", ".safetensors"))
    if len(indexes) > 1 or (not indexes and len(files) != 1):
        raise _ambiguous(folder, indexes or files)
    if not indexes:
        return {name: (files[0], info) for name, info in read_header(files[0]).items()}
    (index,) = indexes
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map, wanted the name of a file for each tensor")
    for name in weight_map:
        printable_name(name, f"the name of a tensor in {index}")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if "/" in inner_name(shard, f"the file of a tensor in {index}"):
            raise ValueError(f"{index} names {shown(shard)!r}, wanted names of files in its own folder")
    twin = index.with_name(index.name.removesuffix(".index.json"))
    if twin in files and twin.name not in shards:  # all weights in one file, beside an index of others
        raise _ambiguous(folder, [index, twin])
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} of the {len(shards)} files that {index.name} names: "
            f"{', '.join(absent[:10])}; download them again"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} tensors are not in the file that {index.name} names for them: "
            f"{', '.join(lost[:10])}"
        )
    return {
        name: (folder / shard, info) for shard, header in headers.items() for name, info in header.items()
    }


def _ambiguous(folder: Path, found: Iterable[Path]) -> ValueError:
    names = ", ".join(shown(path.name) for path in found) or "none"
    return ValueError(f"{folder} wants one *.safetensors file, or an index of several; found {names}")


def _without_variant(paths: Iterable[Path]) -> list[Path]:
    """The files without a variant in their names (x.fp16.safetensors has one); all if each has one."""
    found = sorted(paths)
    return [path for path in found if "." not in path.name.partition(".safetensors")[0]] or found


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside `path`: renamed to `path` if the block succeeds, removed if it fails.

    Raises:
        ValueError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes the file private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`: renamed to `path` if the block succeeds, removed if it fails.

    Raises:
        ValueError: there is something at `path` already, other than an empty folder; or no folder to make it
            in.
    """
    path = require_new(path)
    temporary = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=_TEMPORARY))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes the folder private
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(path: str | os.PathLike[str]) -> Path:
    """The path of a folder that `new_folder` can make.

    Raises:
        ValueError: as `new_folder`.
    """
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise ValueError(f"{shown(path)} exists and is not an empty folder, wanted a new one to write to")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write {shown(path)}: there is no folder {shown(path.absolute().parent)}")
    return path


def require_folder(path: Path) -> None:
    """Check that a folder can be written into, or made.

    Raises:
        ValueError: there is something else at its place, or above it, or it is read-only.
    """
    existing = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write into {shown(path)}: {shown(existing)} is no folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {shown(path)}: {error}") from error


def is_leftover(path: Path) -> bool:
    """True for a temporary file of `replacing_file`, which a killed process leaves."""
    return path.name.startswith(_TEMPORARY)


def remove_leftovers(*folders: Path) -> None:
    """Remove what killed processes have left half-written in folders that no other process writes into."""
    for folder in filter(Path.is_dir, folders):
        for path in filter(is_leftover, folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[Any], T], what: str) -> list[T]:
    """What `parse` makes of each line of a JSON Lines file; an empty list if there is no such file.

    A last line without a line break, or one after others that is not JSON, was cut off when its writer was
    stopped: it is left out.

    Raises:
        ValueError: no plain file; another line is not JSON, or `parse` fails on a line. The message says that
            it is not `what`.
    """
    if not os.path.lexists(path):
        return []
    *lines, _cut_off = plain_file(path).read_bytes().split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    found: list[T] = []
    for number, line in numbered:
        try:
            try:
                value = parse_json(line, "it")
            except ValueError:
                if found and number == numbered[-1][0]:
                    break
                raise
            found.append(parse(value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {shown(path)} is no {what}: {shown(error)}") from error
    return found


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON Lines file anew, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, values)))


def append_line(path: Path, value: Any) -> None:
    """Add a line to a JSON Lines file, on the disk when this returns."""
    with path.open("ab") as file:
        file.write(_line(value))
        file.flush()
        os.fsync(file.fileno())


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n"
