"""The networks of DiffSynth-Studio and DiffSynth-Engine, built from a checkpoint's configs.

Their modules compute as they are. Where their arguments differ from those of diffusers or transformers, a
subclass here takes those and hands them on, so that stages.py runs every reference alike.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.networks.vae import VAEConfig
from qwenedit.networks.vision_language import VisionLanguageConfig
from qwenedit.parity.oracles import oracle_module
from qwenedit.weights.configs import network_config

__all__ = ["ENGINE_ENCODER", "oracle_network"]

ENGINE_ENCODER = "models.qwen_image.qwen2_5_vl"
_THETA = 1_000_000.0  # of the engine's RoPE, a constant there


def oracle_network(folder: Path, component: str) -> Any:
    """DiffSynth's network on the meta device, but with real RoPE modules: they have no weights.

    The text encoder is the engine's, which moves its tables to their place by itself.

    Raises:
        ValueError: the package is not installed, or the config has a value that is a constant there.
    """
    config = network_config(folder, component)
    if component == "text_encoder":
        return engine_encoder(config).eval()
    build = diffsynth_transformer if component == "transformer" else diffsynth_vae
    return build(config).eval()


def diffsynth_transformer(config: MMDiTConfig) -> Any:
    """`QwenImageDiT` in the config's size, with diffusers' arguments.

    Source: the order of the modules is that of `model_fn_qwen_image` in pipelines/qwen_image.py.
    """
    official = oracle_module("diffsynth", "models.qwen_image_dit")

    class Block(official.QwenImageTransformerBlock):  # type: ignore[name-defined]
        def forward(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor, *,
            encoder_hidden_states_mask: None, **options: Any,
        ) -> Any:  # fmt: skip
            assert encoder_hidden_states_mask is None
            return super().forward(image=hidden_states, text=encoder_hidden_states, **options)

    class Time(official.TimestepEmbeddings):  # type: ignore[name-defined]
        def forward(self, timestep: Tensor, like: Tensor, addition_t: Tensor | None = None) -> Any:
            return super().forward(timestep, like.dtype, addition_t)

    rope = official.QwenEmbedLayer3DRope if config.use_layer3d_rope else official.QwenEmbedRope

    class Rope(rope):  # type: ignore[valid-type, misc]
        def forward(self, grids: list[Any], *, device: torch.device, max_txt_seq_len: int) -> Any:
            return super().forward(grids[0], [max_txt_seq_len], device)

    width, text, heads = config.width, config.joint_attention_dim, config.num_attention_heads
    with torch.device("meta"):
        network = official.QwenImageDiT(num_layers=0)
        network.img_in = nn.Linear(config.in_channels, width)
        network.txt_norm, network.txt_in = official.RMSNorm(text, eps=1e-6), nn.Linear(text, width)
        network.time_text_embed = Time(
            256, width, diffusers_compatible_format=True, scale=1000, align_dtype_to_timestep=False,
            use_additional_t_cond=config.use_additional_t_cond,
        )  # fmt: skip
        network.transformer_blocks = nn.ModuleList(
            [Block(width, heads, config.attention_head_dim) for _ in range(config.num_layers)]
        )
        network.norm_out = official.AdaLayerNorm(width, single=True)
        network.proj_out = nn.Linear(width, config.in_channels)
    network.pos_embed = Rope(theta=10000, axes_dim=list(config.axes_dims_rope), scale_rope=True)
    network.config = config
    return network


def diffsynth_vae(config: VAEConfig) -> Any:
    """`QwenImageVAE` in the config's size, with diffusers' arguments.

    It normalises by the official checkpoints' constants and does not clamp pixels; here its networks are
    compared, with diffusers' clamps, and the config's mean and standard deviation.
    """
    official = oracle_module("diffsynth", "models.qwen_image_vae")

    class VAE(official.QwenImageVAE):  # type: ignore[name-defined]
        def encode(self, pixels: Tensor) -> Any:
            mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
            posterior = SimpleNamespace(mode=lambda: mean, logvar=logvar.clamp(-30, 20))
            return SimpleNamespace(latent_dist=posterior)

        def decode(self, latents: Tensor, *, return_dict: bool) -> tuple[Tensor]:
            assert not return_dict
            return (self.decoder(self.post_quant_conv(latents)).clamp(-1, 1),)

    with torch.device("meta"):
        network = VAE(
            base_dim=config.base_dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks, temperal_downsample=list(config.temperal_downsample),
            image_channels=config.input_channels,
        )  # fmt: skip
    network.config = config
    return network


def engine_encoder(config: VisionLanguageConfig) -> Any:
    """The engine's Qwen2.5-VL, which shares no code with transformers, with transformers' arguments.

    Raises:
        ValueError: another base of RoPE than its constant.
    """
    official = oracle_module("diffsynth-engine", ENGINE_ENCODER)
    text, vision = config.text_config, config.vision_config
    if text.rope_theta != _THETA:
        raise ValueError(f"rope_theta is {text.rope_theta}, wanted {_THETA}, a constant of diffsynth-engine")

    class Rotary(official.Qwen2_5_VLRotaryEmbedding):  # type: ignore[name-defined]
        def forward(self, like: Tensor, positions: Tensor) -> Any:
            return super().forward(positions, device=like.device, dtype=like.dtype)

    of_text = dataclasses.asdict(text) | {"mrope_section": list(text.mrope_section), "attn_impl": "sdpa"}
    of_vision = dataclasses.asdict(vision) | {
        "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        "attn_impl": "sdpa",
    }
    on_meta = {"device": "meta", "dtype": torch.float32}
    parts = official.Qwen2_5_VLConfig(**of_text, image_token_id=config.image_token_id, pad_token_id=0)
    whole = official.Qwen2_5_VLForConditionalGeneration(
        official.Qwen2_5_VLVisionConfig(**of_vision), parts, **on_meta
    )
    whole.model.rotary_emb = Rotary(dim=text.head_dim)
    network = nn.Module()
    network.visual, network.language_model = whole.visual, whole.model
    return network
