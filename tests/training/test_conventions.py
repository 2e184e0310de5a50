"""Noise levels, weights and timesteps against their formulas: as distributions, and point by point."""

import dataclasses
import math
from statistics import NormalDist

import pytest
import torch

from qwenedit.training.conventions import CONVENTIONS, WEIGHTINGS, Timestep, Weighting, convention
from qwenedit.training.noise_levels import (
    NOISE_LEVELS,
    AIToolkit,
    DiffSynth,
    Diffusers,
    LogSNR,
    Qinglong,
    QwenShift,
    Shift,
    Uniform,
    diffsynth_schedule,
)

DRAWS = 10_000
# Dvoretzky, Kiefer, Wolfowitz and Massart: a distribution's own draws stray further once in a million tests.
STRAY = math.sqrt(math.log(2e6) / (2 * DRAWS))
TOKENS = 1024
MU = 0.5 + (TOKENS - 256) / (8192 - 256) * 0.4
PHI = NormalDist().cdf


def logit(x):
    return math.log(x / (1 - x))


def shifted(sigma, s, k=1.0):
    """P(s t / (1 + (s - 1) t) <= sigma) for t = sigmoid(k N)."""
    t = sigma / (s - (s - 1) * sigma)
    return PHI(logit(t) / k)


def logsnr(sigma, mean=0.0, std=1.0):
    """P(sigmoid(-N / 2) <= sigma) = P(N >= -2 logit(sigma))."""
    return 1 - PHI((-2 * logit(sigma) - mean) / std)


def table(of_t):
    """P(sigma <= (1000 - i) / 1000) = P(t >= i / 1000), for the steps i."""
    return lambda sigma: 1 - of_t(round(1000 - 1000 * sigma) / 1000)


def mode(x, s=1.29):
    """P(t <= x), for the t that falls with u."""
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        t = 1 - u - s * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        low, high = (u, high) if t > x else (low, u)
    return 1 - low


def diffsynth(sigma):
    """By counting the 1000 equally likely levels."""
    levels = DiffSynth().sigma((torch.arange(1000) + 0.5) / 1000)
    return float((levels <= sigma + 1e-7).float().mean())


DISTRIBUTIONS = {
    "uniform": (Uniform(), lambda sigma: sigma),
    "diffusers": (Diffusers(), table(lambda t: t)),
    "diffusers logit-normal": (
        Diffusers(density="logit_normal", logit_mean=-0.5, logit_std=1.5),
        table(lambda t: PHI((logit(t) + 0.5) / 1.5) if t else 0.0),
    ),
    "diffusers mode": (Diffusers(density="mode"), table(mode)),
    "shift": (Shift(shift=3.0), lambda sigma: shifted(sigma, 3.0)),
    "shift, wide": (Shift(shift=0.5, sigmoid_scale=2.0), lambda sigma: shifted(sigma, 0.5, 2.0)),
    "qwen_shift": (QwenShift(), lambda sigma: shifted(sigma, math.exp(MU))),
    "logsnr": (LogSNR(logit_mean=1.0, logit_std=2.0), lambda sigma: logsnr(sigma, 1.0, 2.0)),
    "qinglong": (
        Qinglong(),
        lambda sigma: 0.95 * shifted(sigma, math.exp(MU)) + 0.05 * logsnr(sigma, 5.36),
    ),
    "diffsynth": (DiffSynth(), diffsynth),
    "ai_toolkit": (AIToolkit(), lambda sigma: 1 - PHI(logit(1 - sigma))),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_distribution_of_the_formula(name):
    levels, cdf = DISTRIBUTIONS[name]
    drawn = levels.draw(DRAWS, torch.Generator().manual_seed(0), tokens=TOKENS)
    assert drawn.shape == (DRAWS,) and drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() <= 1
    again = levels.draw(DRAWS, torch.Generator().manual_seed(0), tokens=TOKENS)
    assert torch.equal(drawn, again)
    values = drawn.unique().tolist()
    for value in values[:: max(1, len(values) // 500)]:
        if value < 1:
            share = float((drawn <= value).float().mean())
            assert abs(share - cdf(value)) < STRAY, f"{share} of draws up to {value}, wanted {cdf(value)}"


def test_another_distribution_would_be_noticed():
    """The tolerance tells apart what trainers confuse: shifts, and qinglong without its rare part."""
    for one, other in (("qwen_shift", "shift"), ("qwen_shift", "qinglong"), ("diffusers", "diffusers mode")):
        cdfs = DISTRIBUTIONS[one][1], DISTRIBUTIONS[other][1]
        apart = max(abs(cdfs[0](k / 1000) - cdfs[1](k / 1000)) for k in range(1, 1000))
        assert apart > 1.5 * STRAY, f"{one} and {other}: {apart}"


U = (1e-6, 0.0301, 0.25, 0.5, 0.6789, 0.949, 0.9501, 0.97, 0.9999)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def normal(u):
    return NormalDist().inv_cdf(u)


def shift(u, s, k=1.0):
    t = sigmoid(k * normal(u))
    return s * t / (1 + (s - 1) * t)


POINTS = {
    "uniform": (Uniform(), lambda u: u),
    "shift": (Shift(shift=3.0), lambda u: shift(u, 3.0)),
    "shift, wide": (Shift(shift=0.5, sigmoid_scale=2.0), lambda u: shift(u, 0.5, 2.0)),
    "qwen_shift": (QwenShift(), lambda u: shift(u, math.exp(MU))),
    "logsnr": (LogSNR(logit_mean=1.0, logit_std=2.0), lambda u: sigmoid(-(1 + 2 * normal(u)) / 2)),
    "qinglong": (
        Qinglong(),
        lambda u: (
            shift(u / 0.95, math.exp(MU)) if u < 0.95 else sigmoid(-(5.36 + normal((u - 0.95) / 0.05)) / 2)
        ),
    ),
    "ai_toolkit": (AIToolkit(), lambda u: 1 - sigmoid(normal(u))),
}


@pytest.mark.parametrize("name", POINTS)
def test_levels_point_by_point(name):
    levels, formula = POINTS[name]
    got = levels.sigma(torch.tensor(U, dtype=torch.float64), TOKENS).tolist()
    assert got == pytest.approx([formula(u) for u in U], rel=1e-9)


WEIGHTS = {
    "none": lambda sigma: 1.0,
    "sigma_sqrt": lambda sigma: sigma**-2,
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma * sigma)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_draws(name):
    sigma = Uniform().draw(DRAWS, torch.Generator().manual_seed(1), tokens=TOKENS)
    got = Weighting(name).of(sigma)
    assert got.shape == sigma.shape
    assert got.tolist() == pytest.approx([WEIGHTS[name](x) for x in sigma.tolist()], rel=1e-5)


def test_diffsynths_weights_are_its_bell_and_sum_to_1000_over_its_schedule():
    schedule = diffsynth_schedule().double()
    weights = Weighting("diffsynth").of(schedule)
    bell = [math.exp(-2 * ((1000 * x - 500) / 1000) ** 2) for x in schedule.tolist()]
    raised = [y - min(bell) for y in bell]
    assert weights.tolist() == pytest.approx([y * 1000 / sum(raised) for y in raised], abs=1e-6)
    assert float(weights.sum()) == pytest.approx(1000) and weights.min() == 0


def test_even_numbers_stratify_a_batch():
    levels = QwenShift().sigma((torch.arange(64) + 0.5) / 64, TOKENS)
    assert levels.diff().min() > 0


def test_timesteps():
    sigma = torch.tensor([0.0, 0.2501, 0.873, 1.0])
    assert Timestep().of(sigma) is sigma
    assert Timestep(offset=1.0).of(sigma).tolist() == pytest.approx([0.001, 0.2511, 0.874, 1.001])
    assert Timestep(bfloat16=True).of(sigma).tolist() == [0.0, 0.25, 0.87109375, 1.0]  # 872 / 1000, rounded


def test_names():
    assert set(CONVENTIONS) == {"qwenedit", "diffusers", "musubi", "diffsynth", "ai_toolkit"}
    assert set(WEIGHTINGS) == {*WEIGHTS, "diffsynth"}
    assert {type(one) for one, _ in DISTRIBUTIONS.values()} == set(NOISE_LEVELS.values())
    assert convention("musubi").timestep == Timestep(offset=1.0)
    changed = dataclasses.replace(convention("diffusers"), levels=Diffusers(density="mode"))
    assert changed.posterior == "sample" and changed.levels.mode_scale == 1.29


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: convention("kohya"), "the convention is 'kohya', wanted one of qwenedit, diffusers"),
        (lambda: Weighting("min_snr"), "the weighting is 'min_snr', wanted one of none"),
        (lambda: Diffusers(density="cosine"), "density is 'cosine', wanted 'uniform'"),
        (lambda: Shift(shift=math.inf), "shift is inf, wanted a finite number"),
        (lambda: Shift(shift=0.0), "shift is 0.0, wanted a number above 0"),
        (lambda: LogSNR(logit_std=-1.0), "logit_std is -1.0, wanted a number above 0"),
        (lambda: Timestep(offset=math.nan), "a timestep's offset is nan"),
        (lambda: convention(["musubi"]), "the convention is"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
