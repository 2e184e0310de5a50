"""What a sweep runs: pictures, prompts, seeds and a grid of settings, from a SPEC.toml or a dict.

    model = "path/to/folder"              # hub id or folder; by default the embedded model
    pictures = ["mini:0", "cat.png"]      # a list in place of a name, ["a.png", "b.png"], is one edit of both
                                          # "mini:0": a scene of the embedded model's world, from seed 0,
                                          # with its own prompt; the oracle judges the result
    prompts = ["give the cat a hat"]      # for the pictures that are files
    pairing = "each"                      # one prompt per such picture, in order; "all": every combination
    masks = ["mask.png"]                  # one for each such picture, "" for none: white where the edit may
                                          # change something; distances are measured inside and outside of it,
    masked = true                         # and with this, edits keep what is black (`mask_image` of `edit`)
    seeds = [0, 1]                        # of the noise
    true_cfg_scale = 4.0                  # arguments of every run: also negative_prompt, height, width,
    steps = 20                            # strength, intervention, lora, lora_scale
    sampler = "heun"                      # one of `qwenedit.sampling.samplers`; by default the model's
    attention = true                      # record attention maps of the first picture's target tokens
    deterministic = true                  # run under `qwenedit.deterministic`

    [switches]                            # for all runs, the unablated run included
    "seen.size" = [32, 32]

    [grid]                                # all combinations are run, except those that contradict themselves
                                          # ("references.sigma" with "references.latents" = "left_out")
    "references.latents" = ["concatenated", "left_out"]     # a switch of `qwenedit.Switches`,
    dialect = ["reference", "comfy"]                        # another tool's arithmetic (dialects.py),
    true_cfg_scale = [1, 4]                                 # or an argument, like steps,
    masked = [false, true]
    intervention = ["none", "halve"]                        # a name of [interventions],
    lora = ["none", "style.safetensors"]                    # a file

    [interventions]                       # "module:function", the module installed or beside the spec; a
    halve = "methods:halve"               # function of the pipeline that returns a context manager, inside of
                                          # which the edit runs

    [metrics]                             # functions (result, source, **rest) of PIL pictures that return a
    lpips = "methods:lpips"               # number; `rest` has prompt, pictures, mask, unablated

The unablated run, with the arguments and switches that stand above the grid, is always included; all others
are compared with it. Paths are relative to the folder of SPEC.toml.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwenedit.ablation.cases import (
    Case,
    cases_of,
    close_to,
    is_text,
    listed,
    picture_at,
    require,
    seeds_of,
)
from qwenedit.ablation.functions import code_of, functions_of
from qwenedit.ablation.measures import MEASURES
from qwenedit.checks import real_number, whole_number
from qwenedit.foreign import plain_file, read_toml, shown
from qwenedit.inputs.pictures import as_picture
from qwenedit.sampling.samplers import require_sampler
from qwenedit.switches import NAMES, Guidance, Mask, Switches
from qwenedit.weights.checkpoints import pieces_of

__all__ = ["Case", "Cell", "Spec", "read_spec", "with_sampler"]

NONE = "none"  # the name of no intervention, and of no LoRA
CALL: dict[str, Any] = {  # with their defaults
    "true_cfg_scale": 4.0, "steps": 20, "sampler": None, "negative_prompt": " ", "masked": False,
    "strength": 1.0, "intervention": NONE, "lora": NONE, "lora_scale": 1.0,
}  # fmt: skip
FLAGS = ("attention", "deterministic")
KEYS = (
    "model", "pictures", "prompts", "pairing", "masks", "seeds", *CALL, "height", "width", *FLAGS, "switches",
    "grid", "interventions", "metrics",
)  # fmt: skip
METRIC = ("result", "source", "*", "prompt", "pictures", "mask", "unablated")  # its arguments
COLUMNS = ("key", "status", "picture", "prompt", "seed", "reason", "file", "error")  # of results.csv
SAME = {"num_inference_steps": "steps", "guidance_scale": "true_cfg_scale", "cfg": "true_cfg_scale"}
MOST_CELLS = 10_000
MASKED = ("mask.preserve", "mask.grey")  # read with a mask alone; its other switches with a strength, too
OTHERS = {"references.picture": "references.latents", "seen.other": "seen.picture"}  # read if that is "other"


@dataclass(frozen=True, eq=False)
class Cell:
    """One setting. `combinations` are those of the grid that come to it, as values by name.

    There is none for a run outside of the grid. What a run does not read has its default: switches of
    guidance in an unguided run, those of masks in a run without one, `lora_scale` without a LoRA. `hashes`
    are of the LoRA's file and of the intervention's code.
    """

    combinations: tuple[dict[str, Any], ...]
    switches: Switches
    true_cfg_scale: float
    steps: int
    sampler: str | None  # None, the model's, until `with_sampler` names it
    negative_prompt: str
    masked: bool
    strength: float
    intervention: str
    lora: str
    lora_scale: float
    lora_file: Path | None
    hashes: dict[str, str]

    @property
    def starts(self) -> bool:
        """True if its runs start from the source, and not from noise alone."""
        return self.masked or self.strength != 1

    @property
    def values(self) -> dict[str, Any]:
        """The first of the combinations; empty outside of the grid."""
        return self.combinations[0] if self.combinations else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that affects the result: cells with equal settings make the same pictures."""
        called = {name: getattr(self, name) for name in CALL}
        return {**called, "hashes": self.hashes, "switches": self.switches.flat()}


@dataclass(frozen=True, eq=False)
class Spec:
    """A sweep, checked as far as possible without the model. `cells[0]` is the unablated run.

    Combinations of the grid that come to the same settings are one cell.
    """

    model: str | None
    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    height: int | None
    width: int | None
    attention: bool
    deterministic: bool
    interventions: dict[str, Callable[..., Any]]
    metrics: dict[str, Callable[..., Any]]
    axes: tuple[str, ...]  # the grid's names
    cells: tuple[Cell, ...]
    impossible: int  # contradictory combinations of the grid, which are left out
    sampler: str | None = None  # the model's, once it is known: of cells that name none

    @property
    def edits(self) -> int:
        """The number of edits that are run."""
        return len(self.cases) * len(self.seeds) * len(self.cells)


class _Named(NamedTuple):
    """What names in a spec stand for: pictures in a folder, hashes of interventions, LoRAs with hashes."""

    folder: Path
    interventions: dict[str, str]
    loras: dict[str, tuple[Path, str]]


def read_spec(
    source: str | os.PathLike[str] | Mapping[str, Any],
    interventions: Mapping[str, Callable[..., Any]] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
) -> Spec:
    """A spec from a TOML file, or from a dict of the same content (paths relative to the current folder).

    The functions are added to those of the spec's tables of these names.

    Raises:
        ValueError: a bad spec; the message says what, got, wanted, and lists names that come close.
    """
    given = {"interventions": interventions or {}, "metrics": metrics or {}}
    if isinstance(source, Mapping):
        return _spec(source, Path(), given)
    path = Path(source)
    content = read_toml(path, "spec")
    try:
        return _spec(content, path.parent, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _spec(raw: Mapping[str, Any], base: Path, given: Mapping[str, Mapping[str, Any]]) -> Spec:
    raw = {SAME.get(key, key): value for key, value in raw.items()}
    for key in raw:
        if key not in KEYS:
            raise ValueError(f"there is no {key!r}{close_to(key, KEYS)}")
    switches = dict(_named("switches", raw.get("switches", {})))
    model = raw.get("model")
    if model is not None:
        require(isinstance(model, str) and model != "", "model", model, "a hub id or a folder")
        model = str(base / model) if os.path.isdir(base / model) else model
    sizes: dict[str, Any] = {}
    for name in ("height", "width"):
        sizes[name] = None if raw.get(name) is None else whole_number(name, raw[name])
    flags: dict[str, Any] = {name: raw.get(name, False) for name in FLAGS}
    for name, value in flags.items():
        require(isinstance(value, bool), name, value, "true or false")
    call = {name: _call_value(name, raw.get(name, default)) for name, default in CALL.items()}
    axes = {name: _values(name, values) for name, values in _named("grid", raw.get("grid", {}))}
    interventions, metrics = (
        {**functions_of(name, raw.get(name, {}), base, takes), **functions_of(name, given[name], base, takes)}
        for name, takes in (("interventions", ("pipe",)), ("metrics", METRIC))
    )
    for name in metrics:
        if name in (*COLUMNS, *CALL, *NAMES, *(one.name for one in MEASURES)):
            raise ValueError(f"metrics: {name} is what something else is called: wanted another name")
        if not re.fullmatch(r"\w[\w.-]*", name):  # it names files and columns
            raise ValueError(f"metrics: {shown(name)!r} is no name, wanted letters, digits, _, . and -")
    codes = {name: code_of(function) for name, function in interventions.items()}
    files = {name: plain_file(base / name, "LoRA") for name in {*axes.get("lora", ()), call["lora"]} - {NONE}}
    named = _Named(base, codes, {name: (file, _hash(file)) for name, file in files.items()})
    cells, impossible = _cells(call, switches, axes, named)
    cases = tuple(cases_of(raw, base))
    for case in cases:
        if case.mask is None and any(cell.masked for cell in cells):
            raise ValueError(
                f"masked is true, but {shown(case.name)} has no mask: wanted one for every picture"
            )
    return Spec(
        model=model,
        cases=cases,
        seeds=tuple(seeds_of(raw.get("seeds", [0]))),
        interventions=interventions,
        metrics=metrics,
        axes=tuple(axes),
        cells=tuple(cells),
        impossible=impossible,
        **sizes,
        **flags,
    )


def _named(table: str, content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names and values; TOML reads an unquoted `guidance.norm` as a nested table."""
    require(isinstance(content, Mapping), table, content, "a table")
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
            raise ValueError(f"{table}: no switch is called {name!r}{close_to(name, known)}")


def _values(name: str, values: Any) -> list[Any]:
    """The values of one of the grid's names."""
    given = listed(f"grid: {name}", values, "a list of values")
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
    require(value is None or isinstance(value, (bool, int, float, str)), f"grid: {name}", value, wanted)
    return value


def _call_value(name: str, value: Any) -> Any:
    if name in ("true_cfg_scale", "lora_scale", "strength"):
        number = real_number(name, value)
        require(name != "strength" or 0 < number <= 1, name, value, "a number above 0, at most 1")
        return number
    if name == "masked":
        require(isinstance(value, bool), name, value, "true or false")
        return value
    if name == "sampler" and value is None:
        return None
    if name == "steps":
        return whole_number(name, value)
    require(is_text(value), name, value, "a text")
    if name == "sampler":
        require_sampler(value)
    return value


def _cells(
    call: dict[str, Any],
    fixed: dict[str, Any],
    axes: dict[str, list[Any]],
    named: _Named,
) -> tuple[list[Cell], int]:
    """The unablated run, then all other settings, the last axis changing fastest; and the number of
    combinations that contradict themselves, which are left out.

    A value that no combination can have is an error.
    """
    count = math.prod(map(len, axes.values()))
    if count > MOST_CELLS:
        raise ValueError(f"grid: {count} combinations, wanted at most {MOST_CELLS}")
    plain = _cell({}, call, fixed, named)
    cells, errors, usable = [plain], [], set()
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        try:
            cells.append(_cell(values, call, fixed, named))
        except ValueError as error:
            errors.append((values, error))
            continue
        usable |= {(name, json.dumps(value)) for name, value in values.items()}
    for values, why in errors:
        if any((name, json.dumps(value)) not in usable for name, value in values.items()):
            raise ValueError(f"grid: {why}") from why
    _require_read(call, fixed, axes, cells, named.interventions)
    return _distinct(cells), len(errors)


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, those of equal settings as one with all of their combinations, at the place of the first."""
    found: dict[str, Cell] = {}
    for cell in cells:
        same = found.get(_settings(cell))
        combinations = (*same.combinations, *cell.combinations) if same else cell.combinations
        found[_settings(cell)] = dataclasses.replace(cell, combinations=combinations)
    return list(found.values())


def with_sampler(spec: Spec, sampler: str) -> Spec:
    """The spec with the model's sampler in the cells that name none; those that then are equal are one."""
    cells = (dataclasses.replace(cell, sampler=cell.sampler or sampler) for cell in spec.cells)
    return dataclasses.replace(spec, cells=tuple(_distinct(cells)), sampler=sampler)


def _settings(cell: Cell) -> str:
    return json.dumps(cell.settings, sort_keys=True)


def _require_read(
    call: Mapping[str, Any],
    fixed: Mapping[str, Any],
    axes: Mapping[str, Any],
    cells: Sequence[Cell],
    interventions: Mapping[str, Any],
) -> None:
    """Raise a ValueError for what is given and never read."""
    for name, needs in OTHERS.items():
        if (name in fixed or name in axes) and all(name not in cell.switches.flat() for cell in cells):
            raise ValueError(f"{name} is given, but {needs} is never 'other'")
    scaled = "lora_scale" in axes or call["lora_scale"] != CALL["lora_scale"]
    if scaled and all(cell.lora == NONE for cell in cells):
        raise ValueError(f"lora_scale is given, but lora is never another than {NONE!r}")
    for name in (one for one in NAMES if one.startswith("mask.") and (one in fixed or one in axes)):
        if name in MASKED and not any(cell.masked for cell in cells):
            raise ValueError(f"{name} is given, but masked is never true")
        if not any(cell.starts for cell in cells):
            raise ValueError(f"{name} is given, but masked is never true, and strength never below 1")
    if interventions and all(cell.intervention == NONE for cell in cells):
        names = json.dumps([NONE, *interventions])
        raise ValueError(
            f"there are interventions, but none is used: wanted intervention = {names} in the grid"
        )


def _cell(values: dict[str, Any], call: dict[str, Any], fixed: dict[str, Any], named: _Named) -> Cell:
    called = {name: values.get(name, default) for name, default in call.items()}
    flat = {**fixed, **{name: value for name, value in values.items() if name not in CALL}}
    for name, needs in OTHERS.items():
        if flat.get(needs) != "other":
            flat.pop(name, None)
        elif name in flat:  # as pictures, so that a run's key depends on their pixels
            given = flat[name]
            flat[name] = (
                picture_at(given, named.folder) if isinstance(given, (str, Path)) else as_picture(given, name)
            )
    switches = Switches.from_flat(flat)
    if called["true_cfg_scale"] <= 1:
        seen = dataclasses.replace(switches.seen, negative=True)
        switches = dataclasses.replace(switches, guidance=Guidance(), seen=seen)
    if not called["masked"]:
        starts = called["strength"] != 1
        mask = (
            dataclasses.replace(switches.mask, preserve=Mask.preserve, grey=Mask.grey) if starts else Mask()
        )
        switches = dataclasses.replace(switches, mask=mask)
    hashes, file = {}, None
    if (name := called["intervention"]) != NONE:
        if name not in named.interventions:
            close = close_to(name, named.interventions)
            raise ValueError(f"intervention is {name!r}, wanted {NONE!r} or a name of [interventions]{close}")
        hashes["intervention"] = named.interventions[name]
    if called["lora"] == NONE:
        called["lora_scale"] = CALL["lora_scale"]
    else:
        file, hashes["lora"] = named.loras[called["lora"]]
    return Cell((values,) if values else (), switches, **called, lora_file=file, hashes=hashes)


def _hash(file: Path) -> str:
    return hashlib.sha256(b"".join(pieces_of(file))).hexdigest()[:20]
