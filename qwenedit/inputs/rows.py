"""The caller's prompts and pictures, in all their forms, checked and converted to a list of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qwenedit.checks import warn
from qwenedit.family import Variant
from qwenedit.inputs import geometry
from qwenedit.inputs.geometry import Areas, Geometry, Picture
from qwenedit.inputs.processor import check_prompt

__all__ = ["BatchRow", "rows_of"]


@dataclass(frozen=True, eq=False)
class BatchRow:
    """One prompt with its negative prompt, its pictures and all their sizes."""

    prompt: str
    negative: str | None
    pictures: list[Image.Image]
    geometry: Geometry

    @property
    def planned(self) -> list[tuple[Image.Image, Picture]]:
        """Each picture with its sizes."""
        return list(zip(self.pictures, self.geometry.pictures, strict=True))


def rows_of(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    image: Any,
    variant: Variant,
    areas: Areas,
    height: int | None,
    width: int | None,
) -> list[BatchRow]:
    """One row per prompt; without an image the rows have no pictures.

    All checks of prompts, pictures and sizes are here; they need no network.

    Raises:
        ValueError: bad input.
    """
    illustrated = image is not None
    prompts = _prompts("prompt", prompt, illustrated=illustrated)
    negatives: list[str] | list[None] = [None] * len(prompts)
    if negative_prompt is not None:
        negatives = _negatives(negative_prompt, len(prompts), illustrated=illustrated)
    pictures = _pictures(image, len(prompts), variant) if illustrated else [[]] * len(prompts)
    rows = []
    for text, negative, of_row in zip(prompts, negatives, pictures, strict=True):
        sizes = [picture.size for picture in of_row]
        plan = geometry.plan(sizes, areas=areas, height=height, width=width)
        rows.append(BatchRow(text, negative, of_row, plan))
    for row in rows:
        plan = row.geometry
        if plan.follows is not None and not plan.aligned:
            warn(
                f"the output's token grid {plan.grid[1:]} is not that of the picture it follows, "
                f"{plan.pictures[plan.follows].grid[1:]}: positions are centred, so expect a shift or a zoom"
            )
    outputs = sorted({row.geometry.size for row in rows})
    if len(outputs) > 1:
        raise ValueError(
            f"the pictures of this batch ask for outputs of different sizes {outputs}: pass height and "
            "width, or run them one by one"
        )
    return rows


def _prompts(name: str, value: str | Sequence[str], *, illustrated: bool) -> list[str]:
    if not isinstance(value, Sequence) or not (isinstance(value, str) or value):
        raise ValueError(f"{name} is {_describe(value)}, wanted a string or a list of at least one")
    prompts = [value] if isinstance(value, str) else list(value)
    for one in prompts:
        check_prompt(one, illustrated=illustrated)
    return prompts


def _negatives(value: str | Sequence[str], batch: int, *, illustrated: bool) -> list[str]:
    negatives = _prompts("negative_prompt", value, illustrated=illustrated)
    if len(negatives) == 1:
        return negatives * batch
    if len(negatives) != batch:
        raise ValueError(
            f"got {len(negatives)} negative prompts, wanted one, or {batch}, one for each prompt"
        )
    return negatives


def _pictures(image: Any, batch: int, variant: Variant) -> list[list[Image.Image]]:
    """The references of each prompt; `QwenImageEdit.edit` describes the forms of `image`."""
    if variant.max_pictures == 0:
        raise ValueError(f"{variant.name} makes pictures from text only: it cannot edit one; use generate")
    if isinstance(image, Image.Image):
        pictures = [[image]] * batch
    elif not isinstance(image, Sequence) or isinstance(image, str) or not image:
        raise ValueError(f"image is {_describe(image)}, wanted a PIL picture or a list of them")
    elif all(isinstance(one, Image.Image) for one in image):
        if variant.max_pictures > 1:
            pictures = [list(image)] * batch
        elif len(image) in (1, batch):
            pictures = [[image[row % len(image)]] for row in range(batch)]
        else:
            raise ValueError(
                f"got {len(image)} pictures for {batch} prompt(s), but {variant.name} takes one a prompt"
            )
    else:
        pictures = [list(one) if isinstance(one, (list, tuple)) else [one] for one in image]
        if len(pictures) != batch:
            raise ValueError(f"got {len(pictures)} lists of pictures, wanted {batch}, one for each prompt")
    for of_row in pictures:
        if not 1 <= len(of_row) <= variant.max_pictures:
            raise ValueError(
                f"got {len(of_row)} pictures for a prompt, but {variant.name} takes 1"
                + (f" to {variant.max_pictures}" if variant.max_pictures > 1 else "")
            )
        for picture in of_row:
            if not isinstance(picture, Image.Image):
                raise ValueError(f"a picture is {_describe(picture)}, wanted a PIL picture")
    return pictures


def _describe(value: Any) -> str:
    return (
        f"an empty {type(value).__name__}"
        if isinstance(value, Sequence) and not value
        else type(value).__name__
    )
