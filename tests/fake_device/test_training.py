"""The training step on the fake device: gradients are where their weights are, and what waits is counted."""

import pytest
import torch

from qwenedit.training.loss import TrainingBatch, flow_matching_loss, freeze_unreached
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

GRID = (1, 64, 64)
OWN = {"sampling", "networks"}  # folders of what runs in a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("official"), blocks={"transformer": 2})


def batch(grids, dtype=torch.bfloat16, weighted=False):
    rows = len(grids)
    latents = torch.empty(rows, 4096, 64, dtype=dtype, device="cuda")
    return TrainingBatch(
        conditioning=models.conditioning(grids, dtype=dtype),
        latents=latents,
        sigma=torch.full((rows,), 0.5, device="cuda"),
        noise=torch.empty_like(latents),
        weight=torch.ones(rows, 4096, device="cuda") if weighted else None,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_one_kind_of_row_waits_for_its_checks_alone(folder, checkpointing):
    with fake_device() as device:
        pipe = models.load(folder, text_encoder=False)
        pipe.mmdit.requires_grad_(True).train()
        freeze_unreached(pipe.mmdit)
        pipe.mmdit.checkpointing = checkpointing
        device.fresh()
        made = batch((((GRID,)),))
        assert len(device.waits) == 1  # sigma in [0, 1]
        device.fresh()
        loss = flow_matching_loss(pipe, made)
        assert loss.dtype == torch.float32 and loss.device.type == "cuda"
        before = device.peak
        loss.backward()
        assert not device.waits
        assert not [place for place, where, _ in device.placed if where == "cpu"]
        assert not [place for place, _, dtype in device.placed if dtype == torch.float64]
        for name, weight in pipe.mmdit.named_parameters():
            if weight.requires_grad:
                assert weight.grad is not None, name
                assert (weight.grad.dtype, weight.grad.device) == (weight.dtype, weight.device), name
        assert device.peak >= before > device.now / 4


def test_checkpointing_takes_less_memory(folder):
    peaks = []
    for checkpointing in (False, True):
        with fake_device() as device:
            pipe = models.load(folder, text_encoder=False)
            pipe.mmdit.requires_grad_(True).train()
            pipe.mmdit.checkpointing = checkpointing
            weights = device.now
            device.fresh()
            flow_matching_loss(pipe, batch((((GRID,)),)))
            peaks.append(device.peak - weights)
    assert peaks[1] < 0.6 * peaks[0]


def test_rows_of_several_kinds_wait_once_for_each_kind(folder):
    """Their numbers are copied to the device, and the lengths of their prompts are read."""
    with fake_device() as device:
        pipe = models.load(folder, text_encoder=False)
        made = batch(((GRID,), (GRID, (1, 32, 40)), (GRID,)), weighted=True)
        device.fresh()
        flow_matching_loss(pipe, made)
        places = [wait.split(":")[0] for wait in device.waits]
        assert places.count("encoding/conditioning.py groups") == 2
        assert set(places) == {
            "encoding/conditioning.py groups", "encoding/conditioning.py rows",
            "encoding/conditioning.py lengths",
        }  # fmt: skip
        assert len(places) <= 2 * 4
