"""The edits of a sweep: pictures with their prompts and masks, and scenes of the embedded model's world."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from qwenedit.checks import whole_number
from qwenedit.inputs.pictures import open_picture
from qwenedit.mini.pairs import random_edit
from qwenedit.mini.scenes import DETERMINED, Request, instruction
from qwenedit.mini.shapes import Scene, draw

__all__ = ["Case", "cases_of", "close_to", "is_text", "listed", "picture_at", "require", "seeds_of"]

PAIRINGS = ("each", "all")
MINI = "mini:"


@dataclass(frozen=True, eq=False)
class Case:
    """One edit: pictures and a prompt. With `scene` and `request`, the oracle can judge the result.

    `mask` is white where the edit may change something.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    prompt: str
    scene: Scene | None = None
    request: Request | None = None
    mask: Image.Image | None = None

    @property
    def image(self) -> Image.Image | list[Image.Image]:
        """The argument of `QwenImageEdit.condition`."""
        return self.pictures[0] if len(self.pictures) == 1 else list(self.pictures)

    @property
    def source(self) -> Image.Image:
        """The picture that the result follows, and is compared with: the last one."""
        return self.pictures[-1]

    @property
    def shown(self) -> Image.Image:
        """All pictures side by side, at the first one's height."""
        if len(self.pictures) == 1:
            return self.pictures[0]
        height = self.pictures[0].height
        alike = [
            one.convert("RGB").resize((max(1, round(one.width * height / one.height)), height))
            for one in self.pictures
        ]
        page = Image.new("RGB", (sum(one.width for one in alike), height))
        for k, one in enumerate(alike):
            page.paste(one, (sum(before.width for before in alike[:k]), 0))
        return page


def cases_of(raw: Mapping[str, Any], base: Path) -> Iterable[Case]:
    """The edits, in the order of the pictures."""
    pictures = _pictures(raw.get("pictures", []))
    prompts = listed("prompts", raw.get("prompts", []), "a list of texts", is_text, least=0)
    pairing = raw.get("pairing", "each")
    if pairing not in PAIRINGS:
        close = close_to(pairing, PAIRINGS)
        raise ValueError(f"pairing is {pairing!r}, wanted one of {', '.join(PAIRINGS)}{close}")
    files = [names for names in pictures if not names[0].startswith(MINI)]
    if not files and prompts:
        raise ValueError("there are prompts, but every picture is a mini: one, which brings its own")
    if files and not prompts:
        raise ValueError(f"there are no prompts, wanted one for each of {len(files)} picture(s)")
    if pairing == "each" and len(files) != len(prompts):
        raise ValueError(
            f"there are {len(prompts)} prompts, wanted {len(files)}, one for each picture that is a file; "
            "or pairing = 'all', for each with each"
        )
    masks = listed("masks", raw.get("masks", []), 'a list of files\' names, or of ""', is_text, least=0)
    if masks and len(masks) != len(files):
        raise ValueError(
            f"there are {len(masks)} masks, wanted {len(files)}, one for each picture that is a file"
        )
    opened_masks = iter([picture_at(name, base) if name else None for name in masks] or [None] * len(files))
    of_file = [[prompt] for prompt in prompts] if pairing == "each" else [prompts] * len(files)
    waiting = iter(of_file)
    seen = set()
    for names in pictures:
        name = " + ".join(names)
        if name.startswith(MINI):
            made = [_mini(name)]
        else:
            opened = tuple(picture_at(one, base) for one in names)
            mask = next(opened_masks)
            made = [Case(name, opened, prompt, mask=mask) for prompt in next(waiting)]
        for case in made:
            if (name, case.prompt) in seen:
                raise ValueError(f"the picture {name!r} with the prompt {case.prompt!r} is there twice")
            seen.add((name, case.prompt))
            yield case


def _pictures(value: Any) -> list[list[str]]:
    """The names of each edit's pictures."""
    wanted = "a list of at least one text, or of lists of them for edits of several pictures"
    rows = listed("pictures", value, wanted)
    named = [[one] if is_text(one) else listed("pictures", one, wanted, is_text) for one in rows]
    for names in named:
        if len(names) > 1 and any(name.startswith(MINI) for name in names):
            raise ValueError(f"pictures has {names!r}, wanted a mini: picture alone")
    return named


def _mini(name: str) -> Case:
    """A held-out scene (a composition that training never shows) and a request with one right answer."""
    number = name.removeprefix(MINI)
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"the picture is {name!r}, wanted mini: and a whole number, like 'mini:0'")
    rng = Random(f"ablation {int(number)}")
    scene, request = random_edit(rng, test=True, actions=dict.fromkeys(DETERMINED, 1.0))
    return Case(name, (draw(scene),), instruction(rng, request), scene, request)


def picture_at(name: str | Path, base: Path) -> Image.Image:
    path = base / name
    if not os.path.lexists(path):
        known = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        raise ValueError(f"no such picture: {path}{close_to(path.name, [*known, f'{MINI}0'])}")
    return open_picture(path)


def seeds_of(value: Any) -> list[int]:
    given = listed("seeds", value, "a list of whole numbers")
    seeds = [whole_number("a seed", seed, least=0, most=2**64 - 1) for seed in given]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {seeds}, wanted each once")
    return seeds


def listed(
    name: str, value: Any, wanted: str, fits: Callable[[Any], bool] = lambda _: True, *, least: int = 1
) -> list[Any]:
    """The value as a list, if it is a sequence of at least `least` values that all fit."""
    is_list = isinstance(value, Sequence) and not is_text(value)
    require(is_list and len(value) >= least and all(map(fits, value)), name, value, wanted)
    return list(value)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def require(fits: bool, what: str, got: Any, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{what} is {got!r}, wanted {wanted}")


def close_to(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
