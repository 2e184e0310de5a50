"""Qwen2.5-VL, the text encoder of Qwen-Image-Edit: pictures and prompt as one sequence of vectors.

Source: transformers 4.57.6, models/qwen2_5_vl/modeling_qwen2_5_vl.py (`Qwen2_5_VLModel`, SDPA attention).
The official modules differ from ours in names only (`KEY_TABLE`); the arithmetic, casts included, is the
official one. We differ in this: positions are always three-dimensional and computed by us; there are no
videos, logits or generation; a mask of ones counts as no mask. vision_tower.py has the vision tower.

    B T D    the sequence: tokens of the text and of the pictures
    H G K A  heads of queries, heads of keys and values, head dim, K/2 angles; E is inside the MLP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qwenedit.networks.ranges import CHANNELS, LAYERS, VOCABULARY, require_ranges
from qwenedit.networks.vision_tower import (
    WITHOUT_EFFECT,
    Grid,
    RMSNorm,
    VisionConfig,
    VisionTower,
    check_grids,
    rope_frequencies,
    rotate,
    softmax,
)
from qwenedit.taps import Tapped

__all__ = [
    "KEY_PREFIXES", "KEY_TABLE", "SKIPPED_KEYS", "Grid", "TextConfig", "VisionConfig", "VisionLanguage",
    "VisionLanguageConfig", "mrope_positions",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The `text_config` of text_encoder/config.json.

    Raises:
        ValueError: sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # of `rope_scaling`: angles for frame, row, column

    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0,
    }  # fmt: skip
    IGNORED: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {"model_type", "image_token_id"}

    def __post_init__(self) -> None:
        require_ranges(
            self, vocab_size=VOCABULARY, hidden_size=CHANNELS, intermediate_size=CHANNELS,
            num_hidden_layers=LAYERS, num_attention_heads=CHANNELS, num_key_value_heads=CHANNELS,
            mrope_section=CHANNELS,
        )  # fmt: skip
        if not 0 <= self.rms_norm_eps <= 1:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}, wanted 0 to 1")
        if not 1 <= self.rope_theta <= 1e15:
            raise ValueError(f"rope_theta is {self.rope_theta}, wanted 1 to 1e15")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups or self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_attention_heads {heads}, num_key_value_heads {groups}: "
                "wanted each a multiple of the next, and an even head dim"
            )
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"mrope_section is {self.mrope_section}, wanted three numbers that sum to half the head dim, "
                f"{self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """The text_encoder/config.json.

    Raises:
        ValueError: the tower's output does not fit the language model.
    """

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_id: int

    FIXED: ClassVar[dict[str, Any]] = {"model_type": "qwen2_5_vl"}
    IGNORED: ClassVar[frozenset[str]] = WITHOUT_EFFECT

    def __post_init__(self) -> None:
        require_ranges(self, image_token_id=VOCABULARY)
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"out_hidden_size of the vision tower is {self.vision_config.out_hidden_size}, "
                f"wanted hidden_size of the language model, {self.text_config.hidden_size}"
            )


class VisionLanguage(Tapped):
    """Encode a prompt with its pictures to one vector per token, after the last block and the final norm.

    Shapes: `input_ids` (B, T) long; `attention_mask` as in `LanguageModel`; `pixel_values`
        (N, C * frames * P * P), the patches of all pictures in row order, each merge x merge square of
        patches together; `image_grid_thw` one `Grid` per picture; `pictures` (M, D), the vision tower's
        output in place of the patches; `positions` (3, B, T), by default those of `mrope_positions`.
        Returns (B, T, D).
    Units: pixels as the processor normalises them. At padding the output is finite but meaningless.
    Raises: ValueError if ids, mask, patches and grids disagree.
    Source: `Qwen2_5_VLModel.forward`, its `last_hidden_state`.
    """

    TAPS = ("embeddings", "out")

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.text_config.vocab_size, config.text_config.hidden_size)
        self.vision = VisionTower(config.vision_config)
        self.language = LanguageModel(config.text_config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Sequence[Grid] | None = None,
        pictures: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        given = [x for x in (pixel_values, pictures) if x is not None]
        if len(given) != (1 if image_grid_thw else 0):
            raise ValueError("pixel_values (or pictures) and image_grid_thw: wanted both or neither")
        if positions is None:
            positions = self.positions(input_ids, attention_mask, image_grid_thw)
        x = self.embed_tokens(input_ids)
        if image_grid_thw:
            if pictures is None:
                assert pixel_values is not None
                pictures = self.vision(pixel_values, image_grid_thw)
            is_picture = input_ids == self.config.image_token_id
            if (count := int(is_picture.sum())) != len(pictures):
                raise ValueError(f"input_ids hold {count} image tokens, wanted {len(pictures)}, none masked")
            x = x.masked_scatter(is_picture[..., None], pictures.to(x.dtype))
        x = self.tap("embeddings", x, "B T D")
        return self.tap("out", self.language(x, positions, attention_mask), "B T D")

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, image_grid_thw: Sequence[Grid] | None
    ) -> Tensor:
        """`mrope_positions` (3, B, T) for ids and mask (B, T), with the config's sizes."""
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, wanted {tuple(input_ids.shape)}"
            )
        return mrope_positions(
            input_ids,
            attention_mask,
            image_grid_thw,
            image_token_id=self.config.image_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
        )


class LanguageModel(nn.Module):
    """The blocks and the final norm of Qwen2.5: (B, T, D) -> (B, T, D), causal.

    Shapes: `positions` (3, B, T): frame, row, column; `attention_mask` (B, T), 1 at real tokens, or (B, 1, T,
        T) bool, True where a query may look, or None.
    Source: `Qwen2_5_VLTextModel`. A query at padding sees itself too, so that its output is finite on any
        backend.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.rope = Rope(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        rope = self.rope(positions, x.dtype)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
        if attention_mask is not None and mask is None and not bool(attention_mask.all()):
            mask = causal_mask(x.shape[1], x.device) & attention_mask.bool()[:, None, None, :]
            mask = mask | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.norm(x)


class Block(Tapped):
    """One pre-norm block of the language model. Source: `Qwen2_5_VLDecoderLayer`."""

    TAPS = ("in", "attn_in", "mid", "mlp_in", "out")

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        x = self.tap("in", x, "B T D")
        x = self.tap("mid", x + self.attn(self.tap("attn_in", self.norm1(x), "B T D"), rope, mask), "B T D")
        return self.tap("out", x + self.mlp(self.tap("mlp_in", self.norm2(x), "B T D")), "B T D")


class Attention(Tapped):
    """Causal attention in which H / G query heads share one head of keys and values.

    Shapes: `x` (B, T, D), `rope` (B, T, K/2, 2), `mask` (B, 1, T, T) bool, True where a query may look, or
        None: causal.
    Source: `Qwen2_5_VLAttention`. With `scores` or `probs` tapped, attention is computed explicitly.
    """

    TAPS = ("q", "k", "v", "q_rot", "k_rot", "scores", "probs", "heads", "attn_out")

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.sharing = config.num_attention_heads // config.num_key_value_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, config.num_key_value_heads * config.head_dim)
        self.v = nn.Linear(width, config.num_key_value_heads * config.head_dim)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        q = self.tap("q", rearrange(self.q(x), "b t (h k) -> b t h k", k=self.head_dim), "B T H K")
        k = self.tap("k", rearrange(self.k(x), "b t (g k) -> b t g k", k=self.head_dim), "B T G K")
        v = self.tap("v", rearrange(self.v(x), "b t (g k) -> b t g k", k=self.head_dim), "B T G K")
        q = self.tap("q_rot", rotate(q, rope), "B T H K")  # in the model's dtype, unlike the tower's
        k = self.tap("k_rot", rotate(k, rope), "B T G K")

        q = q.transpose(1, 2)  # B H T K
        k = k.repeat_interleave(self.sharing, dim=2).transpose(1, 2)
        v = v.repeat_interleave(self.sharing, dim=2).transpose(1, 2)
        if self.tapped("scores", "probs"):
            heads = self.explicit_attention(q, k, v, mask)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        heads = self.tap("heads", heads.transpose(1, 2), "B T H K")
        return self.tap("attn_out", self.out(heads.flatten(2)), "B T D")

    def explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The same attention written out, so that its maps can be tapped; softmax in at least float32."""
        allowed = causal_mask(q.shape[2], q.device) if mask is None else mask
        scores = self.tap("scores", q @ k.transpose(2, 3) * self.head_dim**-0.5, "B H T T")
        probs = softmax(scores.masked_fill(~allowed, float("-inf"))).to(v.dtype)
        return self.tap("probs", probs, "B H T T") @ v


class MLP(Tapped):
    """SwiGLU without biases. Source: `Qwen2MLP`."""

    TAPS = ("mlp_hidden", "mlp_out")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tap("mlp_hidden", F.silu(self.gate(x)) * self.up(x), "B T E")
        return self.tap("mlp_out", self.down(hidden), "B T D")


class Rope(Tapped):
    """M-RoPE's table: each angle of a head follows the frame, the row or the column, by `mrope_section`.

    Shapes: `positions` (3, B, T) long -> (B, T, K/2, 2) in `dtype`; [..., 0] the cosine, [..., 1] the sine.
    Source: `Qwen2_5_VLRotaryEmbedding` and the selection in `apply_multimodal_rotary_pos_emb`; the angles
        are float32.
    """

    TAPS = ("table",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        frame, row, column = config.mrope_section
        self.axes = [0] * frame + [1] * row + [2] * column

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        frequencies = rope_frequencies(self.head_dim, self.theta, positions.device)
        angles = positions[self.axes].permute(1, 2, 0).float() * frequencies
        return self.tap("table", torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype), "B T A 2")


def mrope_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_grid_thw: Sequence[Grid] | None,
    *,
    image_token_id: int,
    spatial_merge_size: int,
) -> Tensor:
    """The position of each token: frame, row and column.

    Shapes: `input_ids`, `attention_mask` (B, T) -> (3, B, T) long; grids in the order of the rows' pictures.
    Raises: ValueError if runs of image tokens do not fit the grids.
    Source: `Qwen2_5_VLModel.get_rope_index`, which finds pictures by `<|vision_start|>`. We find them by
        their image tokens, and the counts must agree. Without any grid, image tokens are text.

    +-- positions -----------------------------------------------------------------------------------------+
    | text     one number for all three, which rises by 1 per token; padding is not counted, and has 1     |
    | picture  starts at the next number; rows and columns of TOKENS (merged patches) count from there     |
    | after it the next number is start + max(rows, columns), not start + the number of its tokens         |
    +------------------------------------------------------------------------------------------------------+
    """
    grids = list(image_grid_thw or ())
    check_grids(grids, spatial_merge_size)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = torch.ones(3, *input_ids.shape, dtype=torch.long)
    used = 0
    for row, (ids, keep) in enumerate(zip(input_ids.tolist(), real.bool().tolist(), strict=True)):
        tokens = [token for token, is_real in zip(ids, keep, strict=True) if is_real]
        places: list[Grid] = []
        start = 0
        while (at := len(places)) < len(tokens):
            if tokens[at] != image_token_id or not grids:
                places.append((start, start, start))
                start += 1
                continue
            if used == len(grids):
                raise ValueError(f"row {row} of input_ids has an image token too many for the grids {grids}")
            rows, columns = (side // spatial_merge_size for side in grids[used][1:])
            run = tokens[at : at + rows * columns].count(image_token_id)
            if run != rows * columns:
                raise ValueError(
                    f"row {row} of input_ids has {run} image tokens for picture {used}, wanted "
                    f"{rows} x {columns} = {rows * columns}"
                )
            places.extend((start, start + y, start + x) for y in range(rows) for x in range(columns))
            start += max(rows, columns)
            used += 1
        positions[:, row, torch.tensor(keep)] = torch.tensor(places, dtype=torch.long).reshape(-1, 3).T
    if used != len(grids):
        raise ValueError(f"input_ids have image tokens for {used} pictures, wanted {len(grids)}")
    return positions.to(input_ids.device)


def causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


# transformers 5 (a raw state_dict of it, too) uses the left prefix where the hub uses the right one.
KEY_PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)

SKIPPED_KEYS: tuple[str, ...] = ("lm_head.weight",)  # logits are never computed

# official (hub) name -> ours; {n} is a number, {p} is weight or bias
KEY_TABLE: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.weight", "embed_tokens.weight"),
    ("model.layers.{n}.input_layernorm.weight", "language.blocks.{n}.norm1.weight"),
    ("model.layers.{n}.self_attn.q_proj.{p}", "language.blocks.{n}.attn.q.{p}"),
    ("model.layers.{n}.self_attn.k_proj.{p}", "language.blocks.{n}.attn.k.{p}"),
    ("model.layers.{n}.self_attn.v_proj.{p}", "language.blocks.{n}.attn.v.{p}"),
    ("model.layers.{n}.self_attn.o_proj.weight", "language.blocks.{n}.attn.out.weight"),
    ("model.layers.{n}.post_attention_layernorm.weight", "language.blocks.{n}.norm2.weight"),
    ("model.layers.{n}.mlp.gate_proj.weight", "language.blocks.{n}.mlp.gate.weight"),
    ("model.layers.{n}.mlp.up_proj.weight", "language.blocks.{n}.mlp.up.weight"),
    ("model.layers.{n}.mlp.down_proj.weight", "language.blocks.{n}.mlp.down.weight"),
    ("model.norm.weight", "language.norm.weight"),
    ("visual.patch_embed.proj.weight", "vision.patch_embed.weight"),
    ("visual.blocks.{n}.norm1.weight", "vision.blocks.{n}.norm1.weight"),
    ("visual.blocks.{n}.attn.qkv.{p}", "vision.blocks.{n}.attn.qkv.{p}"),
    ("visual.blocks.{n}.attn.proj.{p}", "vision.blocks.{n}.attn.out.{p}"),
    ("visual.blocks.{n}.norm2.weight", "vision.blocks.{n}.norm2.weight"),
    ("visual.blocks.{n}.mlp.gate_proj.{p}", "vision.blocks.{n}.mlp.gate.{p}"),
    ("visual.blocks.{n}.mlp.up_proj.{p}", "vision.blocks.{n}.mlp.up.{p}"),
    ("visual.blocks.{n}.mlp.down_proj.{p}", "vision.blocks.{n}.mlp.down.{p}"),
    ("visual.merger.ln_q.weight", "vision.merger.norm.weight"),
    ("visual.merger.mlp.0.{p}", "vision.merger.up.{p}"),
    ("visual.merger.mlp.2.{p}", "vision.merger.down.{p}"),
)
