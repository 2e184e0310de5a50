"""Whole edits of every variant at the official size: devices, dtypes, waits and peaks of every stage.

The networks are cut in depth, since their blocks are alike; test_whole.py has all of them.
"""

import pytest
import torch

from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.fake_device.models import PICTURES, PROMPT, STEPS
from tests.sparse import write_sparse

BLOCKS = {"transformer": 2, "language": 2, "vision": 8}  # the tower's eighth sees whole pictures
# Where tensors are made on the host: what callers give, token ids and positions, constants of a few values.
HOST = {
    "text encoding": {
        "inputs/pictures.py", "inputs/processor.py", "encoding/encode.py", "networks/vision_language.py",
        "networks/vision_tower.py", "sampling/scheduler.py",
    },
    "VAE encode": {"inputs/pictures.py", "encoding/encode.py", "latents.py"},
    "sampling": set(),
    "VAE decode": {"latents.py"},
}  # fmt: skip
# Where half dtypes are left for float32, as in the reference: RoPE, norms, sinusoids, the Euler step; and
# what kernels return besides (means of layer norms, sums of attention).
WIDE = {
    "networks/mmdit.py", "networks/mmdit_layers.py", "networks/vae_layers.py", "networks/vision_language.py",
    "networks/vision_tower.py", "sampling/precomputed.py", "sampling/sampler.py",
}  # fmt: skip


def files(placed, device, dtype=None):
    """The files that made results on a device, in a dtype."""
    return {
        place.split()[0]
        for place, where, got in placed
        if where == device and (dtype is None or got == dtype)
    }


def require_places(ran, dtype):
    """Results are on the device and in the run's dtype, but for those that have a reason."""
    other = {torch.bfloat16, torch.float16} - {dtype}
    for stage, seen in ran.stages.items():
        assert files(seen.placed, "cpu") <= HOST[stage], stage
        assert not files(seen.placed, "cuda", torch.float64), stage
        assert not any(files(seen.placed, "cuda", one) for one in other), stage
        inputs = {"encoding/encode.py"}  # patches and pixels before their cast
        assert files(seen.placed, "cuda", torch.float32) <= WIDE | inputs, stage


def require_output(ran, variant, batch, dtype):
    shape = (batch, 4, 4, 640, 640) if "Layered" in variant else (batch, 3, 1024, 1024)
    if variant == "Qwen-Image-Layered" or variant == "Qwen-Image":
        assert ran.images.shape[0] == batch
    assert ran.images.shape == shape
    assert ran.images.dtype == dtype and ran.images.device.type == "cuda"


def require_one_wait_a_step(ran):
    assert [after - before for before, after in zip(ran.waits, ran.waits[1:], strict=False)] == [1] * (
        STEPS - 1
    )


@pytest.mark.parametrize("variant", PICTURES)
def test_an_edit_in_bfloat16(variant, tmp_path):
    folder = write_sparse(tmp_path, variant, blocks=BLOCKS)
    with fake_device() as device:
        ran = models.run(models.load(folder), device, variant)
    require_places(ran, torch.bfloat16)
    require_output(ran, variant, 1, torch.bfloat16)
    require_one_wait_a_step(ran)
    planned = plan(folder, device_memory="200GiB", pictures=PICTURES[variant]).peaks[Modes("resident")]
    weights = device.now
    for stage in STAGES:
        got = ran.stages[stage].peak
        assert abs(planned[stage] - got) < 0.15 * got, stage
        # Weights are known exactly. Of what the networks compute, 200 MiB either way are not.
        assert abs(planned[stage] - got) < 0.15 * (got - weights) + (200 << 20), stage


@pytest.mark.filterwarnings("ignore:float16 overflows")
@pytest.mark.parametrize("variant", PICTURES)
def test_a_batch_of_prompts_of_two_lengths_in_float16(variant, tmp_path):
    folder = write_sparse(tmp_path, variant, blocks=BLOCKS)
    prompts = [PROMPT, "red"]
    with fake_device() as device:
        pipe = models.load(folder, dtype=torch.float16)
        ran = models.run(pipe, device, variant, prompt=prompts, negative_prompt=["blue", "grey and green"])
    require_places(ran, torch.float16)
    require_output(ran, variant, 2, torch.float16)
    require_one_wait_a_step(ran)
