"""Guidance: every norm against plain loops, APG and rescaling against diffusers, intervals, momentum, NaN."""

import itertools
import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.latents import pack, unpack
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import checked, euler
from qwenedit.switches import NORMS, Guidance
from qwenedit.taps import NonFiniteError, taps
from tests.support import FP32, FP64, assert_close, randomise_

B, S, C, GRID = 3, 6, 64, (1, 2, 3)
SIGMA, SCALE = 0.7, 4.0
RULES = [
    *(Guidance(norm=norm) for norm in NORMS),
    *(Guidance(norm=norm, rescale=0.7) for norm in ("none", "clamp", "comfy_x0")),
    Guidance(norm="none", eta=0.0, momentum=-0.5, threshold=5.0),
    Guidance(eta=0.3),
    Guidance(norm="comfy_x0", threshold=2.0),
    Guidance(norm="global", momentum=0.4),
]


def draw(count, dtype=torch.float64, seed=0):
    """Different lengths in each token, and every other token of the second close to the first's: combining
    makes those shorter and the others longer, so that no two norms agree.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(B, S, 1, generator=generator, dtype=torch.float64) + 0.2
    x = [torch.randn(B, S, C, generator=generator, dtype=torch.float64) * size for _ in range(count)]
    if count > 1:
        x[1][:, ::2] = 1.1 * x[0][:, ::2] + 0.02 * x[1][:, ::2]
    return [one.to(dtype) for one in x]


def plain(cond, uncond):
    return uncond + SCALE * (cond - uncond)


def length(values):
    return math.sqrt(sum(value * value for value in values))


def looped(norm, cond, uncond, latents):
    """One norm in loops over numbers: token by token, channel by channel, latent pixel by latent pixel."""
    guided = plain(cond, uncond)
    out = guided.clone()
    if norm in ("reference", "clamp"):
        for b, s in itertools.product(range(B), range(S)):
            ratio = length(cond[b, s].tolist()) / length(guided[b, s].tolist())
            out[b, s] *= ratio if norm == "reference" else min(ratio, 1.0)
    if norm == "global":
        for b in range(B):
            out[b] *= length(cond[b].flatten().tolist()) / length(guided[b].flatten().tolist())
    if norm == "channel":
        c, g = unpack(cond, GRID), unpack(guided, GRID)
        for b, channel in itertools.product(range(B), range(16)):
            g[b, channel] *= length(c[b, channel].flatten().tolist()) / length(
                g[b, channel].flatten().tolist()
            )
        out = pack(g)
    if norm == "comfy_x0":
        c, g = (unpack(latents - SIGMA * x, GRID) for x in (cond, guided))
        for b, y, x in itertools.product(range(B), range(4), range(6)):
            ratio = length(c[b, :, 0, y, x].tolist()) / (length(g[b, :, 0, y, x].tolist()) + 1e-8)
            g[b, :, 0, y, x] *= min(max(ratio, 0.0), 1.0)
        out = (latents - pack(g)) / SIGMA
    return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FP64), (torch.float32, FP32)])
@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_is_what_it_says(norm, dtype, tolerance):
    cond, uncond, latents = draw(3)
    wanted = looped(norm, cond, uncond, latents)
    guidance = TrueCFG(SCALE, Guidance(norm=norm))
    got = guidance(cond.to(dtype), uncond.to(dtype), (latents.to(dtype), SIGMA))
    assert got.dtype == dtype
    assert_close(got, wanted, tolerance)


def test_the_norms_differ():
    cond, uncond, latents = draw(3)
    results = [TrueCFG(SCALE, Guidance(norm=norm))(cond, uncond, (latents, SIGMA)) for norm in NORMS]
    for one, other in itertools.combinations(results, 2):
        assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_default_is_the_reference_bit_by_bit(dtype):
    """The lines of QwenImageEditPipeline's loop."""
    noise_pred, neg_noise_pred = draw(2, dtype)
    comb_pred = neg_noise_pred + 4.0 * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    wanted = comb_pred * (cond_norm / noise_norm)
    for guidance in (TrueCFG(), TrueCFG(4.0), TrueCFG(4.0, Guidance()), TrueCFG(scale=4.0, rule=Guidance())):
        assert torch.equal(guidance(noise_pred, neg_noise_pred), wanted)
    assert torch.equal(TrueCFG(4.0, Guidance(norm="none"))(noise_pred, neg_noise_pred), comb_pred)
    ratio = TrueCFG(4.0, Guidance(norm="clamp")).ratio(noise_pred, neg_noise_pred)
    assert ratio.shape == (B, S) and torch.equal(ratio, (cond_norm / noise_norm)[..., 0])


def test_clamp_is_the_reference_where_that_shrinks():
    cond, uncond = draw(2, torch.float32)
    reference, clamped = TrueCFG(SCALE)(cond, uncond), TrueCFG(SCALE, Guidance(norm="clamp"))(cond, uncond)
    shrinks = TrueCFG(SCALE).ratio(cond, uncond) < 1
    assert shrinks.any() and not shrinks.all()
    assert torch.equal(clamped[shrinks], reference[shrinks])
    assert torch.equal(clamped[~shrinks], plain(cond, uncond)[~shrinks])


def test_rescale_is_the_papers():
    for dtype in (torch.float32, torch.float64):
        cond, uncond = draw(2, dtype)
        got = TrueCFG(SCALE, Guidance(norm="none", rescale=0.7))(cond, uncond)
        wanted = rescale_noise_cfg(plain(cond, uncond), cond, 0.7)
        assert_close(got, wanted, FP64 if dtype == torch.float64 else FP32)
        full = TrueCFG(SCALE, Guidance(norm="none", rescale=1.0))(cond, uncond)
        torch.testing.assert_close(full.std(dim=(1, 2)), cond.std(dim=(1, 2)))


@pytest.mark.parametrize(
    "eta, momentum, threshold", [(0.0, -0.5, 5.0), (0.3, 0.0, None), (1.0, -0.75, None), (1.0, 0.0, 4.0)]
)
def test_apg_is_the_papers_over_a_whole_run(eta, momentum, threshold):
    """Against diffusers' `normalized_guidance` on the clean latents, in the paper's form, step by step."""
    rule = Guidance(norm="none", eta=eta, momentum=momentum, threshold=threshold)
    guidance = TrueCFG(SCALE, rule)
    predictions = [draw(2, seed=seed) for seed in range(4)]
    (latents,) = draw(1, seed=9)
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0]
    buffer, moved = MomentumBuffer(momentum) if momentum else None, []
    steps = euler(lambda _, sigma: tuple(predictions[sigmas.index(sigma)]), latents, sigmas, guidance)
    for step in steps:
        x0_cond, x0_uncond = (step.latents - step.sigma * x for x in predictions[step.index])
        wanted = normalized_guidance(
            x0_cond, x0_uncond, SCALE - 1, buffer, eta, threshold or 0.0, use_original_formulation=True
        )
        assert_close(step.x0, wanted, FP64)
        moved.append(float((step.x0 - (x0_uncond + SCALE * (x0_cond - x0_uncond))).abs().max()))
        if momentum:
            assert_close(step.average, buffer.running_average, FP64)
    assert max(moved) > 0.1  # from plain guidance


def test_the_values_of_plain_guidance_are_plain_guidance():
    """eta 1 by way of the projection, which a threshold that never cuts turns on."""
    cond, uncond, latents = draw(3)
    apg = TrueCFG(SCALE, Guidance(norm="none", threshold=1e9))
    assert_close(apg(cond, uncond, (latents, SIGMA)), plain(cond, uncond), FP64)


def test_momentum_is_carried_by_the_loop_and_steps_can_be_read_again():
    rule = Guidance(norm="none", momentum=-0.5, eta=0.0)
    cond, uncond, latents, other = draw(4)
    loop = euler(lambda _latents, _sigma: (cond, uncond), latents, [1.0, 0.6, 0.3, 0.0], TrueCFG(SCALE, rule))
    first = next(loop)
    seen = first.velocity
    assert torch.equal(seen, TrueCFG(SCALE, rule)(cond, uncond, (latents, 1.0)))
    first.cond = other
    assert not torch.equal(first.velocity, seen)
    first.cond = cond
    assert torch.equal(first.velocity, seen)  # nothing was added up meanwhile
    first.cond = other  # what counts is what was left there
    difference = 1.0 * (uncond - other)
    assert_close(first.average, difference, FP64)
    second = next(loop)
    at = (second.latents, 0.6)
    assert torch.equal(second.velocity, TrueCFG(SCALE, rule)(cond, uncond, at, first.average))
    assert_close(second.average, 0.6 * (uncond - cond) - 0.5 * difference, FP64)
    assert not torch.equal(second.velocity, TrueCFG(SCALE, rule)(cond, uncond, at))


def test_latents_that_are_written_do_not_move_the_predictions():
    """Predictions on clean latents were made where the step began."""
    cond, uncond, latents, other = draw(4)
    loop = euler(lambda *_: (cond, uncond), latents, [0.7, 0.2], TrueCFG(SCALE, Guidance(norm="comfy_x0")))
    step = next(loop)
    step.latents = other
    wanted = TrueCFG(SCALE, Guidance(norm="comfy_x0"))(cond, uncond, (latents, 0.7))
    assert torch.equal(step.velocity, wanted)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch(rule, dtype):
    cond, uncond, latents, average = draw(4, dtype)
    guidance = TrueCFG(SCALE, rule)
    whole = guidance(cond, uncond, (latents, SIGMA), average)
    assert whole.dtype == dtype and torch.isfinite(whole).all()
    for i in range(B):
        row = slice(i, i + 1)
        alone = guidance(cond[row], uncond[row], (latents[row], SIGMA), average[row])
        assert torch.equal(whole[row], alone)


@pytest.mark.parametrize("norm", NORMS)
def test_a_token_whose_predictions_cancel_out(norm):
    cond, uncond, latents = draw(3, torch.float32)
    uncond[0, 2] = uncond[0, 2].bfloat16()  # so that nothing is rounded: u + 4 (0.75 u - u) = 0
    cond[0, 2] = 0.75 * uncond[0, 2]
    if norm == "comfy_x0":  # there it is the estimate that can be 0
        latents[0, 2] = 0
    cond.requires_grad_()
    guided = TrueCFG(SCALE, Guidance(norm=norm))(cond, uncond, (latents, SIGMA))
    if norm == "reference":
        assert guided[0, 2].isnan().all()
        return
    assert (guided[0, 2] == 0).all() and torch.isfinite(guided).all()
    guided.square().sum().backward()
    assert torch.isfinite(cond.grad).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_run_in_which_everything_cancels_out(rule):
    zero = torch.zeros(B, S, C)
    loop = checked(euler(lambda *_: (zero, zero), zero, [0.7, 0.3, 0.0], TrueCFG(SCALE, rule)))
    if rule.norm == "reference":
        step = next(loop)
        assert step.norm_ratio.isnan().all()
        with pytest.raises(NonFiniteError, match=r"guidance: the guided velocity at step 0"):
            next(loop)
        return
    for step in loop:
        assert (step.after == 0).all()


def test_gradients_flow_through_every_rule():
    for rule in RULES:
        cond, uncond, latents = draw(3, torch.float64)
        guidance = TrueCFG(SCALE, rule)
        inputs = [x[:1, :2, :8].clone().requires_grad_() for x in (cond, uncond, latents)]
        assert torch.autograd.gradcheck(lambda c, u, x: guidance(c, u, (x, SIGMA)), inputs)  # noqa: B023


CONFIG = MMDiTConfig(
    patch_size=2, in_channels=8, out_channels=2, num_layers=1, attention_head_dim=12, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 4, 4),
)  # fmt: skip


def test_outside_of_the_interval_the_run_is_unguided():
    mmdit = randomise_(MMDiT(CONFIG)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    conditioning = Conditioning(
        prompt=Prompt(torch.randn(1, 4, 10, generator=generator)),
        negative=Prompt(torch.randn(1, 3, 10, generator=generator)),
        target_grid=GRID,
        reference_latents=((),),
        reference_grids=((),),
    )
    latents = torch.randn(1, 6, 8, generator=generator)
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    seen, predict = [], predictor(mmdit, conditioning, guided=True)
    with taps(mmdit, {"velocity": lambda x, site: seen.append((site.labels["step"], site.labels["branch"]))}):
        steps = list(euler(predict, latents, sigmas, TrueCFG(4.0, Guidance(steps=(1, 3)))))
    both = [(i, branch) for i in (1, 2) for branch in ("cond", "uncond")]
    assert seen == [(0, "cond"), *both, (3, "cond"), (4, "cond")]
    assert [step.uncond is not None for step in steps] == [False, True, True, False, False]
    assert [step.norm_ratio is not None for step in steps] == [False, True, True, False, False]
    assert steps[1].norm_ratio.shape == (1, 6)
    for step in steps:
        guided = step.cond if step.uncond is None else TrueCFG(4.0)(step.cond, step.uncond)
        assert torch.equal(step.velocity, guided)
    everywhere = list(euler(predict, latents, sigmas, TrueCFG(4.0, Guidance(steps=(0, 5)))))
    always = list(euler(predict, latents, sigmas, TrueCFG(4.0)))
    assert torch.equal(everywhere[-1].after, always[-1].after)


def test_the_unconditional_prediction_can_be_supplied_outside_of_the_interval():
    cond, uncond, latents = draw(3)
    guidance = TrueCFG(SCALE, Guidance(steps=(1, 2)))

    def predict(_latents, _sigma, guided=True):
        return cond, uncond if guided else None

    step = next(euler(predict, latents, [1.0, 0.5, 0.0], guidance))
    assert torch.equal(step.velocity, cond)
    step.uncond = uncond
    assert torch.equal(step.velocity, TrueCFG(SCALE)(cond, uncond))


def test_the_norm_ratio_follows_what_is_written_and_ignores_the_norm():
    cond, uncond, latents, other = draw(4)
    for norm in ("reference", "none", "comfy_x0"):
        step = next(
            euler(lambda *_: (cond, uncond), latents, [0.7, 0.0], TrueCFG(SCALE, Guidance(norm=norm)))
        )
        wanted = torch.norm(cond, dim=-1) / torch.norm(plain(cond, uncond), dim=-1)
        assert torch.equal(step.norm_ratio, wanted)
        step.cond = other
        assert not torch.equal(step.norm_ratio, wanted)
    assert next(euler(lambda *_: (cond, None), latents, [0.7, 0.0])).norm_ratio is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "token"}, "guidance.norm is 'token', wanted 'reference' or 'none' or 'global'"),
        ({"norm": None}, "guidance.norm is None"),
        ({"steps": (3, 3)}, r"guidance.steps is \(3, 3\), wanted \(start, stop\) with 0 <= start < stop"),
        ({"steps": (-1, 3)}, r"guidance.steps is \(-1, 3\)"),
        ({"steps": (0, 1.0)}, r"guidance.steps is \(0, 1\.0\)"),
        ({"steps": 5}, "guidance.steps is 5"),
        ({"rescale": 1.5, "norm": "none"}, r"guidance.rescale is 1\.5, wanted a number in \[0, 1\]"),
        ({"rescale": "a"}, "guidance.rescale is 'a'"),
        ({"rescale": 0.5}, r"rescale is 0\.5, but norm 'reference' undoes it: wanted norm 'none' or 'clamp'"),
        ({"rescale": 0.5, "norm": "channel"}, "norm 'channel' undoes it"),
        ({"eta": math.inf}, "guidance.eta is inf, wanted a number"),
        ({"momentum": 1.0}, r"guidance.momentum is 1\.0, wanted a number within \(-1, 1\)"),
        ({"threshold": 0.0}, r"guidance.threshold is 0\.0, wanted a positive number, or None"),
        ({"threshold": math.nan}, "guidance.threshold is nan"),
    ],
)
def test_bad_rules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_rules_that_cannot_be_followed_are_refused():
    cond, uncond, latents = draw(3)
    with pytest.raises(ValueError, match="the rule of guidance is str, wanted a Guidance"):
        TrueCFG(4.0, "none")
    for rule in (Guidance(norm="comfy_x0"), Guidance(eta=0.0)):
        with pytest.raises(ValueError, match=r"works on clean latents: wanted .*, got nothing"):
            TrueCFG(4.0, rule)(cond, uncond)
        with pytest.raises(ValueError, match=r"works on clean latents: wanted .*, got sigma 0"):
            TrueCFG(4.0, rule)(cond, uncond, (latents, 0.0))
    loop = euler(
        lambda *_: pytest.fail("predicted"), latents, [1.0, 0.5, 0.0], TrueCFG(4.0, Guidance(steps=(2, 4)))
    )
    with pytest.raises(ValueError, match=r"guided steps are \(2, 4\), but the run has 2"):
        next(loop)
