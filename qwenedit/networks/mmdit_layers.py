"""The layers of the MMDiT: time embedding, adaLN, RoPE, norms, the MLP. mmdit.py has the network.

Source: diffusers 0.39.0, models/transformers/transformer_qwenimage.py, normalization.py, embeddings.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenedit.taps import Tapped, scope

__all__ = [
    "MLP", "AdaLN", "AdaLayerNormOut", "Gelu", "Grid", "JointAttention", "Modulation", "QKNorm", "RMSNorm",
    "Rope", "TimeEmbedding", "both_halves", "by_heads", "gated", "gelu", "joint_key_mask", "joint_rope",
    "layer_norm", "modulated", "picture_positions", "rope_table", "rotate", "sinusoids", "text_positions",
]  # fmt: skip

Gelu = Literal["tanh", "sigmoid"]
Grid = tuple[int, int, int]  # frames (1 in a picture), rows, columns of tokens, which are 2x2 latent pixels

MAX_MAP = 2**28  # elements of an attention map; larger maps are computed a few heads at a time


class TimeEmbedding(Tapped):
    """Embed sigma: 256 sinusoids of 1000 sigma, then two linear layers. The text has no part in it.

    Shapes: `timestep` (R,); with `addition` also `addition_t` (R,), which selects one of two vectors to add.
        Returns (R, D) in `dtype`.
    Raises: ValueError if `addition_t` is given without `addition`, or missing with it.
    Source: `QwenTimestepProjEmbeddings` (official key prefix `time_text_embed`). The sinusoids are float32.
    """

    TAPS = ("sinusoids",)

    def __init__(self, width: int, *, addition: bool = False) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)
        self.addition = nn.Embedding(2, width) if addition else None

    def forward(self, timestep: Tensor, dtype: torch.dtype, addition_t: Tensor | None = None) -> Tensor:
        waves = self.tap("sinusoids", sinusoids(timestep), "R W")
        temb = self.linear_2(F.silu(self.linear_1(waves.to(dtype))))
        if (self.addition is None) != (addition_t is None):
            got, wanted = ("None", "0 or 1 a row") if addition_t is None else ("given", "None")
            raise ValueError(f"addition_t is {got}, wanted {wanted}: see use_additional_t_cond in the config")
        return temb if self.addition is None else temb + self.addition(addition_t).to(dtype)


def sinusoids(timestep: Tensor) -> Tensor:
    """(R,) sigmas in [0, 1] -> (R, 256): cosines, then sines, of 1000 sigma at 128 frequencies, float32."""
    exponent = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=timestep.device) / 128
    angles = 1000 * (timestep[:, None].float() * exponent.exp())
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class JointAttention(Tapped):
    """Attention over the tokens of both streams at once, in the order [text, image].

    Shapes: `img` (B, S, D), `txt` (B, T, D), `rope` two tables (J, 1, K), `key_mask` (B, 1, 1, J) bool or
        None. Returns what is added to each stream, before its gate. With `wanted` only that many image tokens
        are queries, and `txt` is returned unchanged.
    Source: `QwenDoubleStreamAttnProcessor2_0`. With `scores` or `probs` tapped, attention is explicit, some
        heads at a time if the maps are large (`by_heads`).
    """

    TAPS = (
        "img_q", "img_k", "img_v", "img_q_rot", "img_k_rot", "img_heads", "img_attn_out",
        "txt_q", "txt_k", "txt_v", "txt_q_rot", "txt_k_rot", "txt_heads", "txt_attn_out",
        "scores", "probs",
    )  # fmt: skip

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.img_q = nn.Linear(width, width)
        self.img_k = nn.Linear(width, width)
        self.img_v = nn.Linear(width, width)
        self.txt_q = nn.Linear(width, width)
        self.txt_k = nn.Linear(width, width)
        self.txt_v = nn.Linear(width, width)
        self.q_norm = QKNorm(head_dim)
        self.k_norm = QKNorm(head_dim)
        self.img_out = nn.Linear(width, width)
        self.txt_out = nn.Linear(width, width)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        wanted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        k = self.joint(self.txt_k(txt), self.img_k(img))
        v = self.joint(self.txt_v(txt), self.img_v(img))
        if wanted is None:
            q = self.joint(self.txt_q(txt), self.img_q(img))
        else:
            # Contiguous, here and below, as in the reference: a strided input takes another matrix kernel.
            q = self.img_q(img[:, :wanted].contiguous())
        lengths = [txt.shape[1], img.shape[1]]
        if self.shards is not None:
            q, k, v, lengths = self.shards.join(q, k, v, target_only=wanted is not None)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)  # B J H K
        k = self.k_norm(k, lengths[0])
        if wanted is not None:
            q, own = self.q_norm(q, 0), slice(lengths[0], lengths[0] + q.shape[1])
            q, k = rotate(q, (rope[0][own], rope[1][own])), rotate(k, rope)
            img_heads = self.attend(q, k, v, key_mask).flatten(2)
            if self.shards is not None:
                (img_heads,) = self.shards.part(img_heads)
            return self.img_out(img_heads.contiguous()), txt

        q = self.q_norm(q, lengths[0])
        if self.tapped("img_q", "img_k", "img_v", "txt_q", "txt_k", "txt_v"):
            (txt_q, img_q), (txt_k, img_k), (txt_v, img_v) = (x.split(lengths, dim=1) for x in (q, k, v))
            img_q, txt_q = self.tap("img_q", img_q, "B S H K"), self.tap("txt_q", txt_q, "B T H K")
            img_k, txt_k = self.tap("img_k", img_k, "B S H K"), self.tap("txt_k", txt_k, "B T H K")
            img_v, txt_v = self.tap("img_v", img_v, "B S H K"), self.tap("txt_v", txt_v, "B T H K")
            q, k, v = (torch.cat(pair, dim=1) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        q, k = rotate(q, rope), rotate(k, rope)  # after the QK-norm
        if self.tapped("img_q_rot", "img_k_rot", "txt_q_rot", "txt_k_rot"):
            (txt_q, img_q), (txt_k, img_k) = (x.split(lengths, dim=1) for x in (q, k))
            img_q, txt_q = self.tap("img_q_rot", img_q, "B S H K"), self.tap("txt_q_rot", txt_q, "B T H K")
            img_k, txt_k = self.tap("img_k_rot", img_k, "B S H K"), self.tap("txt_k_rot", txt_k, "B T H K")
            q, k = torch.cat([txt_q, img_q], dim=1), torch.cat([txt_k, img_k], dim=1)

        txt_heads, img_heads = self.attend(q, k, v, key_mask).split(lengths, dim=1)
        img_heads = self.tap("img_heads", img_heads, "B S H K")
        txt_heads = self.tap("txt_heads", txt_heads, "B T H K")
        img_heads, txt_heads = img_heads.flatten(2), txt_heads.flatten(2)
        if self.shards is not None:
            txt_heads, img_heads = self.shards.part(txt_heads, img_heads)
        img_a = self.tap("img_attn_out", self.img_out(img_heads.contiguous()), "B S D")
        txt_a = self.tap("txt_attn_out", self.txt_out(txt_heads.contiguous()), "B T D")
        return img_a, txt_a

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Scaled dot-product attention of (B, N, H, K) queries, explicit if its maps are tapped."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H N K
        if self.tapped("scores", "probs"):
            return by_heads(self.explicit_attention, q, k, v, key_mask).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask).transpose(1, 2)

    def joint(self, txt: Tensor, img: Tensor) -> Tensor:
        return torch.cat([txt, img], dim=1)  # B J D

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # B S D -> B S H K

    def explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The same attention with its maps as tensors; softmax in at least float32."""
        scores = self.tap("scores", q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, "B H J J")
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask, float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs = self.tap("probs", torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype), "B H J J")
        return probs @ v


class MLP(Tapped):
    """Two linear layers, four times as wide between them, with the tanh form of GELU.

    `gelu` is the form: "sigmoid" is that of DiffSynth-Studio, and of LoRAs that were trained there.

    Source: `FeedForward(activation_fn="gelu-approximate")`; diffusers' "geglu-approximate" is another GELU.
    """

    TAPS = ("mlp_hidden",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.gelu: Gelu = "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.tap("mlp_hidden", gelu(self.up(x), self.gelu), "B * E"))


def gelu(x: Tensor, form: Gelu) -> Tensor:
    """An approximation of x * Phi(x): "tanh", or "sigmoid", x * sigmoid(1.702 x); up to 0.021 apart."""
    return F.gelu(x, approximate="tanh") if form == "tanh" else x * torch.sigmoid(1.702 * x)


class AdaLN(NamedTuple):
    """One stream's vectors for attention or for the MLP: x * scale + shift before it, gate * change after it.

    Shapes: each (B, 1, D). `scale` includes the 1 of 1 + scale.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """A stream's adaLN vectors: `temb` (R, D) -> (R, 6 D), shift, scale, gate of attention, then of MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, temb: Tensor) -> Tensor:
        return self.linear(F.silu(temb))


def both_halves(mod: Tensor) -> tuple[AdaLN, AdaLN]:
    """Split modulation (B, 6 D) into that of the attention and that of the MLP."""
    shift1, scale1, gate1, shift2, scale2, gate2 = mod.unflatten(-1, (6, 1, -1)).unbind(1)
    return AdaLN(shift1, 1 + scale1, gate1), AdaLN(shift2, 1 + scale2, gate2)


def modulated(x: Tensor, parts: Sequence[AdaLN], target: int) -> Tensor:
    """x * scale + shift. Of two parts (`zero_cond_t`), the second is for the tokens from `target` on."""
    if len(parts) == 1:
        return x * parts[0].scale + parts[0].shift
    pieces = zip(x.tensor_split([target], dim=1), parts, strict=True)
    return torch.cat([piece * part.scale + part.shift for piece, part in pieces], dim=1)


def gated(x: Tensor, parts: Sequence[AdaLN], target: int) -> Tensor:
    """gate * x. Of two parts (`zero_cond_t`), the second is for the tokens from `target` on."""
    if len(parts) == 1:
        return parts[0].gate * x
    pieces = zip(x.tensor_split([target], dim=1), parts, strict=True)
    return torch.cat([part.gate * piece for piece, part in pieces], dim=1)


class AdaLayerNormOut(nn.Module):
    """The last norm, modulated by `temb`; the scale comes *before* the shift (`AdaLayerNormContinuous`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, img: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).chunk(2, dim=-1)
        return self.norm(img) * (1 + scale)[:, None] + shift[:, None]


class Rope(Tapped):
    """The rotary tables of both streams: three axes (frame, row, column), each with its own part of the head.

    Shapes: returns float32 (S, K/2, 2) for the image tokens and (T, K/2, 2) for the text; [..., 0] is the
        cosine, [..., 1] the sine.
    Source: `QwenEmbedRope(scale_rope=True)`, theta 10000; `layered`: `QwenEmbedLayer3DRope`. There each layer
        is its own grid, here a frame of one grid. (Without a reference, theirs would put the last at -1.)

    +-- positions -----------------------------------------------------------------------------------------+
    | frame   the picture's number: 0 the target, 1 the first reference, ...                               |
    |         layered: 0, 1, ... the target's frames, -1 every reference                                   |
    | row     centred: -(h - h//2) ... h//2 - 1; an odd grid has its extra row on the NEGATIVE side        |
    | column  likewise                                                                                     |
    | text    one number for all three axes, counted over the PADDED length (a mask does not shift it);    |
    |         it starts at the largest h//2 or w//2 of any picture, layered: at least at the frame count   |
    +------------------------------------------------------------------------------------------------------+
    """

    TAPS = ("img", "txt")

    def __init__(self, axes: tuple[int, int, int], *, layered: bool = False) -> None:
        super().__init__()
        self.axes = axes
        self.layered = layered

    def forward(self, grids: Sequence[Grid], txt_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        img_positions = torch.cat(
            [picture_positions(self.frame(k), grid, device) for k, grid in enumerate(grids)]
        )
        txt_positions = text_positions(self.text_start(grids), txt_length, device)
        img = self.tap("img", rope_table(img_positions, self.axes), "S A 2")
        txt = self.tap("txt", rope_table(txt_positions, self.axes), "T A 2")
        return img, txt

    def frame(self, number: int) -> int:
        """The first frame of the target, 0, or of the `number`-th reference."""
        return -1 if self.layered and number else number

    def text_start(self, grids: Sequence[Grid]) -> int:
        start = max(max(rows // 2, columns // 2) for _, rows, columns in grids)
        return max(start, grids[0][0]) if self.layered else start


def picture_positions(first: int, grid: Grid, device: torch.device) -> Tensor:
    """(frames * rows * columns, 3) positions of one picture's tokens, row by row, from frame `first`."""
    frames, rows, columns = grid
    frame = torch.arange(first, first + frames, device=device)
    row = torch.arange(rows, device=device) - (rows - rows // 2)
    column = torch.arange(columns, device=device) - (columns - columns // 2)
    return torch.cartesian_prod(frame, row, column).reshape(-1, 3)


def text_positions(start: int, length: int, device: torch.device) -> Tensor:
    """(length, 3) positions of the text's tokens: one number for all three axes."""
    return torch.arange(start, start + length, device=device)[:, None].expand(-1, 3)


def rope_table(positions: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """(N, 3) positions -> (N, K/2, 2) cosines and sines, in float32 whatever the model's dtype."""
    angles = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles.append(positions[:, axis, None] * (1.0 / 10000**exponents))
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def joint_rope(img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of both streams in the form that `rotate` takes: cosines and sines (J, 1, K), text first.

    Each cosine is repeated; each sine becomes (-sin, sin).
    """
    cos, sin = torch.cat([txt, img])[:, None].unbind(-1)
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate NEIGHBOURING pairs (x0, x1), (x2, x3), ... of (B, N, H, K), in float32.

    (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin). The language model's RoPE rotates halves instead: x0
    with x_{K/2}.
    """
    cos, sin = rope
    wide = x.float()
    exchanged = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # x1, x0, x3, x2, ...
    # In place: to get new memory takes as long as the arithmetic.
    return (wide * cos).add_(exchanged.mul_(sin)).to(x.dtype)


def by_heads(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """`attention(q, k, v, key_mask)`, a few heads at a time if the maps of all would exceed `MAX_MAP`.

    Taps inside then fire once per part, for that part's heads only. The label `heads`, a slice, says which;
    without parts there is no such label.

    Shapes: `q`, `k`, `v` and the result (B, H, J, K); the mask broadcasts over H.
    """
    batch, heads, rows, _ = q.shape
    at_once = max(1, MAX_MAP // (batch * rows * k.shape[2]))
    if at_once >= heads:
        return attention(q, k, v, key_mask)
    parts = []
    for start in range(0, heads, at_once):
        part = slice(start, min(start + at_once, heads))
        with scope(heads=part):
            parts.append(attention(q[:, part], k[:, part], v[:, part], key_mask))
    return torch.cat(parts, dim=1)


def joint_key_mask(txt_mask: Tensor, img_length: int) -> Tensor:
    """(B, T) bool -> (B, 1, 1, J): False at padding of the text, True at every image token."""
    ones = txt_mask.new_ones(txt_mask.shape[0], img_length)
    return torch.cat([txt_mask, ones], dim=1)[:, None, None, :]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean square in float32, the product in the weight's dtype.

    Source: diffusers 0.39.0, models/normalization.py `RMSNorm`, eps 1e-6 everywhere in this network.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return over_rms(x).to(weight.dtype) * weight


class QKNorm(nn.Module):
    """The RMSNorm of queries or keys, in which each stream has its own weight.

    Shapes: `x` (B, N, H, K), tokens in the order [text, image], the first `txt_length` of the text.
    Source: `norm_added_q` and `norm_q` of the reference's attention, or `norm_added_k` and `norm_k`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.txt_weight = nn.Parameter(torch.ones(dim))
        self.img_weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, txt_length: int) -> Tensor:
        of_txt = self.txt_weight.expand(txt_length, 1, -1)
        of_img = self.img_weight.expand(x.shape[1] - txt_length, 1, -1)
        weight = torch.cat([of_txt, of_img])  # N 1 K
        return over_rms(x).to(weight.dtype) * weight


def over_rms(x: Tensor) -> Tensor:
    mean_square = x.float().pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + 1e-6)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without parameters: adaLN supplies scale and shift."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
