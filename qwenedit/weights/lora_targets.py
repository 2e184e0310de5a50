"""Which layers a new LoRA changes: trainers' choices by name, or a pattern of official names."""

from __future__ import annotations

import re

from torch import nn

from qwenedit.foreign import shown
from qwenedit.networks.mmdit import KEY_TABLE, MMDiT
from qwenedit.weights.keys import ours_to_official

__all__ = ["TARGETS", "linear_layers", "target_layers"]

_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"

# Patterns of official names, by the trainers that choose these layers. What each leaves out:
TARGETS = {
    "attention": rf"transformer_blocks\.\d+\.{_ATTENTION}",  # all but the 8 layers of each attention
    "diffusers": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",  # the text stream, too
    "musubi": r"transformer_blocks\.\d+\.(?!.*_mod\.).*",  # of the blocks: the modulation
    "diffsynth": rf"transformer_blocks\.\d+\.({_ATTENTION}|(img|txt)_(mlp\.net\.2|mod\.1))",  # mlp.net.0
    "ai_toolkit": r"transformer_blocks\.\d+\..*",  # of the blocks: nothing
}


def linear_layers(mmdit: MMDiT) -> dict[str, str]:
    """Our names of the transformer's linear layers, by their official names; LoRAs may be there already."""
    ours = [
        name.removesuffix(".base") for name, module in mmdit.named_modules() if isinstance(module, nn.Linear)
    ]
    return {ours_to_official(KEY_TABLE, f"{name}.weight").removesuffix(".weight"): name for name in ours}


def target_layers(mmdit: MMDiT, targets: str) -> list[str]:
    """Our names of the layers that `targets` selects, in the order of the network.

    Args:
        targets: a key of `TARGETS`, or a regular expression for the whole of official names, such as
            r"transformer_blocks\\.(3|4)\\.attn\\.to_[qk]".

    Raises:
        ValueError: not a regular expression, or no layer matches.
    Source: `target_modules` of diffusers' train_dreambooth_lora_qwen_image.py; `exclude_patterns` of
        musubi-tuner's lora_qwen_image.py; `--lora_target_modules` of DiffSynth-Studio's Qwen-Image examples;
        `get_transformer_block_names` of ai-toolkit. A text is matched as peft matches it.
    """
    if not isinstance(targets, str):
        raise ValueError(f"targets are {shown(repr(targets))}, wanted {_WANTED}")
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"targets are {shown(targets)!r} ({error}), wanted {_WANTED}") from None
    layers = linear_layers(mmdit)
    if not (found := [ours for official, ours in layers.items() if pattern.fullmatch(official)]):
        raise ValueError(
            f"targets are {shown(targets)!r}, which matches no layer of {len(layers)}, wanted {_WANTED}"
        )
    return found


_WANTED = f"one of {', '.join(TARGETS)}, or a regular expression of names like transformer_blocks.0.attn.to_q"
