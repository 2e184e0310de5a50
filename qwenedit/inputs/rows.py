"""The caller's prompts and pictures, in all their forms, checked and converted to a list of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qwenedit.checks import warn
from qwenedit.family import Variant
from qwenedit.inputs import geometry
from qwenedit.inputs.geometry import Areas, Geometry, Picture, require_visible
from qwenedit.inputs.pictures import as_picture
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
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    image: Any,
    variant: Variant,
    areas: Areas,
    height: int | None,
    width: int | None,
    *,
    starts: bool = False,
) -> list[BatchRow]:
    """One row per prompt; without an image the rows have no pictures.

    With `starts` the run starts from the picture that the output follows, which the VAE then sees at the
    output's size. All checks of prompts, pictures and sizes are here; they need no network.

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
        if starts and plan.follows is not None:
            plan = geometry.at_output(plan)
        if not variant.layered:  # there the language model sees no picture
            require_visible(plan)
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


def _prompts(name: str, value: str | Sequence[str] | None, *, illustrated: bool) -> list[str]:
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
    if not variant.takes_pictures:
        raise ValueError(f"{variant.name} makes pictures from text only: it cannot edit one; use generate")
    if not isinstance(image, Sequence) or isinstance(image, str) or not image:
        return [[as_picture(image, "image")]] * batch
    rows = _checked(image)
    if any(isinstance(one, (list, tuple)) for one in image):
        if len(rows) != batch:
            raise ValueError(f"got {len(rows)} lists of pictures, wanted {batch}, one for each prompt")
    elif variant.takes_several:
        rows = [[picture for (picture,) in rows]] * batch
    elif len(rows) in (1, batch):
        rows = [rows[row % len(rows)] for row in range(batch)]
    else:
        raise ValueError(
            f"got {len(rows)} pictures for {batch} prompt(s), but {variant.name} takes one a prompt"
        )
    for of_row in rows:
        if not of_row or (len(of_row) > 1 and not variant.takes_several):
            wanted = "1 or more" if variant.takes_several else "1"
            raise ValueError(f"got {len(of_row)} pictures for a prompt, but {variant.name} takes {wanted}")
    return rows


def _checked(image: Sequence[Any]) -> list[list[Image.Image]]:
    """Each element as a list of pictures; an object that is there twice stays one object."""
    rows = [list(one) if isinstance(one, (list, tuple)) else one for one in image]
    known: dict[int, Image.Image] = {}

    def checked(one: Any, place: str) -> Image.Image:
        if id(one) not in known:
            known[id(one)] = as_picture(one, place)
        return known[id(one)]

    return [
        [checked(one, f"image[{i}][{k}]") for k, one in enumerate(row)]
        if isinstance(row, list)
        else [checked(row, f"image[{i}]")]
        for i, row in enumerate(rows)
    ]


def _describe(value: Any) -> str:
    return (
        f"an empty {type(value).__name__}"
        if isinstance(value, Sequence) and not value
        else type(value).__name__
    )
