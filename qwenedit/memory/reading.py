"""Read weights from files repeatedly, without mapping the files into memory.

Pages of a mapped file count as the process's memory until the system reclaims them; a weight that is read
here is in memory once. Files that have changed since loading are refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qwenedit.weights.formats import Stored
from qwenedit.weights.gguf_file import GGUFFile, is_gguf

__all__ = ["SafetensorsFile", "WeightFiles"]


class WeightFiles:
    """The files of the weights `found`. Each file is opened for one reading and closed again.

    Raises:
        ValueError: on reading, a file has changed or is gone.
    """

    def __init__(self, found: Iterable[Stored]) -> None:
        self._stored: dict[Path, dict[str, Stored]] = {}  # by file and key
        for weight in found:
            for stored in filter(None, (weight, weight.scale)):
                self._stored.setdefault(stored.path, {})[stored.key] = stored
        self._stamps = {path: _stamp(path) for path in self._stored}
        self._gguf = {path for path in self._stored if is_gguf(path)}

    def read(self, wanted: Sequence[Stored]) -> Iterator[tuple[Stored, Tensor, Tensor | None]]:
        """Yield each weight as it is stored, with its scale if it has one, in the order of the files."""
        for path in sorted({stored.path for stored in wanted}):
            if _stamp(path) != self._stamps[path]:
                raise ValueError(f"{path} has changed since the checkpoint was loaded: load it again")
            opened = GGUFFile(path) if path in self._gguf else SafetensorsFile(path, self._stored[path])
            with opened as file:
                for stored in sorted((one for one in wanted if one.path == path), key=lambda x: x.start):
                    scale = None if stored.scale is None else file.get_tensor(stored.scale.key)
                    yield stored, file.get_tensor(stored.key), scale


def _stamp(path: Path) -> tuple[int, ...]:
    """A value that changes when the file is written to or replaced."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path}, which weights are read from, is gone: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class SafetensorsFile:
    """An open safetensors file, read like `safetensors.safe_open`. `stored` says where its tensors are."""

    def __init__(self, path: Path, stored: Mapping[str, Stored]) -> None:
        self._path, self._stored = path, stored
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def get_tensor(self, key: str) -> Tensor:
        """A tensor as it is stored, in memory of its own."""
        stored = self._stored[key]
        own = torch.empty(stored.bytes, dtype=torch.uint8, device="cpu")
        if stored.bytes:
            self._file.seek(stored.start)
            memory = (ctypes.c_ubyte * stored.bytes).from_address(own.data_ptr())
            try:
                count = self._file.readinto(memory)  # type: ignore[attr-defined]
            except OSError as error:
                raise ValueError(f"{self._path} cannot be read: {error.strerror}") from error
            if count != stored.bytes:
                raise ValueError(f"{self._path} ends within {key}: it has changed since it was loaded")
        return own.view(getattr(torch, stored.dtype)).view(stored.shape)
