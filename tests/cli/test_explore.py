"""`qwenedit explore`: the page of one run or of two, and what it refuses before weights are read."""

import functools
import json
import re

import pytest
from PIL import Image

from qwenedit import mini
from qwenedit.cli import commands
from tests.cli.test_cli import fails, run
from tests.tiny import checkpoint

QUICK = ("--steps", "2", "--device", "cpu", "--quiet")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(mini.EXAMPLE).save("in.png")
    Image.new("L", (64, 64), 255).save("mask.png")


def facts():
    """The facts of each run of the page."""
    with open("edit.html", encoding="utf-8") as file:
        data = json.loads(re.search(r'id="data">(.*?)</script>', file.read(), re.DOTALL)[1])
    return [dict(run["facts"]) for run in data["runs"]]


def test_two_runs_beside_each_other(capsys):
    words = ["explore", "in.png", "make the circle red", "-o", "edit.html", "--seed", "3", *QUICK]
    second = ["--switch", "guidance.norm=none", "--second-switch", "guidance.steps=[0,1]"]
    assert run(*words, *second) == 0
    assert capsys.readouterr().out == "edit.html\n"
    one, two = facts()
    assert one["seed"] == two["seed"] == "3" and one["guidance.norm"] == two["guidance.norm"] == "none"
    assert "guidance.steps" not in one and two["guidance.steps"] == "[0, 1]"
    assert run(*words, "--second-seed", "4", "--second-prompt", "绿") == 0
    one, two = facts()
    assert (one["seed"], two["seed"], two["prompt"]) == ("3", "4", "绿")


def test_the_run_is_that_of_edit(monkeypatch):
    start = ["--mask", "mask.png", "--strength", "0.6", "--seed", "1"]
    words = ["in.png", "make the circle red", *start, *QUICK]
    made = []
    edit = commands.QwenImageEdit.edit

    @functools.wraps(edit)
    def noted(self, *args, **options):
        result = edit(self, *args, **options)
        made.append(result.images[0].tobytes())
        return result

    monkeypatch.setattr(commands.QwenImageEdit, "edit", noted)
    assert run("edit", *words, "-o", "out.png") == 0
    assert run("explore", *words, "-o", "edit.html") == 0
    assert made[0] == made[-1] == Image.open("out.png").tobytes()


def test_from_text_alone():
    assert run("explore", "a red circle", "-o", "edit.html", "--height", "48", "--width", "64", *QUICK) == 0
    assert facts()[0]["size"] == "4 × 3 patches"


@pytest.mark.parametrize("words, message", [
    (["in.png", "x", "-o", "edit.png"], "wanted .html"),
    (["in.png", "-o", "edit.html"], "the prompt is in.png, a file: wanted PICTURE and then PROMPT"),
    (["in.png", "x", "-o", "nowhere/edit.html"], "there is no folder"),
    (["in.png", "x", "-o", "edit.html", "--num-images", "2"], "--num-images is 2, wanted 1"),
    (["x", "-o", "edit.html", "--mask", "mask.png"], "without a picture"),
    (["in.png", "x", "-o", "edit.html", "--second-switch", "guidance.steps=[0,9]"], "there are 2"),
    (["in.png", "x", "-o", "edit.html", "--second-switch", "nonsense=1"], "nonsense"),
    (["in.png", "x", "-o", "edit.html", "--second-seed", "-1"], "is not from 0"),
    (["in.png", "x", "-o", "edit.html", "--model", "LAYERED"], "use decompose"),
])  # fmt: skip
def test_bad_input(capsys, monkeypatch, words, message):
    monkeypatch.setattr(commands, "load", lambda *args, **options: pytest.fail("weights were read"))
    words = [checkpoint("layered") if word == "LAYERED" else word for word in words]
    assert message in fails(capsys, "explore", *words, *QUICK)
