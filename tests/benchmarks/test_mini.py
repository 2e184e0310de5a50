"""The tables of docs/mini.md: cases of both renderers, rates, and the command that writes them."""

import dataclasses
import json
import math
from random import Random

import pytest
import torch
from PIL import Image

from benchmarks import mini, mini_cases
from benchmarks.masks import LOCAL, kept, mask_of
from benchmarks.mini_cases import OTHER, OWN, Case, TextCase, cases, text_cases
from qwenedit.ablation.metrics import mask_pixels, pixels
from qwenedit.mini.descriptions import Description, Item, described
from qwenedit.mini.oracle import judge, judge_described
from qwenedit.mini.scenes import ACTIONS, OPEN, held_out, outcome
from qwenedit.mini.shapes import paint


@pytest.mark.parametrize("renderer", [OWN, OTHER])
def test_cases_are_held_out_and_their_right_pictures_succeed(renderer):
    todo = cases(len(ACTIONS), renderer=renderer)
    assert todo == cases(len(ACTIONS), renderer=renderer)
    assert [case.request.action for case in todo] == list(ACTIONS)
    assert all(held_out(case.scene) for case in todo)
    for case in todo:
        assert case.picture.tobytes() == renderer.draw(case.scene).tobytes()
        right = renderer.draw(outcome(Random(0), case.scene, case.request))
        (verdict,) = mini_cases.verdicts_of([case], pixels(right)[None].float())
        assert verdict.success and verdict.preserved > 90, (case, verdict)
        (verdict,) = mini_cases.verdicts_of([case], pixels(case.picture)[None].float())
        assert not verdict.success


def test_the_other_renderer_draws_other_scenes_in_another_way():
    own, other = cases(3, LOCAL), cases(3, LOCAL, renderer=OTHER)
    assert {case.scene for case in own}.isdisjoint(case.scene for case in other)
    for case in other:
        assert case.picture.size == (64, 64)
        assert case.picture.tobytes() != dataclasses.replace(case, renderer=OWN).picture.tobytes()


@pytest.mark.parametrize("renderer", [OWN, OTHER])
def test_a_mask_holds_all_that_the_right_picture_changes(renderer):
    for case in cases(12, LOCAL, renderer=renderer):
        black = ~mask_pixels(mask_of(case), 64, 64)
        before, after = (
            pixels(renderer.draw(scene))
            for scene in (case.scene, outcome(Random(0), case.scene, case.request))
        )
        assert (before - after).abs().amax(dim=0)[black].max() <= 0.02
        assert 0 < black.double().mean() < 1


def test_what_masks_keep_is_measured_outside_of_them():
    todo = cases(4, LOCAL)
    masks = [mask_of(case) for case in todo]
    given = torch.stack([pixels(case.picture) for case in todo])
    white = torch.stack([mask_pixels(mask, 64, 64) for mask in masks])[:, None]
    off = torch.tensor([0.0, 0.2, 0.1, 0.05], dtype=torch.float64)[:, None, None, None]
    made = torch.where(white, torch.rand(given.shape, dtype=torch.float64), given + off)
    ratios, changed = kept(made, given, masks)
    assert ratios == pytest.approx([100, -20 * math.log10(0.2), 20, -20 * math.log10(0.05)])
    assert changed[0] == changed[3] == 0 and changed[1] == 1
    verdict = judge(todo[0].scene, todo[0].request, paint(todo[0].scene))
    figures = mini.Masked(todo, made, [verdict] * 4, masks).figures
    assert figures["worst"] == min(ratios) and figures["kept"] == pytest.approx(sum(ratios) / 4)
    assert figures["edits"] == 4 and figures["success"] == 0
    everywhere = Image.new("L", (64, 64), 255)
    assert kept(made[:1], given[:1], [everywhere]) == ([], [])


def test_rates_of_edits():
    case = cases(1)[0]
    right = judge(case.scene, case.request, paint(outcome(Random(0), case.scene, case.request)))
    wrong = judge(case.scene, case.request, paint(case.scene))
    others = cases(len(ACTIONS), seed="fill")
    verdicts = [right, right, wrong, wrong, *[wrong] * len(others)]
    result = mini_cases.summary([*[case] * 4, *others], verdicts)
    row = result[case.request.action]
    assert row["edits"] == 5 and row["success"] == row["strict"] == pytest.approx(0.4)
    assert math.isfinite(row["preserved"]) and result["all open"]["edits"] == len(OPEN)
    assert set(mini_cases.summary([case], [right])) == {case.request.action, "all determined"}


def test_rates_of_pictures_from_text():
    one = Description((Item("circle", "red", "left"),), "white")
    two = Description((Item("circle", "red"), Item("star", "blue", "right")))
    free = Description((Item("circle", "red"), Item("square", "blue")))
    todo = [TextCase(description, "") for description in (one, two, free, free)]
    right = [
        judge_described(case.description, paint(described(Random(0), case.description))) for case in todo
    ]
    assert all(verdict.success for verdict in right)
    wrong = judge_described(free, paint(described(Random(0), one)))
    result = mini_cases.text_summary(todo, [*right[:3], wrong])
    wanted = {
        "one shape": (1, 1), "two shapes": (3, 2 / 3), "with a place": (2, 1), "without a place": (2, 0.5),
        "with a background": (1, 1), "without a background": (3, 2 / 3), "all": (4, 0.75),
    }  # fmt: skip
    assert {name: (row["pictures"], row["success"]) for name, row in result.items()} == {
        name: (count, pytest.approx(share)) for name, (count, share) in wanted.items()
    }
    assert set(mini_cases.text_summary(todo[:1], right[:1])).isdisjoint({"two shapes", "without a place"})
    assert text_cases(5) == text_cases(5) and len({case.prompt for case in text_cases(5)}) == 5


def test_pictures_have_noise_of_their_own_in_any_batch(edit, monkeypatch):
    todo, told = cases(3), text_cases(3)
    whole = [mini_cases.run(edit, todo, steps=2), mini_cases.run_text(edit, told, steps=2)]
    monkeypatch.setattr(mini_cases, "BATCH", 2)
    parts = [mini_cases.run(edit, todo, steps=2), mini_cases.run_text(edit, told, steps=2)]
    for x, y in zip(whole, parts, strict=True):
        assert x.shape == (3, 3, 64, 64)
        assert torch.allclose(x, y, atol=1e-4) and (x[0] - x[1]).abs().max() > 0.1
    assert not torch.allclose(whole[1], mini_cases.run_text(edit, told, steps=2, seed=1), atol=0.1)


def test_the_command_writes_tables_and_sheets(tmp_path, capsys, monkeypatch):
    short = {"default": {"steps": 2}, 'instruction " "': {"steps": 2, **mini.ABLATIONS['instruction " "']}}
    monkeypatch.setattr(mini, "ABLATIONS", short)
    monkeypatch.setattr(mini, "NOISES", 2)
    mini.main(["--count", "9", "--ablated", "9", "--out", str(tmp_path / "new")])
    text = (tmp_path / "new" / "mini.md").read_text()
    printed = capsys.readouterr().out
    assert all(part in printed for part in text.strip().split("\n\n"))
    assert text.count("| all determined | 6 |") == text.count("| all open | 3 |") == 2
    assert "| all | 9 |" in text and text.count(f"| {mini.NAMES['other']} | ") == 2
    assert "Ablations, on 9 of the edits" in text and "nan" not in text
    document = json.loads((tmp_path / "new" / "mini.json").read_text())
    assert list(document) == list(mini.TEXTS)
    assert set(document["masked"]) == set(document["vae"]) == set(document["edits"]) == {"own", "other"}
    assert document["masked"]["other"]["edits"] == 3 and document["vae"]["own"]["pictures"] == 9
    with Image.open(tmp_path / "new" / "mini.png") as page:
        assert page.width > 1000 and page.height > 1000


@pytest.mark.parametrize("options", [["--count", "8"], ["--ablated", "8"], ["--ablated", "-1"]])
def test_too_few_cases_are_refused(options, capsys):
    with pytest.raises(SystemExit) as error:
        mini.main(options)
    assert error.value.code == 2 and "at least 9" in capsys.readouterr().err


def test_captions_say_what_fails():
    case = Case(*[getattr(cases(1)[0], name) for name in ("scene", "request", "prompt")])
    right = judge(case.scene, case.request, paint(outcome(Random(0), case.scene, case.request)))
    wrong = judge(case.scene, case.request, paint(case.scene))
    said = [mini.captioned("x", verdicts) for verdicts in ([right], [wrong], [right] * 2, [right, wrong])]
    assert said == ["x", "x (fails)", "x", "x (1 of 2 fail)"]
