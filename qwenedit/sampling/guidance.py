"""Classifier-free guidance as values: how the two predictions of a step become one velocity."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

__all__ = ["NORMS", "Guidance", "TrueCFG"]

NORMS = ("reference", "none", "global", "channel", "clamp", "comfy_x0")
# These set the size of what they are given: a factor on a whole sample, which `rescale` is, is undone.
_UNDO_RESCALE = ("reference", "global", "channel")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What there is to choose in guidance beside its scale. The default is the reference's.

    With c and u for the velocities with the prompt and with the negative prompt, and w for the scale, a step
    combines them, then rescales, then norms.

    Attributes:
        norm: what the combined prediction g is multiplied by.
            "reference": |c| / |g| of each packed token, over its 64 channels. As in the reference the ratio
                is neither clamped nor given an epsilon: where g is exactly 0 it makes NaN.
            "none": nothing.
            "global": one |c| / |g| a sample, over all tokens and channels.
            "channel": |c| / |g| of each of the 16 latent channels, over all latent pixels of the sample. The
                four packed channels of a token that are one latent channel share it: packing is no channel.
            "clamp": the reference's ratio, but at most 1: it shrinks, and never amplifies.
            "comfy_x0": ComfyUI's CFGNorm at strength 1. On the estimate of the clean latents instead of the
                velocity, for each latent pixel over its 16 channels: |x0_c| / (|x0_g| + 1e-8), at most 1.
            All but "reference" leave finite what is exactly 0: it stays 0 (of "comfy_x0", the estimate does).
        steps: (start, stop) of the guided steps, counted from 0, stop not among them; None: all. Outside of
            them c is the velocity, and u is not computed. Source: arXiv 2404.07724.
        rescale: phi in [0, 1]: g becomes phi g std(c) / std(g) + (1 - phi) g, with the standard deviations
            over a whole sample. The norms "reference", "global" and "channel" would undo it, so it is refused
            with them. Source: arXiv 2305.08891, section 3.4.
        eta, momentum, threshold: adaptive projected guidance (APG), on estimates of the clean latents, a
            whole sample at a time. The difference d = x0_c - x0_u becomes d + momentum * (that of the step
            before), and where it is longer than `threshold` (None: any length) it is cut to that length; of
            its part parallel to x0_c the share `eta` is kept; g is x0_c + (w - 1) d. The values 1, 0 and None
            are plain guidance, u + w (c - u). The paper has eta 0, a negative momentum and norm "none".
            Source: arXiv 2410.02416, algorithm 1.

    Raises:
        ValueError: a value without meaning here.

    >>> Guidance(steps=(2, 8)).guides(1), Guidance(steps=(2, 8)).guides(2)
    (False, True)
    >>> Guidance(rescale=2.0)
    Traceback (most recent call last):
    ValueError: guidance.rescale is 2.0, wanted a number in [0, 1]
    """

    norm: str = "reference"
    steps: tuple[int, int] | None = None
    rescale: float = 0.0
    eta: float = 1.0
    momentum: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            close = difflib.get_close_matches(str(self.norm), NORMS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"guidance.norm is {self.norm!r}, wanted one of {', '.join(NORMS)}{hint}")
        if self.steps is not None:
            whole = isinstance(self.steps, (tuple, list)) and [type(x) for x in self.steps] == [int, int]
            if not whole or not 0 <= self.steps[0] < self.steps[1]:
                raise ValueError(
                    f"guidance.steps is {self.steps!r}, wanted (start, stop) with 0 <= start < stop"
                )
            object.__setattr__(self, "steps", tuple(self.steps))  # JSON knows lists only
        if not _is_finite(self.rescale) or not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale is {self.rescale!r}, wanted a number in [0, 1]")
        if self.rescale and self.norm in _UNDO_RESCALE:
            raise ValueError(
                f"guidance.rescale is {self.rescale}, but norm {self.norm!r} undoes it: wanted norm "
                f"{' or '.join(repr(norm) for norm in NORMS if norm not in _UNDO_RESCALE)}"
            )
        if not _is_finite(self.eta):
            raise ValueError(f"guidance.eta is {self.eta!r}, wanted a finite number")
        if not _is_finite(self.momentum) or not -1 < self.momentum < 1:
            raise ValueError(f"guidance.momentum is {self.momentum!r}, wanted a number within (-1, 1)")
        if self.threshold is not None and not (_is_finite(self.threshold) and self.threshold > 0):
            raise ValueError(f"guidance.threshold is {self.threshold!r}, wanted a positive number, or None")

    @property
    def projects(self) -> bool:
        """Is it APG?"""
        return self.eta != 1 or self.momentum != 0 or self.threshold is not None

    @property
    def on_x0(self) -> bool:
        """Does it work on estimates of the clean latents?"""
        return self.projects or self.norm == "comfy_x0"

    def guides(self, step: int) -> bool:
        return self.steps is None or self.steps[0] <= step < self.steps[1]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class TrueCFG:
    """uncond + scale * (cond - uncond), each token rescaled to the norm of its conditional prediction.

    That is the default; `rule` has what there is to choose.

    Shapes: `cond`, `uncond` and the result (B, S, C): velocities of packed tokens, that is of 2x2 latent
        pixels, their channels in the order of `latents.pack`.
    Units: `scale` 1 gives the conditional prediction; "true" as against guidance distilled into a model.
    Raises: ValueError for a scale that is no finite number, or a rule that is no `Guidance`.
    Source: arXiv 2207.12598; the denoising loop of diffusers' `QwenImageEditPipeline`. Each sample is
        computed alone, so that no bit of it depends on the batch that it is in.

    >>> cond, uncond = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    >>> TrueCFG(4.0, Guidance(norm="none"))(cond, uncond)
    tensor([[[ 3., 16.]]])
    >>> f"{TrueCFG(4.0)(cond, uncond).norm():.3f}"  # the conditional prediction's length
    '5.000'
    """

    scale: float = 4.0
    rule: Guidance = Guidance()

    def __post_init__(self) -> None:
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"true_cfg_scale is {self.scale!r}, wanted a finite number")
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
            ValueError: a rule on clean latents without `at`, or at sigma 0, where a velocity says nothing of
                them.
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
        """(B, S): |cond| / |combined| of each token, the reference's factor, whatever the rule's norm is.

        `combined` is what the norm is applied to. The arguments are those of a call.
        """
        latents, sigma = self._place(at)

        def ratio(cond: Tensor, uncond: Tensor, latents: Tensor | None, average: Tensor | None) -> Tensor:
            return _of_tokens(cond, self._combined(cond, uncond, latents, sigma, average))[..., 0]

        return _by_sample(ratio, cond, uncond, latents, average)

    def average(self, cond: Tensor, uncond: Tensor, sigma: float, before: Tensor | None) -> Tensor | None:
        """The differences of the clean latents with momentum, after a step; None without momentum.

        `before` is what this returned at the step before; None at the first. Nothing is kept here, so that a
        step can be computed any number of times.
        """
        return self._difference(cond, uncond, sigma, before) if self.rule.momentum else None

    def _difference(self, cond: Tensor, uncond: Tensor, sigma: float, before: Tensor | None) -> Tensor:
        difference = sigma * (_wide(uncond) - _wide(cond))  # of latents - sigma * velocity
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
    """The function of each sample alone, whose kernels then see one size of batch; as a batch."""
    assert arguments[0] is not None
    count = len(arguments[0])
    columns = [[None] * count if x is None else x.split(1) for x in arguments]
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return rows[0] if count == 1 else torch.cat(rows)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: a ratio for a whole sample would carry bfloat16's rounding to all of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _x0(latents: Tensor, sigma: float, velocity: Tensor) -> Tensor:
    return _wide(latents) - sigma * _wide(velocity)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and a where b is 0: what it is multiplied with is 0 there."""
    return a / b.masked_fill(b == 0, 1)


def _of_tokens(cond: Tensor, combined: Tensor) -> Tensor:
    """The reference's ratio, in its dtype: (1, S, 1)."""
    return torch.norm(cond, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True)


def _projected(difference: Tensor, x0: Tensor, rule: Guidance) -> Tensor:
    """APG's update of one sample: cut to the threshold, then without a share of what is parallel to x0."""
    if rule.threshold is not None:
        length = vector_norm(difference)
        difference = difference * (rule.threshold / length.clamp(min=rule.threshold))
    direction = _quotient(x0, vector_norm(x0))
    parallel = (difference * direction).sum() * direction
    return difference - parallel + rule.eta * parallel


def _normed(norm: str, cond: Tensor, combined: Tensor, latents: Tensor | None, sigma: float) -> Tensor:
    """One sample's combined prediction under a norm."""
    if norm == "none":
        return combined
    if norm == "reference":
        return combined * _of_tokens(cond, combined)
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
    return tokens.unflatten(-1, (-1, 4))
