"""The samplers beside Euler's: their arithmetic, what the caller may write, and the probability of a draw."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

from qwenedit.ablation.first_block_cache import first_block_cache
from qwenedit.instruments.patching import patch_from
from qwenedit.instruments.records import Recorder
from qwenedit.networks.mmdit import MMDiT
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import euler
from qwenedit.sampling.samplers import (
    SAMPLERS,
    count_predictions,
    dpmpp_2m,
    flow_sde,
    heun,
    sampler_of,
    stochastic,
    unipc,
)
from qwenedit.switches import Guidance
from qwenedit.taps import current_labels, taps
from tests.sampling.test_sampler import CONFIG, conditioning
from tests.support import randomise_

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.35, 0.1, 0.0]).tolist()
LATENTS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
DETERMINISTIC = ["euler", "heun", "dpmpp_2m", "unipc"]
DRAWING = ["stochastic", "flow_sde"]


def named(name, seed=0):
    return sampler_of(name, torch.Generator().manual_seed(seed))


def field(latents, sigma):
    return torch.tanh(1.3 * latents + sigma) + 0.2 * latents.roll(1, -1), 0.3 * latents - sigma


def run(sampler, predict=field, latents=LATENTS, sigmas=SIGMAS, guidance=None, preserve=None):
    return list(sampler(predict, latents, sigmas, guidance, preserve))


# The form that all samplers share


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_step_starts_where_the_one_before_led(name):
    steps = run(named(name), guidance=TrueCFG(3.0))
    assert [step.index for step in steps] == list(range(count_predictions(name, SIGMAS)))
    assert torch.equal(steps[0].latents, LATENTS) and steps[-1].sigma_next == 0
    for step, following in pairwise(steps):
        assert torch.equal(following.latents, step.after) and following.sigma == step.sigma_next
        cond, uncond = field(step.latents, step.sigma)
        assert torch.equal(step.cond, cond) and torch.equal(step.uncond, uncond)
    for step in steps:  # read again after the loop: nothing is drawn anew
        assert torch.equal(step.after, step.after)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_constant_velocity_is_followed_exactly(name):
    clean = torch.randn_like(LATENTS)
    last = run(named(name), lambda *_: (LATENTS - clean, None))[-1]
    torch.testing.assert_close(last.after, clean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("what", ["cond", "uncond", "velocity", "x0"])
def test_what_the_caller_writes_is_what_the_whole_rest_of_the_run_uses(name, what):
    """Also what a sampler remembers of a step: as if the predictions had been the written ones."""
    guidance, at = TrueCFG(3.0), count_predictions(name, SIGMAS) // 2
    value = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    calls = iter(range(100))

    def other(latents, sigma):
        cond, uncond = field(latents, sigma)
        if next(calls) != at:
            return cond, uncond
        if what in ("velocity", "x0"):  # a scale of guidance has no effect where both are alike
            velocity = value if what == "velocity" else (latents - value) / sigma
            return velocity, velocity
        return (value, uncond) if what == "cond" else (cond, value)

    wanted = run(named(name), other, guidance=guidance)[-1].after
    for step in named(name)(field, LATENTS, SIGMAS, guidance):
        if step.index == at:
            assert step.after.isfinite().all()  # reading first must not freeze what is derived
            setattr(step, what, value)
    torch.testing.assert_close(step.after, wanted, rtol=1e-5, atol=1e-5)
    assert (step.after - run(named(name), guidance=guidance)[-1].after).abs().max() > 1e-2


@pytest.mark.parametrize("name", SAMPLERS)
def test_written_latents_are_where_the_step_starts(name):
    value = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    for step in named(name)(field, LATENTS, SIGMAS):
        if step.index == 2:
            velocity = step.velocity
            step.latents = value
            break
    assert torch.equal(step.velocity, velocity)
    if name in ("euler", "heun"):
        dt = 0 if step.sigma == step.sigma_next else step.sigma_next - step.sigma
        torch.testing.assert_close(step.after, value + dt * velocity)
    assert (step.after - run(named(name))[2].after).abs().max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_written_result_stays_what_later_corrections_start_from(name):
    """With a velocity that no later prediction contradicts, a shift of the latents is carried to the end."""
    velocity = torch.randn_like(LATENTS)
    shift = torch.randn_like(LATENTS)
    at = 1

    def ends(shifted):
        for step in named(name)(lambda *_: (velocity, None), LATENTS, SIGMAS):
            if step.index == at and shifted:
                step.after = step.after + shift
        return step.after

    moved = ends(True) - ends(False)
    if name in ("euler", "heun"):
        torch.testing.assert_close(moved, shift, rtol=0, atol=5e-6)
    elif name == "stochastic":  # x0 carries it on, in the share that is not drawn anew
        share = math.prod(1 - sigma for sigma in SIGMAS[at + 2 :])
        torch.testing.assert_close(moved, share * shift, rtol=0, atol=5e-6)
    else:  # x0 moves, too: multi-step samplers extrapolate that, and the drift depends on the latents
        assert 0.5 < (moved * shift).sum() / (shift * shift).sum() < 1.5


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_flow_to_the_noise(name):
    latents = LATENTS.double().requires_grad_()
    small = SIGMAS[2:]

    def end(latents):
        return list(named(name)(lambda x, s: (torch.tanh(x + s), None), latents, small))[-1].after

    (gradient,) = torch.autograd.grad(end(latents).sum(), latents)
    along = torch.randn_like(latents)
    difference = (end(latents + 1e-2 * along) - end(latents - 1e-2 * along)).sum() / 2e-2
    torch.testing.assert_close((gradient * along).sum(), difference, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [0.6, 0.0], [1.0, 0.5, 0.0, 0.0], [0.9, 0.4, 0.2]])
def test_short_and_unusual_schedules(name, sigmas):
    """One step; a start below 1; sigmas with a 0 of their own, whose step moves nothing; no 0 at all."""
    steps = run(named(name), sigmas=sigmas)
    assert len(steps) == count_predictions(name, sigmas)
    assert all(step.after.isfinite().all() for step in steps)
    if len(sigmas) == 2:  # whatever the sampler, x0
        torch.testing.assert_close(steps[-1].after, steps[0].x0)
    if sigmas[-2] == 0:
        torch.testing.assert_close(steps[-1].after, steps[-1].latents)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_keep_their_dtype(name, dtype):
    steps = run(named(name), latents=LATENTS.to(dtype))
    assert all(step.after.dtype == dtype for step in steps)
    exact = run(named(name), latents=LATENTS.to(dtype).double())[-1].after
    error = (steps[-1].after.double() - exact).abs().max() / exact.abs().max()
    # as many last digits as there are steps, and the float32 of Euler's step
    assert error < 2 * len(steps) * max(torch.finfo(dtype).eps, 1e-7)


# What is preserved


class Kept:
    """Keeps the tokens where the mask is 0 on their own straight way from noise to `clean`."""

    def __init__(self, mask, clean, noise):
        self.mask, self.clean, self.noise, self.seen = mask, clean, noise, []

    def before(self, latents, sigma, _interval):
        self.seen.append(("before", sigma))
        return latents

    def velocity(self, velocity, latents, sigma, _interval):
        assert latents.shape == velocity.shape
        self.seen.append(("velocity", sigma))
        return velocity

    def after(self, latents, sigma, _interval):
        self.seen.append(("after", sigma))
        known = (1 - sigma) * self.clean + sigma * self.noise
        return torch.where(self.mask > 0, latents, known)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_preserved_ends_as_it_is_and_is_seen_in_every_prediction(name):
    mask = (torch.arange(6) < 2).float()[None, :, None]
    clean = torch.randn_like(LATENTS)
    kept = Kept(mask, clean, LATENTS)
    outside = (mask == 0).expand_as(clean)
    for step in named(name)(field, LATENTS, SIGMAS, TrueCFG(2.0), kept):
        known = (1 - step.sigma) * clean + step.sigma * LATENTS
        assert torch.equal(step.latents[outside], known[outside])
    assert torch.equal(step.after[outside], clean[outside])
    assert (step.after - clean)[~outside].abs().min() > 0
    assert {place for place, _ in kept.seen} == {"before", "velocity", "after"}
    assert [sigma for place, sigma in kept.seen if place == "before"] == [
        step.sigma for step in run(named(name))
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_preserving_nothing_changes_no_bit(name):
    everything = Kept(torch.ones(1, 6, 1), LATENTS, LATENTS)
    for plain, kept in zip(run(named(name)), run(named(name), preserve=everything), strict=True):
        assert torch.equal(plain.after, kept.after)


# Intervals, labels and states


def test_switches_count_intervals_where_an_interval_has_two_predictions():
    labels, guided = [], []

    def predict(latents, sigma, guided_now=True, **only):
        labels.append(current_labels())
        guided.append(only.get("guided", guided_now))
        return field(latents, sigma)

    steps = run(heun, predict, guidance=TrueCFG(3.0, Guidance(steps=(1, 3))))
    assert [one["step"] for one in labels] == [step.index for step in steps] == list(range(9))
    assert [one["interval"] for one in labels] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert [one["sigma"] for one in labels] == [step.sigma for step in steps]
    assert guided == [False, False, True, True, True, True, False, False, False]
    ends = [0.9, 0.9, 0.7, 0.7, 0.35, 0.35, 0.1, 0.1, 0.0]
    assert [step.sigma_next for step in steps] == pytest.approx(ends)
    with pytest.raises(ValueError, match=r"guided steps are \(5, 9\), but the run has 5"):
        next(heun(predict, LATENTS, SIGMAS, TrueCFG(3.0, Guidance(steps=(5, 9)))))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_guided_interval_after_the_last_step_is_refused(name):
    with pytest.raises(ValueError, match="guided steps are"):
        next(named(name)(field, LATENTS, SIGMAS, TrueCFG(3.0, Guidance(steps=(5, 6)))))


@pytest.mark.parametrize("name", SAMPLERS)
def test_records_caches_and_patches_know_each_prediction(name):
    mmdit = randomise_(MMDiT(CONFIG)).requires_grad_(False)
    predict = predictor(mmdit, conditioning(), guided=True)
    recorder = Recorder()
    with taps(mmdit, {"blocks.0.img_out": recorder}):
        plain = run(named(name), predict, guidance=TrueCFG(2.0))
    keys = recorder.of("blocks.0.img_out")
    assert {key.call for key in keys} == {0} and len(keys) == 2 * len(plain)
    with taps(mmdit, {"blocks.0.img_out": patch_from(recorder)}):
        again = run(named(name), predict, guidance=TrueCFG(2.0))
    torch.testing.assert_close(again[-1].after, plain[-1].after, rtol=0, atol=1e-5)
    with first_block_cache(mmdit, threshold=1e9) as cache:  # all follow one another
        run(named(name), predict, guidance=TrueCFG(2.0))
    assert (cache.computed, cache.skipped) == (2, 2 * len(plain) - 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_momentum_goes_from_prediction_to_prediction(name):
    rule = Guidance(eta=0.0, momentum=-0.5, norm="none")
    steps = run(named(name), guidance=TrueCFG(3.0, rule))
    state = None
    for step in steps:
        state = TrueCFG(3.0, rule).average(step.cond, step.uncond, step.sigma, state)
        assert torch.equal(step.average, state)


# Orders of convergence


def tangent(x, _sigma):
    """Solved by tan: dx/dsigma = 1 + x^2."""
    return 1 + x**2, None


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
def test_the_order_over_the_whole_schedule(name, order):
    start = torch.tensor([[[0.9, 0.3, 1.5]]], dtype=torch.float64)
    exact = torch.tan(torch.atan(start) - 1)

    def error(count):
        sigmas = torch.linspace(1, 0, count + 1).tolist()
        return (list(SAMPLERS[name](tangent, start, sigmas))[-1].after - exact).abs().max()

    observed = math.log2(error(32) / error(64))
    assert abs(observed - order) < 0.15


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_the_order_in_even_steps_of_the_signal_to_noise_ratio(name, order):
    """The multi-step samplers extrapolate there. UniPC gains an order by its corrector."""
    start = torch.tensor([[[0.9, 0.3, 1.5]]], dtype=torch.float64)
    exact = torch.tan(torch.atan(start) - 0.6)

    def error(count):
        ends = math.log(0.2 / 0.8), math.log(0.8 / 0.2)
        lambdas = torch.linspace(*ends, count + 1, dtype=torch.float64)
        sigmas = torch.sigmoid(-lambdas).tolist()
        return (list(SAMPLERS[name](tangent, start, sigmas))[-1].after - exact).abs().max()

    observed = math.log2(error(40) / error(80))
    assert abs(observed - order) < 0.3


# Draws


def gaussian(mean, spread):
    """The exact velocity for data N(mean, spread^2): the expected noise - x0 at x."""

    def predict(x, sigma):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        slope = (sigma - (1 - sigma) * spread**2) / variance
        return slope * (x - (1 - sigma) * mean) - mean, None

    return predict


def test_the_sde_has_the_marginals_of_the_flow():
    """Of drawn samples; the tolerance is five standard errors and the steps' own error.

    The first steps from sigma 1 spread the samples more, at any width: there the noise of a step is as large
    as that of the latents. That is forgotten until sigma 0.5.
    """
    mean, spread, count, steps = 1.5, 0.4, 40_000, 200
    latents = torch.randn(1, count, 1, generator=torch.Generator().manual_seed(1))
    sampler = partial(flow_sde, eta=0.7, generator=torch.Generator().manual_seed(2))
    seen = 0
    for step in sampler(gaussian(mean, spread), latents, torch.linspace(1, 0, steps + 1).tolist()):
        if step.sigma_next < 0.5:
            wanted = math.hypot((1 - step.sigma_next) * spread, step.sigma_next)
            error = 5 / count**0.5 + 1 / steps
            assert abs(step.after.mean() - (1 - step.sigma_next) * mean) < wanted * error
            assert abs(step.after.std() / wanted - 1) < error
            seen += 1
    assert seen == 100


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.2])
def test_the_sdes_marginals_converge_to_those_of_the_flow(eta):
    """Without sampling: for Gaussian data a step is linear, and its two moments are known."""
    mean, spread = 1.5, 0.4

    def deviation(sigma):
        return math.hypot((1 - sigma) * spread, sigma)

    def error(count):
        sigmas = torch.linspace(0.9, 0, count + 1, dtype=torch.float64).tolist()
        m, variance, worst = (1 - sigmas[0]) * mean, deviation(sigmas[0]) ** 2, 0.0
        probes = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
        for step in flow_sde(gaussian(mean, spread), probes, sigmas, eta=eta):
            if step.transition is None:
                break
            after, std = step.transition
            base, slope = after[0, 0, 0].item(), (after[0, 1, 0] - after[0, 0, 0]).item()
            m, variance = base + slope * m, slope**2 * variance + std.item() ** 2
            wanted = deviation(step.sigma_next)
            worst = max(worst, abs(variance**0.5 / wanted - 1), abs(m - (1 - step.sigma_next) * mean))
            step.after = probes
        return worst

    errors = [error(count) for count in (100, 200, 400)]
    assert errors[2] < 0.01
    for coarse, fine in pairwise(errors):
        assert 1.6 < coarse / fine < 2.4  # of first order


def test_the_stochastic_sampler_keeps_the_marginals_of_a_single_datum():
    """There x0 is exact, and each step draws the flow's own noise anew."""
    count = 40_000
    latents = torch.randn(1, count, 1, generator=torch.Generator().manual_seed(1))
    sampler = partial(stochastic, generator=torch.Generator().manual_seed(2))
    for step in sampler(gaussian(1.5, 0.0), latents, SIGMAS):
        assert abs(step.after.mean() - (1 - step.sigma_next) * 1.5) < 5 * step.sigma_next / count**0.5 + 1e-6
        assert abs(step.after.std() - step.sigma_next) < 5 * step.sigma_next / count**0.5 + 1e-6


def test_the_sde_is_the_papers_formula():
    eta, generator = 0.9, torch.Generator().manual_seed(3)
    steps = run(partial(flow_sde, eta=eta, generator=torch.Generator().manual_seed(3)))
    for step in steps[:-1]:
        x, v, sigma = step.latents, step.velocity, torch.tensor(step.sigma)
        below = SIGMAS[1] if step.sigma == 1 else step.sigma
        s = eta * math.sqrt(step.sigma / (1 - below))
        dt = step.sigma_next - step.sigma
        mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        std = s * math.sqrt(-dt)
        noise = torch.randn(2, 6, 8, generator=generator)
        torch.testing.assert_close(step.transition[0], mean)
        assert step.transition[1].item() == pytest.approx(std)
        torch.testing.assert_close(step.after, mean + std * noise)
        wanted = Normal(mean, std).log_prob(step.after).mean(dim=(1, 2))
        torch.testing.assert_close(step.log_prob(), wanted)
    last = steps[-1]
    assert last.transition is None and torch.equal(
        last.after, next(euler(field, last.latents, [0.1, 0])).after
    )


def test_without_noise_the_sde_is_eulers():
    plain = run(SAMPLERS["euler"])[-1].after
    assert torch.equal(run(partial(flow_sde, eta=0.0))[-1].after, plain)
    assert torch.equal(run(partial(flow_sde, window=(2, 2)))[-1].after, plain)


def test_draws_are_made_in_the_window_only():
    generator = torch.Generator().manual_seed(4)
    steps = run(partial(flow_sde, window=(1, 3), generator=generator))
    assert [step.transition is not None for step in steps] == [False, True, True, False, False]
    other = torch.Generator().manual_seed(4)
    torch.randn(2, 2, 6, 8, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())
    with pytest.raises(ValueError, match="log_prob of step 0, which draws nothing: wanted a step of"):
        steps[0].log_prob()


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollouts_log_probabilities_are_computed_again_bit_by_bit(name, dtype):
    saved, probabilities = [LATENTS.to(dtype)], []
    for step in named(name)(field, saved[0], SIGMAS, TrueCFG(3.0)):
        if step.transition is not None:
            probabilities.append(step.log_prob())
        saved.append(step.after)
    assert len(probabilities) == 4 and probabilities[0].shape == (2,)
    assert probabilities[0].dtype == torch.float32
    for step in named(name, seed=99)(field, saved[0], SIGMAS, TrueCFG(3.0)):
        following = saved[step.index + 1]
        if step.transition is not None:
            assert torch.equal(step.log_prob(following), probabilities[step.index])
        step.after = following
        if step.transition is not None:
            assert torch.equal(step.log_prob(), probabilities[step.index])
    assert torch.equal(step.after, saved[-1])


@pytest.mark.parametrize("name", DRAWING)
def test_the_log_probability_has_the_gradient_of_the_velocity_alone(name):
    shift = torch.zeros_like(LATENTS, requires_grad=True)

    def predict(latents, sigma):
        return field(latents.detach(), sigma)[0] + shift, None

    for step in named(name)(predict, LATENTS, SIGMAS):
        if step.index == 2:
            break
    (gradient,) = torch.autograd.grad(step.log_prob().sum(), shift, retain_graph=True)
    mean, std = step.transition
    (of_mean,) = torch.autograd.grad(mean.sum(), shift)  # the factor of v
    wanted = (step.after - mean) / std**2 * of_mean / LATENTS[0].numel()
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", DRAWING)
def test_a_list_of_generators_draws_row_by_row(name):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    both = run(sampler_of(name, generators()))[-1].after
    for k, one in enumerate(generators()):
        alone = run(sampler_of(name, one), latents=LATENTS[k : k + 1])[-1].after
        torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="got 2 generators, wanted one, or a list of 3"):
        next(sampler_of(name, generators())(field, torch.randn(3, 6, 8), SIGMAS))


def test_what_has_no_probability_says_so():
    for name in DETERMINISTIC:
        with pytest.raises(ValueError, match="log_prob of step 1, which draws nothing"):
            run(named(name))[1].log_prob()
    with pytest.raises(ValueError, match="log_prob of step 4, which draws nothing"):
        run(named("stochastic"))[-1].log_prob()
    everything = Kept(torch.ones(1, 6, 1), LATENTS, LATENTS)
    with pytest.raises(ValueError, match="preserves a part of the latents"):
        run(named("flow_sde"), preserve=everything)[0].log_prob()
    with pytest.raises(ValueError, match=r"latents of shape \(1, 6, 8\), wanted \(2, 6, 8\)"):
        run(named("flow_sde"))[0].log_prob(LATENTS[:1])


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eta": -0.1}, r"eta is -0\.1, wanted a number of at least 0"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"window": (0, 5)}, r"window is \(0, 5\), wanted .* within the 5 steps, without the last"),
        ({"window": (3, 2)}, r"window is \(3, 2\)"),
        ({"window": (-1, 2)}, r"window is \(-1, 2\)"),
    ],
)
def test_options_of_the_sde_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        next(flow_sde(field, LATENTS, SIGMAS, **options))


def test_an_unknown_name_is_answered_with_a_close_one():
    with pytest.raises(
        ValueError, match=r"sampler is 'dpm\+\+_2m', wanted one of euler, .*did you mean 'dpmpp_2m'"
    ):
        sampler_of("dpm++_2m")
    with pytest.raises(ValueError, match=r"sampler is 3, wanted one of euler, stochastic"):
        sampler_of(3)
    own = partial(flow_sde, eta=1.2)
    assert sampler_of(own) is own and sampler_of("unipc") is unipc and sampler_of("dpmpp_2m") is dpmpp_2m
