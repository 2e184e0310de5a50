"""What a run from a picture starts from, and how the black part of its mask is kept.

Let x0 be the picture's clean latents, noise the run's, and m the mask, 1 where the picture changes. The
picture at a sigma is x0(sigma) = sigma noise + (1 - sigma) x0. Tools keep it in three ways:

    latent     after a step, x = (1 - m) x0(sigma) + m x; the last is x0 itself
    velocity   in a step, v = (1 - m) (x - x0) / sigma + m v
    x0         before a step, x = (1 - m) x0(sigma) + m x; then the estimate of the clean latents is
               (1 - m) x0 + m (x - sigma v), whose velocity is the one above

In exact arithmetic the three are one under `euler` with a mask of black and white. They differ where grey is
blended, under samplers that draw new noise or look ahead, and in rounding.

Sources: the loops of diffusers 0.39.0's inpainting pipelines; `step` of DiffSynth-Studio's `BasePipeline` and
`return_to_timestep` of its scheduler; `KSamplerX0Inpaint` in ComfyUI's comfy/samplers.py, whose sampler goes
on from its own x, where the transformer alone sees the replaced one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenedit.encoding.sources import Generators, draw_masked, mask_tokens
from qwenedit.inputs.masks import Sources
from qwenedit.networks.vae import VAE
from qwenedit.switches import Mask

__all__ = ["Kept", "noised", "preserving"]


def noised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Clean latents at a sigma, in their dtype.

    Source: `FlowMatchEulerDiscreteScheduler.scale_noise`.
    """
    at = torch.full((), sigma, device=x0.device).to(x0.dtype)  # filled there: a copy from the host waits
    return at * noise + (1 - at) * x0


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept:
    """A picture that a run keeps, where its mask says so: a `Preserve`.

    Shapes: `x0`, `noise` and `mask` (B, S, C).

    Attributes:
        mask: 1 where the picture changes, 0 where it is kept, between them where it is grey.
        intervals: how many the run's schedule has.
        how: which way, by `how.preserve`, and what grey means, by `how.grey`.
    """

    x0: Tensor
    noise: Tensor
    mask: Tensor
    intervals: int
    how: Mask

    def before(self, latents: Tensor, sigma: float, interval: int) -> Tensor:
        if self.how.preserve != "x0":
            return latents
        return self._kept_in(noised(self.x0, self.noise, sigma), latents, interval)

    def velocity(self, velocity: Tensor, latents: Tensor, sigma: float, interval: int) -> Tensor:
        if self.how.preserve == "latent" or sigma == 0:  # given sigmas may end with a 0 of their own
            return velocity
        return self._kept_in((latents - self.x0) / sigma, velocity, interval)

    def after(self, latents: Tensor, sigma: float, interval: int) -> Tensor:
        if self.how.preserve != "latent":
            return latents
        return self._kept_in(noised(self.x0, self.noise, sigma), latents, interval)

    def _kept_in(self, kept: Tensor, made: Tensor, interval: int) -> Tensor:
        """Both parts of a step's tensor, one for each place."""
        mask = self.mask
        if self.how.grey == "steps":
            mask = self.mask >= 1 - interval / self.intervals
        mask = mask.to(made.dtype)
        return (1 - mask) * kept + mask * made


def preserving(
    sources: Sources,
    x0: Tensor,
    noise: Tensor,
    sigmas: Sequence[float],
    how: Mask,
    vae: VAE,
    generator: Generators,
) -> Kept | None:
    """What keeps the black part of the masks, if there are any; `x0` and `noise` (B, S, C) are the run's."""
    if not sources.masks:
        return None
    if how.posterior == "sample":
        draw_masked(sources, vae, generator, len(x0))
    factor, channels = vae.config.spatial_factor, vae.config.z_dim
    mask = mask_tokens(sources, len(x0), factor, channels, grey=how.grey != "rounded")
    return Kept(x0=x0, noise=noise, mask=mask.to(x0.device), intervals=len(sigmas) - 1, how=how)
