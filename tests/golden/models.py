"""The tiny models and inputs of the golden file, made of nothing but names and shapes.

A tensor's values follow from its official name alone, so that the recorder (with the references) and the test
(without them) make the same model independently of the order in which either lists its parameters.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

TRANSFORMER = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(4, 6, 6), zero_cond_t=True,
)  # fmt: skip
AUTOENCODER = dict(
    base_dim=8, z_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1, attn_scales=(),
    temperal_downsample=(False, True, True), dropout=0.0,
    latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 0.7, 1.1, 2.0),
)  # fmt: skip
IMAGE_TOKEN, VISION_START, VISION_END = 91, 92, 93
TEXT_ENCODER = {
    "image_token_id": IMAGE_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "video_token_id": 94,
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 512, "hidden_act": "silu", "use_sliding_window": False,
        "rope_scaling": {"mrope_section": [1, 1, 1], "rope_type": "default", "type": "default"},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "in_channels": 3,
        "out_hidden_size": 24, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 32, "fullatt_block_indexes": [1], "hidden_act": "silu", "tokens_per_second": 2,
    },
}  # fmt: skip

SCHEDULER = dict(
    num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
    base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
)  # fmt: skip
SCHEDULES = [(2, 16), (4, 4096), (8, 3182), (28, 4107), (40, 4096), (50, 4056), (50, 8192)]  # steps, tokens
SAMPLED = [(2, 16), (4, 4096), (8, 1024), (20, 4096), (30, 777)]  # steps, tokens; runs of samplers
SAMPLERS = Path(__file__).parent / "samplers.safetensors"

GRIDS = [(1, 3, 5), (1, 4, 2)]  # of the target and of one reference: odd, not square, not alike
PATCH_GRIDS = [(1, 6, 10), (1, 4, 6)]  # two pictures with windows cut at the border


def seeded(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def sampled_latents(steps: int) -> Tensor:
    return seeded(f"latents of {steps} steps", 2, 3, 4)


def sampled_field(latents: Tensor, sigma: float) -> Tensor:
    """A velocity that bends, and mixes channels."""
    return torch.tanh(1.3 * latents + sigma) + 0.2 * latents.roll(1, -1)


def weight(official_name: str, shape: tuple[int, ...]) -> Tensor:
    """Random and non-trivial: matrices by fan-in, vectors spread about 0.6."""
    noise = seeded(official_name, *shape)
    fan_in = noise[0].numel()
    return noise * (1.3 / fan_in**0.5) if fan_in > 1 else 0.6 + 0.3 * noise


def token_ids() -> tuple[Tensor, Tensor]:
    """Two rows: text, a picture, text; the second is shorter and padded on the right. Mask with it."""
    rows = []
    for row, (_, height, width) in enumerate(PATCH_GRIDS):
        text = (seeded(f"text {row}", 12).abs() * 30).long().clamp(0, 90).tolist()
        pads = [IMAGE_TOKEN] * (height * width // 4)
        rows.append([*text[:4], VISION_START, *pads, VISION_END, *text[4 : 12 - 3 * row]])
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return torch.tensor([row + [0] * (length - len(row)) for row in rows]), mask


def transformer_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """img, txt, timestep and the text mask of a batch of two."""
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    return seeded("img", 2, 23, 16), seeded("txt", 2, 6, 24), torch.tensor([0.873, 0.302]), mask


def video() -> Tensor:
    """(1, 3, 5, 24, 40) pixels in [-1, 1]: five frames, not square."""
    return seeded("video", 1, 3, 5, 24, 40).tanh()


def picture() -> Image.Image:
    levels = (seeded("picture", 37 * 53 * 3).abs() * 90).clamp(0, 255).to(torch.uint8)
    return Image.frombytes("RGB", (53, 37), bytes(levels.tolist()))
