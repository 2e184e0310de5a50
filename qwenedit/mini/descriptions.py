"""The embedded model's world in words: what pictures are made from text alone.

    description = random_description(rng)        # shapes in places, on a background
    text = prompt(rng, description)              # "a red circle on the left and a blue star"
    scene = described(rng, description)          # one of the right scenes

What a description does not say is free: the places, the sizes, the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from qwenedit.mini.scenes import PLACES, WHERE, article, free, held_out, varied, visible, visible_colours
from qwenedit.mini.shapes import COLOURS, KINDS, Background, Scene, Shape

__all__ = ["Description", "Item", "described", "prompt", "random_description"]

RADII = (7.0, 10.0)
NEAR = 3.0  # pixels, the most by which a shape misses its place in x and in y


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
    for _ in range(100) if backgrounds else ():
        scene = _placed(rng, description.items, rng.choice(backgrounds))
        if scene is not None:
            return scene
    raise ValueError(f"no scene shows {prompt(rng, description, plain=True)!r}")


def _placed(rng: Random, items: tuple[Item, ...], background: str) -> Scene | None:
    """Plainly drawn shapes near their places, or anywhere; None if there is no room after some tries."""
    shapes: tuple[Shape, ...] = ()
    for item in sorted(items, key=lambda item: item.place is None):
        for _ in range(30):
            x, y = PLACES[item.place or rng.choice(list(PLACES))]
            near = (rng.uniform(-NEAR, NEAR) for _ in range(2))
            shape = Shape(item.kind, item.colour, x + next(near), y + next(near), rng.uniform(*RADII))
            if free(shapes, shape):
                shapes = (*shapes, shape)
                break
        else:
            return None
    return Scene(Background(background), shapes)


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
