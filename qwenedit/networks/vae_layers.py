"""The layers of the VAE's encoder and decoder: causal convolutions, norms, attention, resampling.

Source: diffusers 0.39.0, models/autoencoders/autoencoder_kl_qwenimage.py. vae.py builds the networks.

Shapes within one module: C channels at its input, D further on, E at its end; F Y X frames, rows and columns
at the larger size, f y x at the smaller (latent) size; Z latent channels; S = Y X positions of a frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qwenedit.taps import Tapped, observed

__all__ = ["CausalConv3d", "Downsample", "FrameAttention", "Past", "RMSNorm", "ResidualBlock", "Upsample"]


class Past(dict[nn.Module, Tensor]):
    """The frames that causal convolutions keep from earlier chunks of one video: at most two each.

    Make one for every video and pass it along with every chunk in order. Without one (None) a chunk is the
    whole input, as for a picture.
    """

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        self[conv] = frames.clone()  # a view would keep the whole chunk alive


class ResidualBlock(Tapped):
    """Norm, SiLU and convolution, twice, added to the input. A 1x1x1 convolution changes its width if needed.

    Shapes: `x` (B, C, F, Y, X) -> (B, D, F, Y, X). `mid` is the tensor between the convolutions.
    If nothing observes the block, SiLU and the sum work in place, which saves memory.
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
        alone = not observed(self)  # if so, results of norms and convolutions may be overwritten
        plus = Tensor.add_ if alone else Tensor.add
        x = self.tap("in", x, "B C F Y X")
        skip = self.tap("skip", self.shortcut(x), "B D F Y X")
        h = self.tap("norm1", self.norm1(x), "B C F Y X")
        h = self.tap("act1", F.silu(h, inplace=alone and h is not x), "B C F Y X")  # h is x after Identity
        h = self.tap("mid", self.conv1(h, past), "B D F Y X")
        h = self.tap("norm2", self.norm2(h), "B D F Y X")
        h = self.tap("act2", F.silu(h, inplace=alone), "B D F Y X")
        h = self.tap("add", self.conv2(h, past), "B D F Y X")
        return self.tap("out", plus(h, skip), "B D F Y X")


class FrameAttention(Tapped):
    """Self-attention with a single head within each frame, added to the input.

    Shapes: `x` (B, C, F, Y, X) -> the same. There is no gate: `attn_add` is the output of the projection.
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
        """The same attention written out, so that its maps can be tapped; softmax in at least float32."""
        scores = self.tap("scores", q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, "B F S S")
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs = self.tap("probs", torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype), "B F S S")
        return probs @ v


class Downsample(Tapped):
    """Half the rows and columns, and with `in_time` half the frames.

    Shapes: `x` (B, C, F, Y, X) -> (B, C, F, Y/2, X/2) or (B, C, F/2, Y/2, X/2). The first frame of a video
        skips the convolution over time, which gets it as the past of the next chunk.
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
        video skips the convolution over time, which never gets it: zeros precede the second chunk.
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
        rounded = fold_frames(x.float().to(x.dtype))
        large = F.interpolate(rounded, scale_factor=2.0, mode="nearest-exact")
        return self.tap("out", unfold_frames(self.conv(large), x.shape[2]), "B D F Y X")


class CausalConv3d(nn.Conv3d):
    """A convolution over frames, rows and columns whose output ignores later frames.

    Shapes: `x` (B, C, F, Y, X) -> (B, D, F / stride, Y, X). Rows and columns are padded with zeros. Kernel -
        stride frames are put before the first one: those in `past`, preceded by zeros if it has fewer.
    A single frame without earlier ones needs only the last of the weight's slices in time: the others meet
    zeros. It is convolved in two dimensions, with its channels last in memory: a third of the work.
    Source: `QwenImageCausalConv3d`, and the cache handling that the reference repeats around every call.
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
        if x.shape[2] == self.stride[0] == 1:
            frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)
            margin = (self.margin[2], self.margin[0])
            return F.conv2d(frame, self.weight[:, :, -1], self.bias, padding=margin)[:, :, None]
        return super().forward(F.pad(x, (*self.margin, missing, 0)))


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels, axis 1; |x| in float32 for half dtypes, at least 1e-12.

    `trailing` counts the axes of gamma after the channels: (C, 1, 1, 1) on videos, (C, 1, 1) on frames. The
    result never shares memory with `x`.
    Source: `QwenImageRMS_norm`. Unlike the transformer's RMSNorm it adds no epsilon to the mean square.
    """

    def __init__(self, channels: int, *, trailing: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        size = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
        times = Tensor.mul if torch.is_grad_enabled() else Tensor.mul_  # in place: the quotient is new
        return times(times((wide / size).to(x.dtype), x.shape[1] ** 0.5), self.gamma)


def fold_frames(x: Tensor) -> Tensor:
    """Move the frames into the batch, for two-dimensional layers."""
    if x.shape[2] == 1:
        return x[:, :, 0]  # the same values, and torch still recognises channels-last memory
    return rearrange(x, "b c f y x -> (b f) c y x")


def unfold_frames(x: Tensor, frames: int) -> Tensor:
    return rearrange(x, "(b f) c y x -> b c f y x", f=frames)
