"""The data of a training run: pictures before and after, and what was asked, from a table or a folder.

A table is a JSON Lines file, with paths relative to it:

    {"image": "after.png", "control": "before.png", "caption": "make it snow"}
    {"image": "c.png", "control": ["a.png", "b.png"], "caption": "put 1 on 2", "mask": "where.png"}
    {"image": "cat.png", "caption": "a cat"}

`image` is what is to be learned, `control` what an edit is given: one picture, a list, or none for text to
image. `mask`, of the image's size, is white where the loss counts and black where it does not. The names of
musubi-tuner (`image_path`, `control_path`, `control_path_0`, ...) and DiffSynth-Studio (`edit_image`,
`prompt`) are read, too.

A folder has a picture and a text for each row, and a folder for each picture that an edit is given:

    cat.png  cat.txt            the image and its caption
    control/cat.png             the control of the same name, with any ending; a second one in control_2/, ...
    mask/cat.png                its mask, for any of the rows
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from torch import Tensor

from qwenedit.checks import progress_bar, warn
from qwenedit.family import Variant
from qwenedit.foreign import parse_json, read_text, shown
from qwenedit.inputs.geometry import Areas, Geometry, plan, require_visible
from qwenedit.inputs.pictures import as_picture, byte_tensor, open_picture
from qwenedit.inputs.processor import check_prompt
from qwenedit.training.loss import mask_weights

__all__ = ["Entry", "Row", "digest_of", "edits_of", "looked_at", "picture_of", "read_entries", "rows_of_step"]

Given = Path | Image.Image  # a picture, or its file

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".ppm", ".pgm",
    ".qoi", ".psd", ".tga",
)  # fmt: skip
KEYS = ("image", "control", "caption", "mask")
# What other trainers call these.
_ALIASES = {
    "image_path": "image", "control_path": "control", "edit_image": "control", "prompt": "caption",
}  # fmt: skip
_NUMBERED = re.compile(r"control_path_(\d+)")
_CONTROLS = re.compile(r"control(?:_\d+)?")
_MOST = 10  # names in a message


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row as it was given; no picture is opened yet. A validation edit has no image."""

    name: str
    image: Given | None
    controls: tuple[Given, ...]
    caption: str
    mask: Given | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A row whose pictures were looked at.

    Attributes:
        entry: where the pictures are.
        geometry: the sizes of the image and of the controls.
        image, controls: hashes of the pixels; None for a row without an image.
        weight: (S,) of each token in the loss; None: equal weights.
    """

    entry: Entry
    geometry: Geometry
    image: str | None
    controls: tuple[str, ...]
    weight: Tensor | None


def read_entries(data: Path | Sequence[Mapping[str, Any]], base: Path) -> list[Entry]:
    """The rows of a table, a folder, or a list of a table's rows, whose pictures may be PIL's.

    Raises:
        ValueError: no rows; a row that is none; pictures or captions that are missing, which are listed.
    """
    if not isinstance(data, Path):
        entries = [_entry(f"row {k}", row, base) for k, row in enumerate(data, start=1)]
    elif os.path.isdir(data):
        entries = list(_of_folder(data))
    else:
        lines = enumerate(read_text(data, "data").split("\n"), start=1)
        entries = [
            _entry(what, parse_json(line, what), data.parent)
            for number, line in lines
            if line.strip() and (what := f"line {number} of {shown(data)}")
        ]
    if not entries:
        raise ValueError(f"there are no rows in {shown(data)}, wanted at least one")
    _require_there(entries)
    return entries


def edits_of(edits: Sequence[tuple[Sequence[Any], str]], base: Path) -> list[Entry]:
    """Pictures and prompts of a validation as entries without an image.

    Raises:
        ValueError: pictures that are missing: the message lists them.
    """
    entries = []
    for k, (pictures, prompt) in enumerate(edits, start=1):
        what = f"edit {k} of the validation"
        controls = tuple(_given(one, f"{what}: a picture", base) for one in pictures)
        entries.append(Entry(name=what, image=None, controls=controls, caption=prompt))
    _require_there(entries)
    return entries


def _require_there(entries: Sequence[Entry]) -> None:
    paths = [x for one in entries for x in (one.image, *one.controls, one.mask) if isinstance(x, Path)]
    _require_none([path for path in dict.fromkeys(paths) if not os.path.isfile(path)], "pictures are missing")


def _entry(what: str, row: Any, base: Path) -> Entry:
    """A table's row."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{what} is {shown(repr(row))}, wanted an object with {', '.join(KEYS)}")
    values: dict[str, Any] = {}
    numbered: dict[int, Any] = {}
    for key, value in row.items():
        if match := _NUMBERED.fullmatch(str(key)):
            numbered[int(match[1])] = value
            continue
        name = _ALIASES.get(key, key)
        if name not in KEYS or name in values:
            got = f"{name} twice" if name in values else f"the key {shown(repr(key))}"
            raise ValueError(f"{what} has {got}, wanted {', '.join(KEYS)}")
        values[name] = value
    controls = values.get("control")
    if numbered and controls is not None:
        raise ValueError(f"{what} has control_path twice, with and without numbers")
    if numbered:
        controls = [numbered[k] for k in sorted(numbered)]
    listed = controls if isinstance(controls, (list, tuple)) else [] if controls in (None, "") else [controls]
    caption = values.get("caption")
    if not isinstance(caption, str):
        raise ValueError(f"{what} has the caption {shown(repr(caption))}, wanted a text")
    if values.get("image") is None:
        raise ValueError(f"{what} has no image, wanted the picture that is to be learned")
    mask = values.get("mask")
    return Entry(
        name=what,
        image=_given(values["image"], f"{what}: image", base),
        controls=tuple(_given(one, f"{what}: control", base) for one in listed),
        caption=caption,
        mask=None if mask in (None, "") else _given(mask, f"{what}: mask", base),
    )


def _given(value: Any, what: str, base: Path) -> Given:
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, (str, os.PathLike)) or not value:
        raise ValueError(f"{what} is {shown(repr(value))}, wanted a picture's file")
    return base / value


def _of_folder(folder: Path) -> Iterator[Entry]:
    """The rows of a folder, by name."""
    images = _pictures(folder)
    there = {path.name for path in folder.iterdir() if path.is_dir() and _CONTROLS.fullmatch(path.name)}
    names = ["control", *(f"control_{k}" for k in range(2, len(there) + 1))][: len(there)]
    if there != set(names):
        got = ", ".join(map(shown, sorted(there)))
        raise ValueError(f"{shown(folder)} has folders of controls {got}, wanted control, control_2, ...")
    controls = [_pictures(folder / name) for name in names]
    masks = _pictures(folder / "mask") if (folder / "mask").is_dir() else {}
    texts = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    _require_none([folder / f"{name}.txt" for name in images if name not in texts], "captions are missing")
    for name, of in zip(names, controls, strict=True):
        _require_none([folder / name / one for one in images if one not in of], "controls are missing")
    for found in (texts, *controls, masks):
        _require_none([path for one, path in found.items() if one not in images], "files are of no image")
    for name, image in images.items():
        yield Entry(
            name=shown(image),
            image=image,
            controls=tuple(one[name] for one in controls),
            caption=read_text(texts[name], "caption").strip(),
            mask=masks.get(name),
        )


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder, by their names without ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            if path.stem in found:
                raise ValueError(f"{shown(path)} and {shown(found[path.stem].name)} have one name")
            found[path.stem] = path
    return found


def _require_none(found: Sequence[Path], what: str) -> None:
    if found:
        more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise ValueError(f"{what} ({len(found)}): {', '.join(map(shown, found[:_MOST]))}{more}")


def picture_of(given: Given) -> Image.Image:
    """The picture, in RGB."""
    return (open_picture(given) if isinstance(given, Path) else as_picture(given)).convert("RGB")


def looked_at(
    entries: Sequence[Entry], variant: Variant, areas: Areas, *, progress: bool = True
) -> list[Row]:
    """The rows with their sizes and hashes. Every picture is opened, so that a broken one is found now.

    An image has the checkpoint's area, in its own ratio of sides; controls have their own, as in edits.

    Raises:
        ValueError: a picture that cannot be read, a size that does not fit, or a number of controls that the
            variant does not take. The message names the row.
    """
    seen: dict[Path, tuple[tuple[int, int], str]] = {}

    def look(given: Given) -> tuple[tuple[int, int], str]:
        if isinstance(given, Path) and given in seen:
            return seen[given]
        picture = picture_of(given)
        found = picture.size, hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        if isinstance(given, Path):
            seen[given] = found
        return found

    rows = []
    for entry in progress_bar(entries, progress=progress, desc="looking at the pictures", unit="row"):
        try:
            most = variant.max_pictures
            if most is not None and len(entry.controls) > most:
                raise ValueError(f"it has {len(entry.controls)} controls, but {variant.name} takes {most}")
            check_prompt(entry.caption, illustrated=bool(entry.controls))
            image = None if entry.image is None else look(entry.image)
            controls = [look(one) for one in entry.controls]
            width, height = (None, None) if image is None else plan([image[0]], areas=areas).pictures[0].vae
            geometry = plan([size for size, _ in controls], areas=areas, height=height, width=width)
            require_visible(geometry)
            weight = None
            if entry.mask is not None and image is not None:
                weight = _weight(entry.mask, image[0], geometry)
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from error
        rows.append(
            Row(
                entry=entry,
                geometry=geometry,
                image=None if image is None else image[1],
                controls=tuple(one for _, one in controls),
                weight=weight,
            )
        )
    _warn_of_shifts(rows)
    return rows


def _weight(mask: Given, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """(S,) in [0, 1]: the tokens' weights of a mask."""
    picture = picture_of(mask).convert("L")
    if picture.size != size:
        raise ValueError(f"the mask is {picture.size}, wanted {size}, as the image")
    weight = mask_weights(byte_tensor(picture)[None, ..., 0] / 255, geometry.grid)[0]
    if not bool(weight.any()):
        raise ValueError("the mask is black, so that nothing counts: wanted white where the loss counts")
    return weight


def _warn_of_shifts(rows: Sequence[Row]) -> None:
    shifted = [row for row in rows if row.geometry.follows is not None and not row.geometry.aligned]
    if shifted:
        warn(
            f"{len(shifted)} of {len(rows)} images have another shape than their last control, as "
            f"{shifted[0].entry.name}: their tokens are learned at other positions than edits have them"
        )


def digest_of(rows: Sequence[Row]) -> str:
    """A hash of the rows' contents, wherever their files are."""
    digest = hashlib.sha256()
    for row in rows:
        weight = None if row.weight is None else row.weight.tolist()
        content = [row.entry.caption, row.image, row.controls, row.geometry.grid, weight]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:20]


def rows_of_step(rows: Sequence[Row], count: int, seed: int, step: int) -> list[int]:
    """The numbers of the rows of a step: up to `count`, of one size.

    An epoch has every row once, in steps of rows of one size, all in an order that is drawn anew. The last
    step of each size may have fewer.
    """
    by_size: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        by_size.setdefault(row.geometry.grid, []).append(number)
    epoch, place = divmod(step, sum(-(-len(one) // count) for one in by_size.values()))
    rng = Random(f"{seed} order {epoch}")
    steps = []
    for one in by_size.values():
        rng.shuffle(one)
        steps += [one[start : start + count] for start in range(0, len(one), count)]
    rng.shuffle(steps)
    return steps[place]
