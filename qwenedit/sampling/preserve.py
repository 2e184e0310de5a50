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

from qwenedit.switches import Mask

__all__ = ["Kept", "noised"]


def noised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Clean latents at a sigma, in their dtype.

    Source: `FlowMatchEulerDiscreteScheduler.scale_noise`.
    """
    at = torch.tensor(sigma, device=x0.device).to(x0.dtype)
    return at * noise + (1 - at) * x0


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept:
    """A picture that a run keeps, where its mask says so: a `Preserve`.

    Shapes: `x0`, `noise` and `mask` (B, S, C).

    Attributes:
        mask: 1 where the picture changes, 0 where it is kept, between them where it is grey.
        sigmas: those of the run, with the final 0.
        how: which way, by `how.preserve`, and what grey means, by `how.grey`.
    """

    x0: Tensor
    noise: Tensor
    mask: Tensor
    sigmas: Sequence[float]
    how: Mask

    def before(self, latents: Tensor, sigma: float) -> Tensor:
        if self.how.preserve != "x0":
            return latents
        return self._kept_in(noised(self.x0, self.noise, sigma), latents, self._visited(sigma))

    def velocity(self, velocity: Tensor, latents: Tensor, sigma: float) -> Tensor:
        if self.how.preserve == "latent" or sigma == 0:  # given sigmas may end with a 0 of their own
            return velocity
        return self._kept_in((latents - self.x0) / sigma, velocity, self._visited(sigma))

    def after(self, latents: Tensor, sigma: float) -> Tensor:
        if self.how.preserve != "latent":
            return latents
        return self._kept_in(noised(self.x0, self.noise, sigma), latents, self._visited(sigma) - 1)

    def _kept_in(self, kept: Tensor, made: Tensor, step: int) -> Tensor:
        """Both parts of a step's tensor, one for each place."""
        mask = self.mask
        if self.how.grey == "steps":
            mask = self.mask >= 1 - step / (len(self.sigmas) - 1)
        mask = mask.to(made.dtype)
        return (1 - mask) * kept + mask * made

    def _visited(self, sigma: float) -> int:
        """The number of steps that end at a sigma or before: the step that starts there."""
        return sum(visited > sigma for visited in self.sigmas[:-1])
