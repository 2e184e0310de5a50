"""The jobs of examples/research: each is short, finds what it says, and is a row of one sweep."""

import importlib
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.methods import code_lines
from qwenedit.ablation.metrics import distances, source_distances
from qwenedit.ablation.sweep import ablate
from qwenedit.foreign import read_toml
from qwenedit.mini import EXAMPLE

EXAMPLES = Path(__file__).parents[2] / "examples"
JOBS = sorted(path.stem for path in (EXAMPLES / "research").glob("[a-z]*.py"))
PROMPT = "make the circle red"


@pytest.fixture(autouse=True)
def beside(monkeypatch, tmp_path):
    """As after `cd examples`, but for the folder that files are written to."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


def study(edit, job, steps=4):
    return importlib.import_module(f"research.{job}").study(edit, Image.open(EXAMPLE), PROMPT, steps=steps)


def edited(edit, prompt=PROMPT, steps=4):
    noise = torch.Generator().manual_seed(0)
    return edit.edit(Image.open(EXAMPLE), prompt, generator=noise, num_inference_steps=steps).images[0]


def test_each_job_is_short():
    assert len(JOBS) == 6
    assert {
        job: lines for job in JOBS if (lines := code_lines(EXAMPLES / "research" / f"{job}.py")) > 25
    } == {}


def test_kv_injection(edit):
    found = list(study(edit, "kv_injection").values())
    assert found[0] == source_distances(edited(edit), Image.open(EXAMPLE))["source_psnr"]
    assert len(set(found)) == len(found) == 5


def test_vital_layers(edit):
    found = study(edit, "vital_layers")
    moved = list(found.values())
    assert moved == sorted(moved, reverse=True) and min(moved) > 0
    assert sorted(name.split()[1] for name in found) == list("012345")
    assert next(iter(found)).startswith("block 0 ")


def test_steering_from_a_data_set(edit):
    found = list(study(edit, "steering_dataset").values())
    plain = distances(edited(edit), edited(edit, "make the circle blue"))["psnr"]
    assert found[0] == plain and max(found) > plain + 4


def test_feature_replay(edit):
    found = study(edit, "feature_replay", steps=8)
    assert list(found)[-1] == "PSNR to the source with 8 steps replayed"
    assert len(set(found.values())) == 4 and max(found.values()) == list(found.values())[-1]


def test_an_ablation_over_own_pictures(edit):
    found = study(edit, "own_ablation", steps=2)
    assert Path(found.pop("the page")).is_file()
    assert len(set(found.values())) == 2 and all(isinstance(value, float) for value in found.values())


def test_a_lora(edit):
    before, *after = study(edit, "lora").values()
    assert after[0] > before + 2 and after[1] > after[0] and not edit.loras


def test_all_are_rows_of_one_sweep(tmp_path):
    spec = read_toml(EXAMPLES / "research.toml")
    named = {
        text.partition(":")[0] for table in ("interventions", "metrics") for text in spec[table].values()
    }
    assert named == {f"research.{job}" for job in JOBS}
    shutil.copy(EXAMPLES / "scene.png", tmp_path)
    spec |= {"prompts": spec["prompts"][:1], "steps": 2}
    swept = ablate(spec, tmp_path / "results", device="cpu", progress=False)
    assert not swept.failed and not swept.failed_metrics
    pictures = {Image.open(swept.folder / one["file"]).tobytes() for one in swept.records.values()}
    assert len(pictures) == len(swept.records) == 12
    assert all(isinstance(one["own"]["warmth"], float) for one in swept.records.values())


def test_a_script_prints_what_it_finds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vital_layers", "", str(EXAMPLE), "make the background blue"])
    monkeypatch.delitem(sys.modules, "research.vital_layers", raising=False)
    runpy.run_module("research.vital_layers", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(" moves pixels by: 0." in line for line in lines)


def test_the_list_has_every_example():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.*") if path.is_file()]
    left_out = ("README.md", "scene.png")
    wanted = [one for one in files if one not in left_out and one[-3:] != "pyc" and "__init__" not in one]
    assert len(wanted) > 20 and [one for one in wanted if f"]({one})" not in listed] == []
