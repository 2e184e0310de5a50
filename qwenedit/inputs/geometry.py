"""Every size of a run: for the VAE, for the language model, in tokens, and the maps between them.

A token is a square of pixels whose side follows from the checkpoint (`Areas.token`): 16 in the official ones.

Sizes are (width, height) as in PIL, except in `smart_resize`. Coordinates are continuous and start at the top
left corner: pixel i covers [i, i + 1), so a resize maps x to x * new width / old width. Coordinates are never
rounded here; round last if you want pixels.

The two sides of a picture are rounded to multiples of 32 separately, which stretches it slightly: 1920x1080
becomes 1376x768, 0.8 % too wide. `Resize` measures the stretch and maps coordinates back.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Areas", "Box", "Geometry", "Grid", "Picture", "Resize", "Size", "at_output", "fit_area", "plan",
    "require_visible", "smart_resize",
]  # fmt: skip

Size = tuple[int, int]  # width, height in pixels
Grid = tuple[int, int, int]  # frames (1), rows and columns of tokens; `latents.Grid` without importing torch
Box = tuple[float, float, float, float]  # left, top, right, bottom

_MULTIPLE = 32  # sides that follow from an area are rounded to this in the pipelines, whatever a token's side
_LONGEST = 200  # the largest ratio of sides that `smart_resize` accepts, here as in the reference


@dataclass(frozen=True, kw_only=True)
class Areas:
    """The areas in pixels that pictures are resized to, and the side of a token.

    Attributes:
        token: the side of a token in pixels: 2 latent pixels of the VAE. Output sizes are multiples of it.
        vae: for the VAE, and for the output of an edit without a given size.
        vl: for the language model; 384 squared in Edit-Plus. None if it sees the VAE's picture, as in Edit,
            which takes one picture.
        text_only: of an output that follows from text alone, without a given size.

    Raises:
        ValueError: an area or a side that is not positive.
    """

    token: int
    vae: int = 1024 * 1024
    vl: int | None = 384 * 384
    text_only: int = 1024 * 1024

    def __post_init__(self) -> None:
        if self.token < 1:
            raise ValueError(f"the side of a token is {self.token}, wanted a positive number of pixels")
        for name, area in (("vae", self.vae), ("vl", self.vl), ("text_only", self.text_only)):
            if area is not None and area < 1:
                raise ValueError(f"the {name} area is {area}, wanted a positive number of pixels")


@dataclass(frozen=True)
class Resize:
    """One picture at two sizes, and the map between their coordinates.

    >>> resize = Resize((1920, 1080), (1376, 768))
    >>> f"{resize.stretch:.4f}"
    '1.0078'
    >>> resize.back(688, 384)
    (960.0, 540.0)
    """

    source: Size
    result: Size

    @property
    def stretch(self) -> float:
        """How much wider the result is than the source's aspect ratio: 1 is undistorted, below 1 narrower."""
        return (self.result[0] * self.source[1]) / (self.result[1] * self.source[0])

    def forward(self, x: float, y: float) -> tuple[float, float]:
        """A point of the source in the result's coordinates."""
        return x * self.result[0] / self.source[0], y * self.result[1] / self.source[1]

    def back(self, x: float, y: float) -> tuple[float, float]:
        """A point of the result in the source's coordinates."""
        return x * self.source[0] / self.result[0], y * self.source[1] / self.result[1]

    def back_box(self, box: Box) -> Box:
        """A box of the result in the source's coordinates."""
        left, top, right, bottom = box
        return *self.back(left, top), *self.back(right, bottom)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The sizes of one input picture.

    Attributes:
        size: of the picture as given.
        vae: size that the VAE encodes; its tokens are the transformer's reference tokens.
        vl: size that the processor gets for the language model, before `smart_resize`.
        token: the side of a token in pixels of the VAE's size.
    """

    size: Size
    vae: Size
    vl: Size
    token: int

    @property
    def grid(self) -> Grid:
        return _grid(self.vae, self.token)

    @property
    def to_vae(self) -> Resize:
        return Resize(self.size, self.vae)

    def token_box(self, row: int, column: int) -> Box:
        """The box of a reference token, in pixels of the picture as given; the boxes tile it exactly.

        Raises:
            ValueError: there is no such token.
        """
        return self.to_vae.back_box(_token_box(self.grid, self.token, row, column))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of one sample: its pictures, and the picture to make.

    Attributes:
        size: of the picture to make.
        pictures: the input pictures in order; none in text-to-image.
        follows: index of the picture whose size the output follows; None without pictures.
        token: the side of a token in pixels.
    """

    size: Size
    pictures: tuple[Picture, ...]
    follows: int | None
    token: int

    @property
    def grid(self) -> Grid:
        """Tokens of the picture to make."""
        return _grid(self.size, self.token)

    @property
    def to_output(self) -> Resize:
        """From the picture that the output follows to the output; `.back` maps output pixels to the input.

        Raises:
            ValueError: there is no picture.
        """
        if self.follows is None:
            raise ValueError("no input picture: the output of text-to-image has none to map to")
        return Resize(self.pictures[self.follows].size, self.size)

    @property
    def aligned(self) -> bool:
        """True if the output has the token grid of the picture that it follows.

        The transformer centres positions. With different grids, tokens of the same content have different
        positions: expect a shift or a zoom.
        """
        return self.follows is not None and self.pictures[self.follows].grid == self.grid

    def token_box(self, row: int, column: int) -> Box:
        """The box of a target token, in pixels of the output.

        Raises:
            ValueError: there is no such token.
        """
        return _token_box(self.grid, self.token, row, column)


def plan(
    pictures: Sequence[Size],
    *,
    areas: Areas,
    height: int | None = None,
    width: int | None = None,
    follow: int = -1,
) -> Geometry:
    """Every size of one sample, from the sizes of its pictures and the requested output size.

    Args:
        pictures: (width, height) of each; none for text-to-image, which defaults to a square.
        areas: the checkpoint's areas and a token's side; `areas.vl` tells Edit from Edit-Plus.
        height, width: of the output; if one is omitted, it follows from a picture at the VAE's area,
            independently of the other, as in the reference.
        follow: index of the picture that the output's size follows; the reference takes the last.

    >>> edit = plan([(1920, 1080)], areas=Areas(token=16, vl=None))
    >>> edit.size, edit.grid, edit.pictures[0].vl
    ((1376, 768), (1, 48, 86), (1376, 768))

    Raises:
        ValueError: a height or width that is not a positive multiple of a token's side (the message names the
            next one), a picture so long that a side is 0 in multiples of 32, several pictures for a
            single-picture checkpoint.
    Source: diffusers 0.39.0, `QwenImageEditPipeline.__call__`, `QwenImageEditPlusPipeline.__call__`,
        `QwenImagePipeline.__call__`. They round a given size down; we refuse it.
    """
    if areas.vl is None and len(pictures) > 1:
        raise ValueError(f"got {len(pictures)} pictures, wanted one: this checkpoint edits a single picture")
    if pictures and not -len(pictures) <= follow < len(pictures):
        raise ValueError(f"the output follows picture {follow}, but there are {len(pictures)}")
    planned = tuple(_picture(size, areas) for size in pictures)
    follows = follow % len(pictures) if pictures else None
    default = fit_area(areas.text_only, 1.0, areas.token) if follows is None else planned[follows].vae
    return Geometry(
        size=(
            default[0] if width is None else _side("width", width, areas.token),
            default[1] if height is None else _side("height", height, areas.token),
        ),
        pictures=planned,
        follows=follows,
        token=areas.token,
    )


def at_output(geometry: Geometry) -> Geometry:
    """The sizes of a run that starts from the picture that its output follows, which has its size."""
    assert geometry.follows is not None
    pictures = list(geometry.pictures)
    pictures[geometry.follows] = dataclasses.replace(pictures[geometry.follows], vae=geometry.size)
    return dataclasses.replace(geometry, pictures=tuple(pictures))


def require_visible(geometry: Geometry) -> None:
    """Check that the language model can be shown the pictures: it takes a ratio of sides of at most 200.

    What counts is the size that it would be given. Rounding to multiples of 32 makes a long picture longer in
    Edit, and shorter in Edit-Plus, which at the official area shows pictures of up to about 279 to 1.

    Raises:
        ValueError: a picture is longer.
    """
    for picture in geometry.pictures:
        if max(picture.vl) > _LONGEST * min(picture.vl):
            own, seen = (f"{width}x{height}" for width, height in (picture.size, picture.vl))
            raise ValueError(
                f"the picture is {own}, which the language model would see at {seen}, wanted a ratio of its "
                f"sides of at most {_LONGEST}"
            )


def fit_area(area: int, ratio: float, multiple: int = _MULTIPLE) -> Size:
    """The (width, height) of about this area and ratio (width / height), in multiples of `multiple`.

    Each side is rounded separately, halves to the even multiple, as by Python's `round`.

    >>> fit_area(1024 * 1024, 16 / 9)
    (1376, 768)

    Raises:
        ValueError: the ratio is not positive and finite, or a side rounds to 0.
    Source: `calculate_dimensions` of the edit pipelines, which may return a side of 0.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"the ratio of width to height is {ratio}, wanted a positive number")
    exact_width = math.sqrt(area * ratio)
    exact_height = exact_width / ratio
    width = round(exact_width / multiple) * multiple
    height = round(exact_height / multiple) * multiple
    if min(width, height) < 1:
        raise ValueError(
            f"the ratio of width to height is {ratio:.5g}: at an area of {area} pixels that is "
            f"{width}x{height} in multiples of {multiple}, wanted no side of 0"
        )
    return width, height


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) at which the vision tower sees a picture: multiples of `factor` within limits.

    >>> smart_resize(384, 384, 28, min_pixels=56 * 56, max_pixels=12845056)
    (392, 392)

    Raises:
        ValueError: a side that is not positive, or a ratio of sides over 200.
    Source: transformers 4.57.6, models/qwen2_vl/image_processing_qwen2_vl.py, `smart_resize`.
    """
    _require_pixels(width, height)
    if max(width, height) > _LONGEST * min(width, height):
        raise ValueError(
            f"the picture is {width}x{height}, wanted a ratio of its sides of at most {_LONGEST}"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    if min(rows, columns) < 1:
        raise ValueError(
            f"the picture of {width}x{height} becomes {columns}x{rows} in multiples of {factor}; wanted "
            f"min_pixels of at least 1, got {min_pixels}"
        )
    return rows, columns


def _picture(size: Size, areas: Areas) -> Picture:
    width, height = size
    _require_pixels(width, height)
    ratio = width / height
    vae = fit_area(areas.vae, ratio)
    vl = vae if areas.vl is None else fit_area(areas.vl, ratio)
    if vae[0] % areas.token or vae[1] % areas.token:
        raise ValueError(
            f"the VAE would see the picture at {vae[0]}x{vae[1]}, wanted multiples of {areas.token}, the "
            "side of a token"
        )
    return Picture(size=(width, height), vae=vae, vl=vl, token=areas.token)


def _require_pixels(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise ValueError(f"the picture is {width}x{height} pixels, wanted at least 1x1")


def _side(name: str, value: int, token: int) -> int:
    try:  # not `checks.whole_number`, which would import torch
        side = operator.index(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"{name} is {value!r}, wanted a whole number of pixels") from None
    if side < 1 or side % token:
        following = max(1, math.ceil(side / token)) * token
        raise ValueError(
            f"{name} is {side}, wanted a positive multiple of {token}: the next one is {following}"
        )
    return side


def _grid(size: Size, token: int) -> Grid:
    return 1, size[1] // token, size[0] // token


def _token_box(grid: Grid, token: int, row: int, column: int) -> Box:
    _, rows, columns = grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"no token at row {row}, column {column}: the grid has {rows} rows, {columns} columns"
        )
    return column * token, row * token, (column + 1) * token, (row + 1) * token
