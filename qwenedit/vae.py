"""The causal video VAE that Qwen-Image uses for pictures: pixels to latents and back.

Source: diffusers 0.39.0, models/autoencoders/autoencoder_kl_qwenimage.py (`AutoencoderKLQwenImage`), the VAE
of Wan 2.1 fine-tuned. A picture is a video of one frame. Longer ones have 1 + 4 k frames and go through in
chunks, the first of one frame; what a convolution needs of earlier chunks is in a `Past`. The modules differ
from the official ones in names only (`KEY_TABLE`); the arithmetic, casts included, is the official one. We
differ in this: no tiling or slicing; no state left on modules; the 1x1x1 convolutions between encoder and
decoder run chunk by chunk, so that no bit of a frame depends on later frames; bad shapes are errors.

Shapes within one module: C channels coming in, D going on, E at its end; F Y X frames, rows and columns where
they are many, f y x where they are few (the latent side); Z latent channels; S = Y X positions of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from qwenedit.taps import Tapped

__all__ = ["KEY_TABLE", "VAE", "Past", "Posterior", "VAEConfig"]

CHUNK = (
    4  # frames encoded at a time after the first, whatever the temporal factor; fixed in the reference too
)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The VAE's config.json; `temperal` is the official spelling.

    Raises:
        ValueError: sizes that do not fit together, or a value that no released checkpoint has.
    """

    base_dim: int  # channels at full resolution
    z_dim: int  # latent channels
    dim_mult: tuple[int, ...]  # channels of each level / base_dim; all but the last level halve the picture
    num_res_blocks: int
    attn_scales: tuple[float, ...]  # only () exists
    temperal_downsample: tuple[bool, ...]  # which of the halvings also halve the frames
    dropout: float  # only 0 exists
    latents_mean: tuple[float, ...]  # statistics of raw latents, for who normalises them
    latents_std: tuple[float, ...]
    input_channels: int = 3  # 4 in Layered (RGBA); RGB checkpoints leave the key out

    FIXED: ClassVar[dict[str, Any]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name in ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows lists only
        sizes = (self.base_dim, self.z_dim, self.num_res_blocks, self.input_channels, *self.dim_mult)
        if min(sizes) < 1:
            raise ValueError(
                f"base_dim, z_dim, num_res_blocks, input_channels, dim_mult are {sizes}, wanted >= 1"
            )
        halvings = len(self.dim_mult) - 1
        if len(self.temperal_downsample) != halvings or sum(self.temperal_downsample) > 2:
            raise ValueError(
                f"temperal_downsample is {self.temperal_downsample}, wanted {halvings} entries, one less "
                f"than dim_mult, and at most 2 true: the encoder takes {CHUNK} frames at a time"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, wanted z_dim {self.z_dim}")
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std is {self.latents_std}, wanted positive numbers")
        if self.attn_scales:  # the reference's encoder has it, its decoder ignores it
            raise ValueError(f"attn_scales is {self.attn_scales}, wanted (): no released checkpoint has any")
        if self.dropout != 0:
            raise ValueError(f"dropout is {self.dropout}, wanted 0: no released checkpoint has any")

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent pixel, in each direction."""
        return 2 ** len(self.temperal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame, after the first, which stays one."""
        return 2 ** sum(self.temperal_downsample)


@dataclass(frozen=True, eq=False)
class Posterior:
    """A normal distribution over raw latents, independent in each value.

    Shapes: `mean` and `logvar` (B, Z, f, y, x).
    Source: `DiagonalGaussianDistribution`.
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """The most likely latents, which editing uses: the mean."""
        return self.mean

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Random latents, the reference's for the same generator state.

        The noise is drawn in the mean's dtype on the generator's device, then moved.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class Past(dict[nn.Module, Tensor]):
    """What causal convolutions remember of earlier chunks of one video: at most two frames each.

    Make one for every video, hand it to every chunk in order, and drop it. Without one (None) a chunk is the
    first and the last: a picture.
    """

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        self[conv] = frames.clone()  # a view would keep the whole chunk alive


class VAE(Tapped):
    """Encode pixels to a distribution over latents, decode latents to pixels.

    Latents are raw here: `config.latents_mean` and `latents_std` are for who hands them to the transformer.
    """

    TAPS = ("moments", "latents", "pixels")

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Posterior:
        """The distribution of the raw latents of pictures or videos.

        Shapes: `pixels` (B, C, F, Y, X) with F = 1 + 4 k, Y and X multiples of the spatial factor (8); mean
            and logvar (B, Z, 1 + 4 k / temporal factor, Y / 8, X / 8).
        Units: pixels in [-1, 1]; logvar is clamped to [-30, 20].
        Raises: ValueError for other shapes. The reference silently drops the frames beyond 1 + 4 k.
        Source: `AutoencoderKLQwenImage._encode`.
        """
        check_shape("pixels", pixels, self.config.input_channels)
        frames, rows, columns = pixels.shape[2:]
        factor = self.config.spatial_factor
        if frames % CHUNK != 1:
            raise ValueError(f"pixels have {frames} frames, wanted 1 or 1 + a multiple of {CHUNK}")
        if rows % factor or columns % factor:
            raise ValueError(f"pixels have {rows} rows and {columns} columns, wanted multiples of {factor}")
        past = Past() if frames > 1 else None
        chunks = pixels.split([1] + [CHUNK] * (frames // CHUNK), dim=2)
        moments = torch.cat([self.quant_conv(self.encoder(chunk, past)) for chunk in chunks], dim=2)
        mean, logvar = self.tap("moments", moments, "B D f y x").chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures or videos of raw latents, one latent frame at a time.

        Shapes: `latents` (B, Z, f, y, x); returns (B, C, 1 + (f - 1) * temporal factor, 8 y, 8 x).
        Units: latents as `encode` gives them, not normalised; pixels are clamped to [-1, 1], after their tap.
        Raises: ValueError for other shapes.
        Source: `AutoencoderKLQwenImage._decode`.
        """
        check_shape("latents", latents, self.config.z_dim)
        latents = self.tap("latents", latents, "B Z f y x")
        past = Past() if latents.shape[2] > 1 else None
        chunks = latents.split(1, dim=2)
        pixels = torch.cat([self.decoder(self.post_quant_conv(chunk), past) for chunk in chunks], dim=2)
        return self.tap("pixels", pixels, "B C F Y X").clamp(-1.0, 1.0)


class Encoder(Tapped):
    """One chunk of pixels to one of moments: the picture is halved level by level.

    Shapes: `x` (B, 3, F, Y, X), F = 1 in the first chunk, then 4; returns (B, 2 Z, f, y, x).
    Raises: ValueError where the first chunk is not one frame.
    Source: `QwenImageEncoder3d`, whose list is flat too: residual blocks and downsamplers in one.
    """

    TAPS = ("in", "norm_out", "act", "out")

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.base_dim
        self.conv_in = CausalConv3d(config.input_channels, width, (3, 3, 3))
        self.down = nn.ModuleList()
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                self.down.append(ResidualBlock(width, config.base_dim * mult))
                width = config.base_dim * mult
            if level < len(config.temperal_downsample):
                self.down.append(Downsample(width, in_time=config.temperal_downsample[level]))
        self.mid = MidBlock(width)
        self.norm_out = RMSNorm(width, trailing=3)
        self.conv_out = CausalConv3d(width, 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        check_first_chunk(x, past)
        x = self.tap("in", self.conv_in(x, past), "B C F Y X")
        for block in self.down:
            x = block(x, past)
        x = self.mid(x, past)
        x = self.tap("norm_out", self.norm_out(x), "B D f y x")
        x = self.tap("act", F.silu(x), "B D f y x")
        return self.tap("out", self.conv_out(x, past), "B E f y x")


class Decoder(Tapped):
    """One latent frame to its pixels: the encoder's way back, with one more residual block a level.

    Shapes: `x` (B, Z, 1, y, x); returns (B, 3, F, Y, X), F = 1 for the first frame, then the temporal factor.
    Raises: ValueError where the first chunk is not one frame.
    Source: `QwenImageDecoder3d`.
    """

    TAPS = ("in", "norm_out", "act", "out")

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        in_time = config.temperal_downsample[::-1]
        width = config.base_dim * config.dim_mult[-1]
        self.conv_in = CausalConv3d(config.z_dim, width, (3, 3, 3))
        self.mid = MidBlock(width)
        self.up = nn.ModuleList()
        for level, mult in enumerate(config.dim_mult[::-1]):
            out = config.base_dim * mult
            upsample = Upsample(out, in_time=in_time[level]) if level < len(in_time) else None
            self.up.append(UpBlock(width, out, config.num_res_blocks + 1, upsample))
            width = out // 2  # upsampling halves the channels
        self.norm_out = RMSNorm(out, trailing=3)
        self.conv_out = CausalConv3d(out, config.input_channels, (3, 3, 3))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        check_first_chunk(x, past)
        x = self.tap("in", self.conv_in(x, past), "B C f y x")
        x = self.mid(x, past)
        for block in self.up:
            x = block(x, past)
        x = self.tap("norm_out", self.norm_out(x), "B D F Y X")
        x = self.tap("act", F.silu(x), "B D F Y X")
        return self.tap("out", self.conv_out(x, past), "B E F Y X")


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks, then twice the size unless it is the last."""

    def __init__(self, channels: int, out: int, depth: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ResidualBlock(out if i else channels, out) for i in range(depth)])
        self.upsample = upsample

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, past)
        return x if self.upsample is None else self.upsample(x, past)


class MidBlock(nn.Module):
    """The middle of encoder and decoder: residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.attn = FrameAttention(channels)
        self.block2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.block2(self.attn(self.block1(x, past)), past)


class ResidualBlock(Tapped):
    """Norm, SiLU, convolution, all twice; added to the input, which a 1x1x1 convolution widens if need be.

    Shapes: `x` (B, C, F, Y, X) -> (B, D, F, Y, X). `mid` is the tensor between the convolutions.
    Source: `QwenImageResidualBlock`.
    """

    TAPS = ("in", "skip", "norm1", "act1", "mid", "norm2", "act2", "add", "out")

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels, trailing=3)
        self.conv1 = CausalConv3d(channels, out, (3, 3, 3))
        self.norm2 = RMSNorm(out, trailing=3)
        self.conv2 = CausalConv3d(out, out, (3, 3, 3))
        self.shortcut = nn.Identity() if channels == out else CausalConv3d(channels, out, (1, 1, 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.tap("in", x, "B C F Y X")
        skip = self.tap("skip", self.shortcut(x), "B D F Y X")
        h = self.tap("norm1", self.norm1(x), "B C F Y X")
        h = self.tap("act1", F.silu(h), "B C F Y X")
        h = self.tap("mid", self.conv1(h, past), "B D F Y X")
        h = self.tap("norm2", self.norm2(h), "B D F Y X")
        h = self.tap("act2", F.silu(h), "B D F Y X")
        h = self.tap("add", self.conv2(h, past), "B D F Y X")
        return self.tap("out", h + skip, "B D F Y X")


class FrameAttention(Tapped):
    """Self-attention with a single head over the positions of each frame by itself, added to the input.

    Shapes: `x` (B, C, F, Y, X) -> the same. There is no gate, so what leaves the projection is `attn_add`.
    Source: `QwenImageAttentionBlock`. With `scores` or `probs` tapped, attention is computed explicitly.
    """

    TAPS = ("in", "attn_in", "q", "k", "v", "scores", "probs", "heads", "attn_add", "out")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, trailing=2)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, frames, rows, _ = x.shape
        x = self.tap("in", x, "B C F Y X")
        h = self.tap("attn_in", unfold_frames(self.norm(fold_frames(x)), frames), "B C F Y X")
        qkv = rearrange(self.qkv(fold_frames(h)), "(b f) c y x -> b f (y x) c", f=frames)
        q, k, v = qkv.contiguous().chunk(3, dim=-1)
        q = self.tap("q", q, "B F S C")
        k = self.tap("k", k, "B F S C")
        v = self.tap("v", v, "B F S C")
        if self.tapped("scores", "probs"):
            heads = self.explicit_attention(q, k, v)
        else:
            heads = F.scaled_dot_product_attention(q, k, v)  # the frames stand where heads would
        heads = self.tap("heads", heads, "B F S C")
        projected = self.proj(rearrange(heads, "b f (y x) c -> (b f) c y x", y=rows))
        add = self.tap("attn_add", unfold_frames(projected, frames), "B C F Y X")
        return self.tap("out", add + x, "B C F Y X")

    def explicit_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same attention written out, for who reads or replaces its maps; softmax in at least float32."""
        scores = self.tap("scores", q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, "B F S S")
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs = self.tap("probs", torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype), "B F S S")
        return probs @ v


class Downsample(Tapped):
    """Half the rows and columns, and with `in_time` half the frames.

    Shapes: `x` (B, C, F, Y, X) -> (B, C, F, Y/2, X/2) or (B, C, F/2, Y/2, X/2). The first frame of a video
        passes the convolution over time by, which meets it as the past of the next chunk.
    Source: `QwenImageResample` in the modes "downsample2d" and "downsample3d".
    """

    TAPS = ("in", "mid", "out")

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if in_time else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        frames = x.shape[2]
        x = self.tap("in", x, "B C F Y X")
        padded = F.pad(fold_frames(x), (0, 1, 0, 1))  # right and below only
        x = self.tap("mid", unfold_frames(self.conv(padded), frames), "B C F y x")
        if self.time_conv is not None and past is not None:
            if self.time_conv in past:
                x = self.time_conv(x, past)
            else:
                past.keep(self.time_conv, x)
        return self.tap("out", x, "B C f y x")


class Upsample(Tapped):
    """Twice the rows and columns, half the channels, and with `in_time` twice the frames.

    Shapes: `x` (B, C, f, y, x) -> (B, C/2, f, 2 y, 2 x) or (B, C/2, 2 f, 2 y, 2 x). The first frame of a
        video passes the convolution over time by, which never meets it: zeros precede the second chunk.
    Source: `QwenImageResample` in the modes "upsample2d" and "upsample3d" (its cache then holds "Rep").
    """

    TAPS = ("in", "mid", "out")

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.tap("in", x, "B C f y x")
        if self.time_conv is not None and past is not None:
            if self.time_conv in past:
                x = rearrange(self.time_conv(x, past), "b (two c) f y x -> b c (f two) y x", two=2)
            else:
                past.keep(self.time_conv, x[:, :, :0])
        x = self.tap("mid", x, "B C F y x")
        # The reference resizes in float32 whatever the dtype: exact for half dtypes, a rounding in float64.
        large = F.interpolate(fold_frames(x).float(), scale_factor=2.0, mode="nearest-exact").to(x.dtype)
        return self.tap("out", unfold_frames(self.conv(large), x.shape[2]), "B D F Y X")


class CausalConv3d(nn.Conv3d):
    """A convolution over frames, rows and columns whose output ignores later frames.

    Shapes: `x` (B, C, F, Y, X) -> (B, D, F / stride, Y, X). Rows and columns are padded with zeros. Before
        the first frame come kernel - stride others: those in `past`, and zeros where it has fewer.
    Source: `QwenImageCausalConv3d` together with the bookkeeping that the reference repeats at every call.
    """

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=(stride, 1, 1))
        self.context = kernel[0] - stride
        self.margin = (kernel[2] // 2, kernel[2] // 2, kernel[1] // 2, kernel[1] // 2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        missing = self.context
        if past is not None and self.context:
            if self in past:
                missing = self.context - past[self].shape[2]
                x = torch.cat([past[self], x], dim=2)
            past.keep(self, x[:, :, -self.context :])
        return super().forward(F.pad(x, (*self.margin, missing, 0)))


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels, axis 1; |x| in float32 for half dtypes, at least 1e-12.

    `trailing` counts the axes of gamma after the channels: (C, 1, 1, 1) on videos, (C, 1, 1) on frames.
    Source: `QwenImageRMS_norm`. Unlike the transformer's RMSNorm it adds no epsilon to the mean square.
    """

    def __init__(self, channels: int, *, trailing: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.normalize(wide, dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma


def fold_frames(x: Tensor) -> Tensor:
    """Frames become pictures of a larger batch, for layers in two dimensions."""
    return rearrange(x, "b c f y x -> (b f) c y x")


def unfold_frames(x: Tensor, frames: int) -> Tensor:
    return rearrange(x, "(b f) c y x -> b c f y x", f=frames)


def check_shape(what: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        wanted = f"(batch, {channels} channels, frames, rows, columns)"
        raise ValueError(f"{what} have shape {tuple(x.shape)}, wanted {wanted}")


def check_first_chunk(x: Tensor, past: Past | None) -> None:
    if x.shape[2] != 1 and not past:  # no past, or an empty one
        raise ValueError(f"the first chunk has {x.shape[2]} frames, wanted 1, then the rest with one `Past`")


def _renamed(official: str, ours: str, *tails: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{official}.{tail}", f"{ours}.{tail}") for tail in tails)


_RESIDUAL = ("norm1.gamma", "conv1.{p}", "norm2.gamma", "conv2.{p}")
_ENDS = ("conv_in.{p}", "norm_out.gamma", "conv_out.{p}")

# official name -> ours; {n} and {m} are numbers, {p} is weight or bias
KEY_TABLE: tuple[tuple[str, str], ...] = (
    *_renamed("encoder", "encoder", *_ENDS),
    *_renamed("encoder.down_blocks.{n}", "encoder.down.{n}", *_RESIDUAL, "time_conv.{p}"),
    ("encoder.down_blocks.{n}.conv_shortcut.{p}", "encoder.down.{n}.shortcut.{p}"),
    ("encoder.down_blocks.{n}.resample.1.{p}", "encoder.down.{n}.conv.{p}"),
    *_renamed("encoder.mid_block.resnets.0", "encoder.mid.block1", *_RESIDUAL),
    *_renamed("encoder.mid_block.attentions.0", "encoder.mid.attn", "norm.gamma", "proj.{p}"),
    ("encoder.mid_block.attentions.0.to_qkv.{p}", "encoder.mid.attn.qkv.{p}"),
    *_renamed("encoder.mid_block.resnets.1", "encoder.mid.block2", *_RESIDUAL),
    ("quant_conv.{p}", "quant_conv.{p}"),
    ("post_quant_conv.{p}", "post_quant_conv.{p}"),
    *_renamed("decoder", "decoder", *_ENDS),
    *_renamed("decoder.mid_block.resnets.0", "decoder.mid.block1", *_RESIDUAL),
    *_renamed("decoder.mid_block.attentions.0", "decoder.mid.attn", "norm.gamma", "proj.{p}"),
    ("decoder.mid_block.attentions.0.to_qkv.{p}", "decoder.mid.attn.qkv.{p}"),
    *_renamed("decoder.mid_block.resnets.1", "decoder.mid.block2", *_RESIDUAL),
    *_renamed("decoder.up_blocks.{n}.resnets.{m}", "decoder.up.{n}.blocks.{m}", *_RESIDUAL),
    ("decoder.up_blocks.{n}.resnets.{m}.conv_shortcut.{p}", "decoder.up.{n}.blocks.{m}.shortcut.{p}"),
    ("decoder.up_blocks.{n}.upsamplers.0.resample.1.{p}", "decoder.up.{n}.upsample.conv.{p}"),
    ("decoder.up_blocks.{n}.upsamplers.0.time_conv.{p}", "decoder.up.{n}.upsample.time_conv.{p}"),
)
