"""The flow-matching schedule: the sigmas of a run, from the official scheduler_config.json.

Sigma is the share of noise: x_sigma = (1 - sigma) * clean + sigma * noise; 1 is pure noise, 0 the picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from qwenedit.checks import whole_number
from qwenedit.foreign import read_json
from qwenedit.weights.checkpoints import read_variant
from qwenedit.weights.configs import config_from

__all__ = [
    "CURVES", "MAX_STEPS", "FlowMatchScheduler", "LayeredScheduler", "comfy_sigmas", "diffsynth_sigmas",
    "given_sigmas", "load_scheduler",
]  # fmt: skip

Own = TypeVar("Own", bound="FlowMatchScheduler")
MAX_STEPS = 10_000  # of a run: float32 sigmas are still apart


@dataclass(frozen=True, kw_only=True)
class FlowMatchScheduler:
    """Sigmas from a number of steps and a number of tokens; its fields are scheduler_config.json's.

    `shift_terminal` is None (or False, as Layered writes it) for no stretch. `time_shift_type` says how `mu`
    shifts; how `mu` follows from the tokens is the pipeline's rule, not the file's (see `LayeredScheduler`).

    Raises:
        ValueError: a value that this schedule cannot use.
    Source: diffusers 0.39.0, `FlowMatchEulerDiscreteScheduler.set_timesteps` as the pipelines call it.
    """

    num_train_timesteps: int
    shift: float  # used where use_dynamic_shifting is False
    use_dynamic_shifting: bool
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    shift_terminal: float | None
    time_shift_type: str  # "exponential" or "linear"
    # At most one of these: the curve between the first and the last sigma, after shift and stretch.
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False  # the sampler "stochastic" where a run names none

    FIXED: ClassVar[dict[str, Any]] = {"invert_sigmas": False}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type is {self.time_shift_type!r}, wanted 'exponential' or 'linear'")
        if self.num_train_timesteps != 1000:
            got = self.num_train_timesteps
            raise ValueError(f"num_train_timesteps is {got}, wanted 1000: the transformer embeds 1000 sigma")
        if self.base_image_seq_len == self.max_image_seq_len:
            got = self.base_image_seq_len
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {got}, wanted two numbers")
        for name in ("base_image_seq_len", "max_image_seq_len"):
            whole_number(name, getattr(self, name), most=10**9)
        for name, least in (("shift", 1e-6), ("base_shift", -100), ("max_shift", -100)):
            if not least <= (value := getattr(self, name)) <= 100:
                raise ValueError(f"{name} is {value}, wanted {least} to 100")
        if self.shift_terminal and not 0 < self.shift_terminal < 1:
            raise ValueError(f"shift_terminal is {self.shift_terminal}, wanted a number between 0 and 1")
        curves = [name for name in CURVES if getattr(self, f"use_{name}_sigmas")]
        if len(curves) > 1:
            raise ValueError(f"sigmas are to be {' and '.join(curves)}, wanted at most one of these")

    def curved(self: Own, name: str | None) -> Own:
        """The schedule with one of `CURVES` or none, whatever its config says."""
        flags: dict[str, Any] = {f"use_{one}_sigmas": one == name for one in CURVES}
        return dataclasses.replace(self, **flags)

    @property
    def sampler(self) -> str:
        """The sampler of runs that name none."""
        return "stochastic" if self.stochastic_sampling else "euler"

    @property
    def config(self) -> dict[str, Any]:
        """The keys of scheduler_config.json, for `from_config` of the reference's schedulers."""
        return {**dataclasses.asdict(self), **self.FIXED}

    def mu(self, tokens: int) -> float:
        """The shift for a resolution: linear in the number of target tokens, through the config's base and
        max points.

        Source: `calculate_shift` in diffusers' pipelines, which does not count reference tokens.
        """
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def sigmas(self, steps: int, tokens: int, custom: Sequence[float] | None = None) -> list[float]:
        """The sigmas of a run, noise first, with the final 0: `steps` + 1 numbers.

        Args:
            steps: number of Euler steps.
            tokens: tokens of the target (in Layered, of one layer), which determine the shift.
            custom: unshifted sigmas in place of the even ones from 1 to 1/steps. They, too, are shifted and
                stretched; a curve keeps only the ends. The last may be 0: its step moves nothing, unless the
                stretch raises it.

        Each is a float32 number, equal to the reference's bit by bit. Runs of a single step differ: there the
        reference's stretch is 0/0 and its sigma NaN; ours stays 1.

        Raises:
            ValueError: no steps, or more than `MAX_STEPS`; custom sigmas that do not fall within [0, 1] or
                are not `steps` many; or sigmas so close that float32 or the shift makes them equal.
        """
        steps = whole_number("num_inference_steps", steps, most=MAX_STEPS)
        plain = _line(1.0, 1 / steps, steps) if custom is None else _checked(custom, steps)
        t = self._shifted(torch.tensor(plain, dtype=torch.float32), tokens)
        if self.shift_terminal:
            t = _stretched(t, self.shift_terminal)
        for name, curve in CURVES.items():
            if getattr(self, f"use_{name}_sigmas"):
                t = curve(t[-1].item(), t[0].item(), steps).float()
        sigmas = [*t.tolist(), 0.0]
        last = len(sigmas) if plain[-1] > 0 else -1  # custom sigmas may end with a 0 of their own
        if not all(a > b for a, b in pairwise(sigmas[:last])):
            raise ValueError(
                f"{steps} sigmas for {tokens} tokens no longer fall strictly when shifted and rounded to "
                "float32, wanted fewer, or further apart"
            )
        return sigmas

    def _shifted(self, t: Tensor, tokens: int) -> Tensor:
        if not self.use_dynamic_shifting:
            return self.shift * t / (1 + (self.shift - 1) * t)
        mu = self.mu(tokens)
        try:
            shift = math.exp(mu) if self.time_shift_type == "exponential" else mu
        except OverflowError:
            raise ValueError(f"{tokens} tokens are too many for the schedule: its shift overflows") from None
        factor = torch.tensor(shift, dtype=t.dtype)
        one = torch.ones_like(t)  # tensor / tensor is a true division; `1 / t` would compute a reciprocal
        return factor / (factor + (one / t - 1))


class LayeredScheduler(FlowMatchScheduler):
    """The schedule of Layered, whose pipeline has a `mu` of its own, whatever the file says.

    Source: `QwenImageLayeredPipeline.__call__`, which counts the tokens of the picture, as many as a layer's.
    """

    def mu(self, tokens: int) -> float:
        """The square root of (a layer's tokens / 256)."""
        return (tokens / 256) ** 0.5


def given_sigmas(sigmas: Sequence[float], steps: int) -> list[float]:
    """The given sigmas, unshifted and noise first, with the final 0: `steps` + 1 float32 numbers.

    Raises:
        ValueError: they do not fall within (0, 1], or are not `steps` many.
    """
    checked = _checked(sigmas, steps)
    if checked[-1] == 0:
        raise ValueError(f"given sigmas are {checked}, wanted them without the final 0, which is added")
    return [*torch.tensor(checked, dtype=torch.float32).tolist(), 0.0]


def diffsynth_sigmas(steps: int, tokens: int, start: float = 1.0) -> list[float]:
    """The sigmas of DiffSynth-Studio, noise first, with the final 0; float32 numbers, equal to its own.

    A `start` below 1, its denoising strength, is the first sigma before shift and stretch. With an official
    checkpoint they are the reference's but for last bits. For a single step from 1 there is no stretch.

    Source: DiffSynth-Studio 2.1.12, `FlowMatchScheduler.set_timesteps_qwen_image`.
    """
    slope = (0.9 - 0.5) / (8192 - 256)  # constants there, whatever a checkpoint's file says
    factor = math.exp(tokens * slope + (0.5 - slope * 256))
    t = torch.linspace(start, 0, whole_number("num_inference_steps", steps, most=MAX_STEPS) + 1)[:-1]
    t = factor / (factor + (1 / t - 1))
    return _falling([*_stretched(t, 0.02).tolist(), 0.0])


def comfy_sigmas(steps: int) -> list[float]:
    """The sigmas of ComfyUI's scheduler "simple", noise first, with the final 0, as float32 numbers.

    They are entries of a table of 10,000, shifted by the exponential of 1.15 at every size.

    Source: comfy/samplers.py, `simple_scheduler`; comfy/model_sampling.py, `ModelSamplingFlux`, whose shift
        is 1.15 for this family (comfy/supported_models.py, `QwenImage`).
    """
    steps = whole_number("num_inference_steps", steps, most=MAX_STEPS)
    t = torch.arange(1, 10_001) / 10_000
    table = math.exp(1.15) / (math.exp(1.15) + (1 / t - 1))
    return _falling([*(float(table[-1 - int(i * (10_000 / steps))]) for i in range(steps)), 0.0])


def _falling(sigmas: list[float]) -> list[float]:
    if not all(a > b for a, b in pairwise(sigmas)):
        raise ValueError(f"{len(sigmas) - 1} sigmas no longer fall strictly in float32, wanted fewer")
    return sigmas


def _line(start: float, stop: float, steps: int) -> list[float]:
    """Even steps, in float64, as numpy.linspace computes them."""
    if steps == 1:
        return [start]
    width = (stop - start) / (steps - 1)
    return [i * width + start for i in range(steps - 1)] + [stop]


def _checked(custom: Sequence[float], steps: int) -> list[float]:
    try:
        sigmas = [float(sigma) for sigma in custom]
    except (TypeError, ValueError):
        raise ValueError(f"sigmas are {custom!r}, wanted falling numbers within [0, 1]") from None
    if len(sigmas) != steps:
        raise ValueError(f"got {len(sigmas)} sigmas for {steps} steps, wanted as many (the final 0 is added)")
    falling = all(a > b for a, b in pairwise(sigmas))
    if not falling or not 0 <= sigmas[-1] <= sigmas[0] <= 1:
        raise ValueError(f"sigmas are {sigmas}, wanted strictly falling numbers within [0, 1]")
    return sigmas


def _stretched(t: Tensor, terminal: float) -> Tensor:
    """Stretch the schedule about 1 so that its last sigma is `terminal`."""
    clean = 1 - t
    if clean[-1] == 0:
        return t
    return 1 - clean / (clean[-1] / (1 - terminal))


def _karras(last: float, first: float, steps: int) -> Tensor:
    """Even steps of sigma^(1/7). Source: arXiv 2206.00364, equation 5."""
    ends = [sigma ** (1 / 7) for sigma in (last, first)]
    return (ends[1] + _ramp(steps) * (ends[0] - ends[1])) ** 7


def _exponential(last: float, first: float, steps: int) -> Tensor:
    """Even steps of log sigma."""
    if last == 0:
        raise ValueError("exponential sigmas fall to a last sigma above 0, and it is 0")
    return torch.tensor(_line(math.log(first), math.log(last), steps), dtype=torch.float64).exp()


def _beta(last: float, first: float, steps: int) -> Tensor:
    """Quantiles of the beta distribution with both parameters 0.6. Source: arXiv 2407.12173."""
    return last + beta_quantile(1 - _ramp(steps)) * (first - last)


CURVES = {"karras": _karras, "exponential": _exponential, "beta": _beta}


def _ramp(steps: int) -> Tensor:
    return torch.tensor(_line(0.0, 1.0, steps), dtype=torch.float64)


def beta_quantile(p: Tensor, a: float = 0.6) -> Tensor:
    """The inverse of the regularised incomplete beta function I_x(a, a), to about 1e-15.

    With u = x^a, I_x is u / B times a power series in x, convex up to x = 1/2 where its inverse is found by
    Newton's method; the other half follows by symmetry.
    """
    complete = math.gamma(a) ** 2 / math.gamma(2 * a)  # B(a, a)
    lower = p.minimum(1 - p)
    u = lower * a * complete  # where the tangent at 0 is p: not below the solution
    for _ in range(8):
        x = u ** (1 / a)
        series, coefficient = torch.zeros_like(x), 1.0
        for n in range(100):
            series = series + coefficient / (a + n) * x**n
            coefficient *= (n + 1 - a) / (n + 1)
        u = u - (u * series / complete - lower) * a * complete * (1 - x) ** (1 - a)
    x = u ** (1 / a)
    return torch.where(p > 0.5, 1 - x, x)


def load_scheduler(folder: Path) -> FlowMatchScheduler:
    """The noise schedule of a checkpoint folder: its scheduler_config.json, by its variant's rule for `mu`.

    Raises:
        ValueError: see `read_variant` and `config_from`.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    kind = LayeredScheduler if read_variant(folder).layered else FlowMatchScheduler
    return config_from(kind, read_json(path), str(path))
