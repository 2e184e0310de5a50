"""What the files of a checkpoint hold: JSON, and the headers of safetensors files.

Nothing here reads a weight: headers are enough for every question but the numbers themselves. They are read
as strictly as the safetensors library reads them, so that what is fine here can be loaded.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "FLOATS", "TensorInfo", "append_line", "component_headers", "read_header", "read_json", "read_lines",
    "replacing_file", "write_lines",
]  # fmt: skip

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what weights are stored and run in
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one for an optional file that is not there.

    Raises:
        ValueError: the file is absent, or holds something else.
    """
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor; start and end are bytes within the file's data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        ValueError: no such file, or an empty, truncated or otherwise broken one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ValueError(
                    f"{path} is {size} bytes long: too short for a safetensors file; download it again"
                )
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, 100_000_000):
                raise ValueError(
                    f"{path} is truncated or no safetensors file: its header is said to have {length} bytes, "
                    f"but the file has {size}"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: its header's __metadata__ is {metadata!r}, wanted texts by name")
    tensors = {
        name: _entry(entry, f"{path}: its header's entry for {name}") for name, entry in header.items()
    }
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise ValueError(f"{path}: {name} starts at byte {info.start}, wanted {end}: gaps or overlaps")
        end = info.end
    wanted = 8 + length + end
    if size != wanted:
        state = "truncated" if size < wanted else "too long"
        raise ValueError(
            f"{path} is {state}: it has {size} bytes, its header asks for {wanted}; download it again"
        )
    return tensors


def _entry(entry: Any, what: str) -> TensorInfo:
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
    return TensorInfo(dtype, shape, start, end)


def component_headers(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a component's folder with the file that holds it; shards follow the index.

    Raises:
        ValueError: no weights, a shard that the index names and the folder lacks, a tensor that the index
            promises and its shard lacks, or a broken file.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = "none" if not files else ", ".join(file.name for file in files)
            raise ValueError(f"{folder} wants one *.safetensors file, or an index of several; found {found}")
        return {name: (files[0], info) for name, info in read_header(files[0]).items()}
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{indexes[0]} has no weight_map, wanted the name of a file for each tensor")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} of the {len(shards)} files that {indexes[0].name} names: "
            f"{', '.join(absent[:10])}; download them again"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} tensors are not in the file that {indexes[0].name} names for them: "
            f"{', '.join(lost[:10])}"
        )
    return {
        name: (folder / shard, info) for shard, header in headers.items() for name, info in header.items()
    }


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        ValueError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".qwenedit-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; the result is an ordinary one
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[Any], T], what: str) -> list[T]:
    """What `parse` makes of each line of a JSON Lines file; an empty list if there is no such file.

    A last line without a line break was cut off when its writer was killed: it is left out.

    Raises:
        ValueError: another line is not JSON, or `parse` fails on it; the message says that it is not `what`.
    """
    try:
        *lines, _cut_off = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is no {what}: {error!r}") from error
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
