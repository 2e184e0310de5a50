"""What a sweep runs: pictures and prompts, seeds, and a grid of settings, from a SPEC.toml or a dict.

    model = "path/to/folder"              # hub id or folder; left out: the embedded model
    pictures = ["mini:0", "cat.png"]      # in place of a name ["a.png", "b.png"]: one edit of both
                                          # "mini:0": a scene of the embedded model's world, from seed 0, with
                                          # a request of its own for a prompt, which the oracle judges
    prompts = ["give the cat a hat"]      # of the pictures that are files
    pairing = "each"                      # a prompt for each such picture, in order; "all": each with each
    seeds = [0, 1]                        # of the noise
    true_cfg_scale = 4.0                  # what a run is called with: also steps, negative_prompt,
    steps = 20                            # and, for all runs alike, height and width
    attention = true                      # with maps of what the first picture's target attends to
    deterministic = true                  # under `qwenedit.deterministic`

    [switches]                            # of all runs, the unablated one too
    "seen.size" = [32, 32]

    [grid]                                # every combination is run that can be: "references.sigma" beside
                                          # "references.latents" = "left_out", say, cannot
    "references.latents" = ["concatenated", "left_out"]     # a switch of `qwenedit.Switches`,
    true_cfg_scale = [1, 4]                                 # or true_cfg_scale, steps, negative_prompt

The run without any change, with the calls of the top and default switches, is always among them, and all
others are compared with it. Paths are relative to the SPEC.toml's folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from qwenedit.inputs.pictures import open_picture
from qwenedit.mini.pairs import random_edit
from qwenedit.mini.scenes import DETERMINED, Request, Scene, draw, instruction
from qwenedit.switches import NAMES, Guidance, Switches

__all__ = ["Case", "Cell", "Spec", "read_spec"]

CALL: dict[str, Any] = {"true_cfg_scale": 4.0, "steps": 20, "negative_prompt": " "}  # and their defaults
FLAGS = ("attention", "deterministic")
KEYS = (
    "model", "pictures", "prompts", "pairing", "seeds", *CALL, "height", "width", *FLAGS, "switches", "grid",
)  # fmt: skip
SAME = {"num_inference_steps": "steps", "guidance_scale": "true_cfg_scale", "cfg": "true_cfg_scale"}
MOST_CELLS = 10_000
OTHERS = {"references.picture": "references.latents", "seen.other": "seen.picture"}  # which "other"
PAIRINGS = ("each", "all")
TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"  # the module that reads it
MINI = "mini:"


@dataclass(frozen=True, eq=False)
class Case:
    """A picture, or several, and what is asked of it; `scene` and `request` where the oracle can judge the
    result.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    prompt: str
    scene: Scene | None = None
    request: Request | None = None

    @property
    def image(self) -> Image.Image | list[Image.Image]:
        """What `QwenImageEdit.condition` takes."""
        return self.pictures[0] if len(self.pictures) == 1 else list(self.pictures)

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


@dataclass(frozen=True, eq=False)
class Cell:
    """One combination of settings; `values` are those of the grid, by name (none where it is not in it).

    Where the run is unguided, the switches are without those that only guidance reads.
    """

    values: dict[str, Any]
    switches: Switches
    true_cfg_scale: float
    steps: int
    negative_prompt: str

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes a difference to the result: cells with equal settings make the same pictures."""
        call = {name: getattr(self, name) for name in CALL}
        return {**call, "switches": self.switches.flat()}


@dataclass(frozen=True, eq=False)
class Spec:
    """A sweep, checked as far as that needs no model. `cells[0]` is the unablated run."""

    model: str | None
    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    height: int | None
    width: int | None
    attention: bool
    deterministic: bool
    axes: tuple[str, ...]  # the grid's names
    cells: tuple[Cell, ...]
    impossible: int  # combinations of the grid that were left out

    @property
    def edits(self) -> int:
        """How many are run: cells that come to the same share theirs."""
        different = {json.dumps(cell.settings, sort_keys=True) for cell in self.cells}
        return len(self.cases) * len(self.seeds) * len(different)


def read_spec(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    """A spec from a TOML file, or from a dict of the same content (with paths relative to where we are).

    Raises:
        ValueError: whatever is wrong with it; what, got, wanted, and names that come close.
    """
    if isinstance(source, Mapping):
        return _spec(source, Path())
    path = Path(source)
    try:
        return _spec(_toml(path), path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _toml(path: Path) -> Mapping[str, Any]:
    try:
        toml = importlib.import_module(TOML)
    except ImportError:
        raise ValueError(
            "reading TOML needs Python 3.11, or tomli (pip install 'qwenedit[report]'); or give "
            "`qwenedit.ablate` a dict"
        ) from None
    try:
        content: Mapping[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"not a TOML file: {error}") from error
    return content


def _spec(raw: Mapping[str, Any], base: Path) -> Spec:
    raw = {SAME.get(key, key): value for key, value in raw.items()}
    for key in raw:
        if key not in KEYS:
            raise ValueError(f"there is no {key!r}{_close(key, KEYS)}")
    switches = dict(_named("switches", raw.get("switches", {})))
    model = raw.get("model")
    if model is not None:
        _require(isinstance(model, str) and model != "", "model", model, "a hub id or a folder")
        model = str(base / model) if (base / model).is_dir() else model
    sizes: dict[str, Any] = {}
    for name in ("height", "width"):
        sizes[name] = raw.get(name)
        _require(sizes[name] is None or _is_whole(sizes[name]), name, sizes[name], "a whole number")
    flags: dict[str, Any] = {name: raw.get(name, False) for name in FLAGS}
    for name, value in flags.items():
        _require(isinstance(value, bool), name, value, "true or false")
    call = {name: _call_value(name, raw.get(name, default)) for name, default in CALL.items()}
    axes = {name: _values(name, values) for name, values in _named("grid", raw.get("grid", {}))}
    cells, impossible = _cells(call, switches, axes, base)
    return Spec(
        model=model,
        cases=tuple(_cases(raw, base)),
        seeds=tuple(_seeds(raw.get("seeds", [0]))),
        axes=tuple(axes),
        cells=tuple(cells),
        impossible=impossible,
        **sizes,
        **flags,
    )


def _cases(raw: Mapping[str, Any], base: Path) -> Iterable[Case]:
    """The edits that are asked for, in the order of the pictures."""
    pictures = _pictures(raw.get("pictures", []))
    prompts = _texts("prompts", raw.get("prompts", []), least=0)
    pairing = raw.get("pairing", "each")
    if pairing not in PAIRINGS:
        close = _close(pairing, PAIRINGS)
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
    of_file = [[prompt] for prompt in prompts] if pairing == "each" else [prompts] * len(files)
    waiting = iter(of_file)
    seen = set()
    for names in pictures:
        name = " + ".join(names)
        if name.startswith(MINI):
            made = [_mini(name)]
        else:
            opened = tuple(_picture(one, base) for one in names)
            made = [Case(name, opened, prompt) for prompt in next(waiting)]
        for case in made:
            if (name, case.prompt) in seen:
                raise ValueError(f"the picture {name!r} with the prompt {case.prompt!r} is there twice")
            seen.add((name, case.prompt))
            yield case


def _pictures(value: Any) -> list[list[str]]:
    """The names of each edit's pictures."""
    wanted = "a list of at least one text, or of lists of them for edits of several pictures"
    fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    _require(fits, "pictures", value, wanted)
    named = [[one] if isinstance(one, str) else one for one in value]
    for names in named:
        fits = isinstance(names, Sequence) and len(names) > 0 and all(isinstance(one, str) for one in names)
        _require(fits, "pictures", value, wanted)
        if len(names) > 1 and any(name.startswith(MINI) for name in names):
            raise ValueError(f"pictures has {list(names)!r}, wanted a mini: picture alone")
    return [list(names) for names in named]


def _mini(name: str) -> Case:
    """A held-out scene (of a composition that was never trained on) and a request with one right answer."""
    number = name.removeprefix(MINI)
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"the picture is {name!r}, wanted mini: and a whole number, like 'mini:0'")
    rng = Random(f"ablation {int(number)}")
    scene, request = random_edit(rng, test=True, actions=dict.fromkeys(DETERMINED, 1.0))
    return Case(name, (draw(scene),), instruction(rng, request), scene, request)


def _picture(name: str, base: Path) -> Image.Image:
    path = base / name
    if not path.exists():
        known = [*(one.name for one in path.parent.iterdir())] if path.parent.is_dir() else []
        raise ValueError(f"no such picture: {path}{_close(path.name, [*known, f'{MINI}0'])}")
    return open_picture(path)


def _seeds(value: Any) -> list[int]:
    wanted = "a list of whole numbers from 0 to 2**64 - 1"
    _require(
        isinstance(value, Sequence) and not isinstance(value, str) and bool(value), "seeds", value, wanted
    )
    for seed in value:
        _require(_is_whole(seed) and 0 <= seed < 2**64, "a seed", seed, "a whole number from 0 to 2**64 - 1")
    if len(set(value)) < len(value):
        raise ValueError(f"seeds are {list(value)}, wanted each once")
    return list(value)


def _named(table: str, content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names and values; TOML reads an unquoted `guidance.norm` as a table in a table."""
    _require(isinstance(content, Mapping), table, content, "a table")
    for key, value in content.items():
        name = SAME.get(key, key) if not prefix else prefix + key
        if isinstance(value, Mapping):
            yield from _named(table, value, name + ".")
        elif name in NAMES or (table == "grid" and name in CALL):
            yield name, value
        elif name in KEYS:
            raise ValueError(f"{table}: {name} is not to be varied: it stands above the tables")
        else:
            known = [*NAMES, *(CALL if table == "grid" else ())]
            raise ValueError(f"{table}: no switch is called {name!r}{_close(name, known)}")


def _values(name: str, values: Any) -> list[Any]:
    """The values of one of the grid's names."""
    fits = isinstance(values, Sequence) and not isinstance(values, str) and bool(values)
    _require(fits, f"grid: {name}", values, "a list of values")
    checked = [_call_value(name, value) if name in CALL else value for value in values]
    if len({json.dumps(value, sort_keys=True) for value in checked}) < len(checked):
        raise ValueError(f"grid: {name} is {list(values)}, wanted each value once")
    return checked


def _call_value(name: str, value: Any) -> Any:
    if name == "true_cfg_scale":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(number and math.isfinite(value), name, value, "a finite number")
        return float(value)
    if name == "steps":
        _require(_is_whole(value) and value > 0, name, value, "a whole number of at least 1")
    else:
        _require(isinstance(value, str), name, value, "a text")
    return value


def _cells(
    call: dict[str, Any], fixed: dict[str, Any], axes: dict[str, list[Any]], base: Path
) -> tuple[list[Cell], int]:
    """The unablated run, then every other combination that can be, the last axis changing fastest; and how
    many cannot: values that do not go together.
    """
    count = math.prod(map(len, axes.values()))
    if count > MOST_CELLS:
        raise ValueError(f"grid: {count} combinations, wanted at most {MOST_CELLS}")
    plain = _cell({}, call, fixed, base)
    cells, errors, usable = [], [], set()
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        try:
            cells.append(_cell(values, call, fixed, base))
        except ValueError as error:
            errors.append((values, error))
        else:
            usable |= {(name, json.dumps(value)) for name, value in values.items()}
    for values, why in errors:
        if any((name, json.dumps(value)) not in usable for name, value in values.items()):
            raise ValueError(f"grid: {why}") from why
    for name, needs in OTHERS.items():
        given = name in fixed or name in axes
        if given and all(name not in cell.switches.flat() for cell in (plain, *cells)):
            raise ValueError(f"{name} is given, but {needs} is never 'other'")
    settings = [cell.settings for cell in cells]
    same = [cell for cell, own in zip(cells, settings, strict=True) if own == plain.settings]
    first = same[0] if same else plain
    rest = [cell for cell, own in zip(cells, settings, strict=True) if cell is not first]
    return [first, *rest], len(errors)


def _cell(values: dict[str, Any], call: dict[str, Any], fixed: dict[str, Any], base: Path) -> Cell:
    called = {name: values.get(name, default) for name, default in call.items()}
    flat = {**fixed, **{name: value for name, value in values.items() if name not in CALL}}
    for name, needs in OTHERS.items():
        if flat.get(needs) != "other":
            flat.pop(name, None)
        elif isinstance(flat.get(name), str):  # as pictures, so that the key is of what they show
            flat[name] = _picture(flat[name], base)
    switches = Switches.from_flat(flat)
    if called["true_cfg_scale"] <= 1:
        seen = dataclasses.replace(switches.seen, negative=True)
        switches = dataclasses.replace(switches, guidance=Guidance(), seen=seen)
    return Cell(values, switches, **called)


def _texts(name: str, value: Any, *, least: int) -> list[str]:
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    fits = fits and all(isinstance(one, str) for one in value) and len(value) >= least
    _require(fits, name, value, f"a list of {'at least one text' if least else 'texts'}")
    return list(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(fits: bool, what: str, got: Any, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{what} is {got!r}, wanted {wanted}")


def _close(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
