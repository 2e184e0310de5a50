"""What a training run is, from a SPEC.toml or a dict: model, data, and every choice that trainers make.

    model = "Qwen/Qwen-Image-Edit-2511"   # hub id or folder; left out: the embedded model
    data = "pairs.jsonl"                  # or a folder of pairs: see data.py
    output = "run"                        # a folder, for the result and for what a killed run goes on from
    cache = "run/cache"                   # of what is encoded; several runs may share one
    steps = 300
    batch = 1                             # rows that run at a time
    accumulate = 1                        # so many times `batch` rows are one step
    rate = 1e-4                           # AdamW's learning rate; also weight_decay, betas and eps
    warmup = 0                            # steps
    schedule = "constant"                 # or "cosine"
    clip = 1.0                            # the largest norm of the gradients; 0: any
    ema = 0.0                             # decay of the weights' average, like 0.999; 0: none
    seed = 0
    area = 1048576                        # pixels of a picture; left out: the checkpoint's
    dtype = "bfloat16"                    # of the arithmetic: or "float32"; left out: as for `load`
    checkpointing = false                 # memory for time
    deterministic = false                 # under `qwenedit.deterministic`: equal bits on an accelerator
    caption_dropout = 0.0                 # share of captions that are replaced by " "
    convention = "qwenedit"               # a trainer's choices, which these replace one by one:
    posterior = "mode"                    # or "sample"
    weighting = "none"
    noise_levels = {name = "shift", shift = 3.0}
    timestep = {offset = 0.0, bfloat16 = false}
    report_every = 10                     # steps between two lines of log.jsonl
    save_every = 60                       # seconds between two saves

    [lora]                                # left out: all weights of the transformer
    rank = 16
    alpha = 16                            # left out: the rank
    targets = "attention"                 # left out: the convention's
    dropout = 0.0
    layout = "diffusers"                  # of the file: or "comfyui", "kohya"

    [validation]                          # left out: none
    every = 100                           # steps
    rows = 4                              # of the data that are held out: for the sheet and for the loss
    pictures = ["cat.png"]                # more edits for the sheet, as in a sweep: a list in place of a name
    prompts = ["give the cat a hat"]      # is one edit of several pictures
    steps = 20
    true_cfg_scale = 4.0
    negative_prompt = " "
    sigmas = [0.1, 0.3, 0.5, 0.7, 0.9]    # of the loss
    seed = 0

What is left out is as shown, but for what says otherwise; `data`, `output`, `steps` and `rate` have to be
there. Without `pictures`, `rows` is 4, else 0. Paths are relative to the folder of SPEC.toml.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenedit.checks import real_number, whole_number
from qwenedit.foreign import read_toml, shown
from qwenedit.training.conventions import (
    CONVENTIONS,
    WEIGHTINGS,
    Convention,
    Timestep,
    Weighting,
    convention,
)  # fmt: skip
from qwenedit.training.loop import MOST_SEED, SCHEDULES, Options
from qwenedit.training.noise_levels import NOISE_LEVELS
from qwenedit.weights.lora_saving import LAYOUTS

__all__ = ["Lora", "Spec", "Validation", "read_spec"]

DTYPES = ("bfloat16", "float32")  # float16 would lose small gradients
# What a result does not depend on, or is compared in another way: by content.
_ELSEWHERE = ("model", "data", "output", "cache", "save_every", "validation.pictures")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA to train."""

    rank: int
    alpha: float
    targets: str
    dropout: float
    layout: str


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Edits and losses of rows that do not train; `edits` are pictures with a prompt each."""

    every: int
    rows: int
    edits: tuple[tuple[tuple[Any, ...], str], ...]
    steps: int
    true_cfg_scale: float
    negative_prompt: str
    sigmas: tuple[float, ...]
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """A training run, checked as far as possible without its model and data.

    Attributes:
        data: a JSON Lines file, a folder, or rows.
        base: the folder that paths in `data`'s rows are relative to, if those were given as they are.
        options: of the loop.
        settings: every value that the result depends on, by name; the data and the model are not among them.
    """

    model: str | None
    data: Path | Sequence[Mapping[str, Any]]
    base: Path
    output: Path
    cache: Path
    options: Options
    batch: int
    accumulate: int
    rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    area: int | None
    dtype: str | None
    checkpointing: bool
    deterministic: bool
    caption_dropout: float
    convention: Convention
    lora: Lora | None
    validation: Validation | None
    settings: dict[str, Any]


def read_spec(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    """A spec from a TOML file, or from a dict of the same content (paths relative to the current folder).

    Raises:
        ValueError: a bad spec; the message says what, got and wanted, and names that come close.
    """
    if isinstance(source, Mapping):
        return _spec(source, Path())
    path = Path(source)
    content = read_toml(path, "spec")
    try:
        return _spec(content, path.parent)
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from error


class _Table:
    """A table of a spec: values are taken one by one, and checked; what is not taken is unknown.

    Attributes:
        taken: the values by their whole names, for this table and those inside of it.
    """

    def __init__(self, raw: Any, name: str = "", taken: dict[str, Any] | None = None) -> None:
        if not isinstance(raw, Mapping):
            raise ValueError(f"{name} is {shown(repr(raw))}, wanted a table")
        self.raw, self.name = dict(raw), name
        self.taken: dict[str, Any] = {} if taken is None else taken
        self.known: list[str] = []

    def __call__(self, key: str, default: Any, check: Callable[[str, Any], Any]) -> Any:
        value = check(self._whole(key), self.raw[key]) if key in self.raw else default
        self.known.append(key)
        self.taken[self._whole(key)] = value
        return value

    def table(self, key: str) -> _Table | None:
        self.known.append(key)
        return _Table(self.raw[key], self._whole(key), self.taken) if key in self.raw else None

    def end(self) -> None:
        for key in self.raw:
            if key not in self.known:
                close = difflib.get_close_matches(str(key), self.known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(self.known)}"
                raise ValueError(f"there is no {shown(repr(self._whole(key)))}; {hint}")

    def _whole(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _spec(raw: Mapping[str, Any], base: Path) -> Spec:
    take = _Table(raw)
    model, data = take("model", None, _text), take("data", None, _data)
    output, cache = take("output", None, _text), take("cache", None, _text)
    steps, rate = take("steps", None, whole_number), take("rate", None, _positive)
    values: dict[str, Any] = {
        "batch": take("batch", 1, whole_number),
        "accumulate": take("accumulate", 1, whole_number),
        "weight_decay": take("weight_decay", 0.0, _not_negative),
        "betas": take("betas", (0.9, 0.999), _betas),
        "eps": take("eps", 1e-8, _positive),
        "area": take("area", None, whole_number),
        "dtype": take("dtype", None, _one_of(DTYPES)),
        "checkpointing": take("checkpointing", False, _flag),
        "deterministic": take("deterministic", False, _flag),
        "caption_dropout": take("caption_dropout", 0.0, _share),
    }
    loop: dict[str, Any] = {
        "seed": take("seed", 0, _seed),
        "warmup": take("warmup", 0, _from_zero),
        "schedule": take("schedule", "constant", _one_of(SCHEDULES)),
        "clip": take("clip", 1.0, _not_negative) or None,
        "ema": take("ema", 0.0, _share) or None,
        "report_every": take("report_every", 10, whole_number),
        "save_every": take("save_every", 60.0, _not_negative),
    }
    chosen = _convention(take)
    lora, validation = _lora(take.table("lora"), chosen), _validation(take.table("validation"))
    take.end()
    for name, value in (("data", data), ("output", output), ("steps", steps), ("rate", rate)):
        if value is None:
            raise ValueError(f"there is no {name}, wanted one: qwenedit train --help shows a spec")
    if cache is not None and os.path.realpath(base / cache) == os.path.realpath(base / output):
        raise ValueError(f"cache is {shown(cache)}, the output folder, wanted another one, or one inside it")
    if model is not None and os.path.isdir(base / model):
        model = str(base / model)
    return Spec(
        model=model,
        data=base / data if isinstance(data, str) else data,
        base=base,
        output=base / output,
        cache=base / output / "cache" if cache is None else base / cache,
        options=Options(steps=steps, **loop),
        rate=rate,
        convention=chosen,
        lora=lora,
        validation=validation,
        settings={name: x for name, x in take.taken.items() if name not in _ELSEWHERE},
        **values,
    )


def _convention(take: _Table) -> Convention:
    """The trainer's choices, with what replaces them."""
    named = take("convention", "qwenedit", _one_of(tuple(CONVENTIONS)))
    chosen = convention(named)
    replaced: dict[str, Any] = {}
    if (posterior := take("posterior", None, _one_of(("mode", "sample")))) is not None:
        replaced["posterior"] = posterior
    if (weighting := take("weighting", None, _one_of(tuple(WEIGHTINGS)))) is not None:
        replaced["weighting"] = Weighting(weighting)
    if (levels := take.table("noise_levels")) is not None:
        kind = NOISE_LEVELS[levels("name", "uniform", _one_of(tuple(NOISE_LEVELS)))]
        replaced["levels"] = _made(levels, kind)
    if (timestep := take.table("timestep")) is not None:
        replaced["timestep"] = _made(timestep, Timestep)
    return dataclasses.replace(chosen, **replaced)


def _made(table: _Table, kind: type[Any]) -> Any:
    """The class made of a table whose keys are its fields."""
    given = {}
    for field in dataclasses.fields(kind):
        check = {"bool": _flag, "str": _text}.get(str(field.type), real_number)
        value = table(field.name, dataclasses.MISSING, check)
        if value is not dataclasses.MISSING:
            given[field.name] = value
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{table.name} has no {field.name}, wanted one")
        table.taken[f"{table.name}.{field.name}"] = given.get(field.name, field.default)
    table.end()
    return kind(**given)


def _lora(table: _Table | None, chosen: Convention) -> Lora | None:
    if table is None:
        return None
    rank = table("rank", 16, whole_number)
    lora = Lora(
        rank=rank,
        alpha=table("alpha", float(rank), _positive),
        targets=table("targets", chosen.targets, _text),
        dropout=table("dropout", 0.0, _share),
        layout=table("layout", "diffusers", _one_of(tuple(LAYOUTS))),
    )
    table.end()
    return lora


def _validation(table: _Table | None) -> Validation | None:
    if table is None:
        return None
    pictures, prompts = table("pictures", [], _listed), table("prompts", [], _texts)
    if len(pictures) != len(prompts):
        raise ValueError(
            f"validation has {len(pictures)} pictures and {len(prompts)} prompts, wanted one prompt for each"
        )
    edits = [(tuple(one) if isinstance(one, (list, tuple)) else (one,)) for one in pictures]
    validation = Validation(
        every=table("every", 100, whole_number),
        rows=table("rows", 0 if edits else 4, _from_zero),
        edits=tuple(zip(edits, prompts, strict=True)),
        steps=table("steps", 20, whole_number),
        true_cfg_scale=table("true_cfg_scale", 4.0, real_number),
        negative_prompt=table("negative_prompt", " ", _text),
        sigmas=tuple(table("sigmas", [0.1, 0.3, 0.5, 0.7, 0.9], _sigmas)),
        seed=table("seed", 0, _seed),
    )
    table.end()
    if not validation.rows and not edits:
        raise ValueError("validation has no rows and no pictures, wanted either")
    return validation


# Checks of a value by its name, as `whole_number` and `real_number` are.


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {shown(repr(value))}, wanted a text")
    return value


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name} is {shown(repr(value))}, wanted a list of at least one")
    return list(value)


def _texts(name: str, value: Any) -> list[str]:
    return [_text(f"a text of {name}", one) for one in _listed(name, value)]


def _data(name: str, value: Any) -> str | list[Any]:
    return _text(name, value) if isinstance(value, str) else _listed(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(repr(value))}, wanted true or false")
    return value


def _one_of(known: Sequence[str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in list(known):
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name} is {shown(repr(value))}, wanted one of {', '.join(known)}{hint}")
        return str(value)

    return check


def _from_zero(name: str, value: Any) -> int:
    return whole_number(name, value, least=0)


def _seed(name: str, value: Any) -> int:
    return whole_number(name, value, least=0, most=MOST_SEED)


def _positive(name: str, value: Any) -> float:
    if (number := real_number(name, value)) <= 0:
        raise ValueError(f"{name} is {number}, wanted a number above 0")
    return number


def _not_negative(name: str, value: Any) -> float:
    if (number := real_number(name, value)) < 0:
        raise ValueError(f"{name} is {number}, wanted at least 0")
    return number


def _share(name: str, value: Any) -> float:
    if not 0 <= (number := real_number(name, value)) < 1:
        raise ValueError(f"{name} is {number}, wanted a number in [0, 1)")
    return number


def _betas(name: str, value: Any) -> tuple[float, float]:
    given = [_share(f"a number of {name}", one) for one in _listed(name, value)]
    if len(given) != 2:
        raise ValueError(f"{name} are {given}, wanted two numbers")
    return given[0], given[1]


def _sigmas(name: str, value: Any) -> list[float]:
    given = [real_number(f"a number of {name}", one) for one in _listed(name, value)]
    if not all(0 < one <= 1 for one in given):
        raise ValueError(f"{name} are {given}, wanted numbers above 0, at most 1")
    return given
