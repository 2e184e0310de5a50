"""The same bits from the same run: what torch has to be told, pinned for a while, and written down.

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

__all__ = ["deterministic"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")  # the two values that NVIDIA documents as deterministic


@contextmanager
def deterministic(pipe: QwenImageEdit | None = None) -> Iterator[dict[str, Any]]:
    """Pin what may change a bit from run to run, for the length of a `with` block; then all is as before.

    Pinned are: deterministic algorithms (an operation that has none raises a RuntimeError), cuDNN's choice of
    them without benchmarks, cuBLAS's workspace, and attention as plain matrix products and softmax (so that
    the last bits differ from those of a run outside). What is given is a dict for a run's manifest, ready for
    JSON: what was pinned, and what decides about bits but is left alone, as versions, the device, threads and
    the precision of matrix products. With a `pipe`, its device and dtype are in it.

    The same bits are promised for the same manifest and the same batch. That a row does not depend on its
    batch is another matter: see `micro_batch` of `sampler.predictor`. torch's settings are the whole
    process's: other threads see them too. cuBLAS reads its workspace when it is first used; in a process that
    has used CUDA before, set CUBLAS_WORKSPACE_CONFIG=:4096:8 before it starts.

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
            yield _manifest(pipe)
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = cudnn_before
        if cublas_before is None:
            os.environ.pop(_CUBLAS, None)
        else:
            os.environ[_CUBLAS] = cublas_before


def _manifest(pipe: QwenImageEdit | None) -> dict[str, Any]:
    """What is in force now."""
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
        "attention": SDPBackend.MATH.name,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get(_CUBLAS),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
