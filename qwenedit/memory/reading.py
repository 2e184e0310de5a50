"""Weights from files, again and again: without mapping them into memory, and only while they are the files
that were looked at.

Pages of a mapped file count as the process's memory until the system takes them back; what is read here is
in memory once, where it is asked for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import torch
from torch import Tensor

from qwenedit.files import TensorInfo, read_header
from qwenedit.weights.formats import Stored
from qwenedit.weights.gguf_file import GGUFFile, is_gguf

__all__ = ["Files", "SafetensorsFile"]


class Files:
    """Files that were there, as they were: each is opened for what is asked of it, and closed.

    Raises:
        ValueError: a file is broken; on reading, it has changed or is gone.
    """

    def __init__(self, found: Iterable[Stored]) -> None:
        paths = sorted({stored.path for stored in found})
        self._stamps = {path: _stamp(path) for path in paths}
        self._headers = {path: None if is_gguf(path) else _Header(path) for path in paths}

    @overload
    def read(self, wanted: Sequence[Stored]) -> Iterator[tuple[Stored, Tensor]]: ...
    @overload
    def read(
        self, wanted: Sequence[Stored], *, raw: Literal[True]
    ) -> Iterator[tuple[Stored, Tensor | tuple[Tensor, Tensor]]]: ...
    def read(self, wanted: Sequence[Stored], *, raw: bool = False) -> Iterator[tuple[Stored, Any]]:
        """Each weight as `Stored.read` makes it, in the order of the files.

        With `raw`, a weight that is stored as float8_e4m3fn comes as it is, with its scale.
        """
        for path in sorted({stored.path for stored in wanted}):
            if _stamp(path) != self._stamps[path]:
                raise ValueError(f"{path} has changed since the checkpoint was loaded: load it again")
            header = self._headers[path]
            with GGUFFile(path) if header is None else header.open() as file:
                for stored in sorted((one for one in wanted if one.path == path), key=lambda x: x.start):
                    yield stored, _raw(stored, file) if raw else stored.read(file)


def _raw(stored: Stored, file: Any) -> Tensor | tuple[Tensor, Tensor]:
    if stored.dtype != "float8_e4m3fn":
        return stored.read(file)
    scale = torch.ones(()) if stored.scale is None else file.get_tensor(stored.scale)
    return file.get_tensor(stored.key), scale


def _stamp(path: Path) -> tuple[int, ...]:
    """What is another one when somebody writes to the file, or puts another in its place."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path}, which weights are read from, is gone: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Header:
    """A safetensors file's header, which is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_header(path)
        self.start = os.path.getsize(path) - max((info.end for info in self.tensors.values()), default=0)

    def open(self) -> SafetensorsFile:
        return SafetensorsFile(self)


class SafetensorsFile:
    """An open safetensors file, with the reading methods of `safetensors.safe_open`."""

    def __init__(self, header: _Header) -> None:
        self._header = header
        try:
            self._file: BinaryIO = header.path.open("rb")
        except OSError as error:
            raise ValueError(f"{header.path} cannot be read: {error.strerror}") from error

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._header.tensors)

    def get_tensor(self, key: str) -> Tensor:
        """A weight as it is stored, in memory of its own."""
        info: TensorInfo = self._header.tensors[key]
        own = torch.empty(info.bytes, dtype=torch.uint8, device="cpu")
        if info.bytes:
            self._file.seek(self._header.start + info.start)
            memory = (ctypes.c_ubyte * info.bytes).from_address(own.data_ptr())
            try:
                count = self._file.readinto(memory)  # type: ignore[attr-defined]
            except OSError as error:
                raise ValueError(f"{self._header.path} cannot be read: {error.strerror}") from error
            if count != info.bytes:
                raise ValueError(f"{self._header.path} ends within {key}: it has changed since it was loaded")
        return own.view(info.dtype).view(info.shape)
