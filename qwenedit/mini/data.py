"""Edits of the embedded model's world as data of `qwenedit.train`.

A new word for what the model can do, as a table of pairs, and edits of compositions that no training sees:

    zapped = painted("zap the {}", "black")
    write_pairs("zap", cases(Random(0), 20, zapped))
    held_out = cases(Random(1), 20, zapped, test=True)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from qwenedit.files import write_lines
from qwenedit.mini.scenes import Request, instruction, outcome, random_request, scenes, visible
from qwenedit.mini.shapes import Scene, draw

__all__ = ["Ask", "Case", "cases", "known", "painted", "row_of", "write_pairs"]

Case = tuple[Scene, Request, str]  # what is edited, what is asked of it, and in which words
Ask = Callable[[Random, Scene], tuple[Request, str] | None]


def cases(rng: Random, count: int, ask: Ask, *, test: bool = False) -> list[Case]:
    """Edits of random scenes; those for which `ask` returns None are left out.

    Args:
        test: of the held-out compositions, which the embedded model has not seen either.
    """
    found: list[Case] = []
    drawn = scenes(rng, test=test)
    while len(found) < count:
        scene = next(drawn)
        if (asked := ask(rng, scene)) is not None:
            found.append((scene, *asked))
    return found


def known(action: str) -> Ask:
    """One of `ACTIONS`, in the words that the embedded model knows."""

    def ask(rng: Random, scene: Scene) -> tuple[Request, str] | None:
        request = random_request(rng, scene, action)
        return None if request is None else (request, instruction(rng, request))

    return ask


def painted(words: str, colour: str) -> Ask:
    """One shape gets a colour that it has not, in any words, with {} for the shape's kind."""

    def ask(rng: Random, scene: Scene) -> tuple[Request, str] | None:
        kinds = [shape.kind for shape in scene.shapes if shape.colour != colour]
        if not kinds or not visible(colour, scene.background):
            return None
        kind = rng.choice(kinds)
        return Request("recolour", kind, colour=colour), words.format(kind)

    return ask


def row_of(case: Case) -> dict[str, Any]:
    """A row of a training's data, with the pictures in place of their files."""
    scene, request, caption = case
    target = outcome(Random(caption), scene, request)
    return {"image": draw(target), "control": draw(scene), "caption": caption}


def write_pairs(folder: str | os.PathLike[str], found: Sequence[Case]) -> Path:
    """Write edits into a folder, made if it is not there, and return their table, `pairs.jsonl`."""
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(found):
        row = row_of(case)
        for key in ("image", "control"):
            name = f"{number:04}-{key}.png"
            row[key].save(folder / name)
            row[key] = name
        lines.append(row)
    write_lines(folder / "pairs.jsonl", lines)
    return folder / "pairs.jsonl"
