"""The vision tower of Qwen2.5-VL: patches of pictures -> tokens of the language model.

Source: transformers 4.57.6, models/qwen2_5_vl/modeling_qwen2_5_vl.py
(`Qwen2_5_VisionTransformerPretrainedModel`). Ours has other names, and no videos.

    N V      the patches of all pictures, and the tower's width; I is inside its MLP
    U Q O    heads, their dim, Q/2 angles
    W X      segments (windows or pictures), and the length of the longest
    L Z D    tokens (merged patches), the width of their concatenated patches (merge^2 V), their final width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qwenedit.networks.ranges import CHANNELS, LAYERS, require_ranges
from qwenedit.taps import Tapped

__all__ = ["Grid", "VisionConfig", "VisionTower"]

# frames, rows and columns of patches, before merging; frames is 1 for pictures
Grid = tuple[int, int, int]

# Keys for generation, videos and training. Any level of text_encoder/config.json may have them.
WITHOUT_EFFECT = frozenset(
    {
        "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
        "max_position_embeddings", "max_window_layers", "pad_token_id", "sliding_window",
        "tie_word_embeddings", "tokens_per_second", "torch_dtype", "transformers_version", "use_cache",
        "video_token_id", "vision_end_token_id", "vision_start_token_id", "vision_token_id",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The `vision_config` of text_encoder/config.json.

    Raises:
        ValueError: sizes that do not fit together.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int  # a picture is repeated this many times: the tower was made for videos
    spatial_merge_size: int  # this many patches a side become one token
    window_size: int  # pixels a side
    fullatt_block_indexes: tuple[int, ...]  # these blocks see the whole picture, the others a window
    out_hidden_size: int
    in_channels: int = 3

    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    IGNORED: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {"model_type"}

    def __post_init__(self) -> None:
        require_ranges(
            self, depth=LAYERS, hidden_size=CHANNELS, intermediate_size=CHANNELS, num_heads=CHANNELS,
            patch_size=1000, temporal_patch_size=100, spatial_merge_size=100, window_size=CHANNELS,
            out_hidden_size=CHANNELS, in_channels=1000,
        )  # fmt: skip
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, wanted a multiple of 4 * num_heads = "
                f"{4 * self.num_heads}: a head's rotary angles are half rows, half columns"
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


class VisionTower(Tapped):
    """Turn the patches of pictures into tokens of the language model.

    Shapes: `pixel_values` (N, C * frames * P * P), `grids` one per picture -> (L, D), L = N / merge^2, in the
        order of the patches. From the tap `patches` to the last block, tensors are in window order.
    Raises: ValueError if grids and patches disagree.
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
        """The same attention written out, so that its maps can be tapped; softmax in at least float32."""
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
    """Merge each merge x merge patches into one token: (N, V) -> (L, D). Source: `Qwen2_5_VLPatchMerger`."""

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
    """The tower's rotary table. The first half of each head's angles follows the row, the second the column.

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


def check_grids(grids: Sequence[Grid], merge: int) -> None:
    for grid in grids:
        frames, rows, columns = grid
        if frames != 1 or rows < 1 or columns < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"grid is {tuple(grid)}, wanted (1, rows, columns) with rows and columns multiples of {merge}"
            )


def window_order(grids: Sequence[Grid], merge: int, side: int) -> tuple[list[int], list[int]]:
    """Indices of all tokens window by window, and the number of patches in each window.

    Windows of `side` x `side` tokens tile each picture from its top left corner. Right and bottom ones may be
    smaller.
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
    """(rows * columns, 2): row and column of each patch, in the order of the patches (square by square)."""
    _, rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    order = "(y j x i) place -> (y x j i) place"
    return rearrange(places, order, y=rows // merge, x=columns // merge, j=merge, i=merge)


def rope_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """(dim / 2,) rotary frequencies, in float32 whatever the model's dtype."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the HALVES of each head, x_i with x_{i + K/2}. The image transformer rotates neighbouring pairs.

    Shapes: `x` (..., heads, K), `rope` (..., K/2, 2).
    """
    cos, sin = rope[..., None, :, 0], rope[..., None, :, 1]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_by_segment(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """(N, U, Q) -> (N, U, Q): attention within each segment."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # 1 U N Q
    segments = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    heads = torch.cat([F.scaled_dot_product_attention(*segment) for segment in segments], dim=2)
    return heads[0].transpose(0, 1)


def softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
