"""A second renderer of the embedded model's world, so that no habit of the first one is taken for the world.

    scene = next(scenes(rng))    # sizes, places and margins of its own
    picture = draw(scene)        # 64x64, drawn by Pillow

It shares the words with qwenedit/mini/shapes.py (what a `Scene` says), and none of the drawing: shapes are
Pillow's polygons and ellipses, mostly on a larger canvas that one of Pillow's filters makes small. How a
picture is drawn follows from the scene's softness and overshoot, which edits keep: a scene before and after
an edit is drawn in one style, and the same scene always as the same picture.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from qwenedit.mini.scenes import CONTRAST, held_out, visible_colours
from qwenedit.mini.shapes import COLOURS, KINDS, SIDE, Background, Rgb, Scene, Shape

__all__ = ["draw", "scenes"]

FILTERS = Image.Resampling
SMOOTH = (FILTERS.BOX, FILTERS.HAMMING, FILTERS.BILINEAR)
RINGING = (FILTERS.BICUBIC, FILTERS.LANCZOS)

RADII = (6.5, 11.5)
ROWS = 3  # of the grid of places, and its columns
TRIES = 4  # at each place
JITTER = 4.0  # pixels by which a shape misses its place in the grid
MARGINS, GAPS = (0.5, 5.0), (1.5, 6.0)  # pixels to the picture's edge, and between shapes
TILTED, MOST_TILT = 0.25, 15.0
OUTLINED, OUTLINES = 0.2, (1.0, 1.8)
GRADED, SHADES = 0.5, (0.15, 0.4)
TINTED, MOST_TINT = 0.3, 0.08
ALIASED, RINGED = 0.15, 0.35  # shares of the scenes


@dataclass(frozen=True)
class Style:
    """How a scene is drawn.

    Attributes:
        factor: how many pixels of the canvas make one of the picture; 1 = no anti-aliasing.
        filter: makes the canvas small.
        waist: of a star, distance of the inner corners from the centre as a share of the outer ones'.
    """

    factor: int
    filter: FILTERS
    waist: float


def style(scene: Scene) -> Style:
    """The style of a scene: of softness 0 without anti-aliasing, with overshoot by a filter that rings."""
    rng = Random(f"{scene.softness} {scene.overshoot}")
    factor, smooth, ringing = rng.randint(4, 8), rng.choice(SMOOTH), rng.choice(RINGING)
    return Style(
        factor if scene.softness else 1, ringing if scene.overshoot else smooth, rng.uniform(0.4, 0.5)
    )


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, 64x64 RGB."""
    how = style(scene)
    canvas = _background(scene.background, SIDE * how.factor)
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        fill, width = _ink(shape.rgb), round(shape.outline * how.factor)
        look = {"fill": fill, "outline": _ink(_line(shape)) if width else fill, "width": max(1, width)}
        if shape.kind == "circle":
            corners = [(shape.x + side * shape.radius, shape.y + side * shape.radius) for side in (-1, 1)]
        else:
            corners = _corners(shape, how.waist)
        # Pillow cuts places off to whole pixels, counted from the middle of the first one.
        whole = [tuple(round(at * how.factor - 0.5) for at in corner) for corner in corners]
        (pen.ellipse if shape.kind == "circle" else pen.polygon)(whole, **look)
    return canvas if how.factor == 1 else canvas.resize((SIDE, SIDE), how.filter)


def _corners(shape: Shape, waist: float) -> list[tuple[float, float]]:
    """The corners of a polygon, clockwise from the one that points up, or up and to the right."""
    shares = {"square": (1.0,) * 4, "triangle": (1.0,) * 3, "star": (1.0, waist) * 5}[shape.kind]
    first = shape.angle - (45 if shape.kind == "square" else 90)
    middle = complex(shape.x, shape.y)
    points = [
        middle + cmath.rect(share * shape.extent, math.radians(first + 360 * i / len(shares)))
        for i, share in enumerate(shares)
    ]
    return [(point.real, point.imag) for point in points]


def _line(shape: Shape) -> Rgb:
    """The darker shade along a shape's edge; along a black one's a lighter one."""
    red, green, blue = ((value + (shape.colour == "black")) / 2 for value in shape.rgb)
    return red, green, blue


def _ink(colour: Rgb) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in colour)
    return red, green, blue


def _background(background: Background, side: int) -> Image.Image:
    """One colour, or two through a mask: Pillow's gradient of 256 rows, turned and stretched."""
    near, far = (Image.new("RGB", (side, side), _ink(end)) for end in background.ends)
    if not background.shade:
        return near
    dx, dy = math.cos(math.radians(background.angle)), math.sin(math.radians(background.angle))
    scale = 256 / (side * (abs(dx) + abs(dy)))
    down = (scale * dx, scale * dy, 128 - scale * (dx + dy) * side / 2)  # the row of a point of the canvas
    mask = Image.linear_gradient("L").transform(
        (side, side), Image.Transform.AFFINE, (0, 0, 128, *down), FILTERS.BILINEAR
    )
    return Image.composite(far, near, mask)


def scenes(rng: Random, *, test: bool = False) -> Iterator[Scene]:
    """Endless random scenes, of the compositions for training or, with `test`, of the held-out ones.

    The rules are those of qwenedit/mini/scenes.py: one to three visible shapes of different kinds that do not
    touch. Sizes, places and margins are its own: a jittered grid, and one margin and one gap for a scene.
    """
    while True:
        scene = _random_scene(rng)
        if scene.shapes and held_out(scene) == test:
            yield scene


def _random_scene(rng: Random) -> Scene:
    background = _random_background(rng)
    tilted, outlined, tinted = (rng.random() < share for share in (TILTED, OUTLINED, TINTED))
    margin, gap, size = rng.uniform(*MARGINS), rng.uniform(*GAPS), rng.uniform(*RADII)
    colours = visible_colours(background)
    cells = [((i % ROWS + 0.5) * SIDE / ROWS, (i // ROWS + 0.5) * SIDE / ROWS) for i in range(ROWS**2)]
    rng.shuffle(cells)
    kinds = rng.sample(KINDS, rng.choice((1, 2, 3, 3)))
    shapes: list[Shape] = []
    for column, row in cells * TRIES:
        if len(shapes) == len(kinds):
            break
        kind = kinds[len(shapes)]
        shape = Shape(
            kind,
            rng.choice(colours),
            column + rng.uniform(-JITTER, JITTER),
            row + rng.uniform(-JITTER, JITTER),
            min(RADII[1], max(RADII[0], size * rng.uniform(0.8, 1.2))),
            rng.uniform(-MOST_TILT, MOST_TILT) if tilted and kind != "circle" else 0.0,
            rng.uniform(*OUTLINES) if outlined else 0.0,
            _tint(rng, tinted),
        )
        if _fits(shape, shapes, margin, gap) and _stands_out(shape, background):
            shapes.append(shape)
    softness = 0.0 if rng.random() < ALIASED else rng.uniform(0.8, 1.4)
    overshoot = rng.uniform(0.05, 0.3) if softness and rng.random() < RINGED else 0.0
    return Scene(background, tuple(shapes), softness, overshoot)


def _random_background(rng: Random) -> Background:
    colour, tint = rng.choice(list(COLOURS)), _tint(rng, rng.random() < TINTED)
    if rng.random() >= GRADED:
        return Background(colour, tint=tint)
    lighter = colour == "black" or (colour != "white" and rng.random() < 0.5)
    shade = rng.uniform(*SHADES)
    return Background(colour, shade if lighter else -shade, rng.choice(range(0, 360, 15)), tint)


def _tint(rng: Random, tinted: bool) -> Rgb:
    most = MOST_TINT if tinted else 0.0
    return rng.uniform(-most, most), rng.uniform(-most, most), rng.uniform(-most, most)


def _fits(shape: Shape, others: list[Shape], margin: float, gap: float) -> bool:
    """True if there is room around a shape, counted from the circle around it."""
    room = shape.extent + margin
    inside = all(room <= at <= SIDE - room for at in (shape.x, shape.y))
    return inside and all(
        math.hypot(shape.x - other.x, shape.y - other.y) >= shape.extent + other.extent + gap
        for other in others
    )


def _stands_out(shape: Shape, background: Background) -> bool:
    return all(math.dist(shape.rgb, end) >= CONTRAST for end in background.ends)
