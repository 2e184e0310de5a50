"""The spec of a training run: defaults, the trainers' choices, and one clear error for whatever is wrong."""

import copy
import dataclasses
import datetime
import math
from pathlib import Path
from random import Random

import pytest

import qwenedit.training.spec as module
from qwenedit.foreign import read_toml
from qwenedit.training.conventions import Timestep, Weighting, convention
from qwenedit.training.data import read_entries
from qwenedit.training.noise_levels import Shift
from qwenedit.training.spec import read_spec

ROOT = Path(__file__).parents[2]
EVERYTHING = "\n".join(line[4:] for line in module.__doc__.split("\n") if line.startswith("    "))
LEAST = {"data": "x.jsonl", "output": "run", "steps": 3, "rate": 1e-3}


def test_defaults():
    spec = read_spec(LEAST)
    assert spec.model is None and spec.lora is None and spec.validation is None and spec.dtype is None
    assert spec.data == Path("x.jsonl") and spec.cache == Path("run/cache")
    assert spec.convention == convention("qwenedit")
    assert (spec.batch, spec.accumulate, spec.weight_decay, spec.caption_dropout) == (1, 1, 0, 0)
    assert (spec.options.clip, spec.options.ema, spec.options.schedule) == (1.0, None, "constant")
    lora = read_spec({**LEAST, "lora": {"rank": 8}}).lora
    assert dataclasses.astuple(lora) == (8, 8.0, "attention", 0.0, "diffusers")


def test_a_file_of_everything(tmp_path):
    """Every key of the module's own text, with paths relative to the file."""
    file = tmp_path / "spec.toml"
    file.write_text(EVERYTHING)
    (tmp_path / "Qwen" / "Qwen-Image-Edit-2511").mkdir(parents=True)
    spec = read_spec(file)
    assert spec.model == str(tmp_path / "Qwen" / "Qwen-Image-Edit-2511")
    assert (spec.data, spec.output, spec.cache) == (
        tmp_path / "pairs.jsonl", tmp_path / "run", tmp_path / "run" / "cache"
    )  # fmt: skip
    assert spec.convention.levels == Shift(shift=3.0) and spec.area == 1024 * 1024
    assert spec.validation.edits == ((("cat.png",), "give the cat a hat"),)
    assert spec.validation.sigmas == (0.1, 0.3, 0.5, 0.7, 0.9)
    least = read_spec({**LEAST, "noise_levels": {"name": "shift", "shift": 3.0}, "timestep": {}})
    for field in dataclasses.fields(spec):
        if field.name not in (
            "model",
            "data",
            "base",
            "output",
            "cache",
            "options",
            "rate",
            "area",
            "dtype",
            "lora",
            "validation",
            "settings",
        ):
            assert getattr(spec, field.name) == getattr(least, field.name), field.name


def test_a_convention_and_what_replaces_it():
    spec = read_spec({**LEAST, "convention": "musubi", "weighting": "cosmap", "lora": {}})
    assert spec.lora.targets == "musubi"
    musubi = convention("musubi")
    assert spec.convention == dataclasses.replace(musubi, weighting=Weighting("cosmap"))
    spec = read_spec({**LEAST, "convention": "ai_toolkit", "posterior": "mode", "timestep": {"offset": 1}})
    assert spec.convention.timestep == Timestep(offset=1.0) and spec.convention.posterior == "mode"


@pytest.mark.parametrize("file", ["qwenedit/training/example.toml", "examples/train_lora.toml"])
def test_the_examples(file):
    spec = read_spec(ROOT / file)
    assert spec.model == "Qwen/Qwen-Image-Edit-2511" and spec.lora is not None and spec.validation is not None


@pytest.mark.parametrize("name", ["data", "output", "steps", "rate"])
def test_what_has_no_default(name):
    with pytest.raises(ValueError, match=f"there is no {name}, wanted one"):
        read_spec({key: value for key, value in LEAST.items() if key != name})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1}, "no 'learning_rate'; known: model, data"),
        ({"step": 3}, "no 'step'; did you mean steps"),
        ({"lora": {"ranks": 3}}, r"no 'lora\.ranks'; did you mean rank\?"),
        ({"validation": {"row": 3}}, r"no 'validation\.row'; did you mean rows"),
        ({"lora": 8}, "lora is 8, wanted a table"),
        ({"steps": 1.5}, r"steps is 1\.5, wanted a whole number of at least 1"),
        ({"rate": 0}, r"rate is 0\.0, wanted a number above 0"),
        ({"rate": "1e-3"}, "rate is '1e-3', wanted a finite number"),
        ({"batch": 0}, "batch is 0"),
        ({"cache": "a/../run"}, r"cache is a/\.\./run, the output folder, wanted another one"),
        ({"ema": 1}, r"ema is 1\.0, wanted a number in"),
        ({"caption_dropout": -0.1}, "caption_dropout"),
        ({"checkpointing": "yes"}, "checkpointing is 'yes', wanted true or false"),
        ({"dtype": "float16"}, "dtype is 'float16', wanted one of bfloat16, float32"),
        ({"schedule": "cosin"}, "schedule is 'cosin', wanted one of constant, cosine; did you mean cosine"),
        ({"convention": "kohya"}, "convention is 'kohya', wanted one of qwenedit, diffusers"),
        ({"weighting": "cosmop"}, "weighting is 'cosmop'.*did you mean cosmap"),
        ({"noise_levels": {"name": "shift"}}, "noise_levels has no shift, wanted one"),
        ({"noise_levels": {"name": "shift", "shift": -1}}, "shift is -1"),
        ({"noise_levels": {"name": "qwen_shift", "shift": 3}}, r"no 'noise_levels\.shift'"),
        ({"noise_levels": "shift"}, "noise_levels is 'shift', wanted a table"),
        ({"timestep": {"bfloat16": 1}}, r"timestep\.bfloat16 is 1, wanted true or false"),
        ({"lora": {"rank": 0}}, r"lora\.rank is 0"),
        ({"lora": {"layout": "peft"}}, r"lora\.layout is 'peft', wanted one of diffusers"),
        ({"validation": {"pictures": ["a.png"]}}, "1 pictures and 0 prompts"),
        ({"validation": {"rows": 0}}, "no rows and no pictures"),
        ({"validation": {"sigmas": [0.5, 1.5]}}, r"sigmas are \[0\.5, 1\.5\]"),
        ({"data": ""}, "data is '', wanted a text"),
        ({"data": 3}, "data is 3"),
        ({"betas": [0.9]}, r"betas are \[0\.9\], wanted two numbers"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seed": 2**40}, "seed is 1099511627776, wanted at most 4294967295"),
    ],
)  # fmt: skip
def test_bad_values(changed, message):
    with pytest.raises(ValueError, match=message):
        read_spec({**LEAST, **changed})


def test_a_file_is_named(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("steps = 0\n")
    with pytest.raises(ValueError, match=r"x\.toml: steps is 0"):
        read_spec(file)
    file.write_text("steps = \n")
    with pytest.raises(ValueError, match=r"x\.toml is not a TOML file"):
        read_spec(file)


STRANGE = [
    None, 0, -1, 2**70, math.nan, math.inf, "", "x", "\0", "\x1b[31m", "\ud800", "a" * 5000, [], [[]], [None],
    {}, {"a": 1}, True, datetime.date(2020, 1, 1), b"x",
]  # fmt: skip


def test_whatever_a_spec_and_its_rows_hold_the_error_is_one_line(tmp_path):
    rng = Random(0)
    (tmp_path / "spec.toml").write_text(EVERYTHING)
    everything = read_toml(tmp_path / "spec.toml")
    refused = 0
    for _ in range(1500):
        spec, row = copy.deepcopy(everything), {"image": "a.png", "control": "a.png", "caption": "x"}
        table = spec if rng.random() < 0.5 else rng.choice([x for x in spec.values() if isinstance(x, dict)])
        table[rng.choice([*table, "zz", 3])] = rng.choice(STRANGE)
        row[rng.choice([*row, "mask", "control_path_0", "zz", 3])] = rng.choice(STRANGE)
        for read in (lambda spec=spec: read_spec(spec), lambda row=row: read_entries([row], tmp_path)):
            try:
                read()
            except ValueError as error:
                assert str(error).isprintable()
                refused += 1
    assert refused > 2000
