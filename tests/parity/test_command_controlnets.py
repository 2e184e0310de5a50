"""`qwenedit parity` with ControlNets: their modules beside the reference's, too."""

import pytest
import torch

from qwenedit.parity import compare as parity
from qwenedit.weights.checkpoints import COMPONENTS
from tests import oracles
from tests.parity.test_command import DTYPES, differing, run, tiny  # noqa: F401
from tests.tiny_controlnet import INPAINTING, blockwise, controlnet

SHARED = ("img_in", "txt_in", "time_embed", "rope")


def modules_of(component, layers):
    names = [f"{component}.{x}" for x in SHARED] + [f"{component}.blocks.{i}" for i in range(layers)]
    return {*names, f"{component} end to end"}


def of_controlnets(rows):
    return {key for key in rows if key[0].startswith("controlnet")}


@pytest.mark.parametrize("name", ["text-to-image", "2511"])
@pytest.mark.parametrize("extra", [0, INPAINTING])
def test_no_difference(run, name, extra):  # noqa: F811
    net = controlnet(layers=2, extra_condition_channels=extra)
    status, printed, rows = run(tiny(name), "--controlnet", net)
    assert status == 0, printed.out + printed.err
    assert of_controlnets(rows) == {(x, d) for x in modules_of("controlnet", 2) for d in DTYPES}
    assert rows["controlnet.blocks.1", "bfloat16"]["reference"] > 1e-4  # bfloat16 is really run


def test_two_nets_of_one_kind_each(run):  # noqa: F811
    oracles.diffsynth("models.qwen_image_controlnet")
    nets = "--controlnet", controlnet(layers=1), "--controlnet", blockwise()
    status, printed, rows = run(tiny("edit"), *nets, "--dtype", "float32")
    assert status == 0, printed.out + printed.err
    own = {f"controlnet 2.{x}" for x in ("cond_in", "blocks.0", "blocks.1")} | {"controlnet 2 end to end"}
    assert {module for module, _ in of_controlnets(rows)} == modules_of("controlnet 1", 1) | own


def test_a_difference_is_named(run, monkeypatch):  # noqa: F811
    of_controlnet = parity._Pair.of_controlnet

    def wrong(*args):
        pair = of_controlnet(*args)
        pair.ours.residuals[1].register_forward_hook(lambda _module, _given, made: made * 1.001)
        return pair

    monkeypatch.setattr(parity._Pair, "of_controlnet", wrong)
    status, _, rows = run(tiny("edit"), "--controlnet", controlnet(layers=2), "--dtype", "float32")
    assert status == 1
    wanted = ["controlnet.blocks.1", "controlnet end to end"]
    assert differing(rows) == [(module, "float32") for module in wanted]


def test_every_weight_is_in_one_stage():
    folder, cpu = tiny("edit"), torch.device("cpu")
    variant = parity.read_variant(folder)
    for net in (controlnet(layers=2), blockwise()):
        pairs = parity._controlnets(folder, variant, [net], cpu, "diffusers")
        areas = parity.read_areas(folder, variant)
        case, _ = parity.prepare(folder, variant, areas, parity._drawn(), "x", cpu)
        pair = pairs["controlnet"]
        todo = parity.controlnet_stages("controlnet", pair.ours.config, case)
        paths = [path for stage in todo for path in stage.paths]
        for name in pair.found:
            assert sum(name.startswith(f"{path}.") for path in paths) == 1, name
    assert "controlnet" not in COMPONENTS


@pytest.mark.parametrize(
    "name, net, message",
    [
        ("edit", lambda: controlnet(joint_attention_dim=8), "its joint_attention_dim is 8, wanted the trans"),
        ("edit", lambda: "someone/some-net", "someone/some-net is not on this machine: load it once"),
        ("layered", controlnet, "takes no control pictures"),
    ],
)
def test_nets_that_cannot_be_compared(run, name, net, message):  # noqa: F811
    status, printed, _ = run(tiny(name), "--controlnet", net())
    assert status == 2 and message in printed.err and len(printed.err.splitlines()) == 1
