"""Control pictures in a run: when and for what the nets run, what is drawn, and what is refused."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import zero
from qwenedit.ablation.first_block_cache import first_block_cache
from qwenedit.instruments.records import Recorder
from qwenedit.networks.controlnet import ControlNet
from qwenedit.networks.mmdit_layers import sinusoids
from qwenedit.switches import Controls, Switches
from qwenedit.taps import current_labels, taps
from tests.support import FP32, assert_close
from tests.tiny import checkpoint, picture
from tests.tiny_controlnet import random_net

pytestmark = [  # the embedded model works at small areas, whose sides are rounded the more
    pytest.mark.filterwarnings("ignore:the output's token grid"),
    pytest.mark.filterwarnings("ignore:the control picture is 64x48 and the output 64x64"),
]
SIZE = {"height": 48, "width": 64}
PICTURE, OTHER = picture(64, 48, 1), picture(64, 48, 2)
MASK = Image.new("L", (64, 48))
MASK.paste(255, (20, 8, 45, 40))
PROMPT, CHINESE = "a red circle", "一个红色的圆形"


@pytest.fixture(scope="module")
def net(edit):
    return random_net(edit.mmdit)


@pytest.fixture(scope="module")
def masked_net(edit):
    return random_net(edit.mmdit, masked=True)


@contextlib.contextmanager
def with_nets(pipe, *nets):
    before, pipe.controlnets = pipe.controlnets, list(nets)
    try:
        yield pipe
    finally:
        pipe.controlnets = before


@pytest.fixture
def pipe(edit, net):
    with with_nets(edit, net):
        yield edit


@pytest.fixture
def inpainting(edit, masked_net):
    with with_nets(edit, masked_net):
        yield edit


@pytest.fixture
def ran(monkeypatch):
    """The labels under which a ControlNet ran, in order."""
    labels = []
    forward = ControlNet.forward

    def noted(self, *args, **options):
        labels.append(current_labels())
        return forward(self, *args, **options)

    noted.__module__ = ControlNet.__module__  # so that it does not count as foreign
    monkeypatch.setattr(ControlNet, "forward", noted)
    return labels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, *, prompt=PROMPT, image=None, seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    options.setdefault("generator", generator(seed))
    if image is None:
        return pipe.generate(prompt, **{**SIZE, **options}).images
    return pipe.edit(image, prompt, **options).images


def noise(rows=1, tokens=12, seed=5):
    return torch.randn(rows, tokens, 64, generator=generator(seed))


# --- what a control does to a run


def test_a_control_picture_changes_the_run_and_none_changes_no_bit(pipe):
    controlled, plain = run(pipe, control_image=PICTURE), run(pipe)
    assert (controlled - plain).abs().max() > 1e-2
    assert (run(pipe, control_image=OTHER) - controlled).abs().max() > 1e-2
    with with_nets(pipe):
        assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("image", [None, PICTURE])
def test_without_its_effect_a_control_changes_no_bit(pipe, image):
    """A scale of 0; and residuals that a tap sets to 0, beside a plain run that is tapped, too."""
    options = {"latents": noise(tokens=run(pipe, image=image).shape[1]), "image": image}
    plain = run(pipe, **options)
    options |= {"control_image": PICTURE}
    assert torch.equal(run(pipe, controlnet_conditioning_scale=0.0, **options), plain)
    assert not torch.equal(run(pipe, **options), plain)
    with taps(pipe.mmdit, {"velocity": lambda x, site: None}):
        plain = run(pipe, **{**options, "control_image": None})
    with taps(pipe.mmdit, {"blocks.*.control_add": zero}):
        assert torch.equal(run(pipe, **options), plain)
    with (
        taps(pipe.controlnets[0], {"blocks.*.residual": zero}),
        taps(pipe.mmdit, {"velocity": lambda x, _: x}),
    ):
        assert torch.equal(run(pipe, **options), plain)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_edit_under_control(pipe, plus, count):
    """Single-picture and multi-picture, references of several sizes; reference tokens get nothing."""
    images = [picture(64, 48, 7), picture(40, 70, 8), picture(50, 50, 9)][:count]
    if count == 1:
        image, system = images[0], pipe
    else:
        image, system = images, plus
    with with_nets(system, *pipe.controlnets):
        plain = run(system, image=image, **SIZE)
        recorder = Recorder(steps=[0], branch="cond")
        with taps(system.mmdit, {"blocks.0.{control_add,img_out}": recorder}):
            controlled = run(system, image=image, control_image=OTHER, **SIZE)
        assert (controlled - plain).abs().max() > 1e-2
        assert recorder["blocks.0.control_add"].shape[1] == 12
        assert recorder["blocks.0.img_out"].shape[1] > 12


def test_the_scale_is_a_factor_on_the_residuals(pipe):
    recorders = []
    for scale in (1.0, 0.25):
        recorders.append(Recorder(steps=[0], branch="cond"))
        with taps(pipe.mmdit, {"blocks.*.control_add": recorders[-1]}):
            run(pipe, control_image=PICTURE, controlnet_conditioning_scale=scale)
    for key in recorders[0]:
        assert torch.equal(recorders[0][key] * 0.25, recorders[1][key])


@pytest.mark.parametrize(
    "start, end, on",
    [
        (0.0, 1.0, [0, 1, 2, 3]), (0.0, 0.5, [0, 1]), (0.5, 1.0, [2, 3]), (0.25, 0.75, [1, 2]),
        (0.2, 0.8, [1, 2]), (0.0, 0.99, [0, 1, 2]), (0.01, 1.0, [1, 2, 3]),
    ],
)  # fmt: skip
def test_a_control_acts_in_the_steps_that_lie_between_start_and_end(pipe, ran, start, end, on):
    options = {"control_guidance_start": start, "control_guidance_end": end}
    run(pipe, num_inference_steps=4, control_image=PICTURE, **options)
    assert [labels["step"] for labels in ran] == on


def test_under_heun_both_predictions_of_an_interval_are_controlled(pipe, ran):
    options = {"num_inference_steps": 4, "control_image": PICTURE, "control_guidance_end": 0.5}
    run(pipe, sampler="heun", **options)
    assert [x.get("interval", x["step"]) for x in ran] == [0, 0, 1, 1]


def test_the_net_runs_once_a_step_with_the_prompt(pipe, ran):
    run(pipe, control_image=PICTURE)
    assert [(x["step"], x["branch"], x["control"]) for x in ran] == [(k, "cond", 0) for k in range(3)]
    assert {x["layout"].grids for x in ran} == {((1, 3, 4),)} and {tuple(x["rows"]) for x in ran} == {(0,)}


def test_each_branch_may_have_its_own_run(pipe, ran):
    each = {"switches": Switches(control=Controls(branches="each")), "control_image": PICTURE}
    own = run(pipe, negative_prompt="a dog", **each)
    assert [x["branch"] for x in ran] == ["cond", "uncond"] * 3
    lengths = [x["text_lengths"] for x in ran]
    assert lengths[0] != lengths[1]
    shared = run(pipe, negative_prompt="a dog", control_image=PICTURE)
    assert (own - shared).abs().max() > 1e-3
    unguided = {"true_cfg_scale": 1.0, "negative_prompt": None}
    assert torch.equal(run(pipe, **unguided, **each), run(pipe, control_image=PICTURE, **unguided))


def test_each_branchs_run_has_that_branchs_prompt(pipe):
    """With the prompt as the negative prompt both residuals are the same."""
    each = {"switches": Switches(control=Controls(branches="each"))}
    runs = [run(pipe, control_image=PICTURE, negative_prompt=PROMPT, **one) for one in ({}, each)]
    assert torch.equal(*runs)


# --- several


def test_several_pictures_of_a_net_are_summed(pipe):
    """One of them twice at half the scale is that one; two nets of equal weights are one net."""
    options = {"latents": noise(), "generator": None}
    recorder = Recorder(steps=[0], branch="cond")
    with (
        taps(pipe.mmdit, {"blocks.0.control_add": recorder}),
        taps(pipe.controlnets[0], {"*.residual": zero}),
    ):
        run(pipe, control_image=[PICTURE, OTHER], controlnet_conditioning_scale=[0.5, 0.5], **options)
    assert not recorder["blocks.0.control_add"].any()
    both = run(pipe, control_image=[PICTURE, OTHER], controlnet_conditioning_scale=[0.7, 0.3])
    twin = copy.deepcopy(pipe.controlnets[0])
    with with_nets(pipe, pipe.controlnets[0], twin):
        two = run(pipe, control_image=[PICTURE, OTHER], controlnet_conditioning_scale=[0.7, 0.3])
    assert torch.equal(both, two)
    assert not torch.equal(both, run(pipe, control_image=[OTHER, PICTURE]))


def test_a_net_that_takes_a_mask_beside_one_that_takes_none(edit, net, masked_net):
    with with_nets(edit, net, masked_net):
        one = run(edit, control_image=[PICTURE, OTHER], control_mask=MASK)
        assert torch.equal(run(edit, control_image=[PICTURE, OTHER], control_mask=[None, MASK]), one)
        halves = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
        other = run(edit, control_image=[PICTURE, OTHER], control_mask=MASK, num_inference_steps=4, **halves)
        assert not torch.equal(one, other)


def test_each_control_has_its_own_interval(pipe, ran):
    run(
        pipe, control_image=[PICTURE, OTHER], num_inference_steps=4, control_guidance_start=[0.0, 0.5],
        control_guidance_end=[0.75, 1.0],
    )  # fmt: skip
    assert [(x["step"], x["control"]) for x in ran] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1)]


# --- rows of a batch


@pytest.mark.parametrize("branches", ["cond", "each"])
def test_rows_of_a_batch_are_their_single_runs(pipe, branches):
    prompts, pictures = [PROMPT, CHINESE, "two"], [PICTURE, OTHER, picture(64, 48, 3)]
    options = {"switches": Switches(control=Controls(branches=branches)), "negative_prompt": "dog"}
    options |= {"controlnet_conditioning_scale": [0.8, 0.4], "control_guidance_end": [0.7, 1.0]}
    singles = [
        run(pipe, prompt=prompt, control_image=[one, MASK], seed=k, **options)
        for k, (prompt, one) in enumerate(zip(prompts, pictures, strict=True))
    ]
    for micro_batch in (None, 2, 1):
        pipe.micro_batch = micro_batch
        try:
            generators = [generator(k) for k in range(3)]
            batch = run(pipe, prompt=prompts, control_image=[pictures, MASK], generator=generators, **options)
        finally:
            pipe.micro_batch = None
        for got, wanted in zip(batch, singles, strict=True):
            if micro_batch == 1:
                assert torch.equal(got[None], wanted)
            else:
                assert_close(got[None], wanted, FP32 * 10)


def test_rows_with_references_of_several_sizes(plus, net):
    """Groups of other layouts get the control of their own rows."""
    images = [[picture(64, 48, 7)], [picture(64, 48, 8), picture(40, 70, 9)], [picture(64, 48, 4)]]
    prompts, pictures = [PROMPT, CHINESE, "two"], [PICTURE, OTHER, picture(64, 48, 3)]
    with with_nets(plus, net):
        batch = run(
            plus, image=images, prompt=prompts, control_image=[pictures],
            generator=[generator(k) for k in range(3)], **SIZE,
        )  # fmt: skip
        for k, got in enumerate(batch):
            wanted = run(plus, image=images[k], prompt=prompts[k], control_image=pictures[k], seed=k, **SIZE)
            assert_close(got[None], wanted, FP32 * 10)


def test_several_outputs_of_a_prompt_are_prompt_major(pipe):
    options = {"prompt": [PROMPT, CHINESE], "num_images_per_prompt": 2, "control_image": [[PICTURE, OTHER]]}
    got = run(pipe, generator=[generator(k) for k in range(4)], **options)
    for row in range(4):
        wanted = run(
            pipe, prompt=[PROMPT, CHINESE][row // 2], control_image=[PICTURE, OTHER][row // 2], seed=row
        )
        assert_close(got[row][None], wanted, FP32 * 10)


# --- what is drawn


def test_the_pictures_are_drawn_before_the_noise(pipe):
    """A sample of each control, then the noise; given noise leaves the controls' draws as they are."""
    first = generator()
    torch.randn(2, 16, 1, 6, 8, generator=first)
    wanted = torch.randn(1, 1, 16, 6, 8, generator=first)
    options = {"control_image": [PICTURE, OTHER], "num_inference_steps": 1}
    seen = []
    with taps(pipe.mmdit, {"img_in": lambda x, site: seen.append(x)}):
        drawn = run(pipe, **options)
        given = run(pipe, latents=qwenedit.latents.pack(wanted.transpose(1, 2)), **options)
    assert torch.equal(seen[0], seen[2]) and torch.equal(drawn, given)
    assert not torch.equal(drawn, run(pipe, seed=1, **options))


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_picture_to_start_from_is_drawn_after_the_control(pipe, mask):
    """The first step's latents are those of a run whose generator has lost one draw."""
    options = {"image": OTHER, "mask_image": mask, "strength": 0.5, "num_inference_steps": 4, **SIZE}
    seen, later = [], generator()
    torch.randn(1, 16, 1, 6, 8, generator=later)
    with taps(pipe.mmdit, {"img_in": lambda x, site: seen.append((site.labels["step"], x))}):
        controlled = pipe.generate(
            PROMPT, generator=generator(), control_image=PICTURE, output_type="latent", **options
        ).images
        first = len(seen)
        plain = pipe.generate(PROMPT, generator=later, output_type="latent", **options).images
    assert first == len(seen) - first == 4  # two steps of four, two branches
    assert torch.equal(seen[0][1], seen[first][1]) and not torch.equal(controlled, plain)
    if mask is not None:  # the kept column of tokens is the picture's, control or not
        kept = torch.tensor([0, 4, 8])
        assert torch.equal(controlled[:, kept], plain[:, kept])


def test_a_masked_edit_under_control(pipe):
    options = {"control_image": PICTURE, "mask_image": MASK, "image": OTHER}
    controlled = run(pipe, **options)
    plain = run(pipe, **{**options, "control_image": None})
    assert controlled.shape == plain.shape and not torch.equal(controlled, plain)


def test_a_generator_decides_all(inpainting):
    options = {"control_image": PICTURE, "control_mask": MASK}
    one = run(inpainting, **options)
    torch.manual_seed(99)
    assert torch.equal(run(inpainting, **options), one)
    torch.manual_seed(3)
    other = run(inpainting, latents=noise(), generator=None, **options)
    torch.manual_seed(3)
    assert torch.equal(run(inpainting, latents=noise(), generator=None, **options), other)


def test_an_inpainting_net_sees_nothing_under_the_mask(inpainting):
    changed = PICTURE.copy()
    changed.paste((255, 0, 0), (20, 8, 45, 40))
    options = {"control_mask": MASK}
    one = run(inpainting, control_image=PICTURE, **options)
    assert torch.equal(run(inpainting, control_image=changed, **options), one)
    grey = MASK.point(lambda level: 130 if level else 120)  # grey from 128 on counts as white
    assert torch.equal(run(inpainting, control_image=PICTURE, control_mask=grey), one)
    assert not torch.equal(run(inpainting, control_image=changed, control_mask=MASK.rotate(180)), one)


def test_a_row_has_its_own_mask(inpainting):
    masks = [MASK, MASK.rotate(180)]
    batch = run(
        inpainting, prompt=[PROMPT, CHINESE], control_image=PICTURE, control_mask=[masks],
        generator=[generator(0), generator(1)],
    )  # fmt: skip
    for k, got in enumerate(batch):
        wanted = run(
            inpainting, prompt=[PROMPT, CHINESE][k], control_image=PICTURE, control_mask=masks[k], seed=k
        )
        assert_close(got[None], wanted, FP32 * 10)


# --- the other doors


def test_every_door_gives_the_same_run(pipe):
    options = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.8}
    options |= {"num_inference_steps": 3}
    wanted = run(pipe, **options)
    called = pipe(
        PICTURE, PROMPT, **SIZE, negative_prompt=" ", output_type="latent", generator=generator(), **options
    ).images
    edited = run(pipe, image=PICTURE, **SIZE, **options)
    assert torch.equal(called, edited) and not torch.equal(edited, wanted)
    conditioning = pipe.condition(None, PROMPT, **SIZE)
    sampled = pipe.sample(conditioning, output_type="latent", generator=generator(), **options).images
    assert torch.equal(sampled, wanted)
    with torch.no_grad():
        *_, last = pipe.steps(conditioning, generator=generator(), **options)
    assert torch.equal(last.after, wanted)


def test_gradients_reach_a_net(pipe, net):
    conditioning = pipe.condition(None, PROMPT, **SIZE)
    trained = copy.deepcopy(net).requires_grad_(True)
    with with_nets(pipe, trained):
        for step in pipe.steps(
            conditioning, generator=generator(), num_inference_steps=2, control_image=PICTURE
        ):
            step.cond.square().sum().backward(retain_graph=True)
            break
    assert all(layer.weight.grad.abs().max() > 0 for layer in (*trained.residuals, trained.cond_in))


def test_an_exact_timestep_is_the_nets_too(low):
    """Also if the net is off in a step."""
    seen = []
    options = {"control_image": PICTURE, "num_inference_steps": 2, "control_guidance_start": 0.5}
    with taps(low.controlnets[0], {"time_embed.sinusoids": lambda x, site: seen.append((x, site.labels))}):
        for rounding in ("reference", "exact"):
            run(low, switches=Switches.from_flat({"time.rounding": rounding}), **options)
    (rounded, labels), (exact, _) = seen
    assert not torch.equal(exact, rounded)
    assert torch.equal(exact, sinusoids(torch.tensor([labels["sigma"]])))


@pytest.mark.parametrize("residency", ["stage", "stream"])
@pytest.mark.parametrize("modulation", ["live", "precomputed"])
def test_memory_modes_change_no_bit(residency, modulation):
    folder = checkpoint("edit", layers=3)
    whole = qwenedit.load(folder, device="cpu", progress=False)
    other = qwenedit.load(folder, device="cpu", progress=False, residency=residency, modulation=modulation)
    net = random_net(whole.mmdit)
    results = []
    for system in (whole, other):
        system.controlnets = [net]
        results.append(run(system, image=PICTURE, control_image=OTHER, num_inference_steps=2, **SIZE))
    assert torch.equal(*results)


@pytest.fixture
def low(net):
    pipe = qwenedit.load(device="cpu", progress=False)
    pipe.controlnets = [copy.deepcopy(net)]
    return pipe.to(torch.bfloat16)


def test_bfloat16(low):
    assert next(low.controlnets[0].parameters()).dtype == torch.bfloat16
    got = run(low, control_image=PICTURE)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert (got - run(low)).abs().max() > 1e-2


def test_a_cache_changes_a_controlled_run_by_rounding_alone(pipe):
    plain = run(pipe, control_image=PICTURE)
    with taps(pipe.controlnets[0], {"temb": lambda x, site: None}):
        assert torch.equal(run(pipe, control_image=PICTURE), plain)  # the net's own cache: no bit
    with taps(pipe.mmdit, {"temb": lambda x, site: None}):
        assert_close(run(pipe, control_image=PICTURE), plain, FP32 * 10)


def test_blocks_that_run_as_one_are_refused(pipe):
    """Nothing could be added between them."""
    with first_block_cache(pipe.mmdit, 0.1):
        run(pipe)
        with pytest.raises(ValueError, match="after each of 6 blocks, but they run as 1, as in first_block"):
            run(pipe, control_image=PICTURE)


def test_numbers_may_be_arrays_or_tensors(pipe):
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    given = dict(zip(names, ([0.75, 0.25], [0.0, 0.5], [0.5, 1.0]), strict=True))
    wanted = run(pipe, control_image=[PICTURE, OTHER], **given)
    for kind in (np.array, torch.tensor):
        arrays = {name: kind(values) for name, values in given.items()}
        assert torch.equal(run(pipe, control_image=[PICTURE, OTHER], **arrays), wanted)
    assert torch.equal(run(pipe, controlnet_conditioning_scale=np.float32(1)), run(pipe))


# --- bad input

BAD = {
    "no net": ({"nets": 0, "control_image": PICTURE}, "the pipeline has no ControlNet: load one first"),
    "a mask without a picture": ({"control_mask": MASK}, "given without a control_image"),
    "a scale without a picture": ({"controlnet_conditioning_scale": 0.5}, "given without a control_image"),
    "an interval without a picture": ({"control_guidance_end": 0.5}, "given without a control_image"),
    "a mask too many": (
        {"control_image": PICTURE, "control_mask": MASK},
        "no ControlNet takes one: it is for inpainting nets",
    ),
    "a mask too many in a list": (
        {"control_image": [PICTURE, OTHER], "control_mask": [None, MASK]},
        r"the net of control 1 takes no mask: wanted None as control_mask\[1\]",
    ),
    "no picture": ({"control_image": []}, "control_image has 0 pictures, wanted one or more"),
    "a name": ({"control_image": "edges.png"}, "control_image is str 'edges.png', wanted a PIL picture"),
    "a name in a list": ({"control_image": [PICTURE, 3]}, r"control_image\[1\] is int, wanted a PIL picture"),
    "too few for two nets": (
        {"nets": 2, "control_image": PICTURE},
        "control_image has 1 pictures, wanted 2, one for each ControlNet",
    ),
    "too many for two nets": (
        {"nets": 2, "control_image": [PICTURE] * 3},
        "control_image has 3 pictures, wanted 2, one for each ControlNet",
    ),
    "pictures for prompts": (
        {"control_image": [[PICTURE, OTHER]]},
        r"control_image\[0\] has 2 pictures for 1 prompt\(s\), wanted one, or one for each prompt",
    ),
    "scales": (
        {"control_image": PICTURE, "controlnet_conditioning_scale": [1.0, 0.5]},
        "controlnet_conditioning_scale has 2 numbers, wanted one, or 1, one for each control",
    ),
    "starts": (
        {"control_image": [PICTURE, OTHER], "control_guidance_start": [0.1]},
        "control_guidance_start has 1 numbers, wanted one, or 2",
    ),
    "ends": (
        {"control_image": [PICTURE, OTHER], "control_guidance_end": [0.1, 0.2, 0.3]},
        "control_guidance_end has 3 numbers, wanted one, or 2",
    ),
    "a scale that is none": (
        {"control_image": PICTURE, "controlnet_conditioning_scale": float("nan")},
        "controlnet_conditioning_scale is nan, wanted a finite number",
    ),
    "an array without a picture": (
        {"controlnet_conditioning_scale": np.array([1.0, 0.5])},
        "given without a control_image",
    ),
    "a tensor without a picture": (
        {"control_guidance_start": torch.tensor([0.1])},
        "given without a control_image",
    ),
    "an array of another length": (
        {"control_image": PICTURE, "controlnet_conditioning_scale": np.array([1.0, 0.5])},
        "controlnet_conditioning_scale has 2 numbers, wanted one, or 1, one for each control",
    ),
    "a matrix": (
        {"control_image": [PICTURE, OTHER], "control_guidance_end": torch.ones(2, 2)},
        "control_guidance_end is .*, wanted a finite number",
    ),
    "True as an end": (
        {"control_guidance_end": True},
        "control_guidance_end is True, wanted a finite number",
    ),
    "True as an end beside a picture": (
        {"control_image": PICTURE, "control_guidance_end": True},
        "control_guidance_end is True, wanted a finite number",
    ),
    "nets that are none": ({"nets": [3]}, "one of the pipeline's controlnets is int, wanted ControlNets"),
    "nets that are none, beside a picture": (
        {"nets": [3], "control_image": PICTURE},
        "one of the pipeline's controlnets is int, wanted ControlNets",
    ),
    "a start after the end": (
        {"control_image": PICTURE, "control_guidance_start": 0.6, "control_guidance_end": 0.6},
        r"control_guidance_start is 0\.6 and control_guidance_end 0\.6, wanted numbers in \[0, 1\]",
    ),
    "an end beyond": (
        {"control_image": PICTURE, "control_guidance_end": 1.2},
        r"control_guidance_end 1\.2, wanted numbers in \[0, 1\]",
    ),
    "no step": (
        {"control_image": PICTURE, "control_guidance_start": 0.4, "control_guidance_end": 0.6},
        r"no step of 3 lies between them",
    ),
    "a switch without a control": (
        {"switches": Switches(control=Controls(branches="each"))},
        "switches.control changes how ControlNets run, but this run has no control_image",
    ),
}


@pytest.fixture
def nothing_runs(monkeypatch, edit):
    def fail(*_args, **_options):
        raise AssertionError("a network ran")

    for network in (type(edit.vae), type(edit.mmdit), type(edit.vision_language)):
        monkeypatch.setattr(network, "forward", fail)
    monkeypatch.setattr(type(edit.vae), "encode", fail)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_runs(edit, net, case):
    options, message = BAD[case]
    nets = options.get("nets", 1)
    nets = [net, copy.copy(net)][:nets] if isinstance(nets, int) else nets
    options = {name: value for name, value in options.items() if name != "nets"}
    with with_nets(edit, *nets):
        for image in (None, PICTURE):
            state = generator()
            with pytest.raises(ValueError, match=message):
                run(edit, image=image, generator=state, **options)
            assert torch.equal(state.get_state(), generator().get_state())


@pytest.mark.usefixtures("nothing_runs")
def test_an_inpainting_net_needs_its_mask(inpainting, net):
    with pytest.raises(ValueError, match="the net of control 0 is one for inpainting: wanted a control_mask"):
        run(inpainting, control_image=PICTURE)
    with pytest.raises(ValueError, match="the net of control 1 is one for inpainting: wanted a control_mask"):
        run(inpainting, control_image=[PICTURE, OTHER], control_mask=[MASK, None])
    with pytest.raises(ValueError, match="control_mask has 2 masks, wanted 1, one for each control"):
        run(inpainting, control_image=PICTURE, control_mask=[MASK, MASK])
    with (
        with_nets(inpainting, net, *inpainting.controlnets),
        pytest.raises(ValueError, match="the net of control 1 is one for inpainting"),
    ):
        run(inpainting, control_image=[PICTURE, OTHER])


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"joint_attention_dim": 8},
            r"of control 0: its joint_attention_dim is 8, wanted the transformer's, \d+",
        ),
        (
            {"num_attention_heads": 1},
            r"of control 0: its num_attention_heads is 1, wanted the transformer's, \d+",
        ),
        (
            {"in_channels": 32, "out_channels": 8},
            "the net of control 0: its in_channels is 32, wanted the transformer's, 64",
        ),
        ({"extra_condition_channels": 8}, "token has 72 channels, wanted 64, or with a mask 68"),
    ],
)
def test_a_net_that_does_not_fit_is_refused(edit, net, changes, message):
    with torch.device("meta"):
        other = ControlNet(dataclasses.replace(net.config, **changes))
    mask = MASK if "extra_condition_channels" in changes else None
    with with_nets(edit, other), pytest.raises(ValueError, match=message):
        run(edit, control_image=PICTURE, control_mask=mask)


@pytest.mark.usefixtures("nothing_runs")
def test_a_net_of_another_dtype_is_refused(edit, net):
    with (
        with_nets(edit, net, copy.deepcopy(net).to(torch.bfloat16)),
        pytest.raises(ValueError, match=r"of control 1 is torch\.bfloat16, wanted torch\.float32, as the tr"),
    ):
        run(edit, control_image=[PICTURE, OTHER])


def test_a_control_picture_of_another_shape_is_stretched_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="is 40x70 and the output 64x48, of another shape"):
        run(pipe, control_image=picture(40, 70))
    run(pipe, control_image=picture(640, 481))  # of nearly the same
