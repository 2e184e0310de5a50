"""The embedded model's world as data of a training, and a word that a LoRA learns from twenty pairs of it."""

import json
from random import Random

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import TrainingBatch, flow_matching_loss
from qwenedit.mini.data import cases, known, painted, row_of, write_pairs
from qwenedit.mini.oracle import judge
from qwenedit.mini.scenes import ACTIONS, held_out
from qwenedit.mini.shapes import draw

ZAPPED = painted("zap the {}", "black")


def test_cases_are_of_the_asked_compositions_and_right():
    found = cases(Random(0), 12, ZAPPED)
    others = cases(Random(0), 12, ZAPPED, test=True)
    assert found == cases(Random(0), 12, ZAPPED) != cases(Random(1), 12, ZAPPED)
    assert not any(held_out(scene) for scene, *_ in found) and all(held_out(scene) for scene, *_ in others)
    for case in [*found, *others]:
        scene, request, caption = case
        row = row_of(case)
        assert caption == row["caption"] == f"zap the {request.referent}"
        assert judge(scene, request, row["image"]).strict
        assert not judge(scene, request, row["control"]).success  # it is not black yet


@pytest.mark.parametrize("action", ACTIONS)
def test_what_the_model_knows_is_data_too(action):
    for case in cases(Random(action), 4, known(action)):
        assert case[1].action == action
        assert judge(case[0], case[1], row_of(case)["image"]).success


def test_pairs_are_written_as_a_table_with_its_pictures(tmp_path):
    found = cases(Random(0), 3, ZAPPED)
    table = write_pairs(tmp_path / "new" / "folder", found)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(rows) == 3 and table.name == "pairs.jsonl"
    for row, case in zip(rows, found, strict=True):
        wanted = row_of(case)
        assert row["caption"] == wanted["caption"]
        for key in ("image", "control"):
            with Image.open(table.parent / row[key]) as picture:
                assert picture.tobytes() == wanted[key].tobytes()


def edited(pipe, found):
    return pipe.edit(
        [draw(scene) for scene, *_ in found],
        [caption for *_, caption in found],
        negative_prompt=None,
        true_cfg_scale=1.0,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images


def success(found, images):
    return sum(judge(*case[:2], image).success for case, image in zip(found, images, strict=True))


def loss(pipe, found):
    """Of the pairs, each at its own noise level, always with the same noise."""
    rows = [row_of(case) for case in found]
    captions = [row["caption"] for row in rows]
    batch = TrainingBatch(
        conditioning=pipe.condition([row["control"] for row in rows], captions, negative_prompt=None),
        latents=torch.cat([qwenedit.picture_latents(pipe, row["image"])[0] for row in rows]),
        sigma=torch.linspace(0.05, 1, len(rows)),
        noise=torch.randn(len(rows), 16, 64, generator=torch.Generator().manual_seed(5)),
    )
    with torch.no_grad():
        return float(flow_matching_loss(pipe, batch))


def test_twenty_pairs_teach_a_word(tmp_path):
    """Measured: the loss falls to 0.57 of what it was, and 47 of 60 held-out edits succeed, of 3 before.

    In words that it knows, the model succeeds in 55. What is wanted leaves three standard deviations.
    """
    pairs, unseen = cases(Random(0), 20, ZAPPED), cases(Random("held out"), 60, ZAPPED, test=True)
    pipe = qwenedit.load(device="cpu", progress=False)
    assert success(unseen, edited(pipe, unseen)) <= 8  # 3 and 3 sqrt(60 * 0.05 * 0.95)
    few = edited(pipe, unseen[:8])
    before = loss(pipe, pairs)
    file = qwenedit.train(
        {
            "data": str(write_pairs(tmp_path / "pairs", pairs)), "output": str(tmp_path / "run"),
            "steps": 80, "batch": 8, "rate": 5e-3, "warmup": 8, "schedule": "cosine", "lora": {"rank": 8},
        },
        device="cpu",
        progress=False,
    )  # fmt: skip
    pipe.load_lora_weights(file, "zap")
    assert loss(pipe, pairs) < 0.65 * before
    assert success(unseen, edited(pipe, unseen)) >= 37  # 47 less 3 sqrt(60 * 0.78 * 0.22)
    pipe.disable_lora()
    assert torch.equal(edited(pipe, unseen[:8]), few)
    pipe.unload_lora_weights()
    assert torch.equal(edited(pipe, unseen[:8]), few)
