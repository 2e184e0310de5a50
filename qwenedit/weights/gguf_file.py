"""GGUF files, read with the `gguf` package: an optional extra, imported only when such a file is opened.

The package dequantises to float32 with numpy; the results become torch tensors. Types and shapes come from
the file's header. A weight is dequantised when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TYPES", "GGUFFile", "is_gguf"]

MAGIC = b"GGUF"
# Types that can be read. Quantised in blocks of 32 (_0: a scale; _1: a scale and a minimum) or of 256 (K).
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1",
)  # fmt: skip


def is_gguf(path: Path) -> bool:
    """True if the file starts with GGUF's magic bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GGUFFile:
    """An open GGUF file, with the reading methods of `safetensors.safe_open`.

    Raises:
        ValueError: the `gguf` package is not installed, or the file is broken.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path} is a GGUF file, wanted the gguf package to read it ({error}): "
                "pip install 'qwenedit[gguf]'"
            ) from error

        class Reader(gguf.GGUFReader):
            """Stops at the end of the file; the package goes on for as long as an array is said to be."""

            def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
                found = super()._get(offset, dtype, count, *order, **options)
                if len(found) < int(count):
                    raise ValueError(f"it ends before byte {int(offset) + 1}")
                return found

        try:
            reader = Reader(path)
        except (ValueError, LookupError, ArithmeticError, OSError, TypeError) as error:
            raise ValueError(f"{path} is truncated or no GGUF file: {error}; download it again") from error
        self._dequantize: Any = gguf.quants.dequantize
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self._tensors = {}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def info(self, key: str) -> tuple[str, tuple[int, ...], int, int]:
        """The type's name, the shape, the first byte in the file, and the number of bytes."""
        tensor = self._tensors[key]
        # dimensions are written fastest first: in_features, out_features
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        return tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes)

    def get_tensor(self, key: str) -> Tensor:
        """A weight in float32."""
        tensor = self._tensors[key]
        values = self._dequantize(tensor.data, tensor.tensor_type)
        if not values.flags.writeable:  # float32 as it is in the file, which torch must not write to
            values = values.copy()
        return torch.from_numpy(values).reshape(self.info(key)[1])
