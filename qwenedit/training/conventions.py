"""What trainers choose silently, as named values: `convention("musubi")` is all of one trainer's choices.

    dataclasses.replace(convention("diffusers"), levels=Diffusers(density="logit_normal"))

The target is noise - clean in all of them, and x = (1 - sigma) clean + sigma noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qwenedit.checks import real_number
from qwenedit.foreign import shown
from qwenedit.training.noise_levels import (
    AIToolkit,
    DiffSynth,
    Diffusers,
    NoiseLevels,
    QwenShift,
    Uniform,
    diffsynth_schedule,
)

__all__ = ["CONVENTIONS", "WEIGHTINGS", "Convention", "Timestep", "Weighting", "convention"]


@dataclass(frozen=True)
class Weighting:
    """The factor of an edit's error, by its noise level sigma.

        none         1
        sigma_sqrt   1 / sigma^2
        cosmap       2 / (pi (1 - 2 sigma + 2 sigma^2))
        diffsynth    y = exp(-2 (sigma - 0.5)^2), minus its least value on DiffSynth's schedule, scaled so
                     that the schedule's 1000 values sum to 1000

    The mean over the batch is not divided by the sum of the factors.

    Raises:
        ValueError: there is no such weighting.
    Source: `compute_loss_weighting_for_sd3` of diffusers 0.39.0 (arXiv 2403.03206), which musubi-tuner has,
        too; `set_training_weight` of DiffSynth-Studio 2.1.12.
    """

    name: str = "none"

    def __post_init__(self) -> None:
        if self.name not in list(WEIGHTINGS):
            got = shown(repr(self.name))
            raise ValueError(f"the weighting is {got}, wanted one of {', '.join(WEIGHTINGS)}")

    def of(self, sigma: Tensor) -> Tensor:
        """The factors of (B,) noise levels, in their dtype."""
        return WEIGHTINGS[self.name](sigma)


def _cosmap(sigma: Tensor) -> Tensor:
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2)


@functools.cache
def _diffsynth_scale() -> tuple[float, float]:
    """The least value on DiffSynth's schedule, and the factor."""
    values = _bell(diffsynth_schedule().double())
    least = float(values.min())
    return least, len(values) / float((values - least).sum())


def _diffsynth(sigma: Tensor) -> Tensor:
    least, factor = _diffsynth_scale()
    return (_bell(sigma) - least).clamp_min(0) * factor


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "sigma_sqrt": lambda sigma: sigma**-2.0,
    "cosmap": _cosmap,
    "diffsynth": _diffsynth,
}


@dataclass(frozen=True, kw_only=True)
class Timestep:
    """The timestep that the transformer is given for a noise level: (1000 sigma + offset) / 1000.

    With `bfloat16` it is rounded twice, before and after the division. The transformer rounds it to its own
    dtype in any case.
    """

    offset: float = 0.0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        real_number("a timestep's offset", self.offset)

    def of(self, sigma: Tensor) -> Tensor:
        """(B,) noise levels -> (B,) timesteps in [0, 1], or slightly above."""
        if not self.offset and not self.bfloat16:
            return sigma
        timestep = 1000 * sigma + self.offset
        return (timestep.bfloat16() if self.bfloat16 else timestep) / 1000


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A trainer's choices.

    Attributes:
        levels: the distribution of noise levels.
        weighting: the factor of an error by its noise level.
        timestep: what the transformer is told about the noise level.
        posterior: whether a picture's latents are the mode (the mean) of the VAE's posterior, or a sample.
        targets: the layers that a LoRA changes; see `QwenImageEdit.add_lora`.
    """

    levels: NoiseLevels = field(default_factory=Uniform)
    weighting: Weighting = field(default_factory=Weighting)
    timestep: Timestep = field(default_factory=Timestep)
    posterior: Literal["mode", "sample"] = "mode"
    targets: str = "attention"


CONVENTIONS = {
    "qwenedit": Convention(),
    # train_dreambooth_lora_qwen_image.py, with its default weighting_scheme
    "diffusers": Convention(levels=Diffusers(), posterior="sample", targets="diffusers"),
    # qwen_image_train_network.py with --timestep_sampling qwen_shift, as its documentation recommends; the
    # default, "sigma", is that of diffusers
    "musubi": Convention(levels=QwenShift(), timestep=Timestep(offset=1.0), targets="musubi"),
    # examples/qwen_image/model_training/train.py
    "diffsynth": Convention(
        levels=DiffSynth(),
        weighting=Weighting("diffsynth"),
        timestep=Timestep(bfloat16=True),
        targets="diffsynth",
    ),
    # timestep_type "sigmoid"; its "weighted" is a table of 1000 numbers
    "ai_toolkit": Convention(levels=AIToolkit(), posterior="sample", targets="ai_toolkit"),
}


def convention(name: str) -> Convention:
    """A trainer's choices, by its name.

    Raises:
        ValueError: there is no such convention.
    """
    if name not in list(CONVENTIONS):
        got = shown(repr(name))
        raise ValueError(f"the convention is {got}, wanted one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
