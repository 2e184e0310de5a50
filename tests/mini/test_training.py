"""The embedded model's training, at an even smaller size: it learns, and a killed run loses nothing."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import qwenedit
from qwenedit import mini
from qwenedit.family import EDIT
from qwenedit.latents import pack
from qwenedit.mini import train, train_edit, train_vae
from qwenedit.mini.build import text_encoder_config, write_network, write_shared
from qwenedit.mini.pairs import DRAWS, Pool, World
from qwenedit.mini.shapes import EXAMPLE, draw
from qwenedit.mini.train_tower import train_tower
from qwenedit.mini.train_vae import initialise, measured, pictures, visibility, widened
from qwenedit.mini.training import Stage
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.networks.vae import VAE, VAEConfig
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.weights.configs import vision_language_config
from tests.support import assert_close, randomise_

SMALL_VAE = VAEConfig(
    base_dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, attn_scales=(),
    temperal_downsample=(False, True, True), dropout=0.0, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16,
)  # fmt: skip
SMALL_TRANSFORMER = MMDiTConfig(
    patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
VAE_STAGE = Stage(steps=12, batch=4, rate=4e-3, dtype=torch.float32, report_every=10)
EDIT_STAGE = replace(VAE_STAGE, batch=8, matrix_rate=3e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run's folder `model` after the first stage, with a VAE that has not learned."""
    folder = tmp_path_factory.mktemp("run") / "model"
    write_shared(folder)
    torch.manual_seed(0)
    vae = VAE(SMALL_VAE)
    initialise(vae)
    write_network(folder, measured(vae, 64))
    return folder


def small_networks(tokens):
    raw = text_encoder_config(tokens.tokenizer.get_vocab(with_added_tokens=True))
    raw["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    raw["text_config"]["rope_scaling"]["mrope_section"] = [1, 1, 2]
    raw["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    both = VisionLanguage(vision_language_config(raw, "text_encoder")), MMDiT(SMALL_TRANSFORMER)
    train_edit.initialise(*both)
    return both


def vae_run(folder, **options):
    return train_vae.train_vae(folder, replace(VAE_STAGE, **options), config=SMALL_VAE)


def decoder_run(folder, model, **options):
    start = train.trained_vae(model)
    stage = replace(VAE_STAGE, **options)
    return train_vae.train_vae(folder, stage, config=SMALL_VAE, start=start, decoder_only=True)


def edit_run(folder, model, tower=None, **options):
    return train_edit.train_edit(
        folder, replace(EDIT_STAGE, **options), train.tokens_of(model), train.trained_vae(model),
        tower=tower, make=small_networks, blocks=2,
    )  # fmt: skip


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def state(*networks):
    return {f"{i}.{k}": x for i, one in enumerate(networks) for k, x in one.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_vae_learns(tmp_path):
    vae = vae_run(tmp_path, steps=60, batch=8)
    lines = [line for line in log(tmp_path) if "square" in line]
    assert lines[0]["square"] > 0.35 and lines[-1]["square"] < 0.3, lines
    assert lines[-1]["step"] == 60
    std = vae.config.latents_std
    assert min(std) > 0 and std != SMALL_VAE.latents_std
    x = pictures("others", 32)
    latents = vae.encode(x[:, :, None]).mode()
    z = (latents - torch.tensor(vae.config.latents_mean)[:, None, None, None]) / torch.tensor(std)[
        :, None, None, None
    ]
    assert abs(float(z.mean())) < 0.2 and 0.7 < float(z.std()) < 1.3


def test_the_tower_learns_to_see(tmp_path, model):
    tokens = train.tokens_of(model)
    options = replace(train.STAGES["tower"], steps=30, batch=32, dtype=torch.float32, report_every=10)
    learned = train_tower(tmp_path, options, tokens, make=small_networks, blocks=8)
    lines = log(tmp_path)
    assert lines[0]["loss"] > 0.4 and lines[-1]["loss"] < 0.3, lines
    assert learned.keys() == small_networks(tokens)[0].vision.state_dict().keys()


def test_the_second_stage_starts_from_the_tower(tmp_path, model):
    vision = small_networks(train.tokens_of(model))[0].vision
    tower = {name: x + 1 for name, x in vision.state_dict().items()}
    pipe = edit_run(tmp_path, model, tower=tower, steps=1, rate=0.0, matrix_rate=0.0)
    for name, x in pipe.vision_language.vision.state_dict().items():
        assert torch.allclose(x, tower[name]), name


def test_the_second_stage_learns(tmp_path, model):
    edit_run(tmp_path, model, steps=60)
    lines = [line for line in log(tmp_path) if "flow" in line]
    # With no velocity the error is that of the noise, 1, and of the latents: 1 for samples, less for modes.
    flows = [line["flow"] for line in lines]
    assert 1.4 < flows[0] < 2 and flows[-1] < 0.92 * flows[0], flows
    assert lines[0]["grounding"] > 4.5 and lines[-1]["grounding"] < 4.1, [line["grounding"] for line in lines]
    texts = [line["from_text"] for line in lines]
    assert 1.4 < texts[0] < 2 and texts[-1] < 0.92 * texts[0], texts


def test_descriptions_are_in_every_step(tmp_path, model, monkeypatch):
    """Four for eight edits, without pictures, behind their own template, with three tenths of the loss.

    A token's channels weigh as much as pictures show of them, in the order in which tokens are packed.
    """
    seen, weights = [], []

    class Student(train_edit.Student):
        def forward(self, batch, drop):
            pictures = batch.pixel_values is not None
            weights.append(self.channels)
            seen.append((len(batch.ids), len(batch.sigma), pictures, batch.with_reference and pictures, drop))
            return super().forward(batch, drop)

    monkeypatch.setattr(train_edit, "Student", Student)
    monkeypatch.setattr(train_edit, "held_out_success", None)  # not before step 1000
    edit_run(tmp_path, model, steps=4, report_every=1)
    assert len(seen) == 8 and {one[:3] + one[4:] for one in seen[::2]} == {(8, 8 * DRAWS, True, 64)}
    assert set(seen[1::2]) == {(4, 4 * DRAWS, False, False, 34)}
    shown = visibility(train.trained_vae(model)).clamp_min(0.1)
    assert len(shown.unique()) > 8
    assert torch.equal(weights[0], pack(shown[None, :, None, None, None].expand(1, 16, 1, 2, 2))[0, 0])
    for line in log(tmp_path):
        grounding = (0.5 if line["step"] <= 2 else 0.2) * line["grounding"]
        told = (0.5 if line["step"] <= 2 else 0.2) * line["told"]
        whole = 0.7 * (line["flow"] + grounding) + 0.3 * (line["from_text"] + told)
        assert line["loss"] == pytest.approx(whole, rel=1e-5)


def test_the_decoder_goes_on_alone(tmp_path, model):
    """Latents stay as they are to the bit, and so do the statistics that a transformer was trained with."""
    start = train.trained_vae(model)
    vae = decoder_run(tmp_path, model, steps=40, batch=8)
    assert vae.config == start.config and vae.config.latents_std != SMALL_VAE.latents_std
    encoder = [one for one in state(start) if one.startswith(("0.encoder.", "0.quant_conv."))]
    before, after = state(start), state(vae)
    assert len(encoder) > 20 and all(torch.equal(before[name], after[name]) for name in encoder)
    learned = [name for name in before if name not in encoder and not torch.equal(before[name], after[name])]
    assert any("decoder" in name for name in learned) and any("post_quant" in name for name in learned)
    x = pictures("others", 16)[:, :, None]
    latents = start.encode(x).mode()
    assert torch.equal(latents, vae.encode(x).mode())
    was, now = ((one.decode(latents) - x).square().mean() for one in (start, vae))
    assert now < 0.9 * was, (was, now)


def test_a_vae_that_goes_on_is_measured_anew(tmp_path, model):
    """What the transformer learns may be a sample, so the deviation is that of samples."""
    start = train.trained_vae(model)
    vae = train_vae.train_vae(tmp_path, VAE_STAGE, config=SMALL_VAE, start=start)
    assert not torch.equal(vae.encoder.conv_in.weight, start.encoder.conv_in.weight)
    posterior = vae.encode(pictures("statistics", 512)[:, :, None])
    samples = torch.cat([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(8)])
    each = (0, 2, 3, 4)
    mean, std = samples.mean(dim=each), samples.std(dim=each)
    error = 4 * std / math.sqrt(samples[:, 0].numel())  # four standard errors, at most
    for found, wanted in ((vae.config.latents_mean, mean), (vae.config.latents_std, std)):
        assert bool(((torch.tensor(found) - wanted).abs() < error + 1e-4).all())  # they are rounded
    assert bool((std - posterior.mode().std(dim=each) > 2 * error).any())
    assert vae.config.latents_std != start.config.latents_std


def test_a_widened_vae_computes_the_same_and_learns_in_its_new_channels(tmp_path, model):
    narrow = train.trained_vae(model)
    randomise_(narrow)
    config = replace(SMALL_VAE, base_dim=6)
    wide = widened(narrow, config)
    assert wide.decoder.conv_in.weight.shape[0] == 24
    x = pictures("others", 4)[:, :, None]
    with torch.no_grad():
        latents = narrow.encode(x).mode()
        assert_close(wide.encode(x).mode(), latents, 1e-5)
        assert_close(wide.decode(latents), narrow.decode(latents), 1e-5)
    learned = train_vae.train_vae(tmp_path, VAE_STAGE, config=config, start=narrow)
    for one in (learned.encoder, learned.decoder):
        assert one.conv_in.weight[len(one.conv_in.weight) * 2 // 3 :].abs().amax(dim=(1, 2, 3, 4)).min() > 0


def test_channels_count_as_pictures_show_them(model):
    vae = train.trained_vae(model)
    with torch.no_grad():
        vae.post_quant_conv.weight[:, 3] = 0
    found = visibility(vae, 8)
    assert float(found.mean()) == pytest.approx(1) and found[3] == 0 and found.count_nonzero() == 15


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base_dim": 2}, "has base_dim 4, wanted at most 2"),
        ({"num_res_blocks": 2}, "has num_res_blocks 1, wanted 2"),
        ({"base_dim": 8, "dim_mult": (1, 2, 4, 8)}, r"has dim_mult \(1, 2, 4, 4\), wanted \(1, 2, 4, 8\)"),
    ],
)
def test_a_vae_of_another_size_is_refused(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        train_vae.train_vae(
            tmp_path / "run", VAE_STAGE, config=replace(SMALL_VAE, **options), start=train.trained_vae(model)
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["vae", "decoder", "edit"])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, model, stage):
    """kill -9 while it saves, then again from the same folder: equal to a run that nothing happened to.

    The run kills itself, so that neither its speed nor the test's decides where.
    """
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    given = f"Path({str(folder)!r}), " + (f"Path({str(model)!r}), " if stage != "vae" else "")
    code = f"""
import os, signal, torch
torch.set_num_threads({torch.get_num_threads()})
from pathlib import Path
from tests.mini.test_training import {stage}_run
save = torch.save
def killed(state, file):
    save(state, file)
    if state["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
{stage}_run({given}save_every=0)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    steps = torch.load(folder / "state.pt")["step"]
    assert steps == 5 and len(list(folder.glob(".*"))) == 1  # of step 6, which did not take its place

    if stage == "edit":  # of edits and of descriptions
        run = [edit_run(one, model) for one in (folder, whole)]
        assert_equal(*(state(pipe.vision_language, pipe.mmdit) for pipe in run))
    else:
        run = [vae_run(one) if stage == "vae" else decoder_run(one, model) for one in (folder, whole)]
        assert_equal(*(state(vae) for vae in run))
        assert run[0].config == run[1].config
    logs = [[{**line, "seconds": 0} for line in log(one)] for one in (folder, whole)]
    assert logs[0] == logs[1] and logs[0]


def test_all_stages_from_the_command_line(tmp_path, capsys, monkeypatch):
    """The commands of the docstring, the networks at full size, a small step; and out of order."""
    run = str(tmp_path / "run")
    monkeypatch.setattr(train, "STAGES", {name: replace(x, batch=2) for name, x in train.STAGES.items()})
    monkeypatch.setattr(train, "train_tower", partial(train_tower, blocks=1))
    monkeypatch.setattr(train, "train_edit", partial(train_edit.train_edit, blocks=1))

    def refused(*arguments):
        with pytest.raises(SystemExit, match="2"):
            train.main([*arguments])
        return capsys.readouterr().err

    one_step = ["--steps", "1", "--device", "cpu"]
    assert "run the stage vae first" in refused("edit", run, *one_step)
    train.main(["vae", run, *one_step])
    assert "run the stage tower first" in refused("edit", run, *one_step)
    assert "has no text_encoder/" in refused("export", run, str(tmp_path / "early"))
    assert "export needs OUT" in refused("export", run)
    train.main(["tower", run, *one_step])
    train.main(["edit", run, *one_step])
    first = train.trained_vae(tmp_path / "run" / "model")
    train.main(["decoder", run, *one_step])
    train.main(["export", run, str(tmp_path / "out")])
    last = train.trained_vae(tmp_path / "out")
    assert first.config == last.config
    assert_equal(first.encoder.state_dict(), last.encoder.state_dict())
    assert not torch.equal(first.decoder.conv_out.weight, last.decoder.conv_out.weight)
    pipe = qwenedit.load(tmp_path / "out", device="cpu", progress=False)
    assert pipe.edit(draw(EXAMPLE), "make the circle red", num_inference_steps=1).images[0].size == (64, 64)
    assert sum(x.stat().st_size for x in (tmp_path / "out").rglob("*") if x.is_file()) <= 15e6
    assert not (tmp_path / "early").exists()


class Begun(Exception):
    """A stage is about to train these modules."""


def begun(monkeypatch, *arguments):
    """The weights with which a stage begins, and how it trains."""

    def begin(_folder, modules, stage):
        raise Begun({name: one.state_dict() for name, one in modules.items()}, stage)

    for name in ("train_vae", "train_tower", "train_edit"):
        monkeypatch.setattr(sys.modules[f"qwenedit.mini.{name}"], "begin", begin)
    with pytest.raises(Begun) as found:
        train.main([*arguments, "--device", "cpu"])
    return found.value.args


@pytest.mark.parametrize("stage", ["vae", "decoder", "tower", "edit"])
def test_a_stage_goes_on_from_a_checkpoint(tmp_path, monkeypatch, stage):
    """Its weights at step 0 are the checkpoint's, to the bit; --rate scales both learning rates."""
    run, start = str(tmp_path / "run"), str(mini.CHECKPOINT)
    shutil.copytree(mini.CHECKPOINT / "vae", tmp_path / "run" / "model" / "vae")
    modules, options = begun(monkeypatch, stage, run, "--start", start, "--rate", "0.25")
    pipe = qwenedit.load(device="cpu", dtype=torch.float32, progress=False)
    if stage in ("vae", "decoder"):
        assert_equal(modules["vae"], pipe.vae.state_dict())
    elif stage == "tower":
        assert_equal(modules["tower"], pipe.vision_language.vision.state_dict())
    else:
        got = {name: x for name, x in modules["student"].items() if not name.startswith("grounding.")}
        wanted = {f"vision_language.{k}": x for k, x in pipe.vision_language.state_dict().items()}
        assert_equal(got, wanted | {f"mmdit.{k}": x for k, x in pipe.mmdit.state_dict().items()})
    default = train.STAGES[stage]
    assert options.rate == 0.25 * default.rate
    assert default.matrix_rate is None or options.matrix_rate == 0.25 * default.matrix_rate


def test_without_a_checkpoint_a_stage_begins_at_random(tmp_path, monkeypatch):
    modules, options = begun(monkeypatch, "vae", str(tmp_path))
    assert options.rate == train.STAGES["vae"].rate
    own = qwenedit.load(device="cpu", dtype=torch.float32, progress=False).vae.encoder.conv_in.weight
    assert not torch.equal(modules["vae"]["encoder.conv_in.weight"], own)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("edit", "--start", "nowhere"), "--start nowhere has no text_encoder/, wanted the folder of a ch"),
        (("tower", "--start", "nowhere"), "--start nowhere has no text_encoder/"),
        (("vae", "--start", "nowhere"), "--start nowhere has no vae/"),
        (("decoder", "--start", "nowhere"), "--start nowhere has no vae/"),
        (("decoder",), "run the stage vae first"),
        (("vae", "--rate", "0"), "--rate is 0.0, wanted a number above 0"),
        (("vae", "--rate", "-1"), "--rate is -1.0, wanted a number above 0"),
        (("vae", "--rate", "nan"), "--rate is nan, wanted a finite number"),
        (("vae", "--rate", "fast"), "invalid float value"),
        (("vae", "--steps", "0"), "steps is 0"),
    ],
)
def test_a_stage_that_cannot_begin_says_why(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        train.main([arguments[0], "run", *arguments[1:], "--device", "cpu"])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert message in line
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*.safetensors"))


def test_a_checkpoint_of_another_size_is_refused(tmp_path, capsys):
    """Also one whose files are broken: nothing is trained."""
    broken, model = tmp_path / "broken", tmp_path / "model"
    write_network(model, VAE(replace(SMALL_VAE, num_res_blocks=2)))
    shutil.copytree(mini.CHECKPOINT, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    run = tmp_path / "run"
    shutil.copytree(mini.CHECKPOINT / "vae", run / "model" / "vae")
    for stage, start in (("vae", model), ("edit", broken)):
        with pytest.raises(SystemExit, match="2"):
            train.main([stage, str(run), "--start", str(start), "--device", "cpu"])
        assert sum("error:" in one for one in capsys.readouterr().err.splitlines()) == 1
        assert not (run / stage).exists()


def test_the_initialised_vae_takes_a_video_for_pictures_in_a_row():
    vae = VAE(SMALL_VAE).requires_grad_(False)
    torch.manual_seed(0)
    initialise(vae)
    video = torch.rand((1, 3, 5, 16, 16)) * 2 - 1
    latents = vae.encode(video).mode()
    assert_close(latents[:, :, 1:], vae.encode(video[:, :, -1:]).mode(), 1e-5)
    frames = vae.decode(latents)
    assert_close(frames[:, :, 1], frames[:, :, 4], 1e-5)


def test_no_gradient_reaches_the_reference_latents(model):
    """They are detached, not ignored."""
    tokens = train.tokens_of(model)
    pool = Pool(World(tokens, train.trained_vae(model), 0), 1)
    pool.slide(0)
    torch.manual_seed(0)
    student = train_edit.Student(*small_networks(tokens))
    randomise_(student)
    losses = []
    for shift in (0.0, 1.0):
        batch = next(one for one in (pool.batch(4, seeded(i)) for i in range(9)) if one.with_reference)
        before = (batch.pairs["before"] + shift).requires_grad_()
        batch.pairs["before"] = before
        flow, grounding = student(batch, tokens.drop_index(EDIT))
        (flow + grounding).backward()
        assert before.grad is None
        losses.append(float(flow.detach()))
    assert losses[0] != losses[1]
    assert student.vision_language.embed_tokens.weight.grad.abs().max() > 0
