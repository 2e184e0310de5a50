"""Checkpoints -> modules: strict about names and shapes, and never more than one tensor too many.

A module is built on the meta device, its tensors are compared with the files' headers, and only then is each
tensor read, once, from the memory-mapped file into its place in the wanted dtype and on the wanted device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from qwenedit.files import FLOATS
from qwenedit.weights.formats import Stored
from qwenedit.weights.gguf_file import GGUFFile, is_gguf
from qwenedit.weights.report import Found, Report, compare

__all__ = ["load_network", "load_networks"]


def _run_dtype(report: Report) -> torch.dtype | None:
    """What weights run in that nobody asked a dtype for: None is what each is stored in, if it can run."""
    plain = {str(dtype).removeprefix("torch.") for dtype in FLOATS}
    return None if plain >= report.dtypes.keys() else torch.bfloat16


def load_networks(
    folder: Path,
    components: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    files: Mapping[str, Path] | None = None,
    elsewhere: Callable[..., bool] | None = None,
) -> list[nn.Module]:
    """Networks of a checkpoint folder ("text_encoder", "transformer" or "vae"), ready to run.

    `files` has components whose weights are elsewhere, in any layout of `formats`. `dtype` None keeps what
    the files store, and makes bfloat16 of files that have fp8 or are GGUF. Parameters own their memory (the
    files may change afterwards), want no gradient, and at no time is more than one tensor held twice.
    `elsewhere` may take a network over, unread: see `residency.Modes.manage`.

    Raises:
        ValueError: files that are broken or do not fit their module, all problems of a component in one
            message, before any weight of any component is read.
    """
    compared, files = [], files or {}
    for component in components:
        module, found, report = compare(folder, component, files.get(component))
        if not report.ok:
            where = files.get(component, folder / component)
            raise ValueError(f"{where} does not fit the {component}: {report.problems()}")
        compared.append((module, found, report))
    for module, found, report in compared:
        wanted = dtype or _run_dtype(report)
        if elsewhere is None or not elsewhere(report.component, module, found, device, wanted, progress):
            with progress_bar(report.component, report.bytes, progress) as bar:
                _read(module, found, device, wanted, bar)
    return [module.eval() for module, _, _ in compared]


def progress_bar(component: str, total: int, progress: bool) -> tqdm:
    return tqdm(
        total=total,
        desc=f"loading {component}",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )


def load_network(
    folder: Path,
    component: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> nn.Module:
    """One of `load_networks`."""
    (module,) = load_networks(folder, [component], device=device, dtype=dtype, progress=progress)
    return module


def _read(
    module: nn.Module, found: Found, device: torch.device, dtype: torch.dtype | None, bar: tqdm
) -> None:
    """Each tensor from its file into its place."""
    by_file: dict[Path, list[tuple[int, str, Stored]]] = {}
    for name, stored in found.items():
        by_file.setdefault(stored.path, []).append((stored.start, name, stored))
    for path, entries in by_file.items():
        try:
            opened: Any = GGUFFile(path) if is_gguf(path) else safe_open(path, framework="pt")
            with opened as file:
                for _, name, stored in sorted(entries):  # in the order of the file: one pass over the disk
                    value = stored.read(file)
                    own = torch.empty(value.shape, dtype=dtype or value.dtype, device=device)
                    own.copy_(value)
                    parent, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(parent), leaf, nn.Parameter(own, requires_grad=False))
                    bar.update(stored.bytes)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
