"""The embedded model's world in words: what pictures are made from text alone.

    description = random_description(rng)        # shapes in places, on a background
    text = prompt(rng, description)              # "a red circle on the left and a blue star"
    scene = described(rng, description)          # one of the right scenes

What a description does not say is free: the places, the background. Shapes are drawn plainly, in their very
places and all of one size; where two have no room then, smaller ones, a little further from the center.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from qwenedit.mini.scenes import PLACES, WHERE, article, free, held_out, varied, visible, visible_colours
from qwenedit.mini.shapes import COLOURS, KINDS, Background, Scene, Shape

__all__ = ["Description", "Item", "described", "prompt", "random_description"]

RADIUS, LESS_RADIUS = 8.0, 7.0  # of a shape; of shapes that have no room otherwise
OUTWARD = 3.5  # pixels, how much further from the center these lie than their places


@dataclass(frozen=True)
class Item:
    """A shape that is asked for; `place` is one of `PLACES`, or None: anywhere."""

    kind: str
    colour: str
    place: str | None = None


@dataclass(frozen=True)
class Description:
    """What a picture is to show: one or two shapes of different kinds; `background` None: any colour."""

    items: tuple[Item, ...]
    background: str | None = None


def random_description(rng: Random, *, test: bool = False) -> tuple[Description, Scene]:
    """A description and a scene that it describes.

    Args:
        test: of the held-out compositions, which training never sees.
    """
    while True:
        background = rng.choice(list(COLOURS))
        colours = visible_colours(Background(background))
        places = rng.sample(list(PLACES), 2)
        items = tuple(
            Item(kind, rng.choice(colours), place if rng.random() < 0.65 else None)
            for kind, place in zip(rng.sample(KINDS, rng.choice((1, 2))), places, strict=False)
        )
        description = Description(items, background if rng.random() < 0.5 else None)
        scene = _placed(rng, items, background)
        if scene is not None and held_out(scene) == test:
            return description, scene


def described(rng: Random, description: Description) -> Scene:
    """A random one of the scenes that a description is true of.

    Raises:
        ValueError: there is none: shapes without room, or that cannot be seen.
    """
    backgrounds = [
        name
        for name in (COLOURS if description.background is None else (description.background,))
        if all(visible(item.colour, Background(name)) for item in description.items)
    ]
    scene = _placed(rng, description.items, rng.choice(backgrounds)) if backgrounds else None
    if scene is None:
        raise ValueError(f"no scene shows {prompt(rng, description, plain=True)!r}")
    return scene


def _placed(rng: Random, items: tuple[Item, ...], background: str) -> Scene | None:
    """Plainly drawn shapes in their places, or in any; None if there is no room."""
    for radius, outward in ((RADIUS, 0.0), (LESS_RADIUS, OUTWARD)):
        shapes: tuple[Shape, ...] = ()
        for item in sorted(items, key=lambda item: item.place is None):
            places = [item.place] if item.place else rng.sample(list(PLACES), len(PLACES))
            tried = (Shape(item.kind, item.colour, *_at(place, outward), radius) for place in places)
            shapes += tuple(shape for shape in tried if free(shapes, shape))[:1]
        if len(shapes) == len(items):
            return Scene(Background(background), shapes)
    return None


def _at(place: str, outward: float) -> tuple[float, float]:
    """The point of a place, `outward` pixels further from the picture's center."""
    (x, y), (left, top) = PLACES[place], PLACES["center"]
    far = math.hypot(x - left, y - top)
    return x + outward * (x - left) / max(far, 1), y + outward * (y - top) / max(far, 1)


def prompt(rng: Random, description: Description, *, plain: bool = False) -> str:
    """A description in words, one in five with a capital, one in five with a full stop.

    `plain` gives the first wording, without either.
    """

    def words(item: Item) -> str:
        ways = WHERE.get(item.place or "", ("",))
        return f"{article(item.colour)} {item.kind} {ways[0] if plain else rng.choice(ways)}".strip()

    text = " and ".join(map(words, description.items))
    if description.background is not None:
        text += f" on {article(description.background)} background"
    return text if plain else varied(rng, text)
