"""What a picture of the embedded model's world shows: its shapes, read off the pixels.

    for found in read_shapes(picture, background):
        found.shape, found.fit

Pixels that differ from the background form connected pieces. Each piece is brought to one size and compared
with templates of every kind at several tilts; the kind whose template overlaps it best is taken. So the
reading depends neither on who drew the picture nor on how: tilted, outlined, softly, or a bit off colour.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenedit.mini.shapes import (
    COLOURS,
    KINDS,
    OUTLINE_SHADE,
    SIDE,
    Background,
    Rgb,
    Shape,
    area,
    coverage,
    paint_background,
)

__all__ = [
    "Found", "drawn_alone", "largest", "length", "plain", "read_background", "read_shapes",
]  # fmt: skip

# Distances of colours are in RGB of [0, 1].
FOREGROUND = 0.2  # a pixel at least this far from the background is foreground,
HEIGHT = 0.3  # and at least at this share of the way to the farthest pixel near it
LEAST_AREA = 12  # pixels; smaller pieces are blemishes, not shapes
FEW = 4  # pixels that a shape's colour is read off at least
UNEVEN = 0.15  # distance of a pixel's colour from its shape's
MOTTLED = 0.25  # share of a shape's inner pixels that may be farther from it
TILTS = range(-20, 21, 5)  # of templates, in degrees
SOFTNESSES = (1.0, 3.0)
TEMPLATE_AREA, TEMPLATE_SIDE = 200.0, 32  # in pixels


@dataclass(frozen=True)
class Found:
    """A shape read off a picture; `fit`: intersection over union with the piece, 0 if of several colours."""

    shape: Shape
    fit: float


def read_shapes(picture: Tensor, background: Background) -> list[Found]:
    """The shapes of a picture (3, SIDE, SIDE) in [0, 1] whose background is known."""
    ground = paint_background(background)
    away = length(picture - ground)
    pieces = _pieces((away > FOREGROUND) & (away > HEIGHT * largest(away, 5)))
    return [_read(picture, ground, piece) for piece in pieces]


def read_background(picture: Tensor) -> Background:
    """The one colour that a picture's border has."""
    inner = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    name, tint = _nearest(picture[:, ~inner].median(dim=1).values)
    return Background(name, tint=tint)


def _nearest(colour: Tensor) -> tuple[str, Rgb]:
    """The name of the colour that is nearest, and the tint that makes that one this one."""
    name = min(COLOURS, key=lambda one: math.dist(colour.tolist(), plain(one)))
    red, green, blue = (float(value) - plain for value, plain in zip(colour, plain(name), strict=True))
    return name, (red, green, blue)


def plain(colour: str) -> Rgb:
    return Background(colour).ends[0]


def _pieces(mask: Tensor) -> list[Tensor]:
    """The connected pieces of a mask (SIDE, SIDE), but blemishes; pixels that share a side are connected."""
    width = SIDE + 1  # an empty column, so that no row goes on in the next one
    rest = set(F.pad(mask, (0, 1)).flatten().nonzero()[:, 0].tolist())
    pieces = []
    while rest:
        piece: set[int] = set()
        grown = {rest.pop()}
        while grown:
            piece |= grown
            grown = {at + step for at in grown for step in (-1, 1, -width, width)} & rest
            rest -= grown
        if len(piece) >= LEAST_AREA:
            held = torch.zeros(SIDE * width, dtype=torch.bool)
            held[list(piece)] = True
            pieces.append(held.view(SIDE, width)[:, :SIDE])
    return pieces


def _read(picture: Tensor, ground: Tensor, piece: Tensor) -> Found:
    """The shape that fits a piece of a picture best."""
    depth = _depth(piece)
    deep = next(depth >= level for level in range(5, 0, -1) if int((depth >= level).sum()) >= FEW)
    colour = picture[:, deep].median(dim=1).values
    name, tint = _nearest(colour)
    cover = _cover(picture, ground, depth, colour)
    total = cover.sum()
    centres = torch.arange(SIDE) + 0.5
    x, y = (cover.sum(dim=0) * centres).sum() / total, (cover.sum(dim=1) * centres).sum() / total
    # As large as the templates, and in their middle.
    steps = (torch.arange(TEMPLATE_SIDE) + 0.5 - TEMPLATE_SIDE / 2) * (total / TEMPLATE_AREA).sqrt()
    columns, rows = ((2 * (at + steps) / SIDE - 1).expand(TEMPLATE_SIDE, -1) for at in (x, y))
    grid = torch.stack([columns, rows.T], dim=-1)
    scaled = F.grid_sample(cover[None, None], grid[None], align_corners=False).flatten()
    looks, templates = _templates()
    overlap = torch.minimum(templates, scaled).sum(dim=1) / torch.maximum(templates, scaled).sum(dim=1)
    fit, best = overlap.max(dim=0)
    kind, tilt = looks[int(best)]
    radius = float((total / area(kind)).sqrt())
    shape = Shape(kind, name, float(x), float(y), radius, tilt, tint=tint)
    return Found(shape, float(fit) if _is_one_colour(picture, depth, colour) else 0.0)


def _depth(piece: Tensor) -> Tensor:
    """How deep each pixel lies in a piece: 0 outside, 1 at its border, 5 wherever it is deeper than 4."""
    left = piece.float()
    depth = left
    for _ in range(4):
        left = -largest(-left, 3)
        depth = depth + left
    return depth


def _cover(picture: Tensor, ground: Tensor, depth: Tensor, colour: Tensor) -> Tensor:
    """The share of each pixel that a piece covers.

    At its border it is how far the pixel is from the ground to the piece's colour. Inside it is 1, whatever
    the colour, so that a line along the edge belongs to the shape.
    """
    contrast = length(colour[:, None, None] - ground).clamp_min(0.01)
    share = (length(picture - ground) / contrast - 0.1) / 0.8  # what noise adds is cut off
    cover = share.clamp(0, 1) * largest((depth > 0).float(), 3)
    return torch.where(depth > 1, 1.0, cover)


def _is_one_colour(picture: Tensor, depth: Tensor, colour: Tensor) -> bool:
    """True if a piece has a colour, or its line's shade, nearly wherever no background shines through."""
    black = _nearest(colour)[0] == "black"
    way = OUTLINE_SHADE * (float(black) - colour)  # to the shade of the line
    inner = picture[:, depth >= depth.max().clamp_max(3)] - colour[:, None]
    share = (way @ inner / way.square().sum()).clamp(0, 1)
    off = (inner - share * way[:, None]).norm(dim=0)
    return float((off > UNEVEN).float().mean()) <= MOTTLED


@functools.cache
def _templates() -> tuple[list[tuple[str, float]], Tensor]:
    """The kind and the tilt of every template, and its pixels in a row."""
    looks, drawn = [], []
    cut = slice((SIDE - TEMPLATE_SIDE) // 2, (SIDE + TEMPLATE_SIDE) // 2)
    for kind in KINDS:
        for tilt in TILTS if kind != "circle" else (0,):
            for softness in SOFTNESSES:
                middle, radius = SIDE / 2, math.sqrt(TEMPLATE_AREA / area(kind))
                shape = Shape(kind, "white", middle, middle, radius, float(tilt))
                looks.append((kind, shape.angle))
                drawn.append(drawn_alone(shape, softness)[cut, cut].flatten())
    return looks, torch.stack(drawn)


def largest(x: Tensor, side: int) -> Tensor:
    """The largest value in the square around each pixel of (SIDE, SIDE)."""
    return F.max_pool2d(x[None], side, 1, side // 2)[0]


def length(x: Tensor) -> Tensor:
    """That of the vector of channels at each pixel, (C, SIDE, SIDE) to (SIDE, SIDE)."""
    return x.square().sum(dim=0).sqrt()  # torch's norm is several times slower here


def drawn_alone(shape: Shape, softness: float) -> Tensor:
    """The share of each pixel that a shape covers, (SIDE, SIDE)."""
    x, y, radius, angle = torch.tensor([shape.x, shape.y, shape.radius, shape.angle])
    return coverage(shape.kind, x, y, radius, angle, softness)
