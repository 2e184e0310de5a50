"""The embedded model's configs, and the writing of its checkpoint folder.

The folder has the official layout, so the reference pipelines read it too. train.py fills it.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwenedit.files import replacing_file
from qwenedit.foreign import read_json
from qwenedit.latents import PATCH
from qwenedit.mini import vocabulary
from qwenedit.networks import mmdit, vae
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.weights.keys import NETWORKS, ours_to_official
from qwenedit.weights.writing import FILES, write_json

AREA = 64 * 64  # of pictures, for the VAE and for the language model

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
TRANSFORMER = mmdit.MMDiTConfig(
    patch_size=2,
    in_channels=64,
    out_channels=16,
    num_layers=6,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=128,
    guidance_embeds=False,
    axes_dims_rope=(8, 12, 12),
)
AUTOENCODER = vae.VAEConfig(
    base_dim=16,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    attn_scales=(),
    temperal_downsample=(False, True, True),
    dropout=0.0,
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
)
TOKEN = PATCH * AUTOENCODER.spatial_factor  # the side of a token in pixels
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 65536,
    "merge_size": 2,
    "min_pixels": 256,
    "patch_size": 8,
    "processor_class": "Qwen2VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}

COMPONENTS = {  # of model_index.json: the library and class of each
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def text_encoder_config(ids: dict[str, int]) -> dict[str, Any]:
    """The text encoder's config.json, in the nested form; `ids` are the added tokens' ids."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen2_5_vl",
        "text_config": {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 384,
            "max_position_embeddings": 4096,
            "model_type": "qwen2_5_vl_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": -(-(max(ids.values()) + 1) // 64) * 64,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": 2,
            "fullatt_block_indexes": [1],
            "hidden_act": "silu",
            "hidden_size": 64,
            "in_channels": 3,
            "intermediate_size": 192,
            "model_type": "qwen2_5_vl",
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 32,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def write_shared(folder: Path) -> None:
    """Everything but the networks: index, tokenizer, processor, scheduler."""
    vocabulary.write(folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "processor", dirs_exist_ok=True)
    write_json(folder / "processor" / "preprocessor_config.json", PREPROCESSOR)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "QwenImageEditPipeline",
            "_diffusers_version": "0.39.0",
            "_qwenedit": {"vae_area": AREA, "vl_area": AREA},
            **COMPONENTS,
        },
    )
    scheduler = {"_class_name": COMPONENTS["scheduler"][1], **SCHEDULER}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def write_network(folder: Path, network: VisionLanguage | MMDiT | VAE) -> None:
    """One network's config and bfloat16 weights, in the official names, beside what `write_shared` wrote."""
    if isinstance(network, VisionLanguage):
        component = "text_encoder"
        config = text_encoder_config(read_json(folder / "tokenizer" / "added_tokens.json"))
    else:
        component = "transformer" if isinstance(network, MMDiT) else "vae"
        config = {"_class_name": COMPONENTS[component][1], **asdict(network.config)}
    write_json(folder / component / "config.json", config)
    table = NETWORKS[component].table
    tensors = {
        ours_to_official(table, key): x.to("cpu", torch.bfloat16) for key, x in network.state_dict().items()
    }
    with replacing_file(folder / component / f"{FILES[component]}.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
