"""The causal video VAE that Qwen-Image uses for pictures: pixels to latents and back.

Source: diffusers 0.39.0, models/autoencoders/autoencoder_kl_qwenimage.py (`AutoencoderKLQwenImage`), the VAE
of Wan 2.1 fine-tuned. A picture is a video of one frame. Longer videos have 1 + 4 k frames and are processed
in chunks, the first of one frame; a `Past` keeps the frames that convolutions need from earlier chunks. The
modules differ from the official ones in names only (`KEY_TABLE`); the arithmetic, casts included, is the
official one. We differ in this: no tiling or slicing; no state left on modules; the 1x1x1 convolutions
between encoder and decoder run chunk by chunk, so that no bit of a frame depends on later frames; a first
frame is convolved in two dimensions, which adds in another order; bad shapes are errors. vae_layers.py has
the layers and explains the letters of the shapes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from qwenedit.networks.ranges import CHANNELS, require_ranges
from qwenedit.networks.vae_layers import (
    CausalConv3d,
    Downsample,
    FrameAttention,
    Past,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from qwenedit.taps import Tapped

__all__ = ["KEY_TABLE", "VAE", "Past", "Posterior", "VAEConfig"]

# frames encoded at a time after the first, for any temporal factor; fixed in the reference too
CHUNK = 4


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
    latents_mean: tuple[float, ...]  # statistics of raw latents, to normalise them with
    latents_std: tuple[float, ...]
    input_channels: int = 3  # 4 in Layered (RGBA); RGB checkpoints leave the key out

    def __post_init__(self) -> None:
        for name in ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        require_ranges(
            self, base_dim=CHANNELS, z_dim=CHANNELS, dim_mult=1000, num_res_blocks=100,
            input_channels=CHANNELS, levels=10, widths=CHANNELS,
        )  # fmt: skip
        halvings = self.levels - 1
        if len(self.temperal_downsample) != halvings or sum(self.temperal_downsample) > 2:
            raise ValueError(
                f"temperal_downsample is {self.temperal_downsample}, wanted {halvings} entries, one less "
                f"than dim_mult, and at most 2 true: the encoder takes {CHUNK} frames at a time"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, wanted z_dim {self.z_dim}")
        if not all(0 < one < math.inf for one in self.latents_std):
            raise ValueError(f"latents_std is {self.latents_std}, wanted positive numbers")
        if self.attn_scales:  # the reference's encoder has it, its decoder ignores it
            raise ValueError(f"attn_scales is {self.attn_scales}, wanted (): no released checkpoint has any")
        if self.dropout != 0:
            raise ValueError(f"dropout is {self.dropout}, wanted 0: no released checkpoint has any")

    @property
    def levels(self) -> int:
        return len(self.dim_mult)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_dim * mult for mult in self.dim_mult)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, in each direction."""
        return 2 ** len(self.temperal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, except the first, which is one frame."""
        return 2 ** sum(self.temperal_downsample)


@dataclass(frozen=True, eq=False)
class Posterior:
    """A normal distribution over raw latents, independent for each value.

    Shapes: `mean` and `logvar` (B, Z, f, y, x).
    Source: `DiagonalGaussianDistribution`.
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """The most likely latents, which editing uses: the mean."""
        return self.mean

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Random latents, equal to the reference's for the same generator state.

        The noise is drawn in the mean's dtype on the generator's device, then moved.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.at(noise.to(self.mean.device))

    def at(self, noise: Tensor) -> Tensor:
        """The latents that standard normal noise of the mean's shape stands for."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class VAE(Tapped):
    """Encode pixels to a distribution over latents, decode latents to pixels.

    Latents are raw here. The transformer takes them normalised by `config.latents_mean` and `latents_std`.
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

        Shapes: `pixels` (B, C, F, Y, X) with F = 1 + 4 k, Y and X multiples of the spatial factor s; mean
            and logvar (B, Z, 1 + 4 k / temporal factor, Y / s, X / s).
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

        Shapes: `latents` (B, Z, f, y, x); returns (B, C, 1 + (f - 1) * temporal factor, s y, s x).
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

    def enable_slicing(self) -> None:
        """For scripts of the reference, with a warning: nothing changes."""
        warnings.warn("enable_slicing has no effect: set micro_batch = 1 on the pipeline", stacklevel=2)

    def enable_tiling(self, *_sizes: Any, **_named: Any) -> None:
        """For scripts of the reference, with a warning: nothing changes, and no seams come up."""
        warnings.warn("enable_tiling has no effect: decoding whole needs little memory", stacklevel=2)

    def disable_slicing(self) -> None:
        """For scripts of the reference: there is nothing to undo."""

    def disable_tiling(self) -> None:
        """For scripts of the reference: there is nothing to undo."""


class Encoder(Tapped):
    """Encode one chunk of pixels to moments. Every level but the last halves the picture.

    Shapes: `x` (B, C, F, Y, X), F = 1 in the first chunk, then 4; returns (B, 2 Z, f, y, x).
    Raises: ValueError if the first chunk is not one frame.
    Source: `QwenImageEncoder3d`, which also has one flat list of residual blocks and downsamplers.
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
    """Decode one latent frame to pixels: the encoder reversed, with one more residual block per level.

    Shapes: `x` (B, Z, 1, y, x); returns (B, C, F, Y, X), F = 1 for the first frame, then the temporal factor.
    Raises: ValueError if the first chunk is not one frame.
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
    """One level of the decoder: residual blocks, then upsampling unless it is the last."""

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
