"""How trainers draw noise levels: each distribution of sigma as a value, by name.

    levels = Shift(shift=3.0)
    sigma = levels.draw(batch, generator, tokens=1024)   # (B,)
    levels.sigma(torch.tensor([0.1, 0.5]))               # point by point

A distribution is written as the map from a number u, uniform in [0, 1), to sigma. A normal number is
N = mean + std * Phi^-1(u), with the normal distribution's inverse Phi^-1. The same u gives the same sigma on
every machine, and even u in place of random ones stratify a batch. Trainers draw the same distributions from
normal numbers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from qwenedit.checks import real_number
from qwenedit.sampling.scheduler import FlowMatchScheduler

__all__ = [
    "NOISE_LEVELS", "AIToolkit", "DiffSynth", "Diffusers", "LogSNR", "NoiseLevels", "Qinglong", "QwenShift",
    "Shift", "Uniform",
]  # fmt: skip

_STEPS = 1000  # of the table of training timesteps
_SMALLEST = 2.0**-25  # in place of u = 0, whose normal number is infinite
_POSITIVE = ("logit_std", "shift", "sigmoid_scale")
_MOST = 1 - 2.0**-24  # the largest float32 number below 1


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """A distribution of the noise level sigma.

    Raises:
        ValueError: a value without meaning.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "density" and real_number(name, value) <= 0 and name in _POSITIVE:
                raise ValueError(f"{name} is {value}, wanted a number above 0")

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:
        """The noise levels of uniform numbers, of their shape and dtype.

        Units: u in (0, 1); sigma in [0, 1], 1 = noise. `tokens` of the target count in some distributions.
        """
        raise NotImplementedError

    def draw(self, rows: int, generator: Generator | None, *, tokens: int) -> Tensor:
        """Random noise levels: (rows,) float32, on the CPU, as is the generator."""
        u = torch.rand(rows, generator=generator).clamp_min(_SMALLEST)
        return self.sigma(u, tokens)


@dataclass(frozen=True, kw_only=True)
class Uniform(NoiseLevels):
    """sigma = u."""

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return u


@dataclass(frozen=True, kw_only=True)
class Diffusers(NoiseLevels):
    """i = floor(1000 t), sigma = (1000 - i) / 1000: the 1000 training steps, unshifted.

    density "uniform": t = u; "logit_normal": t = sigmoid(N(logit_mean, logit_std)); "mode":
    t = 1 - u - s (cos^2(pi u / 2) - 1 + u), with s = mode_scale.

    Source: `compute_density_for_timestep_sampling` of diffusers 0.39.0 (arXiv 2403.03206, 3.1) and the
        table of `FlowMatchEulerDiscreteScheduler` before `set_timesteps`, as in
        train_dreambooth_lora_qwen_image.py. "uniform" from the same generator gives its sigmas.
    """

    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density not in ("uniform", "logit_normal", "mode"):
            raise ValueError(f"density is {self.density!r}, wanted 'uniform', 'logit_normal' or 'mode'")

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        t = u
        if self.density == "logit_normal":
            t = torch.sigmoid(_normal(u, self.logit_mean, self.logit_std))
        elif self.density == "mode":
            t = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return (_STEPS - _step(t)).to(u.dtype) / _STEPS


@dataclass(frozen=True, kw_only=True)
class Shift(NoiseLevels):
    """t = sigmoid(k N), sigma = s t / (1 + (s - 1) t), with s = shift and k = sigmoid_scale.

    Source: `--timestep_sampling shift` of musubi-tuner, `--discrete_flow_shift` and `--sigmoid_scale`. At
        shift 1 it is "sigmoid" of musubi-tuner and of ai-toolkit.
    """

    shift: float
    sigmoid_scale: float = 1.0

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return _shifted(u, self.shift, self.sigmoid_scale)


@dataclass(frozen=True, kw_only=True)
class QwenShift(NoiseLevels):
    """`Shift` with s = exp(mu), where mu is linear in the target's tokens through (256, 0.5), (8192, 0.9).

    Source: `--timestep_sampling qwen_shift` of musubi-tuner; the same mu as in sampling.
    """

    sigmoid_scale: float = 1.0

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:
        return _shifted(u, math.exp(_mu(tokens)), self.sigmoid_scale)


@dataclass(frozen=True, kw_only=True)
class LogSNR(NoiseLevels):
    """sigma = sigmoid(-N(logit_mean, logit_std) / 2): the log of (1 - sigma)^2 / sigma^2 is normal.

    Source: arXiv 2411.14793; `--timestep_sampling logsnr` of musubi-tuner.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return torch.sigmoid(-_normal(u, self.logit_mean, self.logit_std) / 2)


@dataclass(frozen=True, kw_only=True)
class Qinglong(NoiseLevels):
    """95 % of `QwenShift`, and 5 % of `LogSNR` about 5.36, which is sigma 0.06: almost clean pictures.

    u below 0.95 is stretched to [0, 1) for the first, the rest for the second.

    Source: `--timestep_sampling qinglong_qwen` of musubi-tuner. Earlier versions took 80 % and 12.5 %, and
        7.5 % of `LogSNR` about 0.
    """

    sigmoid_scale: float = 1.0

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:
        common = QwenShift(sigmoid_scale=self.sigmoid_scale).sigma((u / 0.95).clamp(_SMALLEST, _MOST), tokens)
        rare = LogSNR(logit_mean=5.36).sigma(((u - 0.95) / 0.05).clamp(_SMALLEST, _MOST))
        return torch.where(u < 0.95, common, rare)


@dataclass(frozen=True, kw_only=True)
class DiffSynth(NoiseLevels):
    """i = floor(1000 u); the sampling schedule of 1000 steps, mu 0.8 and terminal 0.02, at i, rounded.

    The timestep 1000 sigma_i is rounded to bfloat16, and the level is the schedule's nearest to it. So only
    376 of the 1000 levels occur.

    Source: `FlowMatchSFTLoss`, `FlowMatchScheduler("Qwen-Image").set_timesteps(1000, training=True)` and its
        `add_noise` of DiffSynth-Studio 2.1.12.
    """

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        timesteps = diffsynth_schedule().to(u.device) * _STEPS
        rounded = timesteps[_step(u)].bfloat16().float()
        nearest = (timesteps - rounded[..., None]).abs().argmin(dim=-1)
        return diffsynth_schedule().to(u)[nearest]


@dataclass(frozen=True, kw_only=True)
class AIToolkit(NoiseLevels):
    """sigma = 1 - sigmoid(N).

    Source: `set_train_timesteps("sigmoid")` of ai-toolkit's custom_flowmatch_sampler.py, whose steps take
        from a list of 1000 such levels that is drawn anew; a batch shares its list.
    """

    def sigma(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return 1 - torch.sigmoid(_normal(u))


NOISE_LEVELS: dict[str, type[NoiseLevels]] = {
    "uniform": Uniform,
    "diffusers": Diffusers,
    "shift": Shift,
    "qwen_shift": QwenShift,
    "logsnr": LogSNR,
    "qinglong": Qinglong,
    "diffsynth": DiffSynth,
    "ai_toolkit": AIToolkit,
}


@functools.cache
def diffsynth_schedule() -> Tensor:
    """The 1000 levels of `DiffSynth` before it rounds, from 1 to 0.02."""
    schedule = FlowMatchScheduler(
        num_train_timesteps=_STEPS, shift=1.0, use_dynamic_shifting=True, base_shift=0.8, max_shift=0.8,
        base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    return torch.tensor(schedule.sigmas(_STEPS, 256)[:-1])


def _normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.special.ndtri(u)


def _step(t: Tensor) -> Tensor:
    """The index of a training step; 1 and above is the last one, which the reference's table lacks."""
    return (t * _STEPS).long().clamp(0, _STEPS - 1)


def _shifted(u: Tensor, shift: float, scale: float) -> Tensor:
    t = torch.sigmoid(_normal(u, 0.0, scale))
    return shift * t / (1 + (shift - 1) * t)


def _mu(tokens: int) -> float:
    return 0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256)
