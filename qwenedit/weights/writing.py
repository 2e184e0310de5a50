"""Write a component's weights as the official checkpoints have them: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qwenedit.checks import ProgressBar

__all__ = ["FILES", "write_json", "write_weights"]

# The names of the weights' files, without their end.
FILES = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def write_weights(
    folder: Path,
    component: str,
    weights: Mapping[str, tuple[int, Callable[[], Tensor]]],
    shard: int,
    bar: ProgressBar,
) -> None:
    """Write weights, in their order, to files of at most `shard` bytes; a larger one has a file of its own.

    `weights` has, by official names, their bytes and a function that gets their values. One file's weights
    are in memory at a time.

    Source: `save_torch_state_dict` of huggingface_hub, which `save_pretrained` of diffusers uses.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (size, _) in weights.items():
        if shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    stem, end, where = FILES[component], "safetensors", {}
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{stem}{part}.{end}"
        tensors = {}
        for name in names:
            size, value = weights[name]
            tensors[name] = value().detach().to("cpu").contiguous()
            bar.update(size)
        save_file(tensors, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(size for size, _ in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / f"{stem}.{end}.index.json", index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file of a checkpoint as the official ones are written: indented, keys sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
