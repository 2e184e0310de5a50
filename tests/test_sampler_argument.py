"""The argument `sampler` of every kind of run, with batches, memory modes, switches, and what it refuses."""

import copy
import json
from functools import partial

import diffusers
import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.ablation.spec import read_spec
from qwenedit.ablation.sweep import ablate
from qwenedit.call import Call
from qwenedit.cli import options as cli
from qwenedit.instruments.inversion import invert
from qwenedit.instruments.records import Recorder
from qwenedit.sampling.sampler import Step, euler
from qwenedit.sampling.samplers import SAMPLERS, flow_sde, heun
from qwenedit.switches import Guidance, References, Switches
from qwenedit.taps import taps
from tests.tiny import checkpoint, picture

PROMPT = "make the circle red"
DRAWING = ("stochastic", "flow_sde")
QUICK = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def image():
    return Image.open(mini.EXAMPLE)


def seeded(*seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds or (7,)]
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_kinds_of_run_take_a_sampler(edit, image, name):
    options = {**QUICK, "sampler": name}
    edited = edit.edit(image, PROMPT, generator=seeded(), **options).images
    conditioning = edit.condition(image, PROMPT)
    plain = edit.sample(conditioning, generator=seeded(), **QUICK).images
    assert torch.equal(edited, plain) == (name == "euler")
    assert torch.equal(edit.sample(conditioning, generator=seeded(), **options).images, edited)
    called = edit(image, PROMPT, negative_prompt=" ", generator=seeded(), **options).images
    assert torch.equal(called, edited)
    with torch.no_grad():
        steps = list(edit.steps(conditioning, generator=seeded(), num_inference_steps=3, sampler=name))
    assert torch.equal(steps[-1].after, edited)
    run = edit.prepare(
        conditioning.target_grid, [1], Call(num_inference_steps=3, sampler=name), Switches(), None
    )
    assert run.predictions == len(steps) == (5 if name == "heun" else 3)
    made = edit.generate(PROMPT, height=32, width=48, generator=seeded(), **options).images
    assert made.shape == (1, 6, 64) and made.isfinite().all()


@pytest.mark.parametrize("name", ["heun", "unipc", "flow_sde"])
def test_layers_take_a_sampler(name):
    pipe = qwenedit.load(checkpoint("layered"), device="cpu", progress=False)
    options = {"layers": 2, "resolution": 64, "true_cfg_scale": 1.0, **QUICK}
    x = pipe.decompose(picture(64, 64), "fox", generator=seeded(), sampler=name, **options).images
    y = pipe.decompose(picture(64, 64), "fox", generator=seeded(), **options).images
    assert x.shape == y.shape and x.isfinite().all() and not torch.equal(x, y)
    called = pipe(picture(64, 64), "fox", generator=seeded(), sampler=name, **options).images
    assert torch.equal(called, x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_with_its_own_generator_equals_its_single_run(edit, image, name):
    """To the bit, one row at a time: prompts of different length, one in Chinese, a picture of odd size."""
    pipe = copy.copy(edit)
    pipe.micro_batch = 1
    images = [image, picture(70, 50)]
    prompts = [PROMPT, "把左边的蓝色圆形变成红色 🔴"]
    options = {**QUICK, "height": 32, "width": 48, "sampler": name}
    both = pipe.edit(images, prompts, generator=seeded(1, 2), **options).images
    for k in range(2):
        alone = pipe.edit(images[k], prompts[k], generator=seeded(k + 1), **options).images
        assert torch.equal(both[k : k + 1], alone)


@pytest.mark.parametrize("name", SAMPLERS)
def test_several_pictures_and_given_latents(plus, image, name):
    latents = torch.randn(1, 16, 64, generator=seeded(3))
    options = {**QUICK, "latents": latents, "sampler": name, "generator": seeded(5)}
    first = plus.edit([image, picture(60, 44)], PROMPT, **options).images
    again = plus.edit([image, picture(60, 44)], PROMPT, **{**options, "generator": seeded(5)}).images
    assert torch.equal(first, again)


@pytest.mark.parametrize("residency, modulation", [("stage", "live"), ("stream", "precomputed")])
def test_memory_modes_change_no_bit(edit, image, residency, modulation):
    other = qwenedit.load(device="cpu", progress=False, residency=residency, modulation=modulation)
    for name in ("stochastic", "heun", "unipc"):
        options = {**QUICK, "sampler": name}
        wanted = edit.edit(image, PROMPT, generator=seeded(), **options).images
        assert torch.equal(other.edit(image, PROMPT, generator=seeded(), **options).images, wanted)


def test_bfloat16(image):
    pipe = qwenedit.load(device="cpu", dtype="bfloat16", progress=False)
    for name in SAMPLERS:
        x = pipe.edit(image, PROMPT, generator=seeded(), **QUICK, sampler=name).images
        assert x.dtype == torch.bfloat16 and x.isfinite().all()


def test_switches_of_steps_count_intervals(edit, image):
    """References that are seen in the second of three intervals: in both of its predictions."""
    conditioning = edit.condition(image, PROMPT)
    switches = Switches(references=References(steps=(1, 2)), guidance=Guidance(steps=(0, 1)))
    recorder = Recorder()
    with taps(edit.mmdit, {"rope.img": recorder}), torch.no_grad():
        steps = list(edit.steps(conditioning, num_inference_steps=3, sampler="heun", switches=switches))
    seen = {key.step: recorder[key].shape[0] for key in recorder if key.branch == "cond"}
    target = conditioning.target_grid[1] * conditioning.target_grid[2]
    assert [seen[k] > target for k in range(5)] == [False, False, True, True, False]
    assert [step.uncond is not None for step in steps] == [True, True, False, False, False]
    with pytest.raises(ValueError, match=r"references.steps is \(0, 5\), but there are 3"):
        edit.steps(
            conditioning, num_inference_steps=3, sampler="heun",
            switches=Switches(references=References(steps=(0, 5))),
        )  # fmt: skip


@pytest.mark.parametrize("way", ["latent", "velocity", "x0"])
def test_every_sampler_keeps_what_a_mask_leaves_out(edit, image, way):
    """Whatever is drawn: the same latents at the end, those of the picture."""
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, 32, 64))
    switches = Switches.from_flat({"mask.preserve": way, "mask.posterior": "mode"})
    options = {**QUICK, "mask_image": mask, "strength": 1.0, "switches": switches, "true_cfg_scale": 1.0}

    def made(name, seed):
        latents = edit.edit(image, PROMPT, generator=seeded(seed), sampler=name, **options).images
        return latents.unflatten(1, (4, 4))

    kept = made("euler", 1)[:, :, 2:]
    for name in SAMPLERS:
        latents = made(name, 2)
        torch.testing.assert_close(latents[:, :, 2:], kept, rtol=0, atol=1e-6)
        assert (latents[:, :, :2] - made(name, 3)[:, :, :2]).abs().max() > 0.1


def test_a_function_is_a_sampler(edit, image):
    generator = seeded()
    sampler = partial(flow_sde, eta=0.3, window=(0, 1), generator=generator)
    options = {**QUICK, "generator": generator}
    x = edit.edit(image, PROMPT, sampler=sampler, **options).images
    conditioning = edit.condition(image, PROMPT)
    steps = list(edit.steps(conditioning, num_inference_steps=3, generator=seeded(), sampler=heun))
    assert len(steps) == 5 and isinstance(steps[0], Step) and not torch.equal(x, steps[-1].after)
    assert torch.equal(
        edit.edit(image, PROMPT, sampler=euler, generator=seeded(), **QUICK).images,
        edit.edit(image, PROMPT, generator=seeded(), **QUICK).images,
    )


def test_a_rollout_for_policy_training(edit, image):
    """As a trainer does it: drawn without gradients, its log-probabilities computed again with them."""
    conditioning = edit.condition(image, PROMPT)
    options = {"num_inference_steps": 3, "true_cfg_scale": 1.0, "sampler": "flow_sde"}
    saved, old = [], []
    with torch.no_grad():
        for step in edit.steps(conditioning, generator=seeded(), **options):
            saved.append(step.latents)
            old += [] if step.transition is None else [step.log_prob()]
            saved_last = step.after
    saved.append(saved_last)
    weight = next(edit.mmdit.parameters()).requires_grad_(True)
    try:
        new = []
        for step in edit.steps(conditioning, latents=saved[0], **options):
            step.after = saved[step.index + 1]
            new += [] if step.transition is None else [step.log_prob()]
        ratios = (torch.cat(new) - torch.cat(old)).exp()
        assert (ratios - 1).abs().max() < 1e-3 and len(ratios) == 2
        (gradient,) = torch.autograd.grad(ratios.sum(), weight)
        assert gradient.abs().max() > 0
    finally:
        weight.requires_grad_(False)


# The pipeline's own sampler


FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize(
    "kind, options, name",
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, {}, "euler"),
        (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, "stochastic"),
        (diffusers.FlowMatchHeunDiscreteScheduler, {}, "heun"),
        (diffusers.DPMSolverMultistepScheduler, FLOW, "dpmpp_2m"),
        (diffusers.UniPCMultistepScheduler, FLOW, "unipc"),
    ],
)
def test_a_scheduler_of_the_reference_chooses_the_sampler(edit, image, kind, options, name):
    pipe = copy.copy(edit)
    pipe.scheduler = kind.from_config(edit.scheduler.config, **options)
    conditioning = edit.condition(image, PROMPT)

    def made(pipe, **options):
        return pipe.sample(conditioning, generator=seeded(), true_cfg_scale=1.0, **QUICK, **options).images

    assert torch.equal(made(pipe), made(edit, sampler=name))
    assert torch.equal(made(pipe, sampler="euler"), made(edit))  # the call's own wins
    pipe.scheduler = edit.scheduler  # and back
    assert pipe.scheduler is edit.scheduler and torch.equal(made(pipe), made(edit))


def test_a_static_shift_of_the_reference_is_ours(edit):
    pipe = copy.copy(edit)
    wanted = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    for kind, options in (
        (diffusers.UniPCMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
        (diffusers.DPMSolverMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
        (diffusers.FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    ):
        pipe.scheduler = kind(**options)
        assert pipe.scheduler.sigmas(4, 16) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (diffusers.UniPCMultistepScheduler, {}, "use_flow_sigmas is False, wanted True in a UniPC"),
        (diffusers.UniPCMultistepScheduler, {**FLOW, "solver_order": 3}, "solver_order is 3, wanted 2"),
        (diffusers.UniPCMultistepScheduler, {**FLOW, "solver_type": "bh1"}, "solver_type is 'bh1'"),
        (diffusers.UniPCMultistepScheduler, {**FLOW, "use_karras_sigmas": True}, "use_karras_sigmas is True"),
        (diffusers.DPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "sde-dpmsolver++"}, "algorithm_"),
        (diffusers.DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "prediction_type is 'epsilon'"),
        (diffusers.DDIMScheduler, {}, "is a DDIMScheduler, wanted a FlowMatchEulerDiscreteScheduler or one"),
    ],
)
def test_other_schedulers_of_the_reference_are_refused(edit, kind, options, message):
    pipe = copy.copy(edit)
    with pytest.raises(ValueError, match=message):
        pipe.scheduler = kind(**options)
    assert pipe.scheduler is edit.scheduler and pipe.sampler is None
    with pytest.raises(ValueError, match=message):
        qwenedit.QwenImageEdit.from_pretrained(scheduler=kind(**options))


def test_a_checkpoint_may_sample_stochastically_on_a_curve(image):
    folder = checkpoint("edit", seed=3)
    file = folder / "scheduler" / "scheduler_config.json"
    before = file.read_text()
    try:
        flags = {"stochastic_sampling": True, "use_beta_sigmas": True}
        file.write_text(json.dumps(json.loads(before) | flags))
        pipe = qwenedit.load(folder, device="cpu", progress=False)
        plain = qwenedit.load(folder, device="cpu", progress=False)
        plain.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            **json.loads(before) | {"_class_name": ""}
        )
        file.write_text(json.dumps(json.loads(before) | flags | {"use_karras_sigmas": True}))
        with pytest.raises(ValueError, match="sigmas are to be karras and beta, wanted at most one"):
            qwenedit.load(folder, device="cpu", progress=False)
    finally:
        file.write_text(before)
    x = pipe.edit(image, PROMPT, generator=seeded(), **QUICK).images
    switches = Switches.from_flat({"time.sigmas": "beta"})
    y = plain.edit(image, PROMPT, generator=seeded(), sampler="stochastic", switches=switches, **QUICK).images
    assert torch.equal(x, y) and not torch.equal(
        x, plain.edit(image, PROMPT, generator=seeded(), **QUICK).images
    )


def test_the_pipelines_sampler_and_its_inversion(edit, image):
    pipe = copy.copy(edit)
    conditioning = pipe.condition(image, PROMPT)
    latents = torch.randn(1, 16, 64)
    pipe.sampler = "unipc"
    wanted = edit.edit(image, PROMPT, generator=seeded(), sampler="unipc", **QUICK).images
    assert torch.equal(pipe.edit(image, PROMPT, generator=seeded(), **QUICK).images, wanted)
    with pytest.raises(ValueError, match="the pipeline's sampler is 'unipc', and only Euler's is inverted"):
        invert(pipe, conditioning, latents)
    pipe.sampler = "euler"
    assert next(invert(pipe, conditioning, latents, num_inference_steps=2)).index == 1


# Bad input


def test_an_unknown_sampler_is_refused_before_any_network_runs(edit, plus, image, monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("a network ran")

    conditioning = edit.condition(image, PROMPT)
    for pipe in (edit, plus):
        for network in (pipe.vision_language, pipe.vae, pipe.mmdit):
            monkeypatch.setattr(type(network), "forward", never)
            monkeypatch.setattr(type(pipe), "_encode", never)
        message = "sampler is 'dpmpp2m', wanted one of euler, .*: did you mean 'dpmpp_2m'"
        for call in (
            partial(pipe.edit, image, PROMPT),
            partial(pipe, image, PROMPT, negative_prompt=" "),
            partial(pipe.generate, PROMPT),
            partial(pipe.sample, conditioning),
            partial(pipe.steps, conditioning),
        ):
            with pytest.raises(ValueError, match=message):
                call(sampler="dpmpp2m")
            with pytest.raises(ValueError, match="sampler is '', wanted one of"):
                call(sampler="")
        pipe = copy.copy(pipe)
        pipe.sampler = "heum"
        with pytest.raises(ValueError, match=r"sampler is 'heum', .*did you mean 'heun'"):
            pipe.edit(image, PROMPT)


# The command line and sweeps


def test_the_command_line(edit, image, tmp_path, capsys):
    image.save(tmp_path / "in.png")
    options = ["--steps", "2", "--quiet", "--device", "cpu", "--seed", "7"]
    arguments = [str(tmp_path / "in.png"), PROMPT, "-o", str(tmp_path / "out.png"), *options]
    assert cli.main(["edit", *arguments, "--sampler", "heun"]) == 0
    wanted = edit.edit(image, PROMPT, generator=seeded(), num_inference_steps=2, sampler="heun").images[0]
    assert Image.open(tmp_path / "out.png").tobytes() == wanted.tobytes()
    assert cli.main(["generate", *arguments[1:], "--sampler", "stochastic", "--height", "48"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main(["edit", *arguments, "--sampler", "dpm"])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and "invalid choice: 'dpm' (choose from" in line


def test_a_sweep_over_samplers(tmp_path):
    grid = {"sampler": ["euler", "heun", "flow_sde"], "guidance.steps": [[0, 1], [0, 2]]}
    spec = {"pictures": ["mini:0"], "steps": 2, "attention": True, "grid": grid}
    sweep = ablate(spec, tmp_path / "sweep", device="cpu", progress=False)
    assert not sweep.failed and len(sweep.records) == 7
    made = {
        (record["sampler"], str(record["switches"])): record["curves"]["sigma"]
        for record in sweep.records.values()
    }
    assert {name: len(sigmas) for (name, _), sigmas in made.items()} == {"euler": 2, "heun": 3, "flow_sde": 2}
    first = next(record for record in sweep.records.values() if record["sampler"] == "heun")
    assert len(first["attention"]["text"][0]) == 3
    again = ablate(spec, tmp_path / "sweep", device="cpu", progress=False)  # all are read, none is run
    assert [record["at"] for record in again.records.values()] == [
        record["at"] for record in sweep.records.values()
    ]
    head = (tmp_path / "sweep" / "results.csv").read_text().splitlines()[0].split(",")
    assert "sampler" in head
    assert read_spec({**spec, "sampler": "unipc"}).cells[0].sampler == "unipc"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grid": {"sampler": ["euler", "unipcc"]}}, "sampler is 'unipcc', .*did you mean 'unipc'"),
        ({"sampler": "ddim"}, "sampler is 'ddim', wanted one of euler"),
        ({"sampler": 3}, "sampler is 3, wanted a text"),
        ({"grid": {"samplers": ["euler"]}}, "did you mean sampler"),
    ],
)
def test_a_sweep_over_unknown_samplers_is_refused_before_it_starts(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ablate({"pictures": ["mini:0"], **changes}, tmp_path / "sweep", device="cpu", progress=False)
    assert not (tmp_path / "sweep").exists()


def test_a_rollout_from_a_picture_is_gone_through_again(edit, image):
    conditioning = edit.condition(image, "make the circle red")

    def walk():
        return edit.steps(
            conditioning, image=image, strength=0.7, sampler="flow_sde", num_inference_steps=4,
            generator=seeded(3),
        )  # fmt: skip

    saved, old = {}, {}
    with torch.no_grad():
        for step in walk():
            saved[step.index] = step.after
            if step.transition:
                old[step.index] = step.log_prob()
        for step in walk():
            step.after = saved[step.index]
            if step.transition:
                assert torch.equal(step.log_prob(), old[step.index])
    assert len(old) > 1


def test_our_own_schedule_leaves_the_sampler_alone():
    pipe = qwenedit.load(progress=False)
    pipe.sampler = "heun"
    pipe.scheduler = pipe.scheduler.curved("karras")
    assert pipe.sampler == "heun"


@pytest.mark.parametrize("options", [{"window": (0, 50)}, {"eta": -1.0}, {"window": (2, 1)}])
def test_options_of_a_sampler_are_checked_before_any_network_runs(edit, image, monkeypatch, options):
    monkeypatch.setattr(edit.vision_language, "forward", None)
    with pytest.raises(ValueError, match=next(iter(options))):
        edit.edit(image, "x", sampler=partial(flow_sde, **options), num_inference_steps=3)


def test_heun_with_options_counts_its_predictions(edit, image):
    edit(image, "x", sampler=partial(heun), num_inference_steps=3, output_type="latent", true_cfg_scale=1.0)
    assert edit.num_timesteps == 5
