"""The checkpoints that the benchmarks load: official configs, some cut in depth, with random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwenedit import mini
from qwenedit.weights.configs import network_config
from qwenedit.weights.keys import NETWORKS, ours_to_official

DATA = Path(__file__).parents[1] / "tests" / "data"
BLOCKS = 2  # of the transformer's 60
LAYERS, VISION_DEPTH, VOCABULARY = 2, 4, 4096  # of the text encoder's 28, 32, 152 064
IMAGE_TOKEN = VOCABULARY - 1
OFFICIAL = dict(
    patch_size=2, in_channels=64, out_channels=16, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=3584, guidance_embeds=False, axes_dims_rope=(16, 56, 56),
)  # fmt: skip


def write_component(folder: Path, component: str, config: dict[str, Any]) -> None:
    """Write one network's folder: bfloat16 weights in the official names that keep activations near 1."""
    network, path = NETWORKS[component], folder / component
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        state = network.module(network_config(folder, component)).state_dict()
    shapes = {ours_to_official(network.table, name): tuple(x.shape) for name, x in state.items()}
    if component == "text_encoder":
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]  # the reference's, not ours
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan_in = value[0].numel()
        tensors[name] = (value / fan_in**0.5 if fan_in > 1 else 0.6 + 0.3 * value).bfloat16()
    file = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
    save_file(tensors, path / file, {"format": "pt"})


def write_vae(folder: Path) -> None:
    write_component(folder, "vae", json.loads((DATA / "configs" / "vae.json").read_text()))


def transformer_config(blocks: int) -> dict[str, Any]:
    return {"_class_name": "QwenImageTransformer2DModel", "num_layers": blocks, **OFFICIAL}


def write_transformer(folder: Path) -> None:
    write_component(folder, "transformer", transformer_config(BLOCKS))


def write_text_encoder(folder: Path) -> None:
    configs = json.loads((DATA / "official_configs.json").read_text())
    config = configs["Qwen-Image-Edit"]["text_encoder/config.json"]
    cut = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config |= cut | {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": IMAGE_TOKEN - 1}
    config["text_config"] |= cut | {"layer_types": ["full_attention"] * LAYERS}
    for one in (config, config["text_config"]):
        one |= {"bos_token_id": 1, "eos_token_id": 2}
    config["vision_config"] |= {"depth": VISION_DEPTH, "fullatt_block_indexes": [VISION_DEPTH - 1]}
    write_component(folder, "text_encoder", config)


def mini_folder(folder: Path, area: int, *, plus: bool) -> Path:
    """The embedded model as a checkpoint for pictures of an area; with `plus`, for several pictures."""
    path = folder / f"mini-{area}-{'plus' if plus else 'edit'}"
    if path.exists():
        return path
    index = json.loads((mini.CHECKPOINT / "model_index.json").read_text())
    index["_qwenedit"]["vae_area"] = area
    if plus:
        index["_class_name"] = "QwenImageEditPlusPipeline"
    path.mkdir()
    for part in mini.CHECKPOINT.iterdir():
        if part.is_dir():
            os.symlink(part, path / part.name)
    (path / "model_index.json").write_text(json.dumps(index))
    return path


WRITERS: dict[str, Callable[[Path], None]] = {
    "vae": write_vae,
    "transformer": write_transformer,
    "text_encoder": write_text_encoder,
}
