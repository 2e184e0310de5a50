"""The samplers and curves against diffusers' schedulers, step by step, on the same made-up velocities.

UniPC and the stochastic step of diffusers 0.42 are those of 0.39.0; outputs that 0.42.1 recorded are in
`tests/golden`.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

import qwenedit
from qwenedit.sampling.samplers import SAMPLERS, sampler_of
from qwenedit.sampling.scheduler import CURVES, FlowMatchScheduler
from qwenedit.sampling.switched import schedule
from qwenedit.switches import Time
from tests.parity.test_scheduler import CONFIGS, KINDS, LIGHTNING, OFFICIAL, reference_sigmas
from tests.support import FP32, assert_as_close_as, assert_close
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
MULTI_STEP = {
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
ALMOST_1 = torch.tensor(1 - 1e-6).item()  # where the reference starts in place of 1


def field(latents, sigma):
    return torch.tanh(1.3 * latents + sigma) + 0.2 * latents.roll(1, -1)


def noise(seed, dtype=torch.float32, shape=(2, 6, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference_steps(scheduler, latents, **step):
    """Latents after each of the scheduler's steps; the velocities are the field's at its own latents."""
    scheduler.set_begin_index(0)
    for sigma, time in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        latents = scheduler.step(field(latents, sigma), time, latents, **step, return_dict=False)[0]
        yield latents


def our_steps(sampler, latents, sigmas):
    for step in sampler(lambda x, sigma: (field(x, sigma), None), latents, sigmas):
        yield step.after


def with_sigmas(kind, sigmas, dtype=torch.float32, **config):
    """A multi-step scheduler on given sigmas, for steps in a dtype."""
    scheduler = kind(**FLOW, **config)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=dtype)
    return scheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [OFFICIAL, LIGHTNING])
@given(steps=st.integers(2, 30), seed=st.integers(0, 99), listed=st.booleans())
def test_the_stochastic_sampler_equals_the_reference_bit_by_bit(dtype, config, steps, seed, listed):
    def generators():
        made = [torch.Generator().manual_seed(seed + k) for k in range(2)]
        return made if listed else made[0]

    reference = reference_sigmas({**config, "stochastic_sampling": True}, steps, 6)
    sigmas = FlowMatchScheduler(**config).sigmas(steps, 6)
    sampler = sampler_of("stochastic", generators())
    theirs = reference_steps(reference, noise(seed, dtype), generator=generators())
    for ours, wanted in zip(our_steps(sampler, noise(seed, dtype), sigmas), theirs, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", MULTI_STEP)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 14, 15, 20, 50])
@pytest.mark.parametrize("tokens", [16, 1024, 8000])
def test_multi_step_samplers_equal_the_reference(name, steps, tokens):
    """By their rounding alone, where both start at the same sigma. From sigma 1 the reference takes a number
    next to it as the place of the first prediction, too."""
    sigmas = [ALMOST_1, *FlowMatchScheduler(**OFFICIAL).sigmas(steps, tokens)[1:]]
    runs = [
        our_steps(SAMPLERS[name], noise(0), sigmas),
        reference_steps(with_sigmas(MULTI_STEP[name], sigmas), noise(0)),
        our_steps(SAMPLERS[name], noise(0, torch.float64), sigmas),
        our_steps(SAMPLERS[name], noise(0), [1.0, *sigmas[1:]]),
    ]
    for ours, wanted, exact, from_1 in zip(*runs, strict=True):
        assert_as_close_as(ours, wanted, exact)
        assert_close(from_1, wanted, FP32)


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_unipc_equals_the_reference_in_float64(steps):
    sigmas = [ALMOST_1, *FlowMatchScheduler(**OFFICIAL).sigmas(steps, 300)[1:]]
    theirs = reference_steps(with_sigmas(MULTI_STEP["unipc"], sigmas, torch.float64), noise(0, torch.float64))
    for ours, wanted in zip(
        our_steps(SAMPLERS["unipc"], noise(0, torch.float64), sigmas), theirs, strict=True
    ):
        assert_close(ours, wanted, 1e-13)


@pytest.mark.parametrize("name", MULTI_STEP)
@pytest.mark.parametrize("steps", [3, 8, 20])
def test_multi_step_samplers_equal_the_reference_on_its_own_schedule(name, steps):
    scheduler = MULTI_STEP[name](**FLOW, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    runs = [
        our_steps(SAMPLERS[name], noise(1), scheduler.sigmas.tolist()),
        reference_steps(scheduler, noise(1)),
        our_steps(SAMPLERS[name], noise(1, torch.float64), scheduler.sigmas.tolist()),
    ]
    for ours, wanted, exact in zip(*runs, strict=True):
        assert_as_close_as(ours, wanted, exact)


@pytest.mark.parametrize("steps, tokens", [(4, 16), (8, 1024), (20, 4096), (50, 8000)])
def test_unipc_has_our_schedule_from_what_the_pipelines_pass_on(steps, tokens):
    ours = FlowMatchScheduler(**OFFICIAL)
    reference = diffusers.UniPCMultistepScheduler.from_config(ours.config, **FLOW)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas = torch.tensor(ours.sigmas(steps, tokens))
    torch.testing.assert_close(sigmas[1:], reference.sigmas[1:], rtol=0, atol=2.0**-23)
    assert reference.sigmas[0] == ALMOST_1 and sigmas[0] == 1
    theirs = reference_steps(reference, noise(2))
    for mine, wanted in zip(our_steps(SAMPLERS["unipc"], noise(2), sigmas.tolist()), theirs, strict=True):
        assert_close(mine, wanted, FP32)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_equals_the_reference(steps, shift):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = [*dict.fromkeys(scheduler.sigmas.tolist())]  # inner ones are there twice
    assert len(sigmas) == steps + 1
    predicted_at = (scheduler.timesteps / 1000).tolist()
    scheduler.set_begin_index(0)

    def theirs(latents):
        for sigma, time in zip(predicted_at, scheduler.timesteps, strict=True):
            latents = scheduler.step(field(latents, sigma), time, latents, return_dict=False)[0]
            yield latents

    runs = [
        our_steps(SAMPLERS["heun"], noise(3), sigmas),
        theirs(noise(3)),
        our_steps(SAMPLERS["heun"], noise(3, torch.float64), sigmas),
    ]
    count = 0
    for ours, wanted, exact in zip(*runs, strict=True):
        assert_as_close_as(ours, wanted, exact)
        count += 1
    assert count == 2 * steps - 1


LIVE = [name for name in CURVES if name != "beta"]  # the reference's needs scipy; see tests/golden


@pytest.mark.parametrize("curve", LIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
@given(steps=st.integers(2, 120), tokens=st.integers(1, 20000))
def test_curves_equal_the_reference_bit_by_bit(curve, kind, config, steps, tokens):
    config = {**config, f"use_{curve}_sigmas": True}
    ours = kind(**config).sigmas(steps, tokens)
    assert torch.equal(torch.tensor(ours), reference_sigmas(config, steps, tokens, kind=kind).sigmas)
    plain = kind(**{**config, f"use_{curve}_sigmas": False})
    assert schedule(plain, Time(sigmas=curve), steps, tokens) == ours


@pytest.mark.parametrize("curve", LIVE)
@given(custom=st.lists(st.integers(10, 990).map(lambda n: n / 1000), min_size=2, max_size=20, unique=True))
def test_curves_of_custom_sigmas_equal_the_reference_bit_by_bit(curve, custom):
    custom, config = sorted(custom, reverse=True), {**OFFICIAL, f"use_{curve}_sigmas": True}
    ours = FlowMatchScheduler(**config).sigmas(len(custom), 777, custom)
    assert torch.equal(torch.tensor(ours), reference_sigmas(config, len(custom), 777, custom).sigmas)


# Whole runs, with the scheduler of a script


class WithExactTimesteps(diffusers.UniPCMultistepScheduler):
    """The pipelines pass its timesteps on to the transformer, and it truncates them to whole numbers."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.timesteps = self.sigmas[:-1] * 1000


@pytest.mark.parametrize("kind", ["edit", "plus", "generate"])
@pytest.mark.parametrize(
    "scheduler, options",
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
        (diffusers.FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}),
        (diffusers.FlowMatchEulerDiscreteScheduler, {"use_exponential_sigmas": True}),
        (WithExactTimesteps, FLOW),
    ],
)
def test_whole_runs_with_a_scheduler_equal_the_reference(monkeypatch, kind, scheduler, options):
    """The reference's stochastic steps draw from torch's global generator, and so does a run without one."""
    tiny_areas(monkeypatch)
    folder = checkpoint(kind)
    ours, reference = qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)
    theirs = scheduler.from_config(reference.scheduler.config, **options)
    reference.scheduler = theirs
    if scheduler is WithExactTimesteps:
        theirs = diffusers.UniPCMultistepScheduler.from_config(ours.scheduler.config, **options)
    ours.scheduler = theirs
    images = {} if kind == "generate" else {"image": picture(64, 48)}
    call = {
        "prompt": "把圆形变成红色", "negative_prompt": " ", "true_cfg_scale": 3.0, "height": 48, "width": 64,
        "num_inference_steps": 4, "output_type": "latent", **images,
    }  # fmt: skip
    torch.manual_seed(11)
    wanted = reference(**call).images
    torch.manual_seed(11)
    got = ours(**call).images
    assert_close(got, wanted, 1e-4)
