"""What a step does on a device: one wait, or none, and no result on the host, whatever acts on the run."""

import pytest
import torch

from qwenedit.dialects import TransformerRule
from qwenedit.instruments.inversion import invert
from qwenedit.sampling.samplers import SAMPLERS
from qwenedit.switches import Guidance, References, Switches, Time
from qwenedit.taps import taps
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

GRID = (1, 64, 64)
STEPS = 3
SWITCHES = {
    "none": Switches(),
    "without references": Switches(references=References(latents="left_out")),
    "references of zeros": Switches(references=References(latents="zeroed")),
    "references of noise": Switches(references=References(latents="noise")),
    "noisy references": Switches(references=References(sigma=0.3)),
    "references in some steps": Switches(references=References(steps=(0, 2))),
    "references in some blocks": Switches(references=References(blocks=(0, 1))),
    "references in the target's frame": Switches(references=References(frame="target")),
    "the other zero_cond_t": Switches(time=Time(zero_cond_t=False)),
    "the exact timestep": Switches(time=Time(rounding="exact")),
    "the timestep in bfloat16": Switches(time=Time(rounding="bfloat16")),
    "odd grids and texts elsewhere": Switches(
        transformer=TransformerRule(odd_grids="positive", text_start="target", rope="rounded")
    ),
    "the sigmas of Lightning": Switches(time=Time(sigmas="lightning")),
    "given sigmas": Switches(time=Time(sigmas=(1.0, 0.7, 0.3))),
    **{
        f"norm {norm}": Switches(guidance=Guidance(norm=norm))
        for norm in ("none", "clamp", "channel", "global", "comfy_x0")
    },
    "guidance in some steps": Switches(guidance=Guidance(steps=(1, 2))),
    "rescaled guidance": Switches(guidance=Guidance(norm="none", rescale=0.7)),
    "projected guidance": Switches(guidance=Guidance(norm="none", eta=0.0, momentum=-0.5, threshold=10.0)),
}


@pytest.fixture(scope="module")
def device():
    with fake_device() as device, torch.no_grad():
        yield device


@pytest.fixture(scope="module")
def pipe(device, tmp_path_factory):  # noqa: ARG001
    folder = write_sparse(tmp_path_factory.mktemp("official"), blocks={"transformer": 2})
    return models.load(folder, text_encoder=False)


def waits(device, steps, taken=STEPS):
    """The waits of each step, from one to the next, after what comes before the first."""
    counts, on_cpu = [], set()
    for step in steps:
        counts.append(len(device.waits))
        on_cpu |= {place for place, where, _ in device.placed if where == "cpu"} if step.index else set()
        device.fresh()
        assert step.after.dtype == step.latents.dtype and step.after.device.type == "cuda"
    assert len(counts) == taken and not on_cpu
    return counts[1:]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_step_waits_once_under_each_switch(pipe, device, name):
    steps = pipe.steps(models.conditioning(), num_inference_steps=STEPS, switches=SWITCHES[name])
    assert waits(device, steps) == [1] * (STEPS - 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_each_sampler_waits_once(pipe, device, sampler):
    """`heun` takes two steps an interval, but for the last."""
    steps = pipe.steps(models.conditioning(), num_inference_steps=STEPS, sampler=sampler)
    taken = 2 * STEPS - 1 if sampler == "heun" else STEPS
    assert waits(device, steps, taken) == [1] * (taken - 1)


def test_without_the_check_no_step_waits(pipe, device, monkeypatch):
    monkeypatch.setattr(pipe, "check_finite", False)
    for switches in (SWITCHES["none"], SWITCHES["projected guidance"]):
        steps = pipe.steps(models.conditioning(), num_inference_steps=STEPS, switches=switches)
        assert waits(device, steps) == [0] * (STEPS - 1)
    unguided = pipe.steps(models.conditioning(), num_inference_steps=STEPS, true_cfg_scale=1.0)
    assert waits(device, unguided) == [0] * (STEPS - 1)
    device.fresh()
    latents = torch.empty(1, 4096, 64, dtype=torch.bfloat16, device="cuda")
    assert pipe.decode(latents, GRID).shape == (1, 3, 1024, 1024)
    assert {wait.split()[0] for wait in device.waits} == {"latents.py"}  # the constants of each channel


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_rows_with_other_references_wait_once_together(pipe, device, monkeypatch, micro_batch):
    monkeypatch.setattr(pipe, "micro_batch", micro_batch)
    conditioning = models.conditioning(((GRID,), (GRID, (1, 32, 40)), (GRID,)))
    assert waits(device, pipe.steps(conditioning, num_inference_steps=STEPS)) == [1] * (STEPS - 1)


def test_taps_wait_for_nothing(pipe, device):
    seen = []

    def look(x, site):
        seen.append(site.full)
        assert x.device.type == "cuda"
        return x * 1.0

    patterns = dict.fromkeys(("blocks.*.img_*", "blocks.*.attn.*_rot", "velocity", "temb"), look)
    with taps(pipe.mmdit, patterns, strict=False):
        steps = pipe.steps(models.conditioning(), num_inference_steps=STEPS)
        assert waits(device, steps) == [1] * (STEPS - 1)
    assert len(seen) > 2 * STEPS * 20


def test_attention_maps_wait_for_nothing(pipe, device):
    """Explicit attention, a few heads at a time, with the references hidden in a block."""
    shapes = set()
    small = models.conditioning((((1, 16, 16),),), target=(1, 16, 16))
    with taps(pipe.mmdit, {"blocks.*.attn.probs": lambda x, site: shapes.add(x.shape)}):
        steps = pipe.steps(small, num_inference_steps=STEPS, switches=SWITCHES["references in some blocks"])
        assert waits(device, steps) == [1] * (STEPS - 1)
    assert shapes == {(1, 24, length, length) for length in (512 + 240, 512 + 225)}


def test_a_lora_waits_for_nothing(pipe, device):
    lora, width = {}, 3072
    for layer, rows in (("attn.to_q", width), ("img_mlp.net.0.proj", 4 * width), ("txt_mod.1", 6 * width)):
        start = f"transformer_blocks.1.{layer}.lora"
        lora[f"{start}_A.weight"] = torch.zeros(16, width, device="cpu")
        lora[f"{start}_B.weight"] = torch.zeros(rows, 16, device="cpu")
    pipe.load_lora_weights(lora, scale=0.5)
    try:
        steps = pipe.steps(models.conditioning(), num_inference_steps=STEPS)
        assert waits(device, steps) == [1] * (STEPS - 1)
    finally:
        pipe.unload_lora_weights()


def test_an_inversion_waits_once_a_step(pipe, device):
    latents = torch.empty(1, 4096, 64, dtype=torch.bfloat16, device="cuda")
    steps = invert(pipe, models.conditioning(), latents, num_inference_steps=STEPS, iterations=1)
    counts = []
    for _ in steps:
        counts.append(len(device.waits))
        device.fresh()
    assert counts[1:] == [1] * (STEPS - 1)
