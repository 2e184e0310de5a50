"""Inversion: the formulas, the labels that it shares with the sampler, the embedded model's round trip."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.instruments.inversion import inverse_euler, invert, picture_latents
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import euler
from qwenedit.switches import Guidance, References, Seen, Switches, Time
from qwenedit.taps import current_labels, taps
from tests.support import assert_close

SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]
LATENTS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drift(latents, sigma):
    """Not linear, and of a Lipschitz constant below 2."""
    return torch.sin(latents) - sigma * latents, 0.5 * latents


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


@pytest.fixture(scope="module")
def picture():
    return Image.open(mini.EXAMPLE)


@pytest.fixture(scope="module")
def described(pipe):
    """A text that says little, and no reference: the velocity depends on the latents."""
    return pipe.condition(None, "a red circle", height=64, width=64)


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("guidance", [None, TrueCFG(1.5, Guidance(norm="none"))])
def test_the_formulas(iterations, guidance):
    def velocity(x, sigma):
        cond, uncond = drift(x, sigma)
        return cond if guidance is None else uncond + 1.5 * (cond - uncond)

    wanted, x = [], LATENTS
    for start, end in pairwise(SIGMAS[::-1]):  # from 0 to 1
        there = x + (end - start) * velocity(x, start)
        for _ in range(iterations):
            there = x + (end - start) * velocity(there, end)
        x = there
        wanted.append(x)
    steps = list(inverse_euler(drift, LATENTS, SIGMAS, guidance, iterations))
    assert [(s.index, s.sigma, s.sigma_next) for s in steps] == [
        (3, 0.0, 0.2), (2, 0.2, 0.5), (1, 0.5, 0.8), (0, 0.8, 1.0),
    ]  # fmt: skip
    for step, x in zip(steps, wanted, strict=True):
        assert_close(step.after, x, 1e-6)  # `after` computes in float32, as the reference's scheduler


def test_it_converges_to_the_exact_inverse():
    errors = []
    for iterations in (0, 2, 4, 8, 20):
        *_, last = inverse_euler(drift, LATENTS, SIGMAS, None, iterations)
        *_, back = euler(drift, last.after, SIGMAS)
        errors.append(float((back.after - LATENTS).abs().max()))
    assert errors[0] > 0.1 and errors[-1] < 1e-5
    assert all(later < earlier for earlier, later in pairwise(errors)), errors


def test_one_step_of_the_straight_flow_is_exact():
    """Where the velocity is one, the explicit step is the inverse."""
    *_, last = inverse_euler(lambda *_: (0 * LATENTS + 0.25, None), LATENTS, SIGMAS)
    assert_close(last.after, LATENTS + 0.25, 1e-6)


def test_labels_and_indices_are_those_of_the_sampler():
    seen = []

    def predict(latents, sigma):
        seen.append((current_labels()["step"], current_labels()["sigma"], current_labels().get("iteration")))
        assert current_labels()["sigma"] == sigma
        return drift(latents, sigma)

    intervals = [{s.index: {s.sigma, s.sigma_next} for s in euler(predict, LATENTS, SIGMAS)}]
    forward, seen = seen, []
    intervals.append({s.index: {s.sigma, s.sigma_next} for s in inverse_euler(predict, LATENTS, SIGMAS)})
    assert intervals[0] == intervals[1]
    assert seen == [(3, 0.0, 0), (2, 0.2, 0), (1, 0.5, 0), (0, 0.8, 0)]
    seen = []
    for _ in inverse_euler(predict, LATENTS, SIGMAS, None, 2):
        assert current_labels() == {}
    assert seen[:4] == [(3, 0.0, 0), (3, 0.2, 1), (3, 0.2, 2), (2, 0.2, 0)]
    assert {(step, sigma) for step, sigma, iteration in seen if iteration == 2} == {x[:2] for x in forward}


def test_what_a_tap_stores_in_inversion_can_be_replayed_in_sampling(pipe, described, picture):
    """By the labels alone, which meet: near the exact inverse, what is replaced is nearly its replacement."""
    latents, _ = picture_latents(pipe, picture)
    stored, used = {}, []

    def store(x, site):
        stored[site.full, site.labels["step"], site.labels["branch"]] = x

    def replay(x, site):
        used.append(key := (site.full, site.labels["step"], site.labels["branch"]))
        assert_close(x, stored[key], 0.1, str(key))
        return stored[key]

    options = {"num_inference_steps": 8, "true_cfg_scale": 2.0}
    with torch.no_grad():
        with taps(pipe.mmdit, {"blocks.*.attn.img_v": store}):
            *_, last = invert(pipe, described, latents, iterations=18, **options)
        with taps(pipe.mmdit, {"blocks.*.attn.img_v": replay}):
            *_, back = pipe.steps(described, latents=last.after, **options)
    assert sorted(used) == sorted(stored) and {key[2] for key in used} == {"cond", "uncond"}
    assert_close(back.after, latents, 0.05)


def round_trip(pipe, conditioning, latents, steps, iterations):
    options = {"num_inference_steps": steps, "true_cfg_scale": 1.0}
    with torch.no_grad():
        *_, last = invert(pipe, conditioning, latents, iterations=iterations, **options)
        *_, back = pipe.steps(conditioning, latents=last.after, **options)
    return float((back.after - latents).norm() / latents.norm())


def test_the_round_trip_on_the_embedded_model(pipe, described, picture):
    latents, grid = picture_latents(pipe, picture)
    assert grid == described.target_grid
    explicit = [round_trip(pipe, described, latents, steps, 0) for steps in (20, 40, 80)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(explicit)), explicit  # of first order
    assert explicit[-1] < 0.15
    iterated = [round_trip(pipe, described, latents, 20, iterations) for iterations in (2, 7)]
    assert iterated[0] < 0.1 * explicit[0] and iterated[1] < 1e-3, iterated


def test_the_round_trip_under_switches(pipe, picture):
    """The same switches lead back; others do not."""
    latents, _ = picture_latents(pipe, picture)
    conditioning = pipe.condition(picture, "make the circle red")
    options = {"num_inference_steps": 20, "true_cfg_scale": 2.0}
    switches = Switches(
        references=References(latents="left_out"),
        guidance=Guidance(norm="none"),
        time=Time(sigmas="lightning"),
    )
    with torch.no_grad():
        *_, last = invert(pipe, conditioning, latents, iterations=7, switches=switches, **options)
        *_, back = pipe.steps(conditioning, latents=last.after, switches=switches, **options)
        *_, lost = pipe.steps(conditioning, latents=last.after, **options)
    errors = [float((one.after - latents).norm() / latents.norm()) for one in (back, lost)]
    assert errors[0] < 0.02 < 0.2 < errors[1], errors


def test_the_latents_of_a_picture_are_those_that_references_get(pipe):
    wide = Image.linear_gradient("L").resize((120, 40)).convert("RGB")
    latents, grid = picture_latents(pipe, wide)
    with pytest.warns(UserWarning, match="token grid"):
        conditioning = pipe.condition(wide, "x", height=64, width=64)
    assert grid == conditioning.reference_grids[0][0] and grid[1] != grid[2]
    assert torch.equal(latents[0], conditioning.reference_latents[0][0])
    assert not latents.is_inference()
    assert torch.equal(latents, picture_latents(pipe, wide)[0])


def test_controlled_inversion_ends_at_the_noise_of_ones_choice():
    noise = torch.flip(LATENTS, [0])
    for step in inverse_euler(drift, LATENTS, SIGMAS):
        step.velocity = step.velocity + 1.0 * ((noise - step.latents) / (1 - step.sigma) - step.velocity)
    assert_close(step.after, noise, 1e-6)


def test_the_guided_interval_is_the_same_steps():
    asked = []

    def predict(latents, sigma, guided=True):
        asked.append((current_labels()["step"], guided))
        cond, uncond = drift(latents, sigma)
        return cond, uncond if guided else None

    list(inverse_euler(predict, LATENTS, SIGMAS, TrueCFG(2.0, Guidance(norm="none", steps=(1, 3)))))
    assert asked == [(3, False), (2, True), (1, True), (0, False)]


def test_gradients_flow_where_they_are_wanted():
    latents = LATENTS.clone().requires_grad_()
    *_, last = inverse_euler(drift, latents, SIGMAS, None, 1)
    last.after.sum().backward()
    assert latents.grad.abs().min() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": torch.zeros(1, 9, 64)}, r"latents are shape \(1, 9, 64\), wanted .* \(1, 16, 64\)"),
        ({"latents": [0.0]}, "latents are list"),
        ({"latents": None}, "latents are None, wanted a tensor"),
        ({"iterations": -1}, "iterations is -1, wanted a whole number of at least 0"),
        ({"iterations": 1.0}, r"iterations is 1\.0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        (
            {"true_cfg_scale": 2.0, "switches": Switches(guidance=Guidance(norm="comfy_x0"))},
            "works on clean latents, wanted",
        ),
        (
            {"true_cfg_scale": 2.0, "switches": Switches(guidance=Guidance(eta=0.0))},
            "works on clean latents, wanted",
        ),
        (
            {"switches": Switches(guidance=Guidance(steps=(7, 9)))},
            r"guidance.steps is \(7, 9\), but there are",
        ),
        ({"switches": Switches(seen=Seen(picture="blank"))}, "this run has none"),
    ],
)
def test_bad_input_is_refused_before_any_network_runs(pipe, described, change, message):
    options = {"latents": torch.zeros(1, 16, 64), "num_inference_steps": 2, **change}
    hook = pipe.mmdit.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    try:
        with pytest.raises(ValueError, match=message):
            invert(pipe, described, **options)
    finally:
        hook.remove()
    with pytest.raises(ValueError, match=r"picture is str 'a\.png', wanted a PIL picture"):
        picture_latents(pipe, "a.png")
