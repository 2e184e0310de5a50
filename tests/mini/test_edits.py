"""The embedded model does what its card says: the shipped weights under the oracle, on cases it never saw."""

import math
from pathlib import Path

import pytest
from PIL import Image

import qwenedit
from benchmarks import mini, mini_cases
from benchmarks.mini_cases import OTHER, OWN, cases
from qwenedit.mini import demo
from qwenedit.mini.oracle import judge
from qwenedit.mini.scenes import DETERMINED, Request
from qwenedit.mini.shapes import EXAMPLE

# What `python -m benchmarks.mini` measures of the shipped weights (docs/mini.md), by the names of mini.json.
SUCCESS = {
    "own": 0.874, "other": 0.952, "from_text": 0.870,
    "masked own": 0.914, "masked other": 0.910,
    "vae own": 0.970, "vae other": 0.983,  # right pictures, after the VAE
}  # fmt: skip
KEPT = {  # dB
    "own": 35.0, "other": 39.0, "masked own": 37.8, "masked other": 42.7,
}  # fmt: skip
VAE = {"own": 36.2, "other": 39.3}  # dB
EDGES = {"own": 0.983, "other": 0.968}  # of pictures through the VAE
EDITED_EDGES = {"own": 0.946, "other": 0.925}  # of successful edits
# How far a part of the cases may lie below all of them. Single pictures deviate by 5 dB and by a tenth of
# their edges, and three deviations of the mean of 36 are half of that.
LESS_DECIBELS, LESS_EDGES = 2.5, 0.05

STEPS = 10  # half of the benchmark's, to be fast; the ablations show no difference from 8 on
COUNT, MASKED = 36, 24


def least(name, count):
    """The rate less three deviations of `count` trials; of a rate next to 1, at least of one failure."""
    rate = min(SUCCESS[name], 1 - 1 / count)
    return rate - 3 * math.sqrt(rate * (1 - rate) / count)


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def edits(pipe, renderer, **options):
    todo = cases(COUNT, DETERMINED, seed="test", renderer=renderer)
    made = mini_cases.run(pipe, todo, steps=STEPS, **options)
    return mini.Edits(todo, made, mini_cases.verdicts_of(todo, made))


@pytest.fixture(scope="module")
def own(pipe):
    return edits(pipe, OWN)


@pytest.fixture(scope="module")
def other(pipe):
    return edits(pipe, OTHER)


@pytest.mark.parametrize("name", mini.RENDERERS)
def test_most_held_out_edits_succeed(name, request):
    done = request.getfixturevalue(name)
    result = mini_cases.summary(done.todo, done.verdicts)["all determined"]
    assert result["success"] >= least(name, COUNT), result
    assert result["preserved"] >= KEPT[name] - LESS_DECIBELS, result


def test_most_held_out_descriptions_become_pictures(pipe):
    todo = mini_cases.text_cases(COUNT, seed="test")
    made = mini_cases.run_text(pipe, todo, steps=STEPS)
    result = mini_cases.text_summary(todo, mini_cases.text_verdicts_of(todo, made))
    assert result["all"]["success"] >= least("from_text", COUNT), result


@pytest.mark.parametrize("name", mini.RENDERERS)
def test_masks_keep_what_is_outside_of_them(pipe, name):
    result = mini.masked_of(pipe, MASKED, mini.RENDERERS[name], steps=STEPS).figures
    assert result["success"] >= least(f"masked {name}", MASKED), result
    assert result["kept"] >= KEPT[f"masked {name}"] - LESS_DECIBELS, result


@pytest.mark.parametrize("name", mini.RENDERERS)
def test_the_vae_keeps_pictures_and_their_edges(pipe, name, request):
    result = mini.fidelity(pipe, request.getfixturevalue(name))
    assert result["psnr"] >= VAE[name] - LESS_DECIBELS, result
    assert result["accepted"] >= least(f"vae {name}", COUNT), result
    assert result["decoded"] >= EDGES[name] - LESS_EDGES, result
    assert result["edited"] >= EDITED_EDGES[name] - LESS_EDGES, result


def test_both_paths_of_the_picture_and_the_instruction_matter(pipe, own):
    def success(done):
        return mini_cases.summary(done.todo, done.verdicts)["all determined"]["success"]

    for change in (mini_cases.without_references, mini_cases.without_both, mini_cases.without_instruction):
        assert success(edits(pipe, OWN, change=change)) < success(own) - 0.2, change


def test_open_edits_differ_between_seeds(pipe):
    assert mini_cases.diversity(pipe, 6, 3, steps=8) > 0.34  # a third: all three outcomes alike


def test_the_example_and_the_picture_of_make_edit(tmp_path, capsys):
    demo.main([str(Path("examples") / "scene.png"), "make the circle red", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "edited.png" in printed and "before-after.png" in printed
    with Image.open(tmp_path / "edited.png") as picture:
        verdict = judge(EXAMPLE, Request("recolour", "circle", colour="red"), picture.convert("RGB"))
    assert verdict.success, verdict
    assert {path.name for path in tmp_path.iterdir()} == {"edited.png", "before-after.png"}


@pytest.mark.parametrize("arguments", [("gone.png",), ("--out", "gone"), (__file__,)])
def test_the_demo_refuses_what_it_cannot_read_or_write(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        demo.main(list(arguments))
    assert stopped.value.code == 2 and arguments[-1] in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
