"""What a sweep runs: pictures, prompts, seeds and a grid of settings, from a SPEC.toml or a dict.

    model = "path/to/folder"              # hub id or folder; by default the embedded model
    pictures = ["mini:0", "cat.png"]      # a list in place of a name, ["a.png", "b.png"], is one edit of both
                                          # "mini:0": a scene of the embedded model's world, from seed 0,
                                          # with its own prompt; the oracle judges the result
    prompts = ["give the cat a hat"]      # for the pictures that are files
    pairing = "each"                      # one prompt per such picture, in order; "all": every combination
    seeds = [0, 1]                        # of the noise
    true_cfg_scale = 4.0                  # arguments of every run: also negative_prompt, height, width
    steps = 20
    sampler = "euler"                     # or another of `qwenedit.sampling.samplers`
    attention = true                      # record attention maps of the first picture's target tokens
    deterministic = true                  # run under `qwenedit.deterministic`

    [switches]                            # for all runs, the unablated run included
    "seen.size" = [32, 32]

    [grid]                                # all combinations are run, except those that contradict themselves
                                          # ("references.sigma" with "references.latents" = "left_out")
    "references.latents" = ["concatenated", "left_out"]     # a switch of `qwenedit.Switches`,
    true_cfg_scale = [1, 4]                                 # or an argument, like steps

The unablated run, with the arguments and switches that stand above the grid, is always included; all others
are compared with it. Paths are relative to the folder of SPEC.toml.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from qwenedit.checks import real_number, whole_number
from qwenedit.foreign import read_toml
from qwenedit.inputs.pictures import as_picture, open_picture
from qwenedit.mini.pairs import random_edit
from qwenedit.mini.scenes import DETERMINED, Request, Scene, draw, instruction
from qwenedit.sampling.samplers import require_sampler
from qwenedit.switches import NAMES, Guidance, Switches

__all__ = ["Case", "Cell", "Spec", "read_spec"]

CALL: dict[str, Any] = {  # with their defaults
    "true_cfg_scale": 4.0, "steps": 20, "sampler": "euler", "negative_prompt": " ",
}  # fmt: skip
FLAGS = ("attention", "deterministic")
KEYS = (
    "model", "pictures", "prompts", "pairing", "seeds", *CALL, "height", "width", *FLAGS, "switches", "grid",
)  # fmt: skip
SAME = {"num_inference_steps": "steps", "guidance_scale": "true_cfg_scale", "cfg": "true_cfg_scale"}
MOST_CELLS = 10_000
OTHERS = {"references.picture": "references.latents", "seen.other": "seen.picture"}  # read if that is "other"
PAIRINGS = ("each", "all")
MINI = "mini:"


@dataclass(frozen=True, eq=False)
class Case:
    """One edit: pictures and a prompt. With `scene` and `request`, the oracle can judge the result."""

    name: str
    pictures: tuple[Image.Image, ...]
    prompt: str
    scene: Scene | None = None
    request: Request | None = None

    @property
    def image(self) -> Image.Image | list[Image.Image]:
        """The argument of `QwenImageEdit.condition`."""
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
    """One combination of settings; `values` are the grid's, by name (empty for a run outside of the grid).

    In an unguided run the switches that only guidance reads have their defaults.
    """

    values: dict[str, Any]
    switches: Switches
    true_cfg_scale: float
    steps: int
    sampler: str
    negative_prompt: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that affects the result: cells with equal settings make the same pictures."""
        return {**{name: getattr(self, name) for name in CALL}, "switches": self.switches.flat()}


@dataclass(frozen=True, eq=False)
class Spec:
    """A sweep, checked as far as possible without the model. `cells[0]` is the unablated run."""

    model: str | None
    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    height: int | None
    width: int | None
    attention: bool
    deterministic: bool
    axes: tuple[str, ...]  # the grid's names
    cells: tuple[Cell, ...]
    impossible: int  # contradictory combinations of the grid, which are left out

    @property
    def edits(self) -> int:
        """The number of edits that are run: cells with equal settings share theirs."""
        different = {json.dumps(cell.settings, sort_keys=True) for cell in self.cells}
        return len(self.cases) * len(self.seeds) * len(different)


def read_spec(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    """A spec from a TOML file, or from a dict of the same content (paths relative to the current folder).

    Raises:
        ValueError: a bad spec; the message says what, got, wanted, and lists names that come close.
    """
    if isinstance(source, Mapping):
        return _spec(source, Path())
    path = Path(source)
    content = read_toml(path, "spec")
    try:
        return _spec(content, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _spec(raw: Mapping[str, Any], base: Path) -> Spec:
    raw = {SAME.get(key, key): value for key, value in raw.items()}
    for key in raw:
        if key not in KEYS:
            raise ValueError(f"there is no {key!r}{_close(key, KEYS)}")
    switches = dict(_named("switches", raw.get("switches", {})))
    model = raw.get("model")
    if model is not None:
        _require(isinstance(model, str) and model != "", "model", model, "a hub id or a folder")
        model = str(base / model) if os.path.isdir(base / model) else model
    sizes: dict[str, Any] = {}
    for name in ("height", "width"):
        sizes[name] = None if raw.get(name) is None else whole_number(name, raw[name])
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
    """The edits, in the order of the pictures."""
    pictures = _pictures(raw.get("pictures", []))
    prompts = _listed("prompts", raw.get("prompts", []), "a list of texts", _is_text, least=0)
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
    rows = _listed("pictures", value, wanted)
    named = [[one] if _is_text(one) else _listed("pictures", one, wanted, _is_text) for one in rows]
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


def _picture(name: str | Path, base: Path) -> Image.Image:
    path = base / name
    if not os.path.lexists(path):
        known = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        raise ValueError(f"no such picture: {path}{_close(path.name, [*known, f'{MINI}0'])}")
    return open_picture(path)


def _seeds(value: Any) -> list[int]:
    given = _listed("seeds", value, "a list of whole numbers")
    seeds = [whole_number("a seed", seed, least=0, most=2**64 - 1) for seed in given]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {seeds}, wanted each once")
    return seeds


def _named(table: str, content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names and values; TOML reads an unquoted `guidance.norm` as a nested table."""
    _require(isinstance(content, Mapping), table, content, "a table")
    for key, value in content.items():
        name = SAME.get(key, key) if not prefix else prefix + key
        if isinstance(value, Mapping):
            yield from _named(table, value, name + ".")
        elif name in NAMES or (table == "grid" and name in CALL):
            yield name, value
        elif name in KEYS:
            raise ValueError(f"{table}: {name} is not to be varied: set it above the tables")
        else:
            known = [*NAMES, *(CALL if table == "grid" else ())]
            raise ValueError(f"{table}: no switch is called {name!r}{_close(name, known)}")


def _values(name: str, values: Any) -> list[Any]:
    """The values of one of the grid's names."""
    given = _listed(f"grid: {name}", values, "a list of values")
    checked = [_call_value(name, value) if name in CALL else _plain(name, value) for value in given]
    if len({json.dumps(value, sort_keys=True) for value in checked}) < len(checked):
        raise ValueError(f"grid: {name} is {given}, wanted each value once")
    return checked


def _plain(name: str, value: Any) -> Any:
    """A value of the grid in JSON's types; a run's key and its line in the results are made of them."""
    if isinstance(value, (list, tuple)):
        return [_plain(name, one) for one in value]
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        return value.item()
    wanted = "a file's name" if name in OTHERS else "numbers, texts, true, false, or lists of them"
    _require(value is None or isinstance(value, (bool, int, float, str)), f"grid: {name}", value, wanted)
    return value


def _call_value(name: str, value: Any) -> Any:
    if name == "true_cfg_scale":
        return real_number(name, value)
    if name == "steps":
        return whole_number(name, value)
    _require(_is_text(value), name, value, "a text")
    if name == "sampler":
        require_sampler(value)
    return value


def _cells(
    call: dict[str, Any], fixed: dict[str, Any], axes: dict[str, list[Any]], base: Path
) -> tuple[list[Cell], int]:
    """The unablated run, then all other combinations, the last axis changing fastest; and the number of
    combinations that contradict themselves, which are left out.

    A value that no combination can have is an error.
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
    unablated = plain.settings
    first = next((cell for cell in cells if cell.settings == unablated), plain)
    return [first, *(cell for cell in cells if cell is not first)], len(errors)


def _cell(values: dict[str, Any], call: dict[str, Any], fixed: dict[str, Any], base: Path) -> Cell:
    called = {name: values.get(name, default) for name, default in call.items()}
    flat = {**fixed, **{name: value for name, value in values.items() if name not in CALL}}
    for name, needs in OTHERS.items():
        if flat.get(needs) != "other":
            flat.pop(name, None)
        elif name in flat:  # as pictures, so that a run's key depends on their pixels
            given = flat[name]
            flat[name] = _picture(given, base) if isinstance(given, (str, Path)) else as_picture(given, name)
    switches = Switches.from_flat(flat)
    if called["true_cfg_scale"] <= 1:
        seen = dataclasses.replace(switches.seen, negative=True)
        switches = dataclasses.replace(switches, guidance=Guidance(), seen=seen)
    return Cell(values, switches, **called)


def _listed(
    name: str, value: Any, wanted: str, fits: Callable[[Any], bool] = lambda _: True, *, least: int = 1
) -> list[Any]:
    """The value as a list, if it is a sequence of at least `least` values that all fit."""
    is_list = isinstance(value, Sequence) and not _is_text(value)
    _require(is_list and len(value) >= least and all(map(fits, value)), name, value, wanted)
    return list(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _require(fits: bool, what: str, got: Any, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{what} is {got!r}, wanted {wanted}")


def _close(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
