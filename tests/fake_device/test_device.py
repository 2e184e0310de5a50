"""The fake device itself: what is put in on purpose is found."""

import pytest
import torch

import qwenedit.networks.mmdit as mmdit
import qwenedit.networks.mmdit_layers as layers
import qwenedit.sampling.predictor as predictor
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse


def step(folder, monkeypatch=None, name=None, broken=None):
    """The device after one step, with a function of a module replaced while it ran."""
    with fake_device() as device, torch.no_grad():
        pipe = models.load(folder, text_encoder=False)
        steps = pipe.steps(models.conditioning(), num_inference_steps=1)
        device.fresh()
        if monkeypatch is not None:
            monkeypatch.setattr(*name, broken)
        next(steps)
    return device


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("official"), blocks={"transformer": 1})


def on_cpu(device):
    return {place for place, where, _ in device.placed if where == "cpu"}


def test_a_step_is_where_it_should_be(folder):
    device = step(folder)
    assert not on_cpu(device) and device.waits == ["sampling/sampler.py check: value"]


def test_a_result_on_the_wrong_device_is_named(folder, monkeypatch):
    original = layers.rope_table

    def table(positions, axes):
        return original(positions.cpu(), axes).to("cuda")

    device = step(folder, monkeypatch, (layers, "rope_table"), table)
    assert on_cpu(device) == {"networks/mmdit_layers.py rope_table", "networks/mmdit_layers.py forward"}
    assert (
        device.waits.count("networks/mmdit_layers.py forward: copy to cpu") == 4
    )  # two streams, two branches
    assert device.waits.count("networks/mmdit_layers.py forward: copy to cuda") == 4


def test_tensors_of_two_devices_do_not_meet(folder, monkeypatch):
    original = mmdit.joint_rope

    def on_the_host(*tables):
        return tuple(x.cpu() for x in original(*tables))

    with pytest.raises(
        RuntimeError, match=r"networks/mmdit_layers\.py rotate: aten\.mul\.Tensor has tensors on"
    ):
        step(folder, monkeypatch, (mmdit, "joint_rope"), on_the_host)


def test_a_dtype_that_is_too_wide_is_named(folder, monkeypatch):
    original = predictor.timestep_of
    device = step(folder, monkeypatch, (predictor, "timestep_of"), lambda *args: original(*args).double())
    assert {place for place, _, dtype in device.placed if dtype == torch.float64} == {
        "sampling/predictor.py _time"
    }


def test_what_waits_for_the_device():
    with fake_device() as device:
        x = torch.ones(3, device="cuda")

        def waits(what):
            device.waits.clear()
            what()
            return len(device.waits)

        assert waits(lambda: x + 1) == waits(lambda: x[1:].sum()) == waits(lambda: x.to("cuda")) == 0
        assert waits(lambda: bool(x.all())) == waits(lambda: x.tolist()) == waits(lambda: x.cpu()) == 1
        assert waits(lambda: x[x > 0]) == waits(lambda: torch.ones(3).to("cuda")) == 1
        assert waits(lambda: x[[0, 2]]) == 1  # the list is copied
        assert waits(lambda: torch.tensor(0.5, device="cuda")) == 1
        assert waits(lambda: torch.full((), 0.5, device="cuda")) == 0
        pinned = torch.empty(3, pin_memory=True, device="cpu")
        assert waits(lambda: pinned.to("cuda", non_blocking=True)) == 0
        assert waits(lambda: torch.empty(3).to("cuda", non_blocking=True)) == 1  # not pinned


def test_known_values_are_known():
    with fake_device():
        ids = torch.tensor([[3, 1, 4]]).to("cuda")
        assert int((ids == 1).sum()) == 1 and (ids > 2).tolist() == [[True, False, True]]
        picked = torch.empty(1, 3, 8, device="cuda")[ids > 2]
        assert picked.shape == (2, 8) and picked.device.type == "cuda"
        ids[:, 1:] = 7
        assert ids.tolist() == [[3, 7, 7]]
        with pytest.raises(RuntimeError, match="reads a value that is not known"):
            float(torch.empty(1 << 20, device="cuda").sum())


def test_the_peak_is_of_storages_that_are_alive():
    with fake_device() as device:
        a = torch.empty(1 << 20, device="cuda")
        view = a[: 1 << 10]
        del a
        assert device.now == 4 << 20
        b = view + 1
        del view
        assert device.now == 4 << 10 and device.peak == (4 << 20) + (4 << 10)
        del b
        assert device.now == 0


def test_streams_that_do_not_wait_are_found():
    with fake_device() as device:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()

        def copied():
            with torch.cuda.stream(side):
                return torch.ones(3, pin_memory=True).to("cuda", non_blocking=True), side.record_event()

        x, done = copied()
        main.wait_event(done)
        x.record_stream(main)
        y = x + 1
        del x
        assert not device.streams.faults and device.streams.returning() == 12  # until `y` was computed
        main.record_event().synchronize()
        assert device.streams.returning() == 0

        x, done = copied()
        x.record_stream(main)
        y = x + 1  # before the copy has ended
        assert "used before its writing was waited for" in device.streams.faults.pop()
        main.wait_event(done)
        del x
        assert not device.streams.faults

        x, done = copied()
        main.wait_event(done)
        y = x + 1
        del x  # the allocator may give it to the next copy while `y` is computed
        assert device.streams.faults == ["memory released while another stream may use it"]
        del y
