"""The loop: what the caller sees, what it may replace, and what happens to NaN."""

import dataclasses

import pytest
import torch

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.latents import Layout
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import checked, euler
from qwenedit.taps import NonFiniteError, current_labels, taps
from tests.support import FP32, assert_close, randomise_

SIGMAS = [1.0, 0.7, 0.3, 0.0]
LATENTS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))

CONFIG = MMDiTConfig(
    patch_size=2, in_channels=8, out_channels=2, num_layers=1, attention_head_dim=12, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 4, 4),
)  # fmt: skip
GRID = (1, 2, 3)


def drift(latents, _sigma):
    return 0.5 * latents, -latents


def conditioning(reference_grids=(((1, 2, 2),), ((1, 2, 2),)), seed=0, padded=True):
    generator = torch.Generator().manual_seed(seed)

    def prompt(length):
        mask = torch.arange(length) < torch.tensor([[length], [length - 2]])
        return Prompt(torch.randn(2, length, 10, generator=generator), mask if padded else None)

    return Conditioning(
        prompt=prompt(7),
        negative=prompt(4),
        target_grid=GRID,
        reference_latents=tuple(
            tuple(torch.randn(g[1] * g[2], 8, generator=generator) for g in row) for row in reference_grids
        ),
        reference_grids=reference_grids,
    )


def row(whole, index):
    one = torch.tensor([index])
    return Conditioning(
        prompt=whole.prompt.rows(one),
        negative=whole.negative.rows(one),
        target_grid=whole.target_grid,
        reference_latents=whole.reference_latents[index : index + 1],
        reference_grids=whole.reference_grids[index : index + 1],
    )


@pytest.fixture
def mmdit():
    return randomise_(MMDiT(CONFIG)).requires_grad_(False)


def test_a_step_shows_everything_before_it_is_taken():
    steps = list(euler(drift, LATENTS, SIGMAS, TrueCFG(3.0)))
    assert [(s.index, s.sigma, s.sigma_next) for s in steps] == [(0, 1.0, 0.7), (1, 0.7, 0.3), (2, 0.3, 0.0)]
    first, second = steps[0], steps[1]
    assert torch.equal(first.latents, LATENTS)
    assert torch.equal(first.cond, 0.5 * LATENTS) and torch.equal(first.uncond, -LATENTS)
    assert torch.equal(first.velocity, TrueCFG(3.0)(first.cond, first.uncond))
    assert torch.equal(first.x0, LATENTS - 1.0 * first.velocity)
    assert torch.equal(second.latents, first.after)


def test_without_guidance_the_velocity_is_the_conditional_one():
    for step in euler(drift, LATENTS, SIGMAS):
        assert torch.equal(step.velocity, step.cond)


@pytest.mark.parametrize("what", ["cond", "uncond", "velocity", "x0", "latents"])
def test_what_the_caller_writes_is_what_is_used(what):
    value = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    loop = euler(drift, LATENTS, SIGMAS, TrueCFG(3.0))
    step = next(loop)
    seen = step.velocity  # reading first must not freeze what is derived
    setattr(step, what, value)
    velocity = {
        "cond": lambda: TrueCFG(3.0)(value, -LATENTS),
        "uncond": lambda: TrueCFG(3.0)(0.5 * LATENTS, value),
        "velocity": lambda: value,
        "x0": lambda: (LATENTS - value) / 1.0,
        "latents": lambda: seen,
    }[what]()
    start = value if what == "latents" else LATENTS
    assert torch.equal(step.velocity, velocity)
    torch.testing.assert_close(next(loop).latents, start - 0.3 * velocity)
    if what == "x0":
        torch.testing.assert_close(step.x0, value)


def test_the_caller_may_stop_and_gradients_flow():
    latents = LATENTS.clone().requires_grad_()
    for step in euler(drift, latents, SIGMAS):
        if step.index == 1:
            break
    step.after.sum().backward()
    torch.testing.assert_close(latents.grad, torch.full_like(LATENTS, (1 - 0.3 * 0.5) * (1 - 0.4 * 0.5)))


def test_the_predictor_labels_branch_step_and_layout(mmdit):
    seen = []
    whole = conditioning()
    with taps(mmdit, {"velocity": lambda x, site: seen.append(site.labels)}):
        for _ in euler(predictor(mmdit, whole, guided=True), LATENTS, SIGMAS, TrueCFG(4.0)):
            assert current_labels() == {}
    assert [(x["step"], x["branch"]) for x in seen] == [(i, b) for i in range(3) for b in ("cond", "uncond")]
    assert [x["sigma"] for x in seen[::2]] == SIGMAS[:-1]
    assert seen[0]["layout"] == Layout(7, (GRID, (1, 2, 2))) and seen[1]["layout"].text == 4
    assert seen[0]["layout"].target == slice(0, 6) and seen[0]["layout"].references == (slice(6, 10),)
    assert seen[0]["layout"].in_joint(slice(6, 10)) == slice(13, 17)


@pytest.mark.parametrize(
    "grids",
    [
        (((1, 2, 2),), ((1, 2, 2),)),
        (((1, 2, 2),), ((1, 3, 2), (1, 1, 4))),
        ((), ((1, 3, 1),)),
    ],
)
def test_each_row_equals_its_single_run(mmdit, grids):
    """Different prompt lengths, and references that differ in number and size."""
    whole = conditioning(grids)
    predict = predictor(mmdit, whole, guided=True)
    outputs = predict(LATENTS, 0.6)
    for index in range(2):
        alone = predictor(mmdit, row(whole, index), guided=True)(LATENTS[index : index + 1], 0.6)
        for both, one in zip(outputs, alone, strict=True):
            assert_close(both[index : index + 1], one, FP32)


def test_rows_come_back_in_order(mmdit):
    a, b = ((1, 2, 2),), ((1, 3, 1),)
    generator = torch.Generator().manual_seed(3)
    grids = (a, b, b, a)  # together 0 3 1 2: an order that is not its own inverse
    whole = Conditioning(
        prompt=Prompt(torch.randn(4, 3, 10, generator=generator)),
        negative=None,
        target_grid=GRID,
        reference_latents=tuple(
            tuple(torch.randn(g[1] * g[2], 8, generator=generator) for g in row) for row in grids
        ),
        reference_grids=grids,
    )
    latents = torch.randn(4, 6, 8, generator=generator)
    together, none = predictor(mmdit, whole, guided=False)(latents, 0.5)
    assert none is None
    for i in range(4):
        one = Conditioning(
            prompt=whole.prompt.rows(torch.tensor([i])),
            negative=None,
            target_grid=GRID,
            reference_latents=whole.reference_latents[i : i + 1],
            reference_grids=grids[i : i + 1],
        )
        assert_close(
            together[i : i + 1], predictor(mmdit, one, guided=False)(latents[i : i + 1], 0.5)[0], FP32
        )


def test_guidance_without_a_negative_prompt_is_refused(mmdit):
    with pytest.raises(ValueError, match="no negative prompt"):
        predictor(mmdit, dataclasses.replace(conditioning(), negative=None), guided=True)


def test_nan_names_component_branch_and_step(mmdit):
    def poison(x, site):
        return x * float("nan") if site.labels["step"] == 1 and site.labels["branch"] == "uncond" else None

    loop = checked(euler(predictor(mmdit, conditioning(), guided=True), LATENTS, SIGMAS, TrueCFG(4.0)))
    with taps(mmdit, {"velocity": poison}):
        next(loop)
        with pytest.raises(
            NonFiniteError, match=r"transformer: the uncond velocity .* step 1, sigma 0\.7000"
        ):
            next(loop)


def test_nan_of_the_guidance_is_not_blamed_on_the_next_prediction():
    """Predictions that cancel out: the reference's rescaling is 0 / 0."""
    loop = checked(euler(lambda latents, _: (0 * latents, 0 * latents), LATENTS, SIGMAS, TrueCFG(4.0)))
    step = next(loop)
    with pytest.raises(NonFiniteError, match=r"guidance: the guided velocity at step 0, sigma 1\.0000"):
        next(loop)
    assert torch.equal(step.cond, 0 * LATENTS)  # what it was made of can still be read


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), None, "4"])
def test_a_guidance_scale_is_a_finite_number(scale):
    with pytest.raises(ValueError, match=f"true_cfg_scale is {scale!r}, wanted a finite number"):
        TrueCFG(scale)


def test_the_timestep_is_rounded_where_the_reference_rounds():
    seen = []
    sigma = 0.87327
    half = MMDiT(CONFIG).to(torch.bfloat16).requires_grad_(False)
    randomise_(half)
    half.register_forward_pre_hook(lambda _module, args: seen.append(args[2]))
    predictor(half, conditioning().to(dtype=torch.bfloat16), guided=False)(LATENTS.bfloat16(), sigma)
    wanted = torch.tensor([sigma * 1000] * 2).to(torch.bfloat16) / 1000
    assert torch.equal(seen[0], wanted)
