"""The arguments of a run: as one value, and as types of keyword arguments; what they say to start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Generator, Tensor

from qwenedit.checks import real_number
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.family import Variant
from qwenedit.inputs.geometry import Areas, Size
from qwenedit.inputs.masks import Sources, one_for_each, sources_of
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import PATCH
from qwenedit.sampling.samplers import Sampler
from qwenedit.switches import Switches, switches_of

__all__ = [
    "MAX_TOKENS", "STRENGTH", "Call", "EditOptions", "GenerateOptions", "RunOptions", "SampleOptions",
    "sources_for", "sources_under",
]  # fmt: skip

MAX_TOKENS = 512  # of a text-to-image prompt, by default
STRENGTH = 0.6  # default of the reference's pipelines that start from a picture


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """The arguments of `edit` and `generate` with their defaults; `QwenImageEdit.edit` describes them.

    `image` is what an edit changes; `source` is what `generate`, `steps` and `sample` call image.
    """

    image: Any = None
    source: Any = None
    mask_image: Any = None
    strength: float | None = None
    padding_mask_crop: int | None = None
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
    sampler: str | Sampler | None = None
    output_type: str = "pil"
    switches: Switches | None = None
    max_sequence_length: int = MAX_TOKENS
    control_image: Any = None
    control_mask: Any = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0

    @property
    def starts(self) -> bool:
        """True if an edit of this call starts from its picture, and not from noise alone.

        Raises:
            ValueError: a strength that is no finite number.
        """
        given = self.mask_image is not None or self.padding_mask_crop is not None
        return given or not (self.strength is None or real_number("strength", self.strength) == 1)


class RunOptions(TypedDict, total=False):
    """What all kinds of run take, for type checkers."""

    true_cfg_scale: float
    num_inference_steps: int | None
    sigmas: Sequence[float] | None
    generator: Generator | Sequence[Generator] | None
    latents: Tensor | None
    sampler: str | Sampler | None


class SwitchedOptions(RunOptions, total=False):
    """What `edit`, `generate` and `sample` take besides, for type checkers."""

    mask_image: Any
    strength: float
    padding_mask_crop: int | None
    switches: Switches | None
    control_image: Any
    control_mask: Any
    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]


class SampleOptions(SwitchedOptions, total=False):
    """What `sample` takes besides its conditioning, for type checkers."""

    image: Any


class EditOptions(SwitchedOptions, total=False):
    """What `edit` takes besides picture and prompt, for type checkers."""

    negative_prompt: str | Sequence[str] | None
    height: int | None
    width: int | None
    num_images_per_prompt: int


class GenerateOptions(EditOptions, total=False):
    """What `generate` takes besides the prompt, for type checkers."""

    image: Any
    max_sequence_length: int


def sources_for(call: Call, rows: Sequence[BatchRow], variant: Variant, areas: Areas) -> Sources | None:
    """What the rows of a call start from; None for noise alone.

    Raises:
        ValueError: bad input, or a mask that would change nothing.
    """
    if call.image is None:
        return _sources(call, len(rows), rows[0].geometry.size, areas.token, edits=False)
    if not call.starts:
        return None
    followed = [row.pictures[row.geometry.follows or 0] for row in rows]
    of_each = isinstance(call.image, Sequence) and len(call.image) > 1
    if of_each and variant.takes_several:  # a list of pictures is then that of every prompt
        of_each = any(isinstance(one, (list, tuple)) for one in call.image)
    followed = followed if of_each else followed[:1]
    call = dataclasses.replace(call, source=followed)
    return _sources(call, len(rows), rows[0].geometry.size, areas.token, edits=True)


def sources_under(call: Call, conditioning: Conditioning, token: int) -> Sources | None:
    """What a run under a conditioning starts from; None for noise alone. `token` is a token's side in pixels.

    Raises:
        ValueError: as `sources_for`, or a picture that would have no effect.
    """
    _, rows, columns = conditioning.target_grid
    edits = any(conditioning.reference_grids)
    if call.source is not None and edits and not call.starts:
        raise ValueError(
            "image has no effect without a mask_image or a strength below 1: the conditioning has its own"
        )
    return _sources(call, conditioning.batch, (token * columns, token * rows), token, edits=edits)


def _sources(call: Call, batch: int, size: Size, token: int, *, edits: bool) -> Sources | None:
    if call.source is None:
        for name in ("mask_image", "strength", "padding_mask_crop"):
            if getattr(call, name) is not None:
                raise ValueError(f"{name} is given without an image, wanted the picture to start from")
        return None
    strength = call.strength if call.strength is not None else 1.0 if edits else STRENGTH
    if not 0 <= real_number("strength", strength) <= 1:
        raise ValueError(f"strength is {strength}, wanted a number in [0, 1]")
    if call.padding_mask_crop is not None and call.output_type != "pil":
        raise ValueError(
            f"padding_mask_crop lays the result back into the picture, so output_type must be 'pil', got "
            f"{call.output_type!r}"
        )
    grey = switches_of(call.switches).mask.grey != "rounded"
    return sources_of(
        one_for_each("image", call.source, batch), call.mask_image, call.padding_mask_crop, float(strength),
        batch=batch, size=size, factor=token // PATCH, edits=edits, grey=grey,
    )  # fmt: skip
