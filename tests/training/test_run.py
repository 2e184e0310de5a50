"""Whole training runs of the embedded model, at a few steps."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import qwenedit
from qwenedit.instruments.inversion import picture_latents
from qwenedit.training.cache import Cache, encoders_of
from qwenedit.training.conventions import convention
from qwenedit.training.data import looked_at, read_entries
from qwenedit.training.loss import TrainingBatch, flow_matching_loss, freeze_unreached
from qwenedit.training.run import _wanted, batches_of_step, train
from qwenedit.training.spec import read_spec
from tests.tiny import checkpoint
from tests.training.pairs import CAPTION, log_of, pictures, spec_of, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 6)
    return folder


@pytest.fixture
def pipe():
    return qwenedit.load(device="cpu", progress=False)


@pytest.fixture(scope="module")
def base():
    return {
        name: x.clone() for name, x in qwenedit.load(device="cpu", progress=False).mmdit.state_dict().items()
    }


def run(spec, pipe=None):
    return train(spec, pipe, device=None if pipe else "cpu", progress=False)


def spec_in(folder, pairs, **changed):
    return spec_of(pairs, **{"output": str(folder), "cache": str(pairs / "cache"), **changed})


def assert_same_files(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_lora_from_pairs(tmp_path, pairs, base):
    """The file acts as it did in the run, and without it the base is there; a second run does nothing."""
    pipe = qwenedit.load(device="cpu", progress=False)

    def edited(pipe):
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        return pipe.edit(pictures(1)[0], CAPTION, output_type="pt", **options).images

    validation = {"every": 3, "rows": 2, "steps": 2, "pictures": [pictures(1)[0]], "prompts": ["红色"]}
    spec = spec_in(tmp_path / "x", pairs, steps=4, validation=validation, report_every=2)
    before = edited(pipe)
    file = run(spec, pipe)
    assert file == tmp_path / "x" / "lora.safetensors" and pipe.loras == {"lora": 1.0}
    assert not pipe.mmdit.training and pipe.progress is False

    other = qwenedit.load(device="cpu", progress=False)
    other.load_lora_weights(file)
    assert torch.equal(edited(pipe), edited(other)) and not torch.equal(edited(pipe), before)
    pipe.disable_lora()
    assert torch.equal(edited(pipe), before)
    pipe.unload_lora_weights()
    after = pipe.mmdit.state_dict()
    assert after.keys() == base.keys() and all(torch.equal(x, after[name]) for name, x in base.items())

    lines = log_of(tmp_path / "x")
    assert [(line["step"], "validation" in line) for line in lines] == [
        (0, True), (2, False), (3, True), (4, False), (4, True)
    ]  # fmt: skip
    assert set(lines[0]["by_sigma"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    sheets = sorted(path.name for path in (tmp_path / "x" / "sheets").iterdir())
    assert sheets == ["000000.png", "000003.png", "000004.png"]
    with Image.open(tmp_path / "x" / "sheets" / sheets[-1]) as sheet:
        assert sheet.height > 3 * 256 and sheet.width > 3 * 256

    before = file.rename(tmp_path / "before.safetensors")
    assert run(spec, pipe) == file
    assert_same_files(file, before)
    assert log_of(tmp_path / "x") == lines


def test_it_is_a_loop_by_hand(tmp_path, pairs):
    """Rows, captions, latents, noise, loss and updates, with a trainer's convention, written out again."""
    spec = spec_in(tmp_path / "x", pairs, steps=3, batch=6, convention="musubi", lora={"rank": 2, "alpha": 4})
    made = load_file(run(spec))
    pipe = qwenedit.load(device="cpu", progress=False)
    musubi = convention("musubi")
    pipe.add_lora(rank=2, alpha=4, targets="musubi", generator=torch.Generator().manual_seed(0))
    freeze_unreached(pipe.mmdit)
    weights = [x for x in pipe.lora_parameters().values() if x.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0)
    entries = read_entries(pairs / "pairs.jsonl", pairs)
    from qwenedit.training.data import rows_of_step

    rows = looked_at(entries, pipe.variant, pipe.areas, progress=False)
    for step in range(3):
        numbers = rows_of_step(rows, 6, 0, step)
        chosen = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
        chosen = [chosen[number] for number in numbers]
        sources = [[Image.open(pairs / row["control"])] for row in chosen]
        conditioning = pipe.condition(sources, [CAPTION] * 6, negative_prompt=None)
        clean = torch.cat(
            [picture_latents(pipe, Image.open(pairs / row["image"]))[0] for row in chosen]
        ).detach()
        generator = torch.Generator().manual_seed(step)
        torch.rand(6, generator=generator)
        batch = TrainingBatch.draw(conditioning, clean, generator, musubi.levels)
        optimiser.zero_grad()
        flow_matching_loss(pipe, batch, musubi).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
    pipe.save_lora_weights(tmp_path / "hand.safetensors")
    hand = load_file(tmp_path / "hand.safetensors")
    assert hand.keys() == made.keys()
    for name, x in hand.items():
        torch.testing.assert_close(made[name], x, rtol=0, atol=3e-5)  # 3 steps of 1e-3, by Adam's sign
    assert any(x.abs().max() > 1e-4 for name, x in hand.items() if "lora_B" in name)


def test_a_new_edit_is_learned(tmp_path):
    """20 pairs of an edit that the model lacks: the loss of rows that it never saw halves in 24 steps."""
    write_pairs(tmp_path, 20)
    spec = spec_of(
        tmp_path, steps=24, batch=4, rate=4e-3, lora={"rank": 8},
        validation={"every": 24, "rows": 4, "steps": 1, "true_cfg_scale": 1.0},
    )  # fmt: skip
    run(spec)
    first, last = (line["validation"] for line in log_of(tmp_path / "run") if "validation" in line)
    assert last < 0.5 * first, (first, last)


def batches(tmp_path, rows, pipe, **changed):
    """The micro-batches of steps of a spec, their rows encoded."""
    spec = read_spec({**spec_of(tmp_path, **changed), "data": rows})
    entries = read_entries(spec.data, tmp_path)
    seen = looked_at(entries, pipe.variant, pipe.areas, progress=False)
    cache = Cache(tmp_path / "cache", encoders_of(pipe))
    cache.encode(pipe, [_wanted(spec, row) for row in seen], progress=False)
    return lambda step: list(batches_of_step(spec, cache, seen, step, torch.Generator().manual_seed(step)))


@pytest.mark.parametrize("model", ["edit", "plus"])
def test_micro_batches_are_one_large_batch(tmp_path, request, model):
    """Gradients too, with masks, captions of several lengths or dropped, and references of several sizes."""
    pipe = request.getfixturevalue(model)
    drawn = pictures(4)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 40, 32))
    rows = [
        {
            "image": drawn[k],
            "control": drawn[k],
            "caption": "red " * (3 * k + 1),
            **({"mask": mask} if k else {}),
        }
        for k in range(4)
    ]
    if model == "plus":
        rows[1]["control"] = [drawn[1], drawn[2]]
        rows[2]["control"] = []
    changed = {"caption_dropout": 0.4, "posterior": "sample", "convention": "diffsynth"}
    found = []
    pipe.mmdit.requires_grad_(True)
    for batch, accumulate in ((4, 1), (2, 2), (3, 2), (1, 4)):
        parts = batches(tmp_path, rows, pipe, batch=batch, accumulate=accumulate, **changed)(0)
        assert len(parts) == -(-4 // batch) and sum(share for _, share in parts) == pytest.approx(1)
        pipe.mmdit.zero_grad()
        total = 0.0
        for part, share in parts:
            loss = flow_matching_loss(pipe, part, convention("diffsynth")) * share
            loss.backward()
            total += float(loss.detach())
        found.append(
            (total, {name: x.grad.clone() for name, x in pipe.mmdit.named_parameters() if x.grad is not None})
        )
    pipe.mmdit.requires_grad_(False)
    pipe.mmdit.zero_grad()
    (whole, gradients), *others = found
    largest = max(float(x.abs().max()) for x in gradients.values())
    for total, cut in others:
        assert total == pytest.approx(whole, rel=1e-5)
        for name, x in gradients.items():
            assert (cut[name] - x).abs().max() < 1e-5 * largest, name


def test_batches_are_what_the_pipeline_encodes(tmp_path, edit):
    drawn = pictures(3)
    rows = [
        {"image": ImageOps.invert(one), "control": one, "caption": f"{k} 变"} for k, one in enumerate(drawn)
    ]
    draw = batches(tmp_path, rows, edit, batch=1)
    seen = set()
    for step in range(3):
        ((batch, share),) = draw(step)
        assert share == 1
        (k,) = (
            k for k, one in enumerate(drawn)
            if torch.equal(batch.latents, picture_latents(edit, ImageOps.invert(one))[0])
        )  # fmt: skip
        seen.add(k)
        wanted = edit.condition(drawn[k], f"{k} 变", negative_prompt=None)
        assert torch.equal(batch.conditioning.prompt.embeds, wanted.prompt.embeds)
        assert torch.equal(batch.conditioning.reference_latents[0][0], wanted.reference_latents[0][0])
        again = draw(step)[0][0]
        assert torch.equal(again.noise, batch.noise) and torch.equal(again.sigma, batch.sigma)
    assert seen == {0, 1, 2}


def test_dropped_captions_and_sampled_latents(tmp_path, edit):
    one = pictures(1)[0]
    row = [{"image": one, "control": one, "caption": "make it blue"}]
    dropped = batches(tmp_path, row, edit, batch=1, caption_dropout=0.5)
    asked, empty = (
        edit.condition(one, text, negative_prompt=None).prompt.embeds for text in ("make it blue", " ")
    )
    kinds = []
    for step in range(12):
        embeds = dropped(step)[0][0].conditioning.prompt.embeds
        kinds.append(torch.equal(embeds, empty))
        assert kinds[-1] or torch.equal(embeds, asked)
    assert 2 < sum(kinds) < 10
    sampled = batches(tmp_path, row, edit, batch=1, posterior="sample")
    x = torch.stack([sampled(step)[0][0].latents[0] for step in range(200)])
    cache = Cache(tmp_path / "cache", encoders_of(edit))
    (seen,) = looked_at(read_entries(row, tmp_path), edit.variant, edit.areas, progress=False)
    mean, std = cache.latents(seen)
    assert (x.mean(dim=0) - mean).abs().max() < 5 * std.max() / math.sqrt(200)
    ratio = x.std(dim=0) / std
    assert 0.97 < ratio.mean() < 1.03
    path = qwenedit.VAEPath(posterior="sample", seed=0)
    direct = picture_latents(edit, one, path)[0][0] - mean
    assert 0.8 < (direct / std).std() < 1.2  # the same deviation as the encoder's own samples


def test_masks_act(tmp_path, edit):
    """The loss is the mean over the tokens under white."""
    one = pictures(1)[0]
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 16))
    row = {"image": one, "control": one, "caption": "x"}
    (masked, _), (plain, _) = (
        batches(tmp_path, [{**row, **more}], edit, batch=1)(0)[0] for more in ({"mask": mask}, {})
    )
    assert plain.weight is None and masked.weight.sum() == 4
    loss = flow_matching_loss(edit, masked)
    white = dataclasses.replace(plain, weight=torch.tensor([[1.0] * 4 + [0.0] * 12]))
    assert torch.equal(loss, flow_matching_loss(edit, white))
    assert not torch.equal(loss, flow_matching_loss(edit, plain))


def test_sizes_and_text_to_image_in_one_run(tmp_path):
    drawn = pictures(4)
    rows = [
        {"image": drawn[0].resize((96, 32)), "control": drawn[0].resize((96, 32)), "caption": "a"},
        {"image": drawn[1], "control": drawn[1], "caption": "b"},
        {"image": drawn[2], "caption": "a circle"},
        {"image": drawn[3].resize((30, 95)), "control": drawn[3].resize((30, 95)), "caption": "c"},
    ]
    spec = {**spec_of(tmp_path, steps=4, batch=2, accumulate=2, checkpointing=True), "data": rows}
    assert run(spec).is_file()
    smaller = {**spec, "output": str(tmp_path / "smaller"), "area": 32 * 32, "steps": 1, "data": rows[1:3]}
    assert run(smaller).is_file()


@pytest.mark.parametrize(("kind", "zero_cond_t"), [("generate", False), ("edit", False), ("plus", True)])
def test_every_variant(tmp_path, kind, zero_cond_t):
    """Random weights in the official layout, in bfloat16, odd sizes, and a LoRA on every layer."""
    drawn = [one.resize((131, 77)) for one in pictures(3)]
    rows = [{"image": one, "caption": f"{k} 只猫"} for k, one in enumerate(drawn)]
    if kind != "generate":
        rows[0]["control"], rows[1]["control"] = drawn[1], drawn[2]
    if kind == "plus":
        rows[1]["control"] = [drawn[2], pictures(1)[0], drawn[0]]
    model = checkpoint(kind, zero_cond_t=zero_cond_t)
    spec = spec_of(
        tmp_path, model=str(model), dtype="bfloat16", batch=3, steps=2, lora={"rank": 1},
        convention="ai_toolkit", caption_dropout=0.3, validation={"rows": 1, "every": 1, "steps": 1},
    )  # fmt: skip
    file = run({**spec, "data": [*rows, rows[0]]})
    pipe = qwenedit.load(model, device="cpu", dtype="bfloat16", progress=False)
    pipe.load_lora_weights(file)
    assert {line["step"] for line in log_of(tmp_path / "run")} == {0, 1, 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights(tmp_path, pairs, dtype, base):
    """The folder loads as the official layout, with its average beside it."""
    spec = spec_in(tmp_path / "x", pairs, lora=None, dtype=dtype, ema=0.5, rate=1e-5, steps=3)
    folder = run(spec)
    assert folder == tmp_path / "x" / "model"
    saved, average = (
        qwenedit.load(tmp_path / "x" / name, device="cpu", dtype=dtype, progress=False)
        for name in ("model", "model_ema")
    )
    assert saved.dtype == getattr(torch, dtype)
    state = torch.load(tmp_path / "x" / "state.pt", weights_only=True)
    assert all(x.dtype == torch.float32 for x in state["masters"].values())
    weights, means = (one.mmdit.state_dict() for one in (saved, average))
    for name, x in state["masters"].items():
        assert torch.equal(weights[name], x.to(saved.dtype)), name
        assert torch.equal(means[name], state["average"][name].to(saved.dtype)), name
    moved = sum(not torch.equal(x, base[name]) for name, x in state["masters"].items())
    assert moved > 0.9 * len(state["masters"])
    frozen = base.keys() - state["masters"].keys()
    assert frozen and all(torch.equal(weights[name], base[name].to(saved.dtype)) for name in frozen)
    assert run(spec) == folder
    shutil.rmtree(folder)
    assert run(spec) == folder  # from the state
    again = qwenedit.load(folder, device="cpu", dtype=dtype, progress=False).mmdit.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in weights.items())
    for name in ("model", "model_ema"):  # which would stay beside the new model
        with pytest.raises(ValueError, match=f"{name} is there already: move it away"):
            run({**spec, "steps": 5})
        shutil.rmtree(tmp_path / "x" / name)


def test_averages_and_layouts(tmp_path, pairs):
    spec = spec_in(tmp_path / "x", pairs, ema=0.9, deterministic=True, lora={"rank": 2, "layout": "comfyui"})
    file = run(spec)
    one, other = load_file(file), load_file(tmp_path / "x" / "lora_ema.safetensors")
    assert one.keys() == other.keys() and all(name.startswith("diffusion_model.") for name in one)
    assert any(not torch.equal(x, other[name]) for name, x in one.items())


def test_a_run_may_be_made_longer(tmp_path, pairs, pipe):
    run(spec_in(tmp_path / "x", pairs, steps=2), pipe)
    pipe.unload_lora_weights()
    longer = run(spec_in(tmp_path / "x", pairs, steps=5), pipe)
    pipe.unload_lora_weights()
    assert_same_files(longer, run(spec_in(tmp_path / "y", pairs, steps=5), pipe))
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="steps is 3, but 5 are done"):
        run(spec_in(tmp_path / "x", pairs, steps=3), pipe)
    assert not pipe.loras
