"""The pictures of the embedded model's world: coloured shapes on a background, and how they are drawn.

    scene = Scene(Background("white"), (Shape("circle", "blue", 19.0, 22.0, 10.0),))
    draw(scene)  # a 64x64 picture

Coordinates are pixels from the top left corner; pixel i covers [i, i + 1). A scene says all that its picture
depends on: shapes may be tilted and outlined, colours may be off their names, and edges may be soft or hard,
as other programs draw them. scenes.py draws scenes at random; oracle.py reads pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qwenedit.inputs.pictures import to_pil

__all__ = [
    "COLOURS", "EXAMPLE", "KINDS", "SIDE", "Background", "Rgb", "Scene", "Shape", "area", "coverage", "draw",
    "paint", "paint_background",
]  # fmt: skip

SIDE = 64  # pixels a side of every picture
KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 50),
    "purple": (140, 60, 180), "orange": (245, 140, 30), "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
OUTLINE_SHADE = 0.5  # of a shape's colour, towards black; of a black one, towards white

# Distance of the corners from the centre at radius 1, chosen so that the kinds look equally large.
_CORNERS = {"circle": 1.0, "square": 1.25, "triangle": 1.4, "star": 1.35}
# Of each polygon: the number of outer corners, and the distance from the centre, as a share of theirs, of the
# point halfway between two of them.
_POLYGONS = {
    "square": (4, math.cos(math.pi / 4)),
    "triangle": (3, math.cos(math.pi / 3)),
    "star": (5, 0.45),  # its inner corners
}
Rgb = tuple[float, float, float]  # of [0, 1]
_NO_TINT: Rgb = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Shape:
    """A shape of a scene.

    Attributes:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        x, y: its centroid.
        radius: of a circle; the other kinds' corners lie farther out, so that they look as large.
        angle: by which it is tilted, in degrees clockwise. At 0 a square lies flat, the others point upwards.
        outline: width in pixels of the line along its edge, in a darker shade of its colour.
        tint: what is added to the colour that the name stands for.
    """

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    outline: float = 0.0
    tint: Rgb = _NO_TINT

    @property
    def extent(self) -> float:
        """Radius of the circle around it."""
        return self.radius * _CORNERS[self.kind]

    @property
    def rgb(self) -> Rgb:
        """The colour that it has."""
        return _rgb(self.colour, self.tint)

    def distance(self, other: Shape) -> float:
        """Between the centres."""
        return math.dist((self.x, self.y), (other.x, other.y))


@dataclass(frozen=True)
class Background:
    """One colour, or a gradient from it towards white (`shade` above 0) or black (below 0).

    `shade` is how far it goes, in [-1, 1], and `angle` its direction in degrees: 0 to the right, 90 down.
    `tint` is added to the colour that the name stands for.
    """

    colour: str
    shade: float = 0.0
    angle: float = 0.0
    tint: Rgb = _NO_TINT

    @property
    def ends(self) -> tuple[Rgb, Rgb]:
        """The colours at both ends of a gradient."""
        near, towards = _rgb(self.colour, self.tint), float(self.shade > 0)
        red, green, blue = (value + abs(self.shade) * (towards - value) for value in near)
        return near, (red, green, blue)


@dataclass(frozen=True)
class Scene:
    """A background with shapes on it.

    Attributes:
        softness: width in pixels of the shapes' edges; 1 is a pixel's own width, 0 no anti-aliasing.
        overshoot: how far edges ring, as resampling leaves them; 0 = not at all.
    """

    background: Background
    shapes: tuple[Shape, ...]
    softness: float = 1.0
    overshoot: float = 0.0

    @property
    def absent(self) -> list[str]:
        """The kinds that no shape has."""
        return [kind for kind in KINDS if kind not in {shape.kind for shape in self.shapes}]

    def find(self, kind: str | None) -> Shape:
        return next(shape for shape in self.shapes if shape.kind == kind)


def _rgb(colour: str, tint: Rgb) -> Rgb:
    red, green, blue = (
        min(1.0, max(0.0, value / 255 + off)) for value, off in zip(COLOURS[colour], tint, strict=True)
    )
    return red, green, blue


EXAMPLE = Scene(  # examples/scene.png
    Background("white", -0.4, 90.0),
    (
        Shape("circle", "blue", 19.0, 22.0, 10.0),
        Shape("square", "green", 46.0, 44.0, 9.5),
        Shape("star", "orange", 45.0, 16.0, 8.5),
    ),
)


def _outside(kind: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor | None) -> Tensor:
    """How far each pixel's centre is outside of a shape, in pixels; inside it is below 0.

    Polygons are folded into one sector of their symmetry, in which their outline is one straight line.
    """
    centres = torch.arange(SIDE) + 0.5
    dx = centres - x[..., None, None]
    dy = centres[:, None] - y[..., None, None]
    corner = (radius * _CORNERS[kind])[..., None, None]
    if kind == "circle":
        return torch.hypot(dx, dy) - corner
    corners, ratio = _POLYGONS[kind]
    half = math.pi / corners
    start = math.pi / 4 if kind == "square" else -math.pi / 2
    turned = torch.atan2(dy, dx) - start
    if angle is not None:
        turned = turned - angle.deg2rad()[..., None, None]
    sector = (turned + half).remainder(2 * half) - half
    along, across = torch.hypot(dx, dy) * sector.cos(), torch.hypot(dx, dy) * sector.sin().abs()
    # The line from the outer corner (1, 0) to the inner one, or to the middle of a plain polygon's side.
    end_along, end_across = ratio * math.cos(half), ratio * math.sin(half)
    length = math.hypot(end_across, 1 - end_along)
    return (end_across * (along - corner) + (1 - end_along) * across) / length


def coverage(
    kind: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor | None = None, softness: float = 1.0
) -> Tensor:
    """The share of each pixel that a shape covers, from the distance to its outline (anti-aliasing).

    Shapes: `x`, `y`, `radius`, `angle` (...) -> (..., SIDE, SIDE), rows first.
    """
    return _covered(_outside(kind, x, y, radius, angle), softness)


def _covered(outside: Tensor, softness: float) -> Tensor:
    return (0.5 - outside / max(softness, 1e-6)).clamp(0, 1)


def area(kind: str) -> float:
    """The area of a shape of radius 1, in square pixels."""
    if kind == "circle":
        return math.pi
    corners, ratio = _POLYGONS[kind]
    return corners * ratio * math.sin(math.pi / corners) * _CORNERS[kind] ** 2


def paint_background(background: Background) -> Tensor:
    """(3, SIDE, SIDE) in [0, 1]."""
    near, far = torch.tensor(background.ends)
    dx, dy = math.cos(math.radians(background.angle)), math.sin(math.radians(background.angle))
    centres = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    way = centres * dx + centres[:, None] * dy
    share = 0.5 + way / (abs(dx) + abs(dy))
    return near[:, None, None].lerp(far[:, None, None], share)


def paint(scene: Scene) -> Tensor:
    """The picture of a scene as (3, SIDE, SIDE) in [0, 1]."""
    picture = paint_background(scene.background)
    for shape in scene.shapes:
        outside = _outside(shape.kind, *torch.tensor([shape.x, shape.y, shape.radius, shape.angle]))
        if shape.outline:
            towards = float(shape.colour == "black")
            line = [value + OUTLINE_SHADE * (towards - value) for value in shape.rgb]
            picture = picture.lerp(torch.tensor(line)[:, None, None], _covered(outside, scene.softness))
        cover = _covered(outside + shape.outline, scene.softness)
        picture = picture.lerp(torch.tensor(shape.rgb)[:, None, None], cover)
    if scene.overshoot:
        around = F.avg_pool2d(F.pad(picture[None], (1, 1, 1, 1), "replicate"), 3, 1)[0]
        picture = (picture + scene.overshoot * (picture - around)).clamp(0, 1)
    return picture


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    return to_pil(paint(scene).clamp(0, 1)[None])[0]
