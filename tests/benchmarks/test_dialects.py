"""The page about dialects has every entry, and the script that makes it runs."""

from pathlib import Path

import torch

import qwenedit
from benchmarks import dialects
from benchmarks.mini_cases import cases
from qwenedit.dialects import DIALECTS
from qwenedit.mini.scenes import DETERMINED
from qwenedit.switches import Switches

PAGE = (Path(__file__).parents[2] / "docs" / "dialects.md").read_text(encoding="utf-8")


def test_every_entry_is_on_the_page_with_its_formula_its_source_and_its_figures():
    for tool, entries in DIALECTS.items():
        for entry in entries:
            name = f"{entry.switch}={entry.value}"
            assert f"- `{name}`: {entry.formula}.\n  *Source:* {entry.source}." in PAGE
            assert f"| `{name}` | " in PAGE
        assert not entries or f"| `dialect={tool}` | " in PAGE


def test_edits_are_from_the_same_noise_and_move_by_what_the_switches_do():
    pipe, todo = qwenedit.load(device="cpu", progress=False), cases(2, DETERMINED, seed="dialects")
    plain, again, moved = (
        dialects.edited(pipe, todo, switches)
        for switches in (Switches(), Switches(dialect="reference"), Switches(dialect="diffsynth"))
    )
    assert plain.shape == (2, 3, 64, 64) and torch.equal(plain, again)
    assert 1e-4 < float((moved - plain).abs().mean()) < 0.05
