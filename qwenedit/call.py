"""The arguments of a run: as one value, and as types of keyword arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Generator, Tensor

from qwenedit.switches import Switches

__all__ = ["MAX_TOKENS", "Call", "EditOptions", "GenerateOptions", "RunOptions", "SampleOptions"]

MAX_TOKENS = 512  # of a text-to-image prompt, by default


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """The arguments of `edit` and `generate` with their defaults; `QwenImageEdit.edit` describes them."""

    image: Any = None
    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = " "
    true_cfg_scale: float = 4.0
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    height: int | None = None
    width: int | None = None
    generator: Generator | Sequence[Generator] | None = None
    num_images_per_prompt: int = 1
    latents: Tensor | None = None
    output_type: str = "pil"
    switches: Switches | None = None
    max_sequence_length: int = MAX_TOKENS


class RunOptions(TypedDict, total=False):
    """What all kinds of run take, for type checkers."""

    true_cfg_scale: float
    num_inference_steps: int | None
    sigmas: Sequence[float] | None
    generator: Generator | Sequence[Generator] | None
    latents: Tensor | None


class SampleOptions(RunOptions, total=False):
    """What `sample` takes besides its conditioning, for type checkers."""

    switches: Switches | None


class EditOptions(SampleOptions, total=False):
    """What `edit` takes besides picture and prompt, for type checkers."""

    negative_prompt: str | Sequence[str] | None
    height: int | None
    width: int | None
    num_images_per_prompt: int


class GenerateOptions(EditOptions, total=False):
    """What `generate` takes besides the prompt, for type checkers."""

    max_sequence_length: int
