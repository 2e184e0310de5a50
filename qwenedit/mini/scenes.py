"""The embedded model's world: pictures of coloured shapes, instructions to edit them, and the results.

    scene = random_scene(rng)                     # one to three shapes on a background
    request = random_request(rng, scene)          # "recolour the circle to red", as a value
    text = instruction(rng, request)              # "paint the circle red"
    target = outcome(rng, scene, request)         # the scene after it; for open requests, one of many
    draw(scene), draw(target)                     # 64x64 pictures

All randomness comes from the `random.Random` that is passed in: the same seed gives the same world on any
machine. oracle.py judges edited pictures.

A scene's shapes differ in kind, so that "the circle" always names one shape. They keep a distance from each
other and from the edges. Coordinates are pixels from the top left corner; pixel i covers [i, i + 1).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from PIL import Image
from torch import Tensor

from qwenedit.inputs.pictures import to_pil

__all__ = [
    "ACTIONS", "COLOURS", "DETERMINED", "EXAMPLE", "KINDS", "OPEN", "PLACES", "SIDE", "Background", "Request",
    "Scene", "Shape", "article", "coverage", "draw", "free", "held_out", "instruction", "outcome", "paint",
    "paint_background", "random_request", "random_scene", "scenes", "visible",
]  # fmt: skip

SIDE = 64  # pixels a side of every picture
KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 50),
    "purple": (140, 60, 180), "orange": (245, 140, 30), "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
PLACES = {"left": (14, 32), "right": (50, 32), "top": (32, 14), "bottom": (32, 50), "center": (32, 32)}
ADDED_RADIUS = 9.0  # of the shape of a determined "add"
RADII = (7.5, 10.5)
GAP = 2.0  # pixels between the circles around two shapes, and to the edges
CONTRAST = 0.3  # least distance of a shape's colour from its background, in RGB of [0, 1]

DETERMINED = ("recolour", "remove", "background", "add", "replace", "move")  # one right picture
OPEN = ("add any", "recolour any", "add something")  # many right pictures
ACTIONS = DETERMINED + OPEN

# Distance of the corners from the centre at radius 1, chosen so that the kinds look equally large.
_CORNERS = {"circle": 1.0, "square": 1.25, "triangle": 1.4, "star": 1.35}
# Of each polygon: the number of outer corners, and the distance from the centre, as a share of theirs, of the
# point halfway between two of them.
_POLYGONS = {
    "square": (4, math.cos(math.pi / 4)),
    "triangle": (3, math.cos(math.pi / 3)),
    "star": (5, 0.45),  # its inner corners
}


@dataclass(frozen=True)
class Shape:
    """A shape of a scene; (x, y) is its centroid."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def extent(self) -> float:
        """Radius of the circle around it."""
        return self.radius * _CORNERS[self.kind]

    def distance(self, other: Shape) -> float:
        """Between the centres."""
        return math.dist((self.x, self.y), (other.x, other.y))


@dataclass(frozen=True)
class Background:
    """One colour, or a gradient from it towards white (`shade` above 0) or black (below 0).

    `shade` is how far it goes, in [-1, 1], and `angle` its direction in degrees: 0 to the right, 90 down.
    """

    colour: str
    shade: float = 0.0
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A background with shapes on it."""

    background: Background
    shapes: tuple[Shape, ...]

    @property
    def absent(self) -> list[str]:
        """The kinds that no shape has."""
        return [kind for kind in KINDS if kind not in {shape.kind for shape in self.shapes}]

    def find(self, kind: str | None) -> Shape:
        return next(shape for shape in self.shapes if shape.kind == kind)


@dataclass(frozen=True)
class Request:
    """An edit that an instruction asks for.

    Attributes:
        action: one of `ACTIONS`.
        referent: the kind of the shape to change; None if the action changes none.
        kind, colour, place: of the wanted shape or background; None if open or without meaning.
    """

    action: str
    referent: str | None = None
    kind: str | None = None
    colour: str | None = None
    place: str | None = None

    @property
    def is_open(self) -> bool:
        """True if several outcomes are right."""
        return self.action in OPEN


def coverage(kind: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The share of each pixel that a shape covers, from the distance to its outline (anti-aliasing).

    Shapes: `x`, `y`, `radius` (...) -> (..., SIDE, SIDE), rows first.

    Polygons are folded into one sector of their symmetry, in which their outline is one straight line.
    """
    centres = torch.arange(SIDE) + 0.5
    dx = centres - x[..., None, None]
    dy = centres[:, None] - y[..., None, None]
    corner = (radius * _CORNERS[kind])[..., None, None]
    if kind == "circle":
        return (0.5 - (torch.hypot(dx, dy) - corner)).clamp(0, 1)
    corners, ratio = _POLYGONS[kind]
    half = math.pi / corners
    start = math.pi / 4 if kind == "square" else -math.pi / 2  # squares lie flat, the others point upwards
    angle = (torch.atan2(dy, dx) - start + half).remainder(2 * half) - half
    along, across = torch.hypot(dx, dy) * angle.cos(), torch.hypot(dx, dy) * angle.sin().abs()
    # The line from the outer corner (1, 0) to the inner one, or to the middle of a plain polygon's side.
    end_along, end_across = ratio * math.cos(half), ratio * math.sin(half)
    length = math.hypot(end_across, 1 - end_along)
    distance = (end_across * (along - corner) + (1 - end_along) * across) / length
    return (0.5 - distance).clamp(0, 1)


def area(kind: str) -> float:
    """The area of a shape of radius 1, in square pixels."""
    if kind == "circle":
        return math.pi
    corners, ratio = _POLYGONS[kind]
    return corners * ratio * math.sin(math.pi / corners) * _CORNERS[kind] ** 2


EXAMPLE = Scene(  # examples/scene.png
    Background("white", -0.4, 90.0),
    (
        Shape("circle", "blue", 19.0, 22.0, 10.0),
        Shape("square", "green", 46.0, 44.0, 9.5),
        Shape("star", "orange", 45.0, 16.0, 8.5),
    ),
)

Rgb = tuple[float, ...]  # of [0, 1]


def _rgb(colour: str) -> Rgb:
    return tuple(value / 255 for value in COLOURS[colour])


def _ends(background: Background) -> tuple[Rgb, Rgb]:
    """The colours at both ends of a gradient."""
    near, towards, share = _rgb(background.colour), float(background.shade > 0), abs(background.shade)
    return near, tuple(value + share * (towards - value) for value in near)


def paint_background(background: Background) -> Tensor:
    """(3, SIDE, SIDE) in [0, 1]."""
    near, far = torch.tensor(_ends(background))
    dx, dy = math.cos(math.radians(background.angle)), math.sin(math.radians(background.angle))
    centres = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    way = centres * dx + centres[:, None] * dy
    share = 0.5 + way / (abs(dx) + abs(dy))
    return near[:, None, None].lerp(far[:, None, None], share)


def paint(scene: Scene) -> Tensor:
    """The picture of a scene as (3, SIDE, SIDE) in [0, 1]."""
    picture = paint_background(scene.background)
    for shape in scene.shapes:
        cover = coverage(shape.kind, *torch.tensor([shape.x, shape.y, shape.radius]))
        picture = picture.lerp(torch.tensor(_rgb(shape.colour))[:, None, None], cover)
    return picture


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    return to_pil(paint(scene).clamp(0, 1)[None])[0]


@functools.cache
def visible(colour: str, background: Background) -> bool:
    """True if a shape of this colour stands out everywhere on this background."""
    return all(math.dist(_rgb(colour), end) >= CONTRAST for end in _ends(background))


def _visible_colours(background: Background) -> list[str]:
    return [name for name in COLOURS if visible(name, background)]


def free(shapes: tuple[Shape, ...], shape: Shape) -> bool:
    """True if there is room for a shape beside others and within the picture."""
    low, high = shape.extent + 1, SIDE - shape.extent - 1
    inside = low <= shape.x <= high and low <= shape.y <= high
    return inside and all(shape.distance(one) >= shape.extent + one.extent + GAP for one in shapes)


def random_background(rng: Random) -> Background:
    colour = rng.choice(list(COLOURS))
    if rng.random() < 0.6:
        return Background(colour)
    shade = {"white": -0.4, "black": 0.4}.get(colour) or rng.choice((-0.4, 0.4))
    return Background(colour, shade, rng.choice((0.0, 90.0, 180.0, 270.0)))


def random_scene(rng: Random) -> Scene:
    """A background with one to three shapes of different kinds, each at a random free place."""
    background = random_background(rng)
    shapes: tuple[Shape, ...] = ()
    for kind in rng.sample(KINDS, rng.choice((1, 2, 2, 3, 3))):
        shape = _anywhere(rng, background, shapes, kind)
        if shape is not None:
            shapes += (shape,)
    return Scene(background, shapes)


def held_out(scene: Scene) -> bool:
    """True if training never sees the scene's composition (kinds, colours, background): a tenth of all."""
    parts = sorted(f"{shape.kind} {shape.colour}" for shape in scene.shapes)
    return zlib.crc32(f"{scene.background.colour}: {', '.join(parts)}".encode()) % 10 == 0


def scenes(rng: Random, *, test: bool = False) -> Iterator[Scene]:
    """Endless random scenes, of the compositions for training or, with `test`, of the held-out ones."""
    while True:
        scene = random_scene(rng)
        if held_out(scene) == test:
            yield scene


def _anywhere(
    rng: Random, background: Background, shapes: tuple[Shape, ...], kind: str, colour: str | None = None
) -> Shape | None:
    """A shape that fits, of random place, size and colour (if none is given); None if 50 tries fail."""
    names = _visible_colours(background)
    for _ in range(50):
        name = colour or rng.choice(names)
        x, y = rng.uniform(0, SIDE), rng.uniform(0, SIDE)
        shape = Shape(kind, name, x, y, rng.uniform(*RADII))
        if free(shapes, shape):
            return shape
    return None


def random_request(rng: Random, scene: Scene, action: str | None = None) -> Request | None:
    """A request that a scene allows, of the given or of a random action; None if it allows none."""
    action = action or rng.choice(ACTIONS)
    referent, absent = rng.choice(scene.shapes), scene.absent
    seen = _visible_colours(scene.background)
    if action == "recolour":
        names = [name for name in seen if name != referent.colour]
        return Request(action, referent.kind, colour=rng.choice(names))
    if action in ("recolour any", "remove"):
        return Request(action, referent.kind)
    if action == "background":
        plain = scene.background.colour if not scene.background.shade else None
        names = [
            name for name in COLOURS
            if name != plain and all(visible(shape.colour, Background(name)) for shape in scene.shapes)
        ]  # fmt: skip
        return Request(action, colour=rng.choice(names)) if names else None
    if action == "replace":
        kinds = [kind for kind in absent if _fits(scene, dataclasses.replace(referent, kind=kind), referent)]
        return Request(action, referent.kind, kind=rng.choice(kinds)) if kinds else None
    if action == "move":
        places = [
            place for place, (x, y) in PLACES.items()
            if math.hypot(referent.x - x, referent.y - y) > 8
            and _fits(scene, dataclasses.replace(referent, x=x, y=y), referent)
        ]  # fmt: skip
        return Request(action, referent.kind, place=rng.choice(places)) if places else None
    if action == "add":
        kind, colour = rng.choice(absent), rng.choice(seen)
        places = [
            place for place, (x, y) in PLACES.items()
            if free(scene.shapes, Shape(kind, colour, x, y, ADDED_RADIUS))
        ]  # fmt: skip
        return Request(action, None, kind, colour, rng.choice(places)) if places else None
    if _anywhere(Random(0), scene.background, scene.shapes, max(absent, key=lambda kind: _CORNERS[kind])):
        if action == "add any":
            return Request(action, None, kind=rng.choice(absent))
        return Request(action, None, colour=rng.choice(seen))
    return None


def _fits(scene: Scene, changed: Shape, instead_of: Shape) -> bool:
    return free(tuple(shape for shape in scene.shapes if shape is not instead_of), changed)


def outcome(rng: Random, scene: Scene, request: Request) -> Scene:
    """The scene after a request; for an open request, a random one of the right outcomes."""
    action = request.action
    if action == "background":
        assert request.colour is not None
        return dataclasses.replace(scene, background=Background(request.colour))
    if request.referent is not None:
        old = scene.find(request.referent)
        new: tuple[Shape, ...] = (_changed(rng, scene, old, request),) if action != "remove" else ()
        at = scene.shapes.index(old)
        return dataclasses.replace(scene, shapes=scene.shapes[:at] + new + scene.shapes[at + 1 :])
    return dataclasses.replace(scene, shapes=(*scene.shapes, _added(rng, scene, request)))


def _added(rng: Random, scene: Scene, request: Request) -> Shape:
    if request.place is not None:
        assert request.kind is not None and request.colour is not None
        x, y = PLACES[request.place]
        return Shape(request.kind, request.colour, x, y, ADDED_RADIUS)
    while True:  # `random_request` has made sure that there is room
        kind = request.kind or rng.choice(scene.absent)
        shape = _anywhere(rng, scene.background, scene.shapes, kind, request.colour)
        if shape is not None:
            return shape


def _changed(rng: Random, scene: Scene, shape: Shape, request: Request) -> Shape:
    if request.action == "move":
        assert request.place is not None
        x, y = PLACES[request.place]
        return dataclasses.replace(shape, x=x, y=y)
    if request.action == "replace":
        assert request.kind is not None
        return dataclasses.replace(shape, kind=request.kind)
    names = [name for name in _visible_colours(scene.background) if name != shape.colour]
    return dataclasses.replace(shape, colour=request.colour or rng.choice(names))


_WORDINGS = {
    "recolour": (
        "make the {referent} {colour}", "change the {referent} to {colour}", "turn the {referent} {colour}",
        "paint the {referent} {colour}", "color the {referent} {colour}",
        "recolor the {referent} to {colour}",
    ),
    "remove": (
        "remove the {referent}", "delete the {referent}", "erase the {referent}", "take away the {referent}",
    ),
    "background": (
        "make the background {colour}", "change the background to {colour}", "turn the background {colour}",
        "paint the background {colour}",
    ),
    "add": (
        "add {a_colour} {kind} {place}", "put {a_colour} {kind} {place}", "draw {a_colour} {kind} {place}",
        "insert {a_colour} {kind} {place}",
    ),
    "replace": (
        "replace the {referent} with a {kind}", "replace the {referent} by a {kind}",
        "swap the {referent} for a {kind}", "turn the {referent} into a {kind}",
        "change the {referent} into a {kind}",
    ),
    "move": ("move the {referent} to the {side}", "shift the {referent} to the {side}"),
    "add any": ("add a {kind}", "draw a {kind}", "put a {kind} in the picture", "insert a {kind}"),
    "recolour any": (
        "change the color of the {referent}", "change the colour of the {referent}",
        "make the {referent} another color", "recolor the {referent}",
    ),
    "add something": (
        "add something {colour}", "draw something {colour}", "put something {colour} in the picture",
    ),
}  # fmt: skip
_WHERE = {
    "left": ("on the left",), "right": ("on the right",), "top": ("at the top",),
    "bottom": ("at the bottom",), "center": ("in the center", "in the middle"),
}  # fmt: skip


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def instruction(rng: Random, request: Request, *, plain: bool = False) -> str:
    """A request in words: a random wording, one in five with a capital, one in five with a full stop.

    `plain` gives the first wording, without either, as in the README.
    """
    wordings, places = _WORDINGS[request.action], _WHERE[request.place or "left"]
    text = (wordings[0] if plain else rng.choice(wordings)).format(
        referent=request.referent,
        kind=request.kind,
        colour=request.colour,
        a_colour=article(request.colour or "a"),
        place=places[0] if plain else rng.choice(places),
        side=request.place if request.place != "center" or plain else rng.choice(("center", "middle")),
    )
    if plain:
        return text
    text = text.capitalize() if rng.random() < 0.2 else text
    return text + "." if rng.random() < 0.2 else text
