"""Records of ControlNets: each control has its own, and a replay finds them."""

import contextlib
import json

import pytest
import safetensors.torch
import torch
from PIL import Image

from qwenedit.instruments.patching import patch_from
from qwenedit.instruments.records import Key, Recorder, Records
from qwenedit.switches import Controls, Switches
from qwenedit.taps import taps
from tests.tiny import picture
from tests.tiny_controlnet import random_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:the output's token grid"),
    pytest.mark.filterwarnings("ignore:the control picture is 64x48 and the output 64x64"),
]
PICTURE, OTHER = picture(64, 48, 1), Image.new("RGB", (64, 48), "white")


@pytest.fixture
def pipe(edit):
    before, edit.controlnets = edit.controlnets, [random_net(edit.mmdit)]
    try:
        yield edit
    finally:
        edit.controlnets, edit.micro_batch = before, None


def run(pipe, prompt="a red circle", **options):
    return pipe.generate(
        prompt, height=48, width=64, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0), **{"control_image": [PICTURE, OTHER], **options},
    ).images  # fmt: skip


@contextlib.contextmanager
def on_nets(pipe, function):
    with contextlib.ExitStack() as stack:
        for net in pipe.controlnets:
            stack.enter_context(taps(net, {"blocks.*.residual": function}))
        yield


def replayed(pipe, records, **options):
    """A run whose control pictures are others, with the residuals of the recorded one."""
    with on_nets(pipe, patch_from(records)):
        return run(pipe, **{**options, "control_image": [OTHER, picture(64, 48, 3)]})


@pytest.mark.parametrize("branches", ["cond", "each"])
@pytest.mark.parametrize("nets", [1, 2])
def test_a_replay_gives_each_control_its_own_record(pipe, nets, branches):
    pipe.controlnets = [random_net(pipe.mmdit, seed=k) for k in range(nets)]
    options = {"switches": Switches(control=Controls(branches=branches))}
    recorder = Recorder()
    with on_nets(pipe, recorder):
        first = run(pipe, **options)
    name = next(iter(recorder)).name
    keys = recorder.of(name)
    assert [key.control for key in keys[:2]] == [0, 1] and {key.call for key in keys} == {0}
    assert {key.branch for key in keys} == ({"cond", "uncond"} if branches == "each" else {"cond"})
    assert not torch.equal(recorder[keys[0]], recorder[keys[1]])
    assert "\n  control: 0, 1" in repr(recorder)
    other = run(pipe, **options, control_image=[OTHER, picture(64, 48, 3)])
    assert not torch.equal(other, first)
    assert torch.equal(replayed(pipe, recorder, **options), first)


@pytest.mark.parametrize("padding", [True, False])
def test_rows_that_run_alone_are_found_for_each_control(pipe, padding):
    prompts, recorder = ["a red circle", "一个红色的圆形"], Recorder(padding=padding)
    pipe.micro_batch = 1
    with on_nets(pipe, recorder):
        first = run(pipe, prompts)
    assert {key.rows for key in recorder} == {(0,), (1,)} and {key.control for key in recorder} == {0, 1}
    assert torch.equal(replayed(pipe, recorder, prompt=prompts), first)


def test_names_that_the_transformer_shares_with_a_net_stay_apart(pipe):
    recorder = Recorder(branch="cond")
    names = {"blocks.*.img_out": recorder}
    with taps(pipe.mmdit, names), taps(pipe.controlnets[0], names):
        first = run(pipe)
    step = [key for key in recorder.of("blocks.0.img_out") if key.step == 0]
    assert {key.control for key in step} == {None, 0, 1} and {key.call for key in step} == {0}
    names = {"blocks.*.img_out": patch_from(recorder, branch="cond")}
    with taps(pipe.mmdit, names), taps(pipe.controlnets[0], names):
        assert torch.equal(run(pipe), first)


def test_a_control_without_a_record_is_an_error(pipe):
    recorder = Recorder(where=lambda site: site.labels["control"] == 0)
    with on_nets(pipe, recorder):
        first = run(pipe)
    with pytest.raises(KeyError, match=r"'cond', \(0,\), None, 0, 1\) was not recorded; of that name"):
        replayed(pipe, recorder)
    with on_nets(pipe, patch_from(recorder, missing="keep")):
        assert torch.equal(run(pipe), first)


def test_files_hold_the_control(pipe, tmp_path):
    recorder = Recorder(to=tmp_path / "run")
    with on_nets(pipe, recorder):
        first = run(pipe)
    loaded = Records.load(tmp_path / "run")
    assert list(loaded) == list(recorder) and {key.control for key in loaded} == {0, 1}
    assert torch.equal(replayed(pipe, loaded), first)


@pytest.mark.parametrize("control", [None, 2, -1, "0", True])
def test_files_with_and_without_a_control_are_read(tmp_path, control):
    parts = ["velocity", 3, "cond", [0], None, 1]
    parts = parts if control is None else [*parts, control]
    metadata = {"format": "qwenedit record 1", "key": json.dumps(parts)}
    safetensors.torch.save_file({"velocity": torch.ones(2)}, tmp_path / "0.safetensors", metadata)
    if control in (None, 2):
        assert list(Records.load(tmp_path)) == [Key("velocity", 3, "cond", (0,), None, 1, control)]
    else:
        with pytest.raises(ValueError, match="where a control is wanted"):
            Records.load(tmp_path)
