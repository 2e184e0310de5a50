"""The lines of a list of edits, a JSON object each:

    {"image": "cat.png", "prompt": "give the cat a hat", "seed": 1}
    {"image": ["cat.png", "hat.png"], "prompt": "put the hat on the cat", "name": "hats/cat", "steps": 30}
    {"prompt": "a red circle", "height": 512, "width": 512}

| key | is |
|---|---|
| `image` | the picture to edit, or a list of pictures; without it the picture is made from text alone |
| `prompt` | what to change |
| `seed` | of the noise, 0 by default |
| `name` | of the result, a PNG in the folder; by default the line's number in the list, like 0001 |
| `negative_prompt`, `true_cfg_scale`, `steps`, `height`, `width`, `sampler`, `strength` | as for `edit` |
| `mask`, `mask_crop` | `mask_image` and `padding_mask_crop` of `edit` |
| `switches` | an object of switches by dotted name |
| `lora`, `lora_scale` | a file with a LoRA for this edit, beside those of the pipeline, and its factor |
| `size_of` | a picture: the result is written at its size (bicubic), as some benchmarks want it |
| `copies` | an object: pictures that are written beside the result, by name |

Names of files are relative to the list's own folder. Names of results stay inside of the folder of results.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from qwenedit.ablation.cases import close_to, is_text, listed, require
from qwenedit.checks import real_number, whole_number
from qwenedit.family import Preset
from qwenedit.files import is_leftover
from qwenedit.foreign import inner_name, parse_json, plain_file, read_text, shown
from qwenedit.inputs.pictures import as_picture, open_picture
from qwenedit.sampling.samplers import require_sampler
from qwenedit.switches import Switches

__all__ = ["OPTIONS", "Edits", "Line", "lines_of", "opened", "raw_lines"]

Picture = Path | Image.Image
OPTIONS = (
    "seed", "negative_prompt", "true_cfg_scale", "steps", "height", "width", "sampler", "strength",
    "mask_crop", "switches", "lora", "lora_scale",
)  # fmt: skip
KEYS = ("image", "prompt", "name", "mask", "size_of", "copies", *OPTIONS)
SAME = {
    "num_inference_steps": "steps", "guidance_scale": "true_cfg_scale", "cfg": "true_cfg_scale",
    "images": "image", "mask_image": "mask", "padding_mask_crop": "mask_crop",
}  # fmt: skip
MOST_SHOWN = 20  # faults in a message


@dataclass(frozen=True, eq=False, kw_only=True)
class Line:
    """One edit of a list. `number` and `place` say where it stands; `file` is the result's, in the folder."""

    number: int
    place: str
    file: str
    pictures: tuple[Picture, ...]
    prompt: str
    negative_prompt: str | None
    true_cfg_scale: float
    num_inference_steps: int
    height: int | None
    width: int | None
    sampler: str | None
    strength: float | None  # None: from noise alone
    mask: Picture | None
    mask_crop: int | None
    seed: int
    switches: Switches
    lora: Path | None
    lora_scale: float
    size_of: Picture | None
    copies: dict[str, Picture]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the content of files, in JSON's types."""
        names = (
            "prompt", "negative_prompt", "true_cfg_scale", "num_inference_steps", "height", "width",
            "sampler", "strength", "mask_crop", "seed", "lora_scale",
        )  # fmt: skip
        return {
            "file": self.file,
            **{name: getattr(self, name) for name in names},
            "switches": self.switches.flat(),
        }

    @property
    def sources(self) -> dict[str, Any]:
        """The names of its files, for records."""
        return {
            "pictures": [_name(one) for one in self.pictures],
            "mask": None if self.mask is None else _name(self.mask),
            "lora": None if self.lora is None else str(self.lora),
        }

    @property
    def files(self) -> list[str]:
        """All files that it writes, the result last."""
        return [*self.copies, self.file]


@dataclass(frozen=True, eq=False)
class Edits:
    """The lines of a list, and the faults of others: a number for their order, and what is wrong."""

    lines: list[Line]
    faults: list[tuple[int, str]]

    def require_good(self, others: list[tuple[int, str]]) -> None:
        """Raise a ValueError that lists all faults and `others`, if there are any."""
        faults = [text for _, text in sorted([*self.faults, *others])]
        if faults:
            count = len(self.lines) + len(self.faults)
            more = f"; and {len(faults) - MOST_SHOWN} more" if len(faults) > MOST_SHOWN else ""
            listing = "; ".join(faults[:MOST_SHOWN])
            raise ValueError(f"{len(faults)} of {count} edits cannot be made: {listing}{more}")


def raw_lines(path: str | os.PathLike[str]) -> list[tuple[str, Any]]:
    """The lines of a JSON Lines file with the places where they stand; what is no JSON is its own error."""
    found: list[tuple[str, Any]] = []
    for number, text in enumerate(read_text(path, "list of edits").split("\n"), start=1):
        if text.strip():
            try:
                found.append((f"line {number}", parse_json(text, "it", unique=True)))
            except ValueError as error:
                found.append((f"line {number}", error))
    return found


def lines_of(raw: Iterable[tuple[str, Any]], base: Path, options: Mapping[str, Any], preset: Preset) -> Edits:
    """The lines, completed by `options` and then by the preset; pictures are not opened yet.

    Raises:
        ValueError: no line, or bad options.
    """
    usual = _renamed(options)
    for name in usual:
        require(name in OPTIONS, "an option of all edits", name, f"one of {', '.join(OPTIONS)}")
    edits, taken, folders = Edits([], []), dict[str, str](), dict[str, str]()
    for number, (place, value) in enumerate(raw, start=1):
        try:
            line = _line(place, number, value, base, usual, preset)
            for file in line.files:
                if before := taken.get(file.casefold()):
                    raise ValueError(f"the name {shown(file)!r} is that of {before}, wanted another")
                taken[file.casefold()] = place
                _require_apart(file, place, taken, folders)
            edits.lines.append(line)
        except ValueError as error:
            edits.faults.append((number, f"{place}: {error}"))
    if not edits.lines and not edits.faults:
        raise ValueError("the list has no edits, wanted at least one line")
    return edits


def _require_apart(file: str, place: str, taken: dict[str, str], folders: dict[str, str]) -> None:
    """Raise a ValueError if one name is a folder of another, as `a.png` is of `a.png/b.png`."""
    names = [
        one.as_posix() for one in PurePath(file.casefold()).parents[:-1]
    ]  # without the folder of results
    folders |= dict.fromkeys(names, place)
    own = folders.get(file.casefold())
    if before := next((taken[name] for name in names if name in taken), own):
        raise ValueError(f"the name {shown(file)!r} and that of {before} are a folder and a file in it")


def opened(value: Picture, what: str = "the picture") -> Image.Image:
    """A line's picture, as it is when it is needed: a list may have more than fit into memory."""
    return as_picture(value, what) if isinstance(value, Image.Image) else open_picture(value)


def _line(place: str, number: int, value: Any, base: Path, usual: dict[str, Any], preset: Preset) -> Line:
    if isinstance(value, ValueError):
        raise value
    require(isinstance(value, Mapping), "it", value, "an object with a prompt")
    given = {**usual, **_renamed(value)}
    for name in given:
        if name not in KEYS:
            raise ValueError(f"there is no {shown(repr(name))}{close_to(name, KEYS)}")
    require(is_text(given.get("prompt")), "prompt", given.get("prompt"), "a text")
    negative, sampler = given.get("negative_prompt"), given.get("sampler")
    require(negative is None or is_text(negative), "negative_prompt", negative, "a text")
    if sampler is not None:
        require(is_text(sampler), "sampler", sampler, "a name")
        require_sampler(sampler)
    scale, steps, strength = (given.get(name) for name in ("true_cfg_scale", "steps", "strength"))
    run = preset.sampling(
        None if steps is None else whole_number("steps", steps),
        None if scale is None else real_number("true_cfg_scale", scale),
        negative,
    )
    return Line(
        number=number,
        place=place,
        file=_png(given.get("name") or f"{number:04d}"),
        pictures=_pictures(given.get("image"), base),
        prompt=given["prompt"],
        **vars(run),
        height=_whole("height", given.get("height"), least=1),
        width=_whole("width", given.get("width"), least=1),
        sampler=sampler,
        strength=None if strength is None else real_number("strength", strength),
        mask=_picture("mask", given.get("mask"), base),
        mask_crop=_whole("mask_crop", given.get("mask_crop"), least=0),
        seed=whole_number("seed", given.get("seed", 0), least=0, most=2**64 - 1),
        switches=_switches(preset, usual.get("switches", {}), value.get("switches", {}), base),
        lora=_lora(given.get("lora"), base),
        lora_scale=real_number("lora_scale", given.get("lora_scale", 1.0)),
        size_of=_picture("size_of", given.get("size_of"), base),
        copies=_copies(given.get("copies", {}), base),
    )


def _renamed(value: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, one in value.items():
        name = SAME.get(key, key)
        if name in renamed:
            raise ValueError(f"{shown(name)} is given twice, as {shown(key)} too")
        renamed[name] = one
    return renamed


def _whole(name: str, value: Any, least: int) -> int | None:
    return None if value is None else whole_number(name, value, least=least)


def _png(name: Any) -> str:
    require(is_text(name), "name", name, "a text")
    file = inner_name(name if name.lower().endswith(".png") else f"{name}.png", "name")
    if is_leftover(Path(file)):
        raise ValueError(f"name is {shown(repr(name))}, wanted one that is not that of a temporary file")
    return file


def _pictures(value: Any, base: Path) -> tuple[Picture, ...]:
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple)) else [value]
    found = [_picture("image", one, base) for one in listed("image", several, "a picture or a list of them")]
    if None in found:
        raise ValueError("image has None in its list, wanted pictures")
    return tuple(one for one in found if one is not None)


def _picture(what: str, value: Any, base: Path) -> Picture | None:
    if value is None or isinstance(value, Image.Image):
        return value
    require(isinstance(value, (str, Path)) and str(value) != "", what, value, "the name of a picture's file")
    return plain_file(base / value, "picture")


def _copies(value: Any, base: Path) -> dict[str, Picture]:
    require(isinstance(value, Mapping), "copies", value, "an object of pictures by name")
    pictures = {_png(name): _picture("copies", one, base) for name, one in value.items()}
    return {name: one for name, one in pictures.items() if one is not None}


def _switches(preset: Preset, usual: Any, given: Any, base: Path) -> Switches:
    for value in (usual, given):
        require(isinstance(value, Mapping), "switches", value, "an object of switches by name")
    flat = {**preset.switches.flat(), **usual, **given}
    for name in ("references.picture", "seen.other"):
        if isinstance(flat.get(name), str):
            flat[name] = open_picture(base / flat[name])
    return Switches.from_flat(flat)


def _lora(value: Any, base: Path) -> Path | None:
    if value is None:
        return None
    require(isinstance(value, (str, Path)) and str(value) != "", "lora", value, "the name of a file")
    return plain_file(base / value, "LoRA")


def _name(value: Picture) -> str:
    return "a given picture" if isinstance(value, Image.Image) else str(value)
