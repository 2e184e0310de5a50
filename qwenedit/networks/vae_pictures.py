"""The VAE for pictures, sooner and in less memory: a second form of what vae_layers.py builds it of.

Before the first frame of a video there are zeros, so that of a causal convolution of one frame the last
temporal tap alone meets data. A picture is then convolved in two dimensions, a third of the work, with its
channels last in memory, and what nobody else can hold is written over. Weights, names, taps and their shapes
are the plain form's, and so is the arithmetic, up to the order in which a convolution adds. Videos are left
to the plain form. `load` makes the VAE of this form; `VAE(config)` is the plain one, to which
`load_state_dict(..., assign=True)` gives the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from qwenedit.networks.vae import VAE
from qwenedit.networks.vae_layers import CausalConv3d, Past, ResidualBlock, RMSNorm

__all__ = ["PictureBlock", "PictureConv", "PictureNorm", "for_pictures"]


def for_pictures(vae: VAE) -> VAE:
    """Give a VAE, in place, the forwards for pictures. Its parameters stay, and no others are made."""
    for network in (vae.encoder, vae.decoder):
        for module in network.modules():
            module.__class__ = FORMS.get(type(module), type(module))
    return vae


class PictureConv(CausalConv3d):
    """A causal convolution, of one frame in two dimensions: with the weight's last temporal tap, a view.

    Shapes: as `CausalConv3d`.
    """

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if past is not None or x.shape[2] > 1:
            return super().forward(x, past)
        frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)  # no copy but for the first
        margin = (self.margin[2], self.margin[0])
        return F.conv2d(frame, self.weight[:, :, -1], self.bias, padding=margin)[:, :, None]


class PictureNorm(RMSNorm):
    """The norm without gradients: the same operations, each in the place of the one before.

    The result is always memory of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        size = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(1e-12)
        return (wide / size).to(x.dtype).mul_(x.shape[1] ** 0.5).mul_(self.gamma)


class PictureBlock(ResidualBlock):
    """The residual block, whose SiLUs and sum write over their argument where nobody else can hold it."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        alone = self.alone()
        x = self.tap("in", x, "B C F Y X")
        skip = self.tap("skip", self.shortcut(x), "B D F Y X")
        h = self.tap("norm1", self.norm1(x), "B C F Y X")
        h = self.tap("act1", F.silu(h, inplace=alone), "B C F Y X")
        h = self.tap("mid", self.conv1(h, past), "B D F Y X")
        h = self.tap("norm2", self.norm2(h), "B D F Y X")
        h = self.tap("act2", F.silu(h, inplace=alone), "B D F Y X")
        h = self.tap("add", self.conv2(h, past), "B D F Y X")
        return self.tap("out", h.add_(skip) if alone else h + skip, "B D F Y X")

    def alone(self) -> bool:
        """Does nobody else hold what the norms and the last convolution return?

        Somebody may with gradients, taps or hooks, or where other modules or forwards stand in their place.
        """
        if torch.is_grad_enabled() or self._taps is not None or torch_module._global_forward_hooks:
            return False
        makers: tuple[nn.Module, ...] = (self.norm1, self.norm2, self.conv2)
        return all(
            type(maker) in (PictureNorm, PictureConv)
            and not maker._forward_hooks
            and "forward" not in maker.__dict__
            for maker in makers
        )


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    CausalConv3d: PictureConv,
    RMSNorm: PictureNorm,
    ResidualBlock: PictureBlock,
}
