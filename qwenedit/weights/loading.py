"""Load checkpoints into modules, with strict names and shapes.

Each module is built on the meta device and compared with the headers of its files. Then each tensor is read
once from the memory-mapped file into its place, in the wanted dtype and on the wanted device. At most one
tensor is in memory twice at any time. Of a weight that is split over processes each reads its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qwenedit.checks import ProgressBar, progress_bar
from qwenedit.weights.formats import Stored
from qwenedit.weights.gguf_file import GGUFFile, is_gguf
from qwenedit.weights.report import Compared, Report, compare
from qwenedit.weights.slices import own_part, part_bytes, placed_like

__all__ = [
    "compare_networks", "dtype_beside", "load_network", "loading_bar", "read_networks", "require_fitting",
    "run_dtype",
]  # fmt: skip


def compare_networks(
    folder: Path, components: Sequence[str], files: Mapping[str, Path] | None = None
) -> list[Compared]:
    """Networks of a checkpoint folder ("text_encoder", "transformer" or "vae"), compared with their files.

    `files` maps components to other files with their weights, in any layout of `formats`.

    Raises:
        ValueError: a file is broken or does not fit its module; the message lists all its problems.
    """
    compared, files = [], files or {}
    for component in components:
        one = compare(folder, component, files.get(component))
        require_fitting(one.report, files.get(component, folder / component))
        compared.append(one)
    return compared


def require_fitting(report: Report, where: Path) -> None:
    """Raise a ValueError with the problems of a report on this file or folder, if it has any."""
    if problems := report.problems():
        raise ValueError(f"{where} does not fit the {report.component}: {problems}")


def read_networks(
    compared: Sequence[Compared],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    manage: Callable[..., bool] | None = None,
) -> list[nn.Module]:
    """Read the weights of compared networks; the networks are then ready to run.

    Parameters own their memory (the files may change afterwards) and require no gradient. `dtype` is as in
    `run_dtype`. A network for which `manage` returns True is not read here: see `residency.Modes.manage`.

    Raises:
        ValueError: a file cannot be read.
    """
    for module, found, report in compared:
        wanted = run_dtype(found.values(), dtype)
        if manage is None or not manage(report.component, module, found, device, wanted, progress):
            with loading_bar(report.component, _bytes(module, found), progress) as bar:
                _read(module, found, device, wanted, bar)
    return [one.module.eval() for one in compared]


def load_network(
    folder: Path,
    component: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> nn.Module:
    """One network of a checkpoint folder: `compare_networks`, then `read_networks`."""
    compared = compare_networks(folder, [component])
    (module,) = read_networks(compared, device=device, dtype=dtype, progress=progress)
    return module


def run_dtype(weights: Iterable[Stored], dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a network runs in: `dtype` if given, else None, which keeps each weight's stored dtype.

    Networks with fp8 or GGUF weights run in bfloat16 by default.
    """
    return dtype or (None if all(stored.plain for stored in weights) else torch.bfloat16)


def dtype_beside(weights: Mapping[str, Stored], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a network that works with the one of these weights, which runs in `run_dtype`."""
    dtype = run_dtype(weights.values(), dtype)
    if dtype is not None:
        return dtype
    first: torch.dtype = getattr(torch, next(iter(weights.values())).dtype)
    return first


def loading_bar(component: str, total: int, progress: bool) -> ProgressBar:
    """A progress bar over `total` bytes."""
    return progress_bar(
        progress=progress, total=total, desc=f"loading {component}", unit="B", unit_scale=True
    )


def _bytes(module: nn.Module, found: Mapping[str, Stored]) -> int:
    """How many bytes this process reads."""
    return sum(part_bytes(module.get_parameter(name), stored.bytes) for name, stored in found.items())


def _read(
    module: nn.Module,
    found: Mapping[str, Stored],
    device: torch.device,
    dtype: torch.dtype | None,
    bar: ProgressBar,
) -> None:
    """Read each tensor from its file into its place."""
    by_file: dict[Path, list[tuple[int, str, Stored]]] = {}
    for name, stored in found.items():
        by_file.setdefault(stored.path, []).append((stored.start, name, stored))
    for path, entries in by_file.items():
        try:
            opened: Any = GGUFFile(path) if is_gguf(path) else safe_open(path, framework="pt")
            with opened as file:
                for _, name, stored in sorted(entries):  # in the order of the file: one pass over the disk
                    weight = module.get_parameter(name)
                    value = stored.read(file, own_part(weight))
                    own = torch.empty(value.shape, dtype=dtype or value.dtype, device=device)
                    own.copy_(value)
                    parent, _, leaf = name.rpartition(".")
                    setattr(module.get_submodule(parent), leaf, placed_like(own, weight))
                    bar.update(part_bytes(weight, stored.bytes))
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
