"""Tiny ControlNets with random weights: in the official layout, written by the reference library, or
blockwise ones in DiffSynth's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import diffusers
import safetensors.torch

from qwenedit.networks.blockwise_controlnet import (
    KEY_TABLE,
    BlockwiseControlNet,
    BlockwiseControlNetConfig,
)
from qwenedit.weights.keys import ours_to_official
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


@functools.cache
def blockwise(
    *, layers: int = 2, width: int = 32, channels: int = 64, extra_condition_channels: int = 0, seed: int = 7
) -> Path:
    """A file with a blockwise net in DiffSynth's naming, which fits `tests/tiny.py` by default."""
    net = blockwise_network(layers, width, channels, extra_condition_channels, seed)
    state = {ours_to_official(KEY_TABLE, name): x.contiguous() for name, x in net.state_dict().items()}
    path = temporary() / "model.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def blockwise_network(
    layers: int = 2, width: int = 32, channels: int = 64, extra_condition_channels: int = 0, seed: int = 7
) -> BlockwiseControlNet:
    config = BlockwiseControlNetConfig(
        num_layers=layers,
        width=width,
        in_channels=channels,
        extra_condition_channels=extra_condition_channels,
    )
    net = randomise_(BlockwiseControlNet(config), seed).requires_grad_(False)
    assert isinstance(net, BlockwiseControlNet)
    return net


def fitting(transformer: Path, **changes) -> Path:
    """A ControlNet that fits the transformer of a checkpoint's folder, for models of other sizes."""
    config = json.loads((transformer / "transformer" / "config.json").read_text())
    return controlnet(
        heads=config["num_attention_heads"], axes=tuple(config["axes_dims_rope"]),
        channels=config["in_channels"], joint_attention_dim=config["joint_attention_dim"], **changes,
    )  # fmt: skip
