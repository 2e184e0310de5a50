"""Classifier-free guidance as a value: how the two predictions of a step become one velocity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Guidance", "TrueCFG"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the two predictions become one, apart from the scale."""

    norm: str = "reference"
    steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class TrueCFG:
    """uncond + scale * (cond - uncond), each token rescaled to the norm of its conditional prediction.

    Shapes: `cond`, `uncond` and the result (B, S, C): velocities of packed tokens; the norm is over C, that
        is over 2x2 latent pixels of 16 channels.
    Units: `scale` 1 gives the conditional prediction; "true" as against guidance distilled into a model.
    Raises: ValueError for a scale that is no finite number.
    Source: arXiv 2207.12598; the denoising loop of diffusers' `QwenImageEditPipeline`. As there, the ratio is
        neither clamped nor given an epsilon: a token whose combined velocity is exactly 0 becomes NaN.
    """

    scale: float = 4.0
    rule: Guidance = Guidance()

    def __post_init__(self) -> None:
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"true_cfg_scale is {self.scale!r}, wanted a finite number")

    def __call__(self, cond: Tensor, uncond: Tensor) -> Tensor:
        guided = uncond + self.scale * (cond - uncond)
        return guided * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))
