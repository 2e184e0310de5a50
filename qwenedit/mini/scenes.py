"""The embedded model's world: scenes, instructions to edit them, and the results.

    scene = random_scene(rng)                     # one to three shapes on a background
    request = random_request(rng, scene)          # "recolour the circle to red", as a value
    text = instruction(rng, request)              # "paint the circle red"
    target = outcome(rng, scene, request)         # the scene after it; for open requests, one of many
    draw(scene), draw(target)                     # 64x64 pictures (shapes.py)

All randomness comes from the `random.Random` that is passed in: the same seed gives the same world on any
machine. descriptions.py has scenes in words; oracle.py judges pictures.

A scene's shapes differ in kind, so that "the circle" always names one shape. They keep a distance from each
other and from the edges. What an edit adds is drawn plainly: upright, without an outline, in the very colour.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from qwenedit.mini.shapes import COLOURS, KINDS, SIDE, Background, Rgb, Scene, Shape

__all__ = [
    "ACTIONS", "DETERMINED", "OPEN", "PLACES", "WHERE", "Request", "article", "free", "held_out",
    "instruction", "outcome", "random_request", "random_scene", "scenes", "varied", "visible",
    "visible_colours",
]  # fmt: skip

PLACES = {"left": (14, 32), "right": (50, 32), "top": (32, 14), "bottom": (32, 50), "center": (32, 32)}
ADDED_RADIUS = 9.0  # of the shape of a determined "add"
RADII = (6.0, 12.0)
GAP = 2.0  # pixels between the circles around two shapes
CONTRAST = 0.3  # least distance of a shape's colour from its background, in RGB of [0, 1]
# How often a scene's look differs from the plain one, and how far it goes: degrees, pixels, RGB of [0, 1].
TILTED, MOST_TILT = 0.4, {"circle": 0.0, "square": 20.0, "triangle": 20.0, "star": 18.0}
OUTLINED, OUTLINES = 0.2, (0.8, 1.8)
TINTED, MOST_TINT = 0.4, 0.1
SOFTENED, SOFTNESS = 0.7, (0.0, 1.8)
RINGING, OVERSHOOT = 0.2, (0.0, 0.4)
SHADED, SHADES = 0.6, (0.15, 0.45)

DETERMINED = ("recolour", "remove", "background", "add", "replace", "move")  # one right picture
OPEN = ("add any", "recolour any", "add something")  # many right pictures
ACTIONS = DETERMINED + OPEN


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


@functools.lru_cache(4096)
def visible(colour: str, background: Background) -> bool:
    """True if a shape of this colour stands out everywhere on this background."""
    return _stands_out(Shape("circle", colour, 0.0, 0.0, 1.0), background)


def _stands_out(shape: Shape, background: Background) -> bool:
    return all(math.dist(shape.rgb, end) >= CONTRAST for end in background.ends)


def visible_colours(background: Background) -> list[str]:
    return [name for name in COLOURS if visible(name, background)]


def free(shapes: tuple[Shape, ...], shape: Shape) -> bool:
    """True if there is room for a shape beside others and within the picture."""
    low, high = shape.extent, SIDE - shape.extent
    inside = low <= shape.x <= high and low <= shape.y <= high
    return inside and all(shape.distance(one) >= shape.extent + one.extent + GAP for one in shapes)


def random_background(rng: Random) -> Background:
    colour, tint = rng.choice(list(COLOURS)), _tint(rng, rng.random() < TINTED)
    if rng.random() >= SHADED:
        return Background(colour, tint=tint)
    away = {"white": -1.0, "black": 1.0}.get(colour) or rng.choice((-1.0, 1.0))
    return Background(colour, away * rng.uniform(*SHADES), rng.uniform(0, 360), tint)


def _tint(rng: Random, tinted: bool) -> Rgb:
    red, green, blue = (rng.uniform(-MOST_TINT, MOST_TINT) if tinted else 0.0 for _ in range(3))
    return red, green, blue


def random_scene(rng: Random) -> Scene:
    """A background with one to three shapes of different kinds, each at a random free place.

    How it is drawn is random, too, and the same for all of its shapes: plain or not in each respect.
    """
    background = random_background(rng)
    tilted, outlined, tinted = (rng.random() < share for share in (TILTED, OUTLINED, TINTED))
    softness = rng.uniform(*SOFTNESS) if rng.random() < SOFTENED else 1.0
    overshoot = rng.uniform(*OVERSHOOT) if rng.random() < RINGING else 0.0
    names = visible_colours(background)
    shapes: tuple[Shape, ...] = ()
    for kind in rng.sample(KINDS, rng.choice((1, 2, 2, 3, 3))):
        for _ in range(50):
            shape = Shape(
                kind, rng.choice(names), SIDE / 2, SIDE / 2, rng.uniform(*RADII),
                MOST_TILT[kind] * rng.uniform(-1, 1) * tilted, rng.uniform(*OUTLINES) * outlined,
                _tint(rng, tinted),
            )  # fmt: skip
            x, y = (rng.uniform(shape.extent, SIDE - shape.extent) for _ in range(2))
            shape = dataclasses.replace(shape, x=x, y=y)
            if free(shapes, shape) and _stands_out(shape, background):
                shapes = (*shapes, shape)
                break
    return Scene(background, shapes, softness, overshoot)


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


def random_request(rng: Random, scene: Scene, action: str | None = None) -> Request | None:
    """A request that a scene allows, of the given or of a random action; None if it allows none."""
    action = action or rng.choice(ACTIONS)
    referent, absent = rng.choice(scene.shapes), scene.absent
    seen = visible_colours(scene.background)
    if action == "recolour":
        names = [name for name in seen if name != referent.colour]
        return Request(action, referent.kind, colour=rng.choice(names))
    if action in ("recolour any", "remove"):
        return Request(action, referent.kind)
    if action == "background":
        plain = scene.background.colour if not scene.background.shade else None
        names = [
            name for name in COLOURS
            if name != plain and all(_stands_out(shape, Background(name)) for shape in scene.shapes)
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
        places = _free_places(scene, kind)
        return Request(action, None, kind, colour, rng.choice(places)) if places else None
    if not all(_free_places(scene, kind) for kind in absent):
        return None
    if action == "add any":
        return Request(action, None, kind=rng.choice(absent))
    return Request(action, None, colour=rng.choice(seen))


def _free_places(scene: Scene, kind: str) -> list[str]:
    """Where there is room for a shape of this kind to be added."""
    return [
        place for place, (x, y) in PLACES.items()
        if free(scene.shapes, Shape(kind, "white", x, y, ADDED_RADIUS))
    ]  # fmt: skip


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
    kind = request.kind or rng.choice(scene.absent)
    x, y = PLACES[request.place or rng.choice(_free_places(scene, kind))]
    colour = request.colour or rng.choice(visible_colours(scene.background))
    return Shape(kind, colour, x, y, ADDED_RADIUS)


def _changed(rng: Random, scene: Scene, shape: Shape, request: Request) -> Shape:
    if request.action == "move":
        assert request.place is not None
        x, y = PLACES[request.place]
        return dataclasses.replace(shape, x=x, y=y)
    if request.action == "replace":
        assert request.kind is not None
        return dataclasses.replace(shape, kind=request.kind)
    names = [name for name in visible_colours(scene.background) if name != shape.colour]
    colour = request.colour or rng.choice(names)
    return dataclasses.replace(shape, colour=colour, tint=(0.0, 0.0, 0.0))


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
WHERE = {
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
    wordings, places = _WORDINGS[request.action], WHERE[request.place or "left"]
    text = (wordings[0] if plain else rng.choice(wordings)).format(
        referent=request.referent,
        kind=request.kind,
        colour=request.colour,
        a_colour=article(request.colour or "a"),
        place=places[0] if plain else rng.choice(places),
        side=request.place if request.place != "center" or plain else rng.choice(("center", "middle")),
    )
    return text if plain else varied(rng, text)


def varied(rng: Random, text: str) -> str:
    """The text as some people write it: one in five with a capital, one in five with a full stop."""
    text = text.capitalize() if rng.random() < 0.2 else text
    return text + "." if rng.random() < 0.2 else text
