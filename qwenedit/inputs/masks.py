"""Pictures that a run starts from, and masks: which part of such a picture is made anew.

A mask is white where the picture changes and black where it is kept. With a crop, only a region around the
white is made, at the whole size of the output, and laid back into the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from qwenedit.checks import warn, whole_number
from qwenedit.inputs.geometry import Size
from qwenedit.inputs.pictures import as_picture, resize_rgb, vae_pixels

__all__ = [
    "Region", "Source", "Sources", "crop_region", "fitted", "laid_back", "masks_for_each", "one_for_each",
    "overlaid", "sources_of",
]  # fmt: skip

Region = tuple[int, int, int, int]  # left, top, right, bottom in whole pixels
HALF = 0.5  # a mask's grey from here on is white
_BLACK = {False: "grey below 128 counts as black", True: "grey counts"}  # by `grey`


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """The picture that a row starts from, with its mask.

    Attributes:
        picture: in RGB; with a region in the size that the region counts in.
        mask: None if the whole picture may change.
        size: (width, height) of what the VAE encodes and of the latents' grid.
        region: of the picture and the mask, what is made; None for all.
    """

    picture: Image.Image
    mask: Image.Image | None
    size: Size
    region: Region | None = None

    @property
    def pixels(self) -> Tensor:
        """(1, 3, height, width) float32 in [-1, 1], for the VAE."""
        return vae_pixels(fitted(self.picture, self.size, self.region), *self.size)

    def changes(self, factor: int, *, grey: bool) -> Tensor:
        """How much each latent pixel, `factor` pixels a side, changes: (height / factor, width / factor)
        float32, 0 or 1, or with `grey` anything between.

        Source: `prepare_mask_latents` of the inpainting pipelines: a latent pixel has the mask's value at its
            top left pixel (nearest). `VaeImageProcessor.binarize`.
        """
        assert self.mask is not None
        levels = fitted(self.mask, self.size, self.region).convert("L")
        pixels = torch.frombuffer(bytearray(levels.tobytes()), dtype=torch.uint8).view(*self.size[::-1])
        share = pixels[::factor, ::factor].float() / 255.0
        return share if grey else (share >= HALF).float()


@dataclass(frozen=True, eq=False, kw_only=True)
class Sources:
    """What the rows of a batch start from.

    Attributes:
        rows: one for each prompt.
        pictures, masks: how many there are: one for all rows, or one for each. Each picture has one sample of
            the VAE's posterior, whatever the number of rows. 0 masks: everything changes.
        strength: the share of the steps that are run, in [0, 1].
    """

    rows: tuple[Source, ...]
    pictures: int
    masks: int
    strength: float


def sources_of(
    pictures: Sequence[Image.Image],
    mask_image: Any,
    padding_mask_crop: int | None,
    strength: float,
    *,
    batch: int,
    size: Size,
    factor: int,
    edits: bool,
    grey: bool,
) -> Sources:
    """The sources of a batch of `batch` prompts whose output has this size.

    Args:
        pictures: one for all prompts, or one for each; as `as_picture` makes them.
        mask_image: likewise, or None.
        padding_mask_crop: pixels around the white that the region includes; None for no crop.
        strength: as in `Sources`.
        factor: pixels along a side of a latent pixel.
        edits: True as in the editing pipeline, which resizes the picture before it crops; False as in
            inpainting, which crops the picture as given.
        grey: grey is not rounded to black or white.

    Raises:
        ValueError: bad input, or a mask that would change nothing.
    Source: `QwenImageInpaintPipeline.__call__`, `QwenImageEditInpaintPipeline.__call__` of diffusers 0.39.0.
        We differ in a mask of another size than its picture under a crop, which is resized to it (the
        reference fails at the overlay), and in masks that change no latent pixel, which are refused.
    """
    if mask_image is None:
        if padding_mask_crop is not None:
            raise ValueError("padding_mask_crop is given without a mask_image, wanted both, or neither")
        rows = tuple(Source(picture=one, mask=None, size=size) for one in pictures)
        return Sources(rows=_for_each(rows, batch), pictures=len(pictures), masks=0, strength=strength)
    pad = None if padding_mask_crop is None else whole_number("padding_mask_crop", padding_mask_crop, least=0)
    masks = masks_for_each("mask_image", mask_image, batch)
    rows = tuple(
        _masked(picture, mask, size, pad, edits=edits)
        for picture, mask in zip(_for_each(pictures, batch), _for_each(masks, batch), strict=True)
    )
    for row in rows:
        if not bool(row.changes(factor, grey=grey).any()):
            raise ValueError(
                f"the mask changes nothing, wanted white where the picture shall change: {_BLACK[grey]}, and "
                f"of {factor}x{factor} pixels the top left one counts"
            )
    own = len(pictures) if pad is None else max(len(pictures), len(masks))  # each mask has its region
    return Sources(rows=rows, pictures=own, masks=len(masks), strength=strength)


def laid_back(sources: Sources, made: Sequence[Image.Image]) -> list[Image.Image]:
    """What was made of each row, in order, in its place in the picture; without a crop as it is."""
    count = len(made) // len(sources.rows)  # outputs for each prompt
    of_rows = [row for row in sources.rows for _ in range(count)]
    return [
        one if row.region is None or row.mask is None else overlaid(row.mask, row.picture, one, row.region)
        for row, one in zip(of_rows, made, strict=True)
    ]


def one_for_each(name: str, value: Any, batch: int) -> list[Image.Image]:
    """One picture for all prompts, or as many as there are prompts, each as `as_picture` makes it.

    Raises:
        ValueError: another number, or what is no picture.
    """
    several = isinstance(value, (list, tuple))
    given = list(value) if several else [value]
    if len(given) not in (1, batch):
        raise ValueError(
            f"{name} has {len(given)} pictures for {batch} prompt(s), wanted one, or one for each prompt"
        )
    return [as_picture(one, f"{name}[{k}]" if several else name) for k, one in enumerate(given)]


def masks_for_each(name: str, value: Any, batch: int) -> list[Image.Image]:
    """As `one_for_each`, of masks; warns of one that differs from place to place in its alpha alone."""
    masks = one_for_each(name, value, batch)
    for mask in masks:
        if mask.mode not in ("RGBA", "LA", "PA") and "transparency" not in mask.info:
            continue
        whole = mask.convert("RGBA")
        (low, high), (least, most) = whole.getchannel("A").getextrema(), whole.convert("L").getextrema()
        if low != high and least == most:
            warn(
                f"{name} is of one colour with an alpha channel, which is not read: for a mask that is white "
                'where it is opaque, pass mask.getchannel("A")'
            )
    return masks


def _for_each(given: Sequence[Any], batch: int) -> tuple[Any, ...]:
    return tuple(given) if len(given) == batch else (given[0],) * batch


def _masked(picture: Image.Image, mask: Image.Image, size: Size, pad: int | None, *, edits: bool) -> Source:
    (width, height), (mask_width, mask_height) = picture.size, mask.size
    uneven = abs(width * mask_height - height * mask_width)
    if mask.size != size and uneven > max(width, height, mask_width, mask_height):
        warn(
            f"the mask is {mask_width}x{mask_height} and its picture {width}x{height}, of another shape: the "
            "mask is stretched to fit"
        )
    picture = resize_rgb(picture, *size) if edits else picture.convert("RGB")
    region = None
    if pad is not None:
        mask = mask.resize(picture.size, Image.Resampling.LANCZOS)
        region = crop_region(mask, size, pad)
    return Source(picture=picture, mask=mask, size=size, region=region)


def crop_region(mask: Image.Image, size: Size, pad: int) -> Region:
    """The smallest region around all that is not black, `pad` pixels larger, widened to the shape of `size`.

    The region stays within the mask, so its shape may still differ.

    Raises:
        ValueError: a black mask.
    Source: `VaeImageProcessor.get_crop_region`.
    """
    box = mask.convert("L").getbbox()
    if box is None:
        raise ValueError("the mask is black everywhere, wanted white where the picture shall change")
    left, top = (max(side - pad, 0) for side in box[:2])
    right, bottom = (min(side + pad, most) for side, most in zip(box[2:], mask.size, strict=True))
    ratio, own = size[0] / size[1], (right - left) / (bottom - top)
    if own > ratio:
        top, bottom = _widened(top, bottom, (right - left) / ratio, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * ratio, mask.width)
    return left, top, right, bottom


def _widened(start: int, stop: int, length: float, most: int) -> tuple[int, int]:
    """The interval at this length about its middle, moved into 0 to `most`, cut where it does not fit."""
    more = int(length - (stop - start))
    start, stop = start - more // 2, stop + more - more // 2
    beyond = max(stop - most, 0)
    start, stop = start - beyond, stop - beyond
    if start < 0:
        start, stop = 0, stop - start
    return start, min(stop, most)


def fitted(picture: Image.Image, size: Size, region: Region | None) -> Image.Image:
    """The picture at a size, stretched; of a region undistorted, where bars of its border fill what is left.

    Source: `VaeImageProcessor.resize`, without and with resize_mode="fill", by Lanczos.
    """
    if region is None:
        return picture.resize(size, Image.Resampling.LANCZOS)
    picture = picture.crop(region)
    canvas, inner, (x, y) = _centred(picture, size, cover=False)
    width, height = size
    if inner.width == width and y > 0:  # bars above and below
        above, below = (0, 0, width, 0), (0, inner.height, width, inner.height)
        canvas.paste(inner.resize((width, y), box=above), (0, 0))
        canvas.paste(inner.resize((width, y), box=below), (0, y + inner.height))
    elif inner.height == height and x > 0:
        before, behind = (0, 0, 0, height), (inner.width, 0, inner.width, height)
        canvas.paste(inner.resize((x, height), box=before), (0, 0))
        canvas.paste(inner.resize((x, height), box=behind), (x + inner.width, 0))
    return canvas


def overlaid(mask: Image.Image, picture: Image.Image, made: Image.Image, region: Region) -> Image.Image:
    """The picture with what was made of its region, where the mask is white; grey mixes.

    Source: `VaeImageProcessor.apply_overlay`.
    """
    kept = Image.new("RGBa", picture.size)
    kept.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    left, top, right, bottom = region
    inside, _, _ = _centred(made, (right - left, bottom - top), cover=True)
    whole = Image.new("RGB", picture.size)  # around the region nothing shows
    whole.paste(inside, (left, top))
    whole = whole.convert("RGBA")
    whole.alpha_composite(kept.convert("RGBA"))
    return whole.convert("RGB")


def _centred(
    picture: Image.Image, size: Size, *, cover: bool
) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """An RGB canvas of the size with the undistorted picture in its middle; that picture, and its corner.

    With `cover` the picture covers the canvas and is cut, else it fits inside.

    Source: `VaeImageProcessor._resize_and_crop` and `_resize_and_fill`, whose sides round down; a side that
        would be 0 is 1 here.
    """
    width, height = size
    ratio, own = width / height, picture.width / picture.height
    from_width = ratio > own if cover else ratio < own
    inner = (
        width if from_width else max(1, picture.width * height // picture.height),
        height if not from_width else max(1, picture.height * width // picture.width),
    )
    corner = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    resized = picture.resize(inner, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", size)
    canvas.paste(resized, corner)
    return canvas, resized, corner
