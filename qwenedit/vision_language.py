"""Qwen2.5-VL, the text encoder of Qwen-Image-Edit: what the pictures and the prompt say, as one sequence of vectors.

Source: transformers 4.57.6, models/qwen2_5_vl/modeling_qwen2_5_vl.py (`Qwen2_5_VLModel`, SDPA attention).
The official modules differ from ours in names only (`KEY_TABLE`); the arithmetic, casts included, is the
official one. We differ where the task does: positions are always ours and three-dimensional, videos, logits
and generation do not exist, and a mask of ones is no mask.

    B T D    the sequence: text tokens, and among them the tokens of the pictures
    H G K A  heads of queries, heads of keys and values, head dim, K/2 angles; E is inside the MLP
    N V      the vision tower: patches of all pictures in a row, its width; I is inside its MLP
    U Q O    its heads, their dim, Q/2 angles; `W X` are segments (windows or pictures) and the longest one
    L Z      the merged patches, which become tokens, and what they are merged from: merge^2 V
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qwenedit.taps import Tapped

__all__ = [
    "KEY_ALIASES", "KEY_TABLE", "SKIPPED_KEYS", "Grid", "TextConfig", "VisionConfig", "VisionLanguage",
    "VisionLanguageConfig", "mrope_positions",
]  # fmt: skip

Grid = tuple[int, int, int]  # frames, rows and columns of patches, before merging; frames is 1 for pictures

WITHOUT_EFFECT = frozenset(
    {
        "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "max_position_embeddings",
        "max_window_layers", "pad_token_id", "sliding_window", "tie_word_embeddings", "tokens_per_second",
        "torch_dtype", "transformers_version", "use_cache", "video_token_id", "vision_end_token_id",
        "vision_start_token_id", "vision_token_id",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The `vision_config` of text_encoder/config.json. Raises ValueError on sizes that do not fit together."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int  # a picture is repeated this often: the tower was made for videos
    spatial_merge_size: int  # so many patches a side become one token
    window_size: int  # pixels a side
    fullatt_block_indexes: tuple[int, ...]  # these blocks see the whole picture, the others a window
    out_hidden_size: int
    in_channels: int = 3

    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    IGNORED: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {"model_type"}

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, wanted a multiple of 4 * num_heads = {4 * self.num_heads}: "
                "a head's rotary angles are half rows, half columns"
            )
        if self.window_side < 1:
            raise ValueError(
                f"window_size is {self.window_size}, wanted at least patch_size * spatial_merge_size = "
                f"{self.patch_size * self.spatial_merge_size}"
            )

    @property
    def window_side(self) -> int:
        """Tokens (merged patches) along a window's side."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The `text_config` of text_encoder/config.json. Raises ValueError on sizes that do not fit together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[
        int, int, int
    ]  # of `rope_scaling`: angles for frame, row, column; sums to head_dim / 2

    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0,
    }  # fmt: skip
    IGNORED: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {"model_type", "image_token_id"}

    def __post_init__(self) -> None:
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
    """The text_encoder/config.json. Raises ValueError where the tower's output does not fit the language model."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_id: int

    FIXED: ClassVar[dict[str, Any]] = {"model_type": "qwen2_5_vl"}
    IGNORED: ClassVar[frozenset[str]] = WITHOUT_EFFECT

    def __post_init__(self) -> None:
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"out_hidden_size of the vision tower is {self.vision_config.out_hidden_size}, "
                f"wanted hidden_size of the language model, {self.text_config.hidden_size}"
            )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> VisionLanguageConfig:
        """The config from a parsed config.json: text keys nested in `text_config`, flat beside it, or both.

        Raises:
            ValueError: unknown, missing or contradictory keys, and values that are not supported.
        """
        top = dict(raw)
        if not isinstance(vision := top.pop("vision_config", None), dict):
            raise ValueError("text_encoder/config.json: missing keys ['vision_config']")
        vision = dict(vision)
        for key, twin, default in (
            ("in_chans", "in_channels", 3),
            ("spatial_patch_size", "patch_size", None),
        ):
            wanted = vision.get(twin, default)  # old names, without effect in the reference
            if (got := vision.pop(key, wanted)) != wanted:
                raise ValueError(f"vision_config: {key} is {got}, wanted {twin}, {wanted}")

        text_keys = {f.name for f in fields(TextConfig)} | {*TextConfig.FIXED, "rope_scaling", "layer_types"}
        flat = plain_text({key: top.pop(key) for key in tuple(top) if key in text_keys})
        nested = plain_text(top.pop("text_config", None) or {})
        if clash := sorted(key for key in flat.keys() & nested.keys() if flat[key] != nested[key]):
            raise ValueError(f"text_encoder/config.json: keys {clash} differ from those in text_config")
        top["vision_config"] = strictly(VisionConfig, vision, "vision_config")
        top["text_config"] = strictly(TextConfig, {**flat, **nested}, "text_config")
        config: VisionLanguageConfig = strictly(cls, top, "text_encoder/config.json")
        return config


def plain_text(raw: dict[str, Any]) -> dict[str, Any]:
    """Text keys with `rope_scaling` reduced to its `mrope_section`, and without `layer_types`; both checked."""
    text = {key: value for key, value in raw.items() if key not in ("rope_scaling", "layer_types")}
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise ValueError(f"layer_types is {raw['layer_types']}, wanted full_attention everywhere")
    if "rope_scaling" in raw:
        rope = raw["rope_scaling"] or {}
        kinds = {rope.get("type", "mrope"), rope.get("rope_type", "mrope")}
        if not kinds <= {"mrope", "default"} or rope.keys() - {"type", "rope_type"} != {"mrope_section"}:
            raise ValueError(f"rope_scaling is {rope}, wanted mrope_section, with type 'mrope' or 'default'")
        text["mrope_section"] = tuple(rope["mrope_section"])
    return text


def strictly(cls: type[Any], raw: dict[str, Any], where: str) -> Any:
    """A config of class `cls` from JSON keys, none of them unknown or missing."""
    given = {key: value for key, value in raw.items() if key not in cls.IGNORED and not key.startswith("_")}
    for key, wanted in cls.FIXED.items():
        if (got := given.pop(key, wanted)) != wanted:
            raise ValueError(f"{where}: {key} is {got!r}, wanted {wanted!r}")
    if unknown := sorted(given.keys() - {f.name for f in fields(cls)}):
        raise ValueError(f"{where}: unknown keys {unknown}")
    if missing := sorted({f.name for f in fields(cls) if f.default is MISSING} - given.keys()):
        raise ValueError(f"{where}: missing keys {missing}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


class VisionLanguage(Tapped):
    """Encode a prompt with its pictures: every token's vector after the last block and the final norm.

    Shapes: `input_ids` (B, T) long; `attention_mask` (B, T), 1 at real tokens, or None; `pixel_values`
        (N, C * frames * P * P), the patches of all pictures in row order, each merge x merge square of
        patches together; `image_grid_thw` one `Grid` a picture. Returns (B, T, D).
    Units: pixels as the processor normalises them. At padding the output is finite and means nothing.
    Raises: ValueError where ids, mask, patches and grids disagree.
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
    ) -> Tensor:
        if (pixel_values is None) != (not image_grid_thw):
            raise ValueError("pixel_values and image_grid_thw: wanted both or neither")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, wanted {tuple(input_ids.shape)}"
            )
        positions = mrope_positions(
            input_ids,
            attention_mask,
            image_grid_thw,
            image_token_id=self.config.image_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
        )
        x = self.embed_tokens(input_ids)
        if pixel_values is not None and image_grid_thw is not None:
            pictures = self.vision(pixel_values, image_grid_thw)
            is_picture = input_ids == self.config.image_token_id
            if (count := int(is_picture.sum())) != len(pictures):
                raise ValueError(f"input_ids hold {count} image tokens, wanted {len(pictures)}, none masked")
            x = x.masked_scatter(is_picture[..., None], pictures.to(x.dtype))
        x = self.tap("embeddings", x, "B T D")
        return self.tap("out", self.language(x, positions, attention_mask), "B T D")


class LanguageModel(nn.Module):
    """The blocks and the final norm of Qwen2.5: (B, T, D) -> (B, T, D), causal.

    Shapes: `positions` (3, B, T): frame, row, column; `attention_mask` (B, T) or None.
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
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
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
    """Causal attention in which H / G heads of queries share a head of keys and values.

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
        """The same attention written out, for who reads or replaces its maps; softmax in at least float32."""
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


class VisionTower(Tapped):
    """Turn the patches of pictures into tokens of the language model.

    Shapes: `pixel_values` (N, C * frames * P * P), `grids` one a picture -> (L, D), L = N / merge^2, in the
        order of the patches. From `patches` to the last block everything is in the order of the windows.
    Raises: ValueError where grids and patches disagree.
    Source: `Qwen2_5_VisionTransformerPretrainedModel`; the grouping into windows is written as loops.
    """

    TAPS = ("patches", "tokens")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False
        )
        self.rope = VisionRope(config)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = Merger(config)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        merge = self.config.spatial_merge_size
        check_grids(grids, merge)
        pictures = [rows * columns for _, rows, columns in grids]
        if sum(pictures) != len(pixel_values):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} patches, wanted {sum(pictures)} for {grids}"
            )
        by_window, windows = window_order(grids, merge, self.config.window_side)
        order = torch.tensor(by_window, device=pixel_values.device)

        x = pixel_values.to(self.patch_embed.weight.dtype)
        x = x.unflatten(-1, (self.config.in_channels, *self.patch_embed.kernel_size))
        x = self.patch_embed(x).flatten(1)
        x = self.tap("patches", x.unflatten(0, (-1, merge**2))[order].flatten(0, 1), "N V")
        rope = self.rope(grids, order)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, pictures if i in self.config.fullatt_block_indexes else windows)
        return self.tap("tokens", self.merger(x)[order.argsort()], "L D")


class VisionBlock(Tapped):
    """One pre-norm block of the tower. Source: `Qwen2_5_VLVisionBlock`."""

    TAPS = ("in", "attn_in", "mid", "mlp_in", "out")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: Tensor, lengths: list[int]) -> Tensor:
        x = self.tap("in", x, "N V")
        x = self.tap("mid", x + self.attn(self.tap("attn_in", self.norm1(x), "N V"), rope, lengths), "N V")
        return self.tap("out", x + self.mlp(self.tap("mlp_in", self.norm2(x), "N V")), "N V")


class VisionAttention(Tapped):
    """Attention within segments of the sequence: windows, or whole pictures.

    Shapes: `x` (N, V), `rope` (N, Q/2, 2), `lengths` of the segments, which sum to N.
    Source: `Qwen2_5_VLVisionAttention`. With `scores` or `probs` tapped, attention is computed explicitly,
        on all segments padded to the longest: (segments, heads, longest, longest).
    """

    TAPS = ("q", "k", "v", "q_rot", "k_rot", "scores", "probs", "heads", "attn_out")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n (three u q) -> three n u q", three=3, u=self.heads)
        q, k, v = self.tap("q", q, "N U Q"), self.tap("k", k, "N U Q"), self.tap("v", v, "N U Q")
        q = self.tap("q_rot", rotate(q.float(), rope).to(x.dtype), "N U Q")  # rotated in float32
        k = self.tap("k_rot", rotate(k.float(), rope).to(x.dtype), "N U Q")

        if self.tapped("scores", "probs"):
            heads = self.explicit_attention(q, k, v, lengths)
        else:
            heads = attention_by_segment(q, k, v, lengths)
        heads = self.tap("heads", heads, "N U Q")
        return self.tap("attn_out", self.out(heads.flatten(1)), "N V")

    def explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        """The same attention written out, for who reads or replaces its maps; softmax in at least float32."""
        q, k, v = (
            pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)
        )  # W U X Q
        real = torch.arange(q.shape[2]) < torch.tensor(lengths)[:, None]  # W X
        real = real.to(q.device)
        scores = self.tap("scores", q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, "W U X X")
        probs = softmax(scores.masked_fill(~real[:, None, None, :], float("-inf"))).to(v.dtype)
        return (self.tap("probs", probs, "W U X X") @ v).transpose(1, 2)[real]


class VisionMLP(Tapped):
    """SwiGLU with biases. Source: `Qwen2_5_VLMLP`."""

    TAPS = ("mlp_hidden", "mlp_out")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tap("mlp_hidden", F.silu(self.gate(x)) * self.up(x), "N I")
        return self.tap("mlp_out", self.down(hidden), "N V")


class Merger(Tapped):
    """Make one token of each merge x merge patches: (N, V) -> (L, D). Source: `Qwen2_5_VLPatchMerger`."""

    TAPS = ("mlp_in", "mlp_hidden")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patches = config.spatial_merge_size**2
        width = config.hidden_size * self.patches
        self.norm = RMSNorm(config.hidden_size, 1e-6)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap("mlp_in", rearrange(self.norm(x), "(l m) v -> l (m v)", m=self.patches), "L Z")
        return self.down(self.tap("mlp_hidden", F.gelu(self.up(x)), "L Z"))  # the exact GELU


class VisionRope(Tapped):
    """The tower's rotary table: of each head's angles, the first half follow the row, the second the column.

    Shapes: `order` (L,) of the tokens -> float32 (N, Q/2, 2); [..., 0] the cosine, [..., 1] the sine.
    Source: `Qwen2_5_VisionRotaryEmbedding` and `rot_pos_emb`, theta 10000, positions from 0 in each picture.
    """

    TAPS = ("table",)

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.dim = config.hidden_size // config.num_heads // 2  # of each of row and column
        self.merge = config.spatial_merge_size

    def forward(self, grids: Sequence[Grid], order: Tensor) -> Tensor:
        places = torch.cat([patch_positions(grid, self.merge) for grid in grids]).to(order.device)
        places = places.unflatten(0, (-1, self.merge**2))[order].flatten(0, 1)
        angles = (places[..., None] * rope_frequencies(self.dim, 10000.0, order.device)).flatten(1)
        return self.tap("table", torch.stack([angles.cos(), angles.sin()], dim=-1), "N O 2")


class RMSNorm(nn.Module):
    """x / rms(x) in float32 and back to x's dtype, then times the weight. Source: `Qwen2RMSNorm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def mrope_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_grid_thw: Sequence[Grid] | None,
    *,
    image_token_id: int,
    spatial_merge_size: int,
) -> Tensor:
    """Where each token is: frame, row and column.

    Shapes: `input_ids`, `attention_mask` (B, T) -> (3, B, T) long; grids in the order of the rows' pictures.
    Raises: ValueError where runs of image tokens do not fit the grids.
    Source: `Qwen2_5_VLModel.get_rope_index`, which looks for pictures behind `<|vision_start|>`; we take
        every image token for one, and the counts must agree.

    +-- positions -----------------------------------------------------------------------------------------+
    | text     one number for all three, one more a token; padding is not counted, and has 1               |
    | picture  starts where text would go on; rows and columns of TOKENS (merged patches) count from there |
    | after it start + max(rows, columns), not start + the number of its tokens                            |
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
            if tokens[at] != image_token_id:
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


def check_grids(grids: Sequence[Grid], merge: int) -> None:
    for grid in grids:
        frames, rows, columns = grid
        if frames != 1 or rows < 1 or columns < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"grid is {tuple(grid)}, wanted (1, rows, columns) with rows and columns multiples of {merge}"
            )


def window_order(grids: Sequence[Grid], merge: int, side: int) -> tuple[list[int], list[int]]:
    """Indices of all tokens window by window, and the number of patches in each window.

    Windows tile each picture from its top left corner, `side` tokens a side; at the other edges they are cut.
    """
    order: list[int] = []
    lengths: list[int] = []
    start = 0
    for _, grid_rows, grid_columns in grids:
        rows, columns = grid_rows // merge, grid_columns // merge
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                ys, xs = range(top, min(top + side, rows)), range(left, min(left + side, columns))
                order.extend(start + y * columns + x for y in ys for x in xs)
                lengths.append(len(ys) * len(xs) * merge**2)
        start += rows * columns
    return order, lengths


def patch_positions(grid: Grid, merge: int) -> Tensor:
    """(rows * columns, 2): row and column of each patch, in the order of the patches: square by square."""
    _, rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    order = "(y j x i) place -> (y x j i) place"
    return rearrange(places, order, y=rows // merge, x=columns // merge, j=merge, i=merge)


def rope_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """(dim / 2,) rotary frequencies, in float32 whatever the model's dtype."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn HALVES of a head of (..., heads, K) into each other, x_i with x_{i + K/2}; `rope` is (..., K/2, 2).

    The image transformer's RoPE turns neighbouring pairs instead.
    """
    cos, sin = rope[..., None, :, 0], rope[..., None, :, 1]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_by_segment(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """(N, U, Q) -> (N, U, Q): attention of each segment to itself."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # 1 U N Q
    segments = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    heads = torch.cat([F.scaled_dot_product_attention(*segment) for segment in segments], dim=2)
    return heads[0].transpose(0, 1)


def causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


# transformers 5 (and any raw state_dict of it) -> hub naming: a key that starts with the first gets the second
KEY_ALIASES: tuple[tuple[str, str], ...] = (("model.language_model.", "model."), ("model.visual.", "visual."))

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
