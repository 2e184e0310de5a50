"""The dual-stream multimodal diffusion transformer (MMDiT) of Qwen-Image, -Edit and -Layered.

Source: diffusers 0.39.0, models/transformers/transformer_qwenimage.py (`QwenImageTransformer2DModel`); the
design is that of Stable Diffusion 3 (arXiv 2403.03206) and Flux, with every block dual-stream. Names are ours
(`KEY_TABLE`), the arithmetic, casts included, is theirs; but RoPE is not limited to 4096 positions.

    img  B S D   the image stream: tokens of the target (noise), then of each reference picture
    txt  B T D   the text stream: embeddings of the prompt, which have seen the picture too
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qwenedit.networks.checkpointing import recomputed
from qwenedit.taps import Tapped, by_heads

__all__ = ["KEY_TABLE", "Grid", "MMDiT", "MMDiTConfig"]

Grid = tuple[int, int, int]  # frames (pictures 1, layers more), rows, columns of tokens: 2x2 latent pixels


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The transformer's config.json.

    Raises:
        ValueError: sizes that do not fit together, or a value that no supported checkpoint has.
    """

    patch_size: int
    in_channels: int  # 4 * latent channels: a token is 2x2 latent pixels
    out_channels: int  # latent channels
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int  # width of the prompt embeddings
    guidance_embeds: bool  # only False exists in this family
    axes_dims_rope: tuple[int, int, int]  # frame, row, column; sums to attention_head_dim
    zero_cond_t: bool = False  # Edit-2511: reference tokens are modulated as if at sigma 0
    use_additional_t_cond: bool = False  # Layered: the time embedding has one of two vectors added
    use_layer3d_rope: bool = False  # Layered: the target has several frames, the reference's is -1

    FIXED: ClassVar[dict[str, Any]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset({"pooled_projection_dim"})

    def __post_init__(self) -> None:
        if self.guidance_embeds:
            raise ValueError("guidance_embeds is True, wanted False: no released checkpoint has it")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {self.axes_dims_rope}, wanted three even numbers that sum to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.in_channels != (wanted := self.out_channels * self.patch_size**2):
            raise ValueError(
                f"in_channels is {self.in_channels}, wanted out_channels * patch_size squared = {wanted}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class MMDiT(Tapped):
    """Predict the velocity of every image token from noisy and reference latents and the prompt's embeddings.

    Shapes: `img` (B, S, in_channels) packed latents, the target's tokens first and then each reference's;
        `txt` (B, T, joint_attention_dim); `timestep` (B,); `grids` the token grid of the target, then of
        each reference, the same for the whole batch; `txt_mask` (B, T) bool, True at real tokens, or None
        where nothing is padded; `addition_t` (B,) int64, Layered's alone: its pipeline's `is_rgb`, 0.
        Returns (B, S, in_channels); the caller keeps the target's part.
    Units: `timestep` is sigma in [0, 1], 1 = noise (the embedding multiplies it by 1000); latents are
        normalised; the velocity is noise - clean.
    Raises: ValueError where grids and tokens disagree, or `addition_t` and the config do.
    Source: `QwenImageTransformer2DModel.forward`; ours picks `zero_cond_t`'s modulation by slices.
    """

    TAPS = ("img_in", "txt_in", "temb", "velocity")

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: for gradients, recompute blocks instead of keeping what they made
        self.img_in = nn.Linear(config.in_channels, config.width)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.txt_in = nn.Linear(config.joint_attention_dim, config.width)
        self.time_embed = TimeEmbedding(config.width, addition=config.use_additional_t_cond)
        self.rope = Rope(config.axes_dims_rope, layered=config.use_layer3d_rope)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm_out = AdaLayerNormOut(config.width)
        self.proj_out = nn.Linear(config.width, config.in_channels)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        timestep: Tensor,
        grids: Sequence[Grid],
        txt_mask: Tensor | None = None,
        addition_t: Tensor | None = None,
    ) -> Tensor:
        lengths = [math.prod(grid) for grid in grids]
        if sum(lengths) != img.shape[1]:
            raise ValueError(f"grids {list(grids)} hold {sum(lengths)} tokens, but img has {img.shape[1]}")
        split = (lengths[0], sum(lengths[1:]))  # target, references
        batch = img.shape[0]

        img = self.tap("img_in", self.img_in(img), "B S D")
        txt = self.tap("txt_in", self.txt_in(self.txt_norm(txt)), "B T D")
        timestep = timestep.to(img.dtype)  # where the reference rounds: 0.873 is 0.871 in bfloat16
        if self.config.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])  # rows B: are for the reference tokens
            addition_t = None if addition_t is None else addition_t.repeat(2)
        temb = self.tap("temb", self.time_embed(timestep, img.dtype, addition_t), "R D")
        rope = self.rope(grids, txt.shape[1], img.device)
        key_mask = None if txt_mask is None else joint_key_mask(txt_mask, img.shape[1])

        for block in self.blocks:
            run = recomputed(block) if self.checkpointing else block
            img, txt = run(img, txt, temb, rope, key_mask, split)

        return self.tap("velocity", self.proj_out(self.norm_out(img, temb[:batch])), "B S C")


class Block(Tapped):
    """One dual-stream block: joint attention, then an MLP a stream, all under adaLN modulation from `temb`.

    Shapes: `temb` (R, D) with R = B, or 2 B under `zero_cond_t` (rows B: for the reference tokens).
    Source: `QwenImageTransformerBlock`, which takes (img, txt) and returns (txt, img); we keep one order.
    """

    TAPS = (
        "img_mod", "img_attn_in", "img_attn_add", "img_mid", "img_mlp_in", "img_mlp_add", "img_out",
        "txt_mod", "txt_attn_in", "txt_attn_add", "txt_mid", "txt_mlp_in", "txt_mlp_add", "txt_out",
    )  # fmt: skip

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.img_mod = Modulation(width)
        self.txt_mod = Modulation(width)
        self.img_norm1 = layer_norm(width)
        self.txt_norm1 = layer_norm(width)
        self.attn = JointAttention(config)
        self.img_norm2 = layer_norm(width)
        self.txt_norm2 = layer_norm(width)
        self.img_mlp = MLP(width)
        self.txt_mlp = MLP(width)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        temb: Tensor,
        rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        split: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        batch = img.shape[0]
        img_mod = per_token(self.tap("img_mod", self.img_mod(temb), "R M"), batch, split)
        txt_mod = self.tap("txt_mod", self.txt_mod(temb[:batch]), "B M")[:, None]
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)

        img_h = self.tap("img_attn_in", self.img_norm1(img) * (1 + img_scale1) + img_shift1, "B S D")
        txt_h = self.tap("txt_attn_in", self.txt_norm1(txt) * (1 + txt_scale1) + txt_shift1, "B T D")
        img_a, txt_a = self.attn(img_h, txt_h, rope, key_mask)
        img = self.tap("img_mid", img + self.tap("img_attn_add", img_gate1 * img_a, "B S D"), "B S D")
        txt = self.tap("txt_mid", txt + self.tap("txt_attn_add", txt_gate1 * txt_a, "B T D"), "B T D")

        img_h = self.tap("img_mlp_in", self.img_norm2(img) * (1 + img_scale2) + img_shift2, "B S D")
        txt_h = self.tap("txt_mlp_in", self.txt_norm2(txt) * (1 + txt_scale2) + txt_shift2, "B T D")
        img_m = self.img_mlp(img_h)
        txt_m = self.txt_mlp(txt_h)
        img = img + self.tap("img_mlp_add", img_gate2 * img_m, "B S D")
        txt = txt + self.tap("txt_mlp_add", txt_gate2 * txt_m, "B T D")
        if img.dtype == torch.float16:  # the residual stream outgrows float16; the reference clips it here
            img = img.clip(-65504, 65504)
            txt = txt.clip(-65504, 65504)
        return self.tap("img_out", img, "B S D"), self.tap("txt_out", txt, "B T D")


class JointAttention(Tapped):
    """Attention over the tokens of both streams at once, in the order [text, image].

    Shapes: `img` (B, S, D), `txt` (B, T, D), `rope` two tables (S, K/2, 2) and (T, K/2, 2), `key_mask` (B,
        1, 1, J) bool or None. Returns what each stream is given, before its gate.
    Source: `QwenDoubleStreamAttnProcessor2_0`. With `scores` or `probs` tapped, attention is explicit, some
        heads at a time if the maps are large (`by_heads`).
    """

    TAPS = (
        "img_q", "img_k", "img_v", "img_q_rot", "img_k_rot", "img_heads", "img_attn_out",
        "txt_q", "txt_k", "txt_v", "txt_q_rot", "txt_k_rot", "txt_heads", "txt_attn_out",
        "scores", "probs",
    )  # fmt: skip

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.img_q = nn.Linear(width, width)
        self.img_k = nn.Linear(width, width)
        self.img_v = nn.Linear(width, width)
        self.txt_q = nn.Linear(width, width)
        self.txt_k = nn.Linear(width, width)
        self.txt_v = nn.Linear(width, width)
        self.img_q_norm = RMSNorm(head_dim)
        self.img_k_norm = RMSNorm(head_dim)
        self.txt_q_norm = RMSNorm(head_dim)
        self.txt_k_norm = RMSNorm(head_dim)
        self.img_out = nn.Linear(width, width)
        self.txt_out = nn.Linear(width, width)

    def forward(
        self, img: Tensor, txt: Tensor, rope: tuple[Tensor, Tensor], key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img_rope, txt_rope = rope
        # QK-norm comes before RoPE.
        img_q = self.tap("img_q", self.img_q_norm(self.split_heads(self.img_q(img))), "B S H K")
        img_k = self.tap("img_k", self.img_k_norm(self.split_heads(self.img_k(img))), "B S H K")
        img_v = self.tap("img_v", self.split_heads(self.img_v(img)), "B S H K")
        txt_q = self.tap("txt_q", self.txt_q_norm(self.split_heads(self.txt_q(txt))), "B T H K")
        txt_k = self.tap("txt_k", self.txt_k_norm(self.split_heads(self.txt_k(txt))), "B T H K")
        txt_v = self.tap("txt_v", self.split_heads(self.txt_v(txt)), "B T H K")

        img_q = self.tap("img_q_rot", rotate(img_q, img_rope), "B S H K")
        img_k = self.tap("img_k_rot", rotate(img_k, img_rope), "B S H K")
        txt_q = self.tap("txt_q_rot", rotate(txt_q, txt_rope), "B T H K")
        txt_k = self.tap("txt_k_rot", rotate(txt_k, txt_rope), "B T H K")

        q = torch.cat([txt_q, img_q], dim=1).transpose(1, 2)  # B H J K
        k = torch.cat([txt_k, img_k], dim=1).transpose(1, 2)
        v = torch.cat([txt_v, img_v], dim=1).transpose(1, 2)
        if self.tapped("scores", "probs"):
            heads = by_heads(self.explicit_attention, q, k, v, key_mask)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        txt_heads, img_heads = heads.transpose(1, 2).split([txt.shape[1], img.shape[1]], dim=1)

        img_heads = self.tap("img_heads", img_heads, "B S H K")
        txt_heads = self.tap("txt_heads", txt_heads, "B T H K")
        # Contiguous as in the reference: a strided input takes another matrix kernel, with other last bits.
        img_a = self.tap("img_attn_out", self.img_out(img_heads.flatten(2).contiguous()), "B S D")
        txt_a = self.tap("txt_attn_out", self.txt_out(txt_heads.flatten(2).contiguous()), "B T D")
        return img_a, txt_a

    def split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b s (h k) -> b s h k", h=self.heads)

    def explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The same attention written out, for who reads or replaces its maps; softmax in at least float32."""
        scores = self.tap("scores", q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, "B H J J")
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask, float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs = self.tap("probs", torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype), "B H J J")
        return probs @ v


class MLP(Tapped):
    """Four times as wide inside, with the tanh form of GELU.

    Source: `FeedForward(activation_fn="gelu-approximate")`; diffusers' "geglu-approximate" is another GELU.
    """

    TAPS = ("mlp_hidden",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.tap("mlp_hidden", F.gelu(self.up(x), approximate="tanh"), "B * E"))


class Modulation(nn.Module):
    """The six adaLN vectors of a stream: `temb` (R, D) -> (R, 6 D), twice (shift, scale, gate)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, temb: Tensor) -> Tensor:
        return self.linear(F.silu(temb))


class AdaLayerNormOut(nn.Module):
    """The last norm, modulated by `temb`; the scale comes *before* the shift (`AdaLayerNormContinuous`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, img: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).chunk(2, dim=-1)
        return self.norm(img) * (1 + scale)[:, None] + shift[:, None]


class TimeEmbedding(Tapped):
    """Embed sigma: 256 sinusoids of 1000 sigma, then two linear layers. There is no text in it.

    Shapes: `timestep` (R,), with `addition` also `addition_t` (R,), which of two vectors is added; -> (R, D)
        in `dtype`.
    Raises: ValueError for an `addition_t` without `addition`, or the other way round.
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


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean square in float32, the product in the weight's dtype.

    Source: diffusers 0.39.0, models/normalization.py `RMSNorm`, eps 1e-6 everywhere in this network.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(mean_square + 1e-6)).to(self.weight.dtype) * self.weight


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without parameters: adaLN supplies scale and shift."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Rope(Tapped):
    """The rotary tables of both streams: three axes (frame, row, column), each with its own part of the head.

    Shapes: returns float32 (S, K/2, 2) for the image tokens and (T, K/2, 2) for the text; [..., 0] is the
        cosine, [..., 1] the sine.
    Source: `QwenEmbedRope(scale_rope=True)`, theta 10000; `layered`: `QwenEmbedLayer3DRope`, where each layer
        is a grid of its own; ours are the frames of one. Without a reference, its last layer would be at -1.

    +-- positions -----------------------------------------------------------------------------------------+
    | frame   the picture's number: 0 the target, 1 the first reference, ...                               |
    |         layered: 0, 1, ... the target's frames, -1 every reference                                   |
    | row     centred: -(h - h//2) ... h//2 - 1; an odd grid has its extra row on the NEGATIVE side        |
    | column  likewise                                                                                     |
    | text    one number for all three axes, upwards from the largest h//2 or w//2 of any picture, over    |
    |         the PADDED length (a mask does not shift it); layered: at least from the number of frames    |
    +------------------------------------------------------------------------------------------------------+
    """

    TAPS = ("img", "txt")

    def __init__(self, axes: tuple[int, int, int], *, layered: bool = False) -> None:
        super().__init__()
        self.axes = axes
        self.layered = layered

    def forward(self, grids: Sequence[Grid], txt_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frames = [-1 if self.layered and i else i for i in range(len(grids))]
        img_positions = torch.cat(
            [picture_positions(frame, grid, device) for frame, grid in zip(frames, grids, strict=True)]
        )
        start = max(max(rows // 2, columns // 2) for _, rows, columns in grids)
        if self.layered:
            start = max(start, grids[0][0])
        txt_positions = torch.arange(start, start + txt_length, device=device)[:, None].expand(-1, 3)
        img = self.tap("img", rope_table(img_positions, self.axes), "S A 2")
        txt = self.tap("txt", rope_table(txt_positions, self.axes), "T A 2")
        return img, txt


def picture_positions(first: int, grid: Grid, device: torch.device) -> Tensor:
    """(frames * rows * columns, 3) positions of one picture's tokens, row by row, from frame `first`."""
    frames, rows, columns = grid
    frame = torch.arange(first, first + frames, device=device)
    row = torch.arange(rows, device=device) - (rows - rows // 2)
    column = torch.arange(columns, device=device) - (columns - columns // 2)
    return torch.cartesian_prod(frame, row, column).reshape(-1, 3)


def rope_table(positions: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """(N, 3) positions -> (N, K/2, 2) cosines and sines, in float32 whatever the model's dtype."""
    angles = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles.append(positions[:, axis, None] * (1.0 / 10000**exponents))
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn NEIGHBOURING pairs (x0, x1), (x2, x3), ... of (B, N, H, K), in float32.

    The language model's RoPE turns halves instead: x0 with x_{K/2}.
    """
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # N 1 K/2
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def per_token(mod: Tensor, batch: int, split: tuple[int, int]) -> Tensor:
    """Modulation rows as (B, 1, M), or under `zero_cond_t` (2 B rows) as (B, S, M)."""
    if mod.shape[0] == batch:
        return mod[:, None]
    target, reference = mod[:batch, None], mod[batch:, None]
    return torch.cat([target.expand(-1, split[0], -1), reference.expand(-1, split[1], -1)], dim=1)


def joint_key_mask(txt_mask: Tensor, img_length: int) -> Tensor:
    """(B, T) bool -> (B, 1, 1, J): padded text is no key; every image token is one."""
    ones = txt_mask.new_ones(txt_mask.shape[0], img_length)
    return torch.cat([txt_mask, ones], dim=1)[:, None, None, :]


# official name -> ours; {n} is a number, {p} is weight or bias
KEY_TABLE: tuple[tuple[str, str], ...] = (
    ("img_in.{p}", "img_in.{p}"),
    ("txt_norm.weight", "txt_norm.weight"),
    ("txt_in.{p}", "txt_in.{p}"),
    ("time_text_embed.timestep_embedder.linear_1.{p}", "time_embed.linear_1.{p}"),
    ("time_text_embed.timestep_embedder.linear_2.{p}", "time_embed.linear_2.{p}"),
    ("time_text_embed.addition_t_embedding.weight", "time_embed.addition.weight"),
    ("transformer_blocks.{n}.img_mod.1.{p}", "blocks.{n}.img_mod.linear.{p}"),
    ("transformer_blocks.{n}.txt_mod.1.{p}", "blocks.{n}.txt_mod.linear.{p}"),
    ("transformer_blocks.{n}.attn.to_q.{p}", "blocks.{n}.attn.img_q.{p}"),
    ("transformer_blocks.{n}.attn.to_k.{p}", "blocks.{n}.attn.img_k.{p}"),
    ("transformer_blocks.{n}.attn.to_v.{p}", "blocks.{n}.attn.img_v.{p}"),
    ("transformer_blocks.{n}.attn.to_out.0.{p}", "blocks.{n}.attn.img_out.{p}"),
    ("transformer_blocks.{n}.attn.add_q_proj.{p}", "blocks.{n}.attn.txt_q.{p}"),
    ("transformer_blocks.{n}.attn.add_k_proj.{p}", "blocks.{n}.attn.txt_k.{p}"),
    ("transformer_blocks.{n}.attn.add_v_proj.{p}", "blocks.{n}.attn.txt_v.{p}"),
    ("transformer_blocks.{n}.attn.to_add_out.{p}", "blocks.{n}.attn.txt_out.{p}"),
    ("transformer_blocks.{n}.attn.norm_q.weight", "blocks.{n}.attn.img_q_norm.weight"),
    ("transformer_blocks.{n}.attn.norm_k.weight", "blocks.{n}.attn.img_k_norm.weight"),
    ("transformer_blocks.{n}.attn.norm_added_q.weight", "blocks.{n}.attn.txt_q_norm.weight"),
    ("transformer_blocks.{n}.attn.norm_added_k.weight", "blocks.{n}.attn.txt_k_norm.weight"),
    ("transformer_blocks.{n}.img_mlp.net.0.proj.{p}", "blocks.{n}.img_mlp.up.{p}"),
    ("transformer_blocks.{n}.img_mlp.net.2.{p}", "blocks.{n}.img_mlp.down.{p}"),
    ("transformer_blocks.{n}.txt_mlp.net.0.proj.{p}", "blocks.{n}.txt_mlp.up.{p}"),
    ("transformer_blocks.{n}.txt_mlp.net.2.{p}", "blocks.{n}.txt_mlp.down.{p}"),
    ("norm_out.linear.{p}", "norm_out.linear.{p}"),
    ("proj_out.{p}", "proj_out.{p}"),
)
