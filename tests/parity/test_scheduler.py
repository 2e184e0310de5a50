"""Sigmas, noise, packing, guidance and the Euler step against diffusers, bit by bit."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.latents import denormalise, initial_noise, normalise, pack, unpack
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import euler
from qwenedit.sampling.scheduler import FlowMatchScheduler, LayeredScheduler

OFFICIAL = dict(
    num_train_timesteps=1000,
    shift=1.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=0.9,
    base_image_seq_len=256,
    max_image_seq_len=8192,
    shift_terminal=0.02,
    time_shift_type="exponential",
)
LIGHTNING = {**OFFICIAL, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
CONFIGS = [
    OFFICIAL,
    LIGHTNING,
    {**OFFICIAL, "time_shift_type": "linear", "shift_terminal": None},
    {**OFFICIAL, "time_shift_type": "linear", "shift_terminal": False},  # Layered's
    {**OFFICIAL, "time_shift_type": "linear"},
    {**OFFICIAL, "use_dynamic_shifting": False, "shift": 3.0},
    {**OFFICIAL, "use_dynamic_shifting": False, "shift": 1.7, "shift_terminal": None},
]


KINDS = [FlowMatchScheduler, LayeredScheduler]


def reference_sigmas(config, steps, tokens, custom=None, kind=FlowMatchScheduler):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu, even = calculate_shift(tokens, *(config[key] for key in keys)), np.linspace(1.0, 1 / steps, steps)
    if kind is LayeredScheduler:  # as its pipeline has it
        mu, even = (tokens / (256 * 256 / 16 / 16)) ** 0.5, np.linspace(1.0, 0, steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=even if custom is None else custom, mu=mu)
    return scheduler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
@given(steps=st.integers(2, 120), tokens=st.integers(1, 20000))
def test_sigmas_equal_the_reference_bit_by_bit(kind, config, steps, tokens):
    ours = kind(**config).sigmas(steps, tokens)
    assert torch.equal(torch.tensor(ours), reference_sigmas(config, steps, tokens, kind=kind).sigmas)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
@given(custom=st.lists(st.integers(10, 990).map(lambda n: n / 1000), min_size=2, max_size=20, unique=True))
def test_custom_sigmas_equal_the_reference_bit_by_bit(kind, config, custom):
    custom = sorted(custom, reverse=True)
    ours = kind(**config).sigmas(len(custom), 777, custom)
    assert torch.equal(torch.tensor(ours), reference_sigmas(config, len(custom), 777, custom, kind).sigmas)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    batch=st.integers(1, 3),
    listed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_initial_noise_is_the_pipelines(rows, columns, batch, listed, dtype):
    def generators():
        made = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return made if listed else made[0]

    noise = randn_tensor(
        (batch, 1, 16, 2 * rows, 2 * columns), generators(), device=torch.device("cpu"), dtype=dtype
    )
    packed = QwenImageEditPipeline._pack_latents(noise, batch, 16, 2 * rows, 2 * columns)
    ours = initial_noise(
        batch, 16, (1, rows, columns), generator=generators(), device=torch.device("cpu"), dtype=dtype
    )
    assert torch.equal(ours, packed)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), batch=st.integers(1, 3))
def test_pack_and_unpack_equal_the_pipelines(rows, columns, batch):
    latents = torch.randn(batch, 4, 1, 2 * rows, 2 * columns)
    packed = QwenImageEditPipeline._pack_latents(latents, batch, 4, 2 * rows, 2 * columns)
    assert torch.equal(pack(latents), packed)
    unpacked = QwenImageEditPipeline._unpack_latents(packed, 16 * rows, 16 * columns, 8)
    assert torch.equal(unpack(packed, (1, rows, columns)), unpacked)
    assert torch.equal(unpacked, latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalisation_has_the_pipelines_casts(dtype):
    mean, std = (-0.7571, 0.1075, 0.9653), (2.8184, 1.4541, 0.3275)
    latents = torch.randn(2, 3, 1, 4, 6, dtype=dtype)
    mean_ = torch.tensor(mean).view(1, 3, 1, 1, 1).to(dtype)
    std_ = torch.tensor(std).view(1, 3, 1, 1, 1).to(dtype)
    assert torch.equal(normalise(latents, mean, std), (latents - mean_) / std_)
    assert torch.equal(denormalise(latents, mean, std), latents / (1.0 / std_) + mean_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
@given(seed=st.integers(0, 99), scale=st.floats(1.5, 9))
def test_the_loop_equals_the_reference_bit_by_bit(dtype, guided, seed, scale):
    """The same made-up velocities through our loop and through the pipelines' arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    steps, shape = 5, (2, 6, 8)
    latents = torch.randn(shape, generator=generator, dtype=dtype)
    conds = torch.randn(steps, *shape, generator=generator, dtype=dtype)
    unconds = torch.randn(steps, *shape, generator=generator, dtype=dtype)

    scheduler = reference_sigmas(OFFICIAL, steps, shape[1])
    scheduler.set_begin_index(0)
    reference = latents
    for i, t in enumerate(scheduler.timesteps):
        velocity = conds[i]
        if guided:
            combined = unconds[i] + scale * (conds[i] - unconds[i])
            velocity = combined * (conds[i].norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        reference = scheduler.step(velocity, t, reference, return_dict=False)[0]

    index = iter(range(steps))

    def predict(_latents, _sigma):
        i = next(index)
        return conds[i], unconds[i] if guided else None

    sigmas = FlowMatchScheduler(**OFFICIAL).sigmas(steps, shape[1])
    for step in euler(predict, latents, sigmas, TrueCFG(scale)):
        ours = step.after
    assert torch.equal(ours, reference)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shift_terminal": 1.0}, r"shift_terminal is 1\.0, wanted a number between 0 and 1"),
        ({"shift_terminal": -0.1}, r"shift_terminal is -0\.1"),
        ({"max_image_seq_len": 256}, "base_image_seq_len and max_image_seq_len are both 256"),
        ({"time_shift_type": "cosine"}, "time_shift_type is 'cosine'"),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500, wanted 1000"),
    ],
)
def test_configs_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchScheduler(**{**OFFICIAL, **changes})
