"""Classifier-free guidance: how the two predictions of a step become one velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.linalg import vector_norm

from qwenedit.checks import real_number, warn
from qwenedit.latents import PATCH
from qwenedit.switches import Guidance, Switches

__all__ = ["TrueCFG", "guidance_of"]


@dataclass(frozen=True)
class TrueCFG:
    """uncond + scale * (cond - uncond), each token rescaled to the norm of its conditional prediction.

    That is the default `rule`; `Guidance` lists the alternatives. ("True" CFG runs the model twice, unlike
    guidance that is distilled into a model.)

    Shapes: `cond`, `uncond` and the result (B, S, C): velocities of packed tokens, that is of 2x2 latent
        pixels, their channels in the order of `latents.pack`.
    Units: `scale` 1 gives the conditional prediction.
    Raises: ValueError for a scale that is no finite number, or a rule that is no `Guidance`.
    Source: arXiv 2207.12598; the denoising loop of diffusers' `QwenImageEditPipeline`. Each sample is
        computed alone, so that its bits do not depend on its batch.

    >>> cond, uncond = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    >>> TrueCFG(4.0, Guidance(norm="none"))(cond, uncond)
    tensor([[[ 3., 16.]]])
    >>> f"{TrueCFG(4.0)(cond, uncond).norm():.3f}"  # the conditional prediction's length
    '5.000'
    """

    scale: float = 4.0
    rule: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", real_number("true_cfg_scale", self.scale))
        if not isinstance(self.rule, Guidance):
            raise ValueError(f"the rule of guidance is {type(self.rule).__name__}, wanted a Guidance")

    def __call__(
        self,
        cond: Tensor,
        uncond: Tensor,
        at: tuple[Tensor, float] | None = None,
        average: Tensor | None = None,
    ) -> Tensor:
        """The guided velocity.

        Args:
            at: latents and sigma where the predictions were made, for rules on clean latents.
            average: what the method `average` returned at the step before, for rules with momentum.

        Raises:
            ValueError: a rule on clean latents without `at`, or at sigma 0, where no velocity changes them.
        """
        latents, sigma = self._place(at)

        def guided(cond: Tensor, uncond: Tensor, latents: Tensor | None, average: Tensor | None) -> Tensor:
            combined = self._combined(cond, uncond, latents, sigma, average)
            return _normed(self.rule.norm, cond, combined, latents, sigma)

        return _by_sample(guided, cond, uncond, latents, average)

    def ratio(
        self,
        cond: Tensor,
        uncond: Tensor,
        at: tuple[Tensor, float] | None = None,
        average: Tensor | None = None,
    ) -> Tensor:
        """(B, S): |cond| / |combined| of each token, the factor of the norm "reference", under any rule.

        `combined` is the prediction before its norm. The arguments are those of a call.
        """
        latents, sigma = self._place(at)

        def ratio(cond: Tensor, uncond: Tensor, latents: Tensor | None, average: Tensor | None) -> Tensor:
            return _token_ratio(cond, self._combined(cond, uncond, latents, sigma, average))[..., 0]

        return _by_sample(ratio, cond, uncond, latents, average)

    def average(self, cond: Tensor, uncond: Tensor, sigma: float, before: Tensor | None) -> Tensor | None:
        """The difference of the clean latents with momentum, after a step; None for rules without momentum.

        `before` is the result at the step before, or None at the first step. No state is kept here, so that
        a step can be computed any number of times.
        """
        return self._difference(cond, uncond, sigma, before) if self.rule.momentum else None

    def _difference(self, cond: Tensor, uncond: Tensor, sigma: float, before: Tensor | None) -> Tensor:
        difference = sigma * (_wide(uncond) - _wide(cond))  # between two x0 = latents - sigma * velocity
        return difference if before is None else difference + self.rule.momentum * before

    def _place(self, at: tuple[Tensor, float] | None) -> tuple[Tensor | None, float]:
        if not self.rule.on_x0:
            return None, math.nan
        if at is None or at[1] == 0:
            got = "nothing" if at is None else "sigma 0"
            raise ValueError(f"{self.rule} works on clean latents: wanted latents and their sigma, got {got}")
        return at

    def _combined(
        self, cond: Tensor, uncond: Tensor, latents: Tensor | None, sigma: float, average: Tensor | None
    ) -> Tensor:
        """One sample's prediction before its norm."""
        if self.rule.projects:
            assert latents is not None
            difference = self._difference(cond, uncond, sigma, average)
            update = _projected(difference, _x0(latents, sigma, cond), self.rule)
            # x0_c + (w - 1) update, as a velocity
            combined = (_wide(cond) - (self.scale - 1) / sigma * update).to(cond.dtype)
        else:
            combined = uncond + self.scale * (cond - uncond)
        if not self.rule.rescale:
            return combined
        wide = _wide(combined)
        ratio = _quotient(_wide(cond).std(), wide.std())
        return (self.rule.rescale * (wide * ratio) + (1 - self.rule.rescale) * wide).to(cond.dtype)


def _by_sample(function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
    """Apply the function to each sample alone, so that kernels see a batch of one, and join the results."""
    assert arguments[0] is not None
    count = len(arguments[0])
    columns = [[None] * count if x is None else x.split(1) for x in arguments]
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return rows[0] if count == 1 else torch.cat(rows)


def _wide(x: Tensor) -> Tensor:
    """In at least float32: bfloat16's rounding of a sample's ratio would affect all of its values."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _x0(latents: Tensor, sigma: float, velocity: Tensor) -> Tensor:
    return _wide(latents) - sigma * _wide(velocity)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, but a where b is 0: the quotient only multiplies zeros there."""
    return a / b.masked_fill(b == 0, 1)


def _token_ratio(cond: Tensor, combined: Tensor) -> Tensor:
    """The reference's ratio, in its dtype: (1, S, 1)."""
    return torch.norm(cond, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True)


def _projected(difference: Tensor, x0: Tensor, rule: Guidance) -> Tensor:
    """APG's update of one sample: cut to the threshold, its part parallel to x0 multiplied by eta."""
    if rule.threshold is not None:
        length = vector_norm(difference)
        difference = difference * (rule.threshold / length.clamp(min=rule.threshold))
    direction = _quotient(x0, vector_norm(x0))
    parallel = (difference * direction).sum() * direction
    return difference - parallel + rule.eta * parallel


def _normed(norm: str, cond: Tensor, combined: Tensor, latents: Tensor | None, sigma: float) -> Tensor:
    """One sample's combined prediction, rescaled under the given norm."""
    if norm == "none":
        return combined
    if norm == "reference":
        return combined * _token_ratio(cond, combined)
    c, g = _wide(cond), _wide(combined)
    if norm == "clamp":
        ratio = _quotient(torch.norm(c, dim=-1, keepdim=True), torch.norm(g, dim=-1, keepdim=True))
        return (g * ratio.clamp(max=1)).to(cond.dtype)
    if norm == "comfy_x0":
        assert latents is not None
        x0_c, x0_g = (_latent_pixels(_x0(latents, sigma, x)) for x in (cond, combined))
        lengths = [vector_norm(x, dim=2, keepdim=True) for x in (x0_c, x0_g)]
        x0 = (x0_g * (lengths[0] / (lengths[1] + 1e-8)).clamp(max=1)).flatten(2)
        return ((_wide(latents) - x0) / sigma).to(cond.dtype)
    c, g = _latent_pixels(c), _latent_pixels(g)
    over = {"global": (1, 2, 3), "channel": (1, 3)}[norm]
    ratio = _quotient(vector_norm(c, dim=over, keepdim=True), vector_norm(g, dim=over, keepdim=True))
    return (g * ratio).flatten(2).to(cond.dtype)


def _latent_pixels(tokens: Tensor) -> Tensor:
    """(B, S, 4 C) packed tokens -> (B, S, C, 4): a token's channels, and its 2x2 latent pixels."""
    return tokens.unflatten(-1, (-1, PATCH * PATCH))


def guidance_of(scale: float, negative_prompt: object, switches: Switches | None = None) -> TrueCFG | None:
    """The guidance of a run, or None: it needs both a scale above 1 and a negative prompt.

    Warns if only one of them is given, or a rule for guidance without it, which is probably a mistake.

    Raises:
        ValueError: the scale is no finite number.
    """
    switches = switches or Switches()
    guidance = TrueCFG(scale, switches.guidance)
    scale = guidance.scale
    if scale > 1 and negative_prompt is not None:
        return guidance
    if switches.own("guidance"):
        warn(f"{guidance.rule} has no effect: the run is unguided")
    if scale > 1:
        warn(f"true_cfg_scale is {scale}, but without a negative_prompt the run is unguided")
    elif negative_prompt not in (None, " "):
        warn(f"a negative_prompt is given, but at true_cfg_scale {scale} the run is unguided")
    return None
