"""Runs on the device: their bits, their generators, compiled blocks, and steps that wait for nothing."""

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.instruments.determinism import deterministic
from qwenedit.latents import initial_noise
from qwenedit.sampling.samplers import SAMPLERS

PROMPT = "make the circle red"
GRID = (1, 4, 4)


@pytest.fixture(scope="module")
def pipe(device):
    return qwenedit.load(device=device, dtype="bfloat16", progress=False)


@pytest.fixture(scope="module")
def example():
    return Image.open(mini.EXAMPLE).convert("RGB")


def edited(pipe, example, **options):
    options = {"num_inference_steps": 4, "output_type": "latent", **options}
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe.edit(example, PROMPT, **options).images


def test_two_runs_have_the_same_bits(pipe, example):
    with deterministic(pipe) as manifest:
        first, second = edited(pipe, example), edited(pipe, example)
    assert torch.equal(first, second) and manifest["device_name"]


def test_a_row_has_the_bits_of_its_single_run(device, example):
    pipe = qwenedit.load(device=device, dtype="float32", progress=False)
    pipe.micro_batch = 1
    seeds = [3, 5]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    both = edited(pipe, example, num_images_per_prompt=2, generator=generators)
    for row, seed in enumerate(seeds):
        alone = edited(pipe, example, generator=[torch.Generator().manual_seed(seed)])
        assert torch.equal(both[row : row + 1], alone)


def test_generators_of_the_host_draw_the_same_for_every_device(device):
    def noise(where, generator, dtype=torch.float32):
        return initial_noise(2, 16, GRID, generator=generator, device=where, dtype=dtype)

    for dtype in (torch.float32, torch.bfloat16):
        on_host = noise(torch.device("cpu"), torch.Generator().manual_seed(1), dtype)
        there = noise(device, torch.Generator().manual_seed(1), dtype)
        assert there.device.type == device.type and torch.equal(there.cpu(), on_host)


def test_generators_of_the_device(device):
    def noise(*seeds):
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        return initial_noise(2, 16, GRID, generator=generators, device=device, dtype=torch.float32)

    assert torch.equal(noise(1, 2), noise(1, 2))
    assert torch.equal(noise(1, 2)[1], noise(2, 1)[0]) and not torch.equal(noise(1, 2)[0], noise(1, 2)[1])


def test_compiled_blocks_are_close_to_uncompiled_ones(device, example):
    latents = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    options = {"latents": latents, "num_inference_steps": 2, "generator": None}
    plain = qwenedit.load(device=device, dtype="float32", progress=False)
    compiled = qwenedit.load(device=device, dtype="float32", progress=False, compile=True)
    wanted, got = (edited(one, example, **options) for one in (plain, compiled))
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_no_step_waits_for_the_device(pipe, example, monkeypatch, sampler):
    """torch raises an error where the host would wait."""
    monkeypatch.setattr(pipe, "check_finite", False)
    conditioning = pipe.condition(example, PROMPT)
    generator = torch.Generator(pipe.device).manual_seed(0)
    steps = pipe.steps(conditioning, num_inference_steps=3, sampler=sampler, generator=generator)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            last = step
        after = last.after
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(after).all()


@torch.no_grad()
def test_a_checked_step_waits_once(pipe, example):
    conditioning = pipe.condition(example, PROMPT)
    steps = pipe.steps(conditioning, num_inference_steps=3)
    next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in waits if "synchroniz" in str(one.message)]) == 1
