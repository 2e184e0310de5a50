"""Every memory mode on the fake device: peaks as planned, the order of copies, uses and releases."""

import pytest
import torch

import qwenedit.memory.streaming as streaming
from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

VARIANT = "Qwen-Image-Edit-2511"
BLOCKS = {"transformer": 5, "language": 3, "vision": 8}
MODES = (
    Modes("resident"), Modes("resident", "precomputed"), Modes("stage"), Modes("stage", "precomputed"),
    Modes("stream"), Modes("stream", "precomputed"), Modes("resident", storage="float8"),
    Modes("stage", "precomputed", "float8"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("official"), VARIANT, blocks=BLOCKS)


def options(mode):
    return {"residency": mode.residency, "modulation": mode.modulation, "storage": mode.storage}


@pytest.fixture(scope="module")
def planned(folder):
    return plan(folder, device_memory="200GiB", pictures=1, steps=models.STEPS).peaks


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_mode_takes_what_is_planned(folder, planned, mode):
    with fake_device() as device:
        pipe = models.load(folder, **options(mode))
        ran = models.run(pipe, device, VARIANT, pictures=1)
    assert not device.streams.faults
    steps = [after - before for before, after in zip(ran.waits, ran.waits[1:], strict=False)]
    assert steps == [1] * (models.STEPS - 1)
    if mode in planned:  # that of the last is the sum of two others
        for stage in STAGES:
            got = ran.stages[stage].peak
            assert abs(planned[mode][stage] - got) < 0.15 * got, (stage, planned[mode][stage], got)


# --- the order of streaming, broken on purpose ---


def streamed(folder, **replaced):
    """The device after two streamed steps, with some of streaming.py replaced."""
    with pytest.MonkeyPatch.context() as patches, fake_device() as device, torch.no_grad():
        pipe = models.load(folder, residency="stream", text_encoder=False)
        for name, replacement in replaced.items():
            patches.setattr(streaming, name, replacement)
        device.fresh()
        for _ in pipe.steps(models.conditioning(), num_inference_steps=2):
            pass
        return device


class Unawaited(streaming._Arrived):
    """The copy's event is not waited for."""

    def put(self):
        for part, weights in zip(self.parts, self.weights, strict=True):
            part.put(weights)
            for weight in weights:
                weight.record_stream(torch.cuda.current_stream())


class Unrecorded(streaming._Arrived):
    """The allocator is not told of the use."""

    def put(self):
        for part, weights in zip(self.parts, self.weights, strict=True):
            part.put(weights)
            torch.cuda.current_stream().wait_event(self.copied)


@pytest.fixture(scope="module")
def in_order(folder):
    return streamed(folder)


def test_streaming_is_in_order_and_in_the_background(in_order):
    assert not in_order.streams.faults
    assert not any("streaming" in wait for wait in in_order.waits)


def test_a_block_that_is_used_before_it_has_arrived_is_found(folder):
    faults = streamed(folder, _Arrived=Unawaited).streams.faults
    assert faults and all("used before its writing was waited for" in fault for fault in faults)
    assert {fault.split(" ")[0] for fault in faults} <= {"networks/mmdit.py", "networks/mmdit_layers.py"}


def test_memory_that_is_released_before_its_use_has_ended_is_found(folder):
    faults = streamed(folder, _Arrived=Unrecorded).streams.faults
    assert set(faults) == {"memory released while another stream may use it"}


def test_a_read_that_does_not_wait_for_the_block_before_takes_more_memory(folder, in_order):
    block = 2 * 339_831_296
    assert streamed(folder, _mark=lambda parts: None).peak - in_order.peak > 0.9 * block


def test_a_copy_from_memory_that_is_not_pinned_is_found(folder, monkeypatch):
    monkeypatch.setattr(streaming.Source, "_placed", lambda own, x: x.to(own.device, non_blocking=True))
    assert "memory/streaming.py read: copy to cuda" in streamed(folder).waits
