"""The table of docs/methods.md."""

import math
import sys
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks import methods
from benchmarks.mini_cases import cases
from qwenedit.ablation.statistics import estimate
from qwenedit.mini.scenes import DETERMINED, outcome
from qwenedit.mini.shapes import KINDS


def test_a_row_is_renewed_and_the_others_stay(tmp_path, monkeypatch):
    page = tmp_path / "methods.md"
    page.write_text("before | it\n<!-- methods -->\n<!-- end -->\nafter | it\n")
    rows = {name: [methods.link(name, file), "p", "1", "a", "b", "c"]
            for name, (_, file) in methods.interventions().items()}  # fmt: skip
    methods.written(page, rows, 7)
    whole = page.read_text()
    assert whole.startswith("before | it\n<!-- methods -->\n7 held-out edits, 20 steps, guidance 4.\n\n| ")
    assert whole.endswith(" |\n<!-- end -->\nafter | it\n") and whole.count("| a | b | c |") == len(rows)
    methods.written(page, {}, 7)
    assert page.read_text() == whole
    options = ["methods", "--count", "2", "--only", "kv inject", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    monkeypatch.setattr(methods, "STEPS", 2)
    methods.main()
    lines = page.read_text().splitlines()
    assert page.read_text().count("| a | b | c |") == len(rows) - 1
    plain, kv_inject = (next(line for line in lines if name in line) for name in ("| plain |", "[kv inject]"))
    assert lines.index(plain) + 1 == lines.index(kv_inject) and kv_inject.count(" to ") == 3


def test_differences_are_paired_and_leave_out_edits_with_nothing_to_preserve():
    found = methods.compared([1.0, math.inf, 3.0], [0.0, 1.0, 1.0])
    assert found == estimate({(0, 0): 1.0, (2, 0): 2.0})
    assert methods.shown(found, "preserved") == "+1.5 (+1.0 to +2.0)"
    assert methods.shown(found, "success", sign=False) == "150 (100 to 200)"
    assert methods.shown(methods.compared([1.0], [2.0]), "source") == "–"


def test_lines_of_code_are_those_beside_docstring_and_imports(tmp_path):
    file = Path(tmp_path, "one.py")
    head = '"""Head.\n\nSource: arXiv\n2605.01480.\n"""\n\nimport torch\nfrom a import (\n    b,\n)\n'
    file.write_text(head + "\n\n# why\nX = 1\n\ndef f():\n    return X\n")
    assert methods.code_lines(file) == 3
    assert methods.paper(file) == "[2605.01480](https://arxiv.org/abs/2605.01480)"
    file.write_text('"""None."""\n')
    assert methods.paper(file) == "–"


@pytest.mark.parametrize("name", methods.interventions())
def test_the_page_has_a_row_for_each(name):
    page = (methods.SPEC.parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    _, file = methods.interventions()[name]
    (row,) = [line for line in page.splitlines() if methods.link(name, file) in line]
    assert f"| {methods.code_lines(file)} |" in row and methods.paper(file) in row


def test_concepts_are_ranked_at_the_centres_of_the_right_pictures_shapes(monkeypatch):
    todo = cases(5, DETERMINED, seed="ranks")
    shapes = [outcome(Random(0), case.scene, case.request).shapes for case in todo]
    right = [[int(one.kind == kind and (int(one.y) // 16, int(one.x) // 16) == divmod(token, 4))
              for one in row for kind in KINDS for token in range(16)] for row in shapes]  # fmt: skip
    maps = [torch.tensor(row).view(-1, 4, 16).amax(0).T.float() for row in right]

    @contextmanager
    def seen(_pipe, concepts):
        assert concepts == list(KINDS)
        yield [torch.stack(maps[: methods.BATCH])]
        del maps[: methods.BATCH]

    monkeypatch.setattr(methods, "BATCH", 2)
    monkeypatch.setattr(methods, "concept_attention", seen)
    monkeypatch.setattr(methods, "edits", lambda *_: None)
    assert methods.concept_ranks(None, todo) == [0] * sum(map(len, shapes))
    assert "of 5 edits with 2 shapes, 3.0 (2.0 to 4.0) of the other 15" in methods.on_ranks([2, 4], 5)
