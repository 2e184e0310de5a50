"""The training step on the fake device: gradients are where their weights are, and what waits is counted."""

import pytest
import torch

from qwenedit.memory.train_plan import Training, train_plan
from qwenedit.training.loss import flow_matching_loss, freeze_unreached
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

GRID = (1, 64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("official"), blocks={"transformer": 2})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_one_kind_of_row_waits_for_its_checks_alone(folder, checkpointing):
    with fake_device("meta") as device:
        pipe = models.load(folder, "meta", text_encoder=False)
        pipe.mmdit.requires_grad_(True).train()
        freeze_unreached(pipe.mmdit)
        pipe.mmdit.checkpointing = checkpointing
        device.fresh()
        made = models.training_batch((((GRID,)),))
        assert len(device.waits) == 1  # sigma in [0, 1]
        device.fresh()
        loss = flow_matching_loss(pipe, made)
        assert loss.dtype == torch.float32 and loss.device.type == "meta"
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
        with fake_device("meta") as device:
            pipe = models.load(folder, "meta", text_encoder=False)
            pipe.mmdit.requires_grad_(True).train()
            pipe.mmdit.checkpointing = checkpointing
            weights = device.now
            device.fresh()
            flow_matching_loss(pipe, models.training_batch((((GRID,)),)))
            peaks.append(device.peak - weights)
    assert peaks[1] < 0.6 * peaks[0]


def test_rows_of_several_kinds_wait_once_for_each_kind(folder):
    """Their numbers are copied to the device, and the lengths of their prompts are read."""
    with fake_device("meta") as device:
        pipe = models.load(folder, "meta", text_encoder=False)
        made = models.training_batch(((GRID,), (GRID, (1, 32, 40)), (GRID,)), weighted=True)
        device.fresh()
        flow_matching_loss(pipe, made)
        places = [wait.split(":")[0] for wait in device.waits]
        assert places.count("encoding/conditioning.py groups") == 2
        assert set(places) == {
            "encoding/conditioning.py groups", "encoding/conditioning.py rows",
            "encoding/conditioning.py lengths",
        }  # fmt: skip
        assert len(places) <= 2 * 4


TRAININGS = [
    Training(lora=True),
    Training(lora=True, targets="musubi", batch=2),
    Training(lora=True, rank=64, targets="ai_toolkit"),
    Training(lora=True, targets=r"transformer_blocks\.1\..*"),
    Training(lora=False),
    Training(lora=False, batch=2, ema=True),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_a_step_takes_what_is_planned(folder, training, checkpointing):
    made = train_plan(folder, training, device_memory="100GiB")
    planned, got = (
        made.peaks[checkpointing]["training step"],
        models.training_peak(folder, training, checkpointing),
    )
    assert abs(planned - got) < 0.15 * got
    # Beyond what its weights take, which most of a plan is. The last block has weights that do not train.
    weights = sum(size for name, size in made.parts.items() if not name.startswith("activations"))
    if training.lora:
        assert abs(planned - got) < 0.15 * (got - weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "training, dtype", [(TRAININGS[0], torch.float32), (TRAININGS[4], torch.bfloat16)], ids=str
)
def test_a_block_takes_what_is_planned(folder, tmp_path, training, dtype, checkpointing):
    """What two blocks more take, so that sixty are planned as well as two."""
    more = write_sparse(tmp_path, blocks={"transformer": 4})
    planned, got = [], []
    for cut in (folder, more):
        made = train_plan(cut, training, device_memory="100GiB", dtype=dtype)
        planned.append(made.peaks[checkpointing]["training step"])
        got.append(models.training_peak(cut, training, checkpointing, dtype))
    assert abs((planned[1] - planned[0]) / (got[1] - got[0]) - 1) < 0.03
