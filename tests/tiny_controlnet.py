"""Tiny ControlNets in the official layout, written by the reference library, with random weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import diffusers

from tests.support import randomise_
from tests.tiny import temporary

INPAINTING = 4  # `extra_condition_channels` of nets that take a mask


@functools.cache
def controlnet(
    *,
    layers: int = 2,
    heads: int = 2,
    axes: tuple[int, int, int] = (4, 6, 6),
    channels: int = 64,
    joint_attention_dim: int = 24,
    extra_condition_channels: int = 0,
    seed: int = 7,
) -> Path:
    """A folder with config.json and weights, which fits the transformers of `tests/tiny.py` by default.

    The weights depend on the seed alone; the layers that training starts at zero are random, too.
    """
    folder = temporary()
    module = diffusers.QwenImageControlNetModel(
        num_layers=layers, attention_head_dim=sum(axes), num_attention_heads=heads, axes_dims_rope=axes,
        in_channels=channels, out_channels=channels // 4, joint_attention_dim=joint_attention_dim,
        extra_condition_channels=extra_condition_channels,
    )  # fmt: skip
    randomise_(module, seed)
    module.save_pretrained(folder)
    return folder


def fitting(transformer: Path, **changes) -> Path:
    """A ControlNet that fits the transformer of a checkpoint's folder, for models of other sizes."""
    config = json.loads((transformer / "transformer" / "config.json").read_text())
    return controlnet(
        heads=config["num_attention_heads"], axes=tuple(config["axes_dims_rope"]),
        channels=config["in_channels"], joint_attention_dim=config["joint_attention_dim"], **changes,
    )  # fmt: skip
