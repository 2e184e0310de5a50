"""Deterministic runs: torch's settings are pinned for a while, and a manifest says what was in force.

with deterministic(pipe) as manifest:
    result = pipe.edit(picture, "make the circle red", generator=torch.Generator().manual_seed(0))
print(json.dumps(manifest))
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwenedit.pipeline import QwenImageEdit
from qwenedit.version import __version__

__all__ = ["deterministic", "environment"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")  # the two values that NVIDIA documents as deterministic


@contextmanager
def deterministic(pipe: QwenImageEdit | None = None) -> Iterator[dict[str, Any]]:
    """Pin the settings that can change bits from run to run, for a `with` block; then restore them.

    Pinned are: deterministic algorithms (an operation without one raises a RuntimeError), cuDNN without
    benchmarks, cuBLAS's workspace, and attention as plain matrix products and softmax (its last bits differ
    from those of fused attention). The block is given a manifest, a dict ready for JSON: the pinned settings,
    and others that decide about bits: versions, device, threads, the precision of matrix products. With a
    `pipe` it has the pipe's device and dtype.

    The same manifest and the same batch give the same bits. For rows that do not depend on their batch, see
    `QwenImageEdit.micro_batch`. torch's settings belong to the process: other threads see them too. cuBLAS
    reads its workspace setting at its first use: in a process that has used CUDA before, set
    CUBLAS_WORKSPACE_CONFIG=:4096:8 before the process starts.

    Source: torch's notes on randomness ("Reproducibility").

    >>> with deterministic() as manifest:
    ...     manifest["deterministic_algorithms"], manifest["attention"]
    (True, 'MATH')
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    cublas_before = os.environ.get(_CUBLAS)
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        if torch.cuda.is_available() and cublas_before not in _CUBLAS_DETERMINISTIC:
            os.environ[_CUBLAS] = _CUBLAS_DETERMINISTIC[0]
        with sdpa_kernel(SDPBackend.MATH):
            yield {**environment(pipe), **_pinned()}
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = cudnn_before
        if cublas_before is None:
            os.environ.pop(_CUBLAS, None)
        else:
            os.environ[_CUBLAS] = cublas_before


def environment(pipe: QwenImageEdit | None) -> dict[str, Any]:
    """Versions, machine, device and dtype, ready for JSON."""
    device = None if pipe is None else pipe.device
    return {
        "qwenedit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": None if device is None else str(device),
        "device_name": torch.cuda.get_device_name(device) if device and device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "dtype": None if pipe is None else str(pipe.dtype).removeprefix("torch."),
    }


def _pinned() -> dict[str, Any]:
    """The settings in force that decide about bits."""
    return {
        "attention": SDPBackend.MATH.name,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get(_CUBLAS),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
