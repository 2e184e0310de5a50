"""Write a LoRA as a file that this library, diffusers, ComfyUI and kohya's tools load alike.

diffusers   transformer.X.lora_A.weight, .lora_B.weight; rank and alpha in the metadata, as by peft
comfyui     diffusion_model.X.lora_down.weight, .lora_up.weight, .alpha
kohya       lora_unet_X_with_underscores.lora_down.weight, .lora_up.weight, .alpha
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwenedit.files import replacing_file
from qwenedit.foreign import shown
from qwenedit.networks.low_rank import Change, Kronecker

__all__ = ["LAYOUTS", "write_lora"]

LAYOUTS = ("diffusers", "comfyui", "kohya")


def write_lora(
    file: str | os.PathLike[str], changes: Mapping[str, Change], layout: str, what: str = "the LoRA"
) -> None:
    """Write the changes of layers, by their official names, as a safetensors file, whole or not at all.

    Matrices are written in the dtype that they are held in. Alpha is factor * rank; the scale, which is the
    user's, is not written.

    Raises:
        ValueError: an unknown layout, or one that cannot hold these changes; a folder in place of the file,
            or no folder to write it in.
    Source: `save_lora_weights` of diffusers 0.39.0 with peft 0.18's `LoraConfig`; `weight_adapter/lora.py` of
        ComfyUI; `networks/lora.py` of musubi-tuner.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {shown(repr(layout))}, wanted one of {', '.join(LAYOUTS)}")
    if os.path.isdir(file):
        raise ValueError(f"{shown(file)} is a folder, wanted the name of a file, such as lora.safetensors")
    if lokr := [name for name, change in changes.items() if isinstance(change, Kronecker)]:
        raise ValueError(f"{what} changes {lokr[0]} by a Kronecker product, which no layout here holds")
    if layout == "diffusers":
        tensors = _as_peft(changes)
        metadata = {"format": "pt", "lora_adapter_metadata": _peft_config(changes, what)}
    else:
        tensors, metadata = _with_alpha(changes, what, flat=layout == "kohya"), {"format": "pt"}
    own = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    with replacing_file(file) as temporary:
        save_file(own, temporary, metadata)


def _as_peft(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    tensors = {}
    for name, change in changes.items():
        start = f"transformer.{name}"
        tensors[f"{start}.lora_A.weight"] = change.down
        tensors[f"{start}.lora_B.weight"] = change.up
        if change.bias is not None:
            tensors[f"{start}.lora_B.bias"] = change.bias
        if change.magnitude is not None:
            tensors[f"{start}.lora_magnitude_vector"] = change.magnitude
    return tensors


def _peft_config(changes: Mapping[str, Change], what: str) -> str:
    """The keys of peft's `LoraConfig` that describe the file; later versions have more, with defaults."""
    ranks = {name: change.down.shape[0] for name, change in changes.items()}
    alphas = {name: _alpha(change) for name, change in changes.items()}
    (rank, _), (alpha, _) = (Counter(one.values()).most_common(1)[0] for one in (ranks, alphas))
    with_bias, with_magnitude = (
        {getattr(change, part) is not None for change in changes.values()} for part in ("bias", "magnitude")
    )
    if len(with_bias) > 1 or len(with_magnitude) > 1:
        part = "a bias" if len(with_bias) > 1 else "DoRA's magnitudes"
        raise ValueError(f"{what} has {part} in some layers only, which the layout 'diffusers' cannot hold")
    config = {
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max(change.dropout for change in changes.values()),
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "target_modules": list(changes),
        "use_dora": with_magnitude == {True},
        "use_rslora": False,
        **({"lora_bias": True} if with_bias == {True} else {}),  # older versions do not know the key
    }
    return json.dumps({f"transformer.{key}": value for key, value in config.items()}, indent=2)


def _with_alpha(changes: Mapping[str, Change], what: str, *, flat: bool) -> dict[str, Tensor]:
    tensors = {}
    for name, change in changes.items():
        if change.bias is not None:
            raise ValueError(f"{what} has a bias of lora_B, which only the layout 'diffusers' holds")
        start = f"lora_unet_{name.replace('.', '_')}" if flat else f"diffusion_model.{name}"
        tensors[f"{start}.lora_down.weight"] = change.down
        tensors[f"{start}.lora_up.weight"] = change.up
        tensors[f"{start}.alpha"] = torch.tensor(float(_alpha(change)))
        if change.magnitude is not None:
            tensors[f"{start}.dora_scale"] = change.magnitude[:, None]
    return tensors


def _alpha(change: Change) -> float:
    alpha = change.factor * change.down.shape[0]
    return int(alpha) if alpha == int(alpha) else alpha
