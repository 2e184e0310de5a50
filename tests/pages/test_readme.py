"""Everything in the README runs: its Python, block after block in one namespace, and its commands.

Tiny checkpoints of the same variants replace the official ones, and a drawn picture the cat.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qwenedit
from qwenedit.cli.options import main
from qwenedit.taps import tap_names
from tests.tiny import checkpoint, picture

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^    ((?:qwenedit|make|python) .*?)(?:  +#.*)?$", README, re.MULTILINE)
OFFICIAL = "Qwen/Qwen-Image-Edit-2511"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that the README mentions."""
    monkeypatch.chdir(tmp_path)
    picture(64, 48).save("cat.png")
    Path("examples").symlink_to(ROOT / "examples")
    width = 2 * 16  # of the tiny transformer
    save_file(
        {
            "transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, width),
            "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(width, 4),
        },
        "style.safetensors",
    )
    return tmp_path


def official() -> Path:
    return checkpoint("plus", zero_cond_t=True)


def test_snippets(here, monkeypatch, capsys):
    load = qwenedit.load

    def stand_in(source=None, **options):
        assert source in (None, OFFICIAL)
        return load() if source is None else load(official(), **{**options, "device": "cpu"})

    monkeypatch.setattr(qwenedit, "load", stand_in)
    run = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), run)
    assert str(tap_names(run["pipe"].mmdit)[:4]) in capsys.readouterr().out
    assert run["edited"].size == (64, 64)  # of the cat, rounded at the tiny area
    assert (here / "edited.png").is_file()
    assert (here / "guidance without its norm.png").is_file()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("qwenedit")])
def test_commands(here, command, capsys):
    words = shlex.split(command)[1:]
    if words[0] == "decompose":  # at a size for tests
        words += ["--resolution", "64", "--steps", "2"]
    stand_ins = {OFFICIAL: official(), "Qwen/Qwen-Image-Layered": checkpoint("layered")}
    assert main([str(stand_ins.get(word, word)) for word in words]) == 0
    assert capsys.readouterr().out
    if "-o" in words:
        output = here / words[words.index("-o") + 1]
        assert output.is_file() or output.with_stem(f"{output.stem}-4").is_file()


def recipe_of(rule):
    """The commands that make would run. MAKE* variables go, since make may be running these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "--no-print-directory", rule]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return run.stdout.strip().splitlines()


def test_make_rules_exist_and_edit_edits(here):
    """The rules make their own environments; the command of `edit` runs in this one."""
    rules = [line.split()[1] for line in COMMANDS if line.startswith("make")]
    assert rules == ["edit", "test"] and all(recipe_of(rule) for rule in rules)
    words = shlex.split(recipe_of("edit")[-1])
    subprocess.run([sys.executable, *words[1:], "--out", here], cwd=ROOT, check=True, capture_output=True)
    assert (here / "edited.png").is_file() and (here / "before-after.png").is_file()


def test_length():
    assert len(README.splitlines()) <= 165, "three screens"


def test_every_letter_of_a_shape_comment_is_in_the_table():
    source = "".join(path.read_text() for path in (ROOT / "qwenedit").rglob("*.py"))
    shapes = re.findall(r'"((?:[A-Z0-9*]+ )+[A-Z0-9*]+)"', source)
    letters = {letter for shape in shapes for letter in shape.split() if re.fullmatch("[A-Z]", letter)}
    pages = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = pages[pages.index("### The letters") : pages.index("## House style")]
    explained = {letter for cell in re.findall(r"`([A-Z ]+)`", table) for letter in cell.split()}
    assert letters and letters - explained == set()
