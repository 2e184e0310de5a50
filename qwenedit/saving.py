"""Write a pipeline as a checkpoint folder in the official layout, which `load` and the reference read."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwenedit.checks import progress_bar
from qwenedit.files import is_leftover, new_folder, require_new
from qwenedit.foreign import read_json, shown
from qwenedit.memory.reading import WeightFiles
from qwenedit.memory.residency import origin_of, weight_value
from qwenedit.networks.low_rank import LowRankLinear
from qwenedit.system import System
from qwenedit.weights.configs import config_from, network_config
from qwenedit.weights.formats import Stored, dequantise, read_weights
from qwenedit.weights.keys import NETWORKS, ours_to_official
from qwenedit.weights.slices import is_first, is_split, whole
from qwenedit.weights.writing import write_json, write_weights

__all__ = ["SHARD", "save"]

SHARD = 5 * 10**9  # bytes of a file, at most


def save(system: System, folder: str | os.PathLike[str], shard: int = SHARD) -> None:
    """Write the system's checkpoint to a new folder, whole or not at all.

    Of processes that share the system each calls this, and the first one writes.

    Raises:
        ValueError: LoRAs that are not fused; a system without its text encoder, or that `load` did not make;
            a folder that is not empty or cannot be made; files of the checkpoint that are gone.
    """
    networks = {"text_encoder": system.vision_language, "transformer": system.mmdit, "vae": system.vae}
    source = _require_whole(system, networks)
    split = [network for network in networks.values() if network is not None and is_split(network)]
    if (split or system.processes is not None) and not is_first():
        if split:
            require_new(folder)
        for weight in (weight for network in split for weight in network.parameters()):
            whole(weight)  # the first process asks for it, and this one has a part of it
        return
    with new_folder(folder) as temporary:
        shutil.copy(source / "model_index.json", temporary)
        for name in ("tokenizer", "processor"):
            if (source / name).is_dir():
                _copy(source / name, temporary / name)
        _copy(source / "scheduler", temporary / "scheduler", only=".json")
        raw = read_json(source / "scheduler" / "scheduler_config.json")
        if config_from(type(system.scheduler), raw, "scheduler") != system.scheduler:
            write_json(temporary / "scheduler" / "scheduler_config.json", {**raw, **system.scheduler.config})
        for component, network in networks.items():
            assert network is not None
            _copy(source / component, temporary / component, only=".json")
            _write_config(source, component, network, temporary / component / "config.json")
            weights = _weights(source, component, network)
            total = sum(size for size, _ in weights.values())
            with progress_bar(
                progress=system.progress, total=total, desc=f"saving {component}", unit="B", unit_scale=True
            ) as bar:
                write_weights(temporary / component, component, weights, shard, bar)


def _require_whole(system: System, networks: dict[str, Any]) -> Path:
    """The folder that the system was loaded from."""
    if system.folder is None or any(one is not None and origin_of(one) is None for one in networks.values()):
        raise ValueError(
            "the pipeline was not made by load, so its tokenizer and configs are unknown: wanted one that was"
        )
    if system.vision_language is None:
        raise ValueError(
            "the pipeline was loaded without its text encoder, wanted a whole one: load(text_encoder=True)"
        )
    if any(isinstance(module, LowRankLinear) for module in system.mmdit.modules()):
        raise ValueError(
            "LoRAs are beside the weights, which the official layout cannot hold: call fuse_lora or "
            "unload_lora_weights first; save_lora_weights writes a LoRA"
        )
    if not system.folder.is_dir():
        raise ValueError(f"{shown(system.folder)}, from which tokenizer and configs are copied, is gone")
    return system.folder


def _copy(source: Path, target: Path, only: str = "") -> None:
    """Copy the files of a folder whose names end like this, without indexes of weights."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        known = path.name.endswith(only) and not path.name.endswith(".index.json")
        if path.is_file() and known and not is_leftover(path):
            shutil.copy(path, target / path.name)


def _write_config(source: Path, component: str, network: Any, file: Path) -> None:
    """Change a copied config.json where the network differs from it: in `zero_cond_t`, or in its dtype."""
    raw = read_json(file)
    if component == "text_encoder":
        dtypes = {x.dtype for x in network.parameters()}
        key = "dtype" if "dtype" in raw else "torch_dtype"
        if len(dtypes) == 1:
            raw[key] = str(dtypes.pop()).removeprefix("torch.")
    elif network_config(source, component) != network.config:
        raw |= dataclasses.asdict(network.config)
    if raw != read_json(file):
        write_json(file, raw)


def _weights(source: Path, component: str, network: nn.Module) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """The weights by official names, as `write_weights` takes them; also those that the network lacks."""
    names = NETWORKS[component]
    weights: dict[str, tuple[int, Callable[[], Tensor]]] = {
        ours_to_official(names.table, name): (x.numel() * x.element_size(), partial(weight_value, network, x))
        for name, x in network.named_parameters()
    }
    if names.skipped:  # the language model's head, which the reference would otherwise make up
        found = origin_of(network)
        assert found is not None
        files = {stored.path for stored in found.values()}
        own = {path.parent for path in files} == {source / component}
        contents = read_weights(source / component if own else files.pop(), component)
        dtype = next(network.parameters()).dtype
        for stored in contents.tensors.values():
            if names.hub_key(stored.name) in names.skipped and stored.readable:
                size = math.prod(stored.shape) * dtype.itemsize
                weights[names.hub_key(stored.name)] = size, partial(_read, stored, dtype)
    return weights


def _read(stored: Stored, dtype: torch.dtype) -> Tensor:
    ((_, value, scale),) = WeightFiles([stored]).read([stored])
    return (value if scale is None else dequantise(value, scale)).to(dtype)
