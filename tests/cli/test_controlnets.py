"""ControlNets on the command line: the pictures of the Python calls, and one line for whatever goes wrong."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import qwenedit
from qwenedit.cli import options as cli
from qwenedit.inputs.pictures import open_picture
from tests import tiny
from tests.tiny import checkpoint
from tests.tiny_controlnet import blockwise, controlnet

QUICK = ["--device", "cpu", "--steps", "2", "--seed", "3", "--quiet", "--num-images", "2", "-o", "out.png"]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Pictures and nets by short names, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("in", "edges", "depth", "mask")):
        tiny.picture(64, 64, seed).save(f"{name}.png")
    shutil.copytree(controlnet(), "net")
    shutil.copytree(controlnet(extra_condition_channels=4), "inpainting")
    shutil.copy(blockwise(), "blockwise.safetensors")
    Path("text.png").write_text("no picture")
    Path("empty").mkdir()


def run(*words):
    return cli.main([*words[:1], "--model", str(checkpoint("edit")), *map(str, words[1:]), *QUICK])


def in_python(nets, image=None, **options):
    pipe = qwenedit.load(checkpoint("edit"), controlnet=nets, device="cpu", progress=False)
    options["control_image"] = [open_picture(f"{name}.png") for name in options["control_image"]]
    options |= {"num_inference_steps": 2, "num_images_per_prompt": 2, "generator": torch.manual_seed(3)}
    call = (
        pipe.generate
        if image is None
        else lambda *words, **more: pipe.edit(open_picture(image), *words, **more)
    )
    return call("一只猫", **options).images


def written():
    return [open_picture(f"out-{number}.png") for number in (1, 2)]


def alike(images):
    return [one.tobytes() for one in written()] == [one.tobytes() for one in images]


def test_one_net_reads_one_picture():
    assert run("generate", "一只猫", "--controlnet", "net", "--control-image", "edges.png") == 0
    assert alike(in_python("net", control_image=["edges"]))
    assert not alike(in_python("net", control_image=["depth"]))


def test_several_nets_and_their_interval():
    nets = ["--controlnet", "net", "--controlnet", "blockwise.safetensors"]
    pictures = ["--control-image", "edges.png", "--control-image", "depth.png"]
    reach = ["--control-scale", "0.5", "--control-start", "0.1", "--control-end", "1"]
    assert run("edit", "in.png", "一只猫", *nets, *pictures, *reach) == 0
    options = {
        "controlnet_conditioning_scale": 0.5,
        "control_guidance_start": 0.1,
        "control_guidance_end": 1.0,
    }
    nets = ["net", "blockwise.safetensors"]
    assert alike(in_python(nets, "in.png", control_image=["edges", "depth"], **options))
    assert not alike(in_python(nets, "in.png", control_image=["edges", "depth"]))


def test_one_net_reads_several_pictures():
    pictures = ["--control-image", "edges.png", "--control-image", "depth.png"]
    assert run("generate", "一只猫", "--controlnet", "net", *pictures) == 0
    assert alike(in_python("net", control_image=["edges", "depth"]))


def test_an_inpainting_net_takes_a_mask():
    mask = ["--control-image", "edges.png", "--control-mask", "mask.png"]
    assert run("generate", "一只猫", "--controlnet", "inpainting", *mask) == 0
    assert alike(in_python("inpainting", control_image=["edges"], control_mask=open_picture("mask.png")))


def test_a_net_and_a_lora_go_together_under_memory_modes():
    words = ["generate", "一只猫", "--controlnet", "net", "--control-image", "edges.png"]
    assert run(*words) == 0
    resident = [one.tobytes() for one in written()]
    assert run(*words, "--residency", "stream", "--modulation", "precomputed") == 0
    assert [one.tobytes() for one in written()] == resident


@pytest.mark.parametrize(
    "words, message",
    [
        (["--controlnet", "net"], "a --control-image is missing"),
        (["--control-scale", "2"], "a --control-image is missing"),
        (["--control-mask", "mask.png"], "a --control-image is missing"),
        (["--control-image", "edges.png"], "--control-image is given without --controlnet, wanted both"),
        (["--controlnet", "absent", "--control-image", "edges.png"], "no ControlNet at absent"),
        (["--controlnet", "net", "--control-image", "absent.png"], "no such picture: absent.png"),
        (["--controlnet", "net", "--control-image", "text.png"], "not a picture that Pillow can read"),
        (
            ["--controlnet", "empty", "--control-image", "edges.png"],
            "wants one *.safetensors file, or an index of several; found none",
        ),
        (["--controlnet", "mask.png", "--control-image", "edges.png"], "no safetensors file"),
        (["--controlnet", "inpainting", "--control-image", "edges.png"], "wanted a control_mask, too"),
        (
            ["--controlnet", "net", "--control-image", "edges.png", "--control-mask", "mask.png"],
            "no ControlNet takes one: it is for inpainting nets",
        ),
        (
            ["--controlnet", "net", "--controlnet", "net", "--control-image", "edges.png"],
            "control_image has 1 pictures, wanted 2, one for each ControlNet",
        ),
        (
            ["--controlnet", "net", "--control-image", "edges.png", "--control-start", "0.9"],
            "no step of 2 lies between them",
        ),
        (
            ["--controlnet", "net", "--control-image", "edges.png", "--control-end", "1.5"],
            "wanted numbers in [0, 1]",
        ),
        (
            ["--controlnet", "net", "--control-image", "edges.png", "--control-scale", "nan"],
            "controlnet_conditioning_scale is nan, wanted a finite number",
        ),
    ],
)
@pytest.mark.parametrize("command", [["generate"], ["edit", "in.png"]])
def test_bad_input_is_one_line_before_any_weight_is_read(monkeypatch, capsys, command, words, message):
    monkeypatch.setattr("qwenedit.cli.commands.load", lambda *_, **__: pytest.fail("weights were read"))
    before = set(os.listdir())
    assert run(*command, "x", *words) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("qwenedit: ")
    assert printed.out == "" and set(os.listdir()) == before


def test_what_is_missing_is_seen_before_anything_is_downloaded(monkeypatch, capsys):
    monkeypatch.setattr("qwenedit.cli.commands.resolve", lambda *_, **__: pytest.fail("downloaded"))
    words = ["generate", "x", "-o", "out.png", "--model", "somebody/a-model", "--device", "cpu"]
    for net, picture in (("absent", "edges.png"), ("net", "absent.png")):
        assert cli.main([*words, "--controlnet", net, "--control-image", picture]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_checkpoints_are_verified_with_their_nets(capsys):
    model = str(checkpoint("edit"))
    nets = ["--controlnet", "net", "--controlnet", "blockwise.safetensors"]
    for command in ("verify", "info"):
        assert cli.main([command, model, *nets]) == 0
        printed = capsys.readouterr().out
        assert "  controlnet    79 tensors (79 float32), 92,152 parameters, 368,608 bytes\n" in printed
        assert "  controlnet    14 tensors (14 float32), 6,432 parameters, 25,728 bytes\n" in printed
        assert "    net: a ControlNet, safetensors\n" in printed
        assert "    blockwise.safetensors: a blockwise ControlNet of DiffSynth, safetensors\n" in printed
        assert printed.count("all names, shapes and dtypes fit") == 5
    assert cli.main(["plan", model, *nets, "--device-memory", "1GiB"]) == 0
    assert "from 1 picture with 2 of control, as stored" in capsys.readouterr().out
    assert cli.main(["verify", model, "--controlnet", "in.png"]) == 2
    assert cli.main(["plan", model, "--controlnet", str(controlnet(heads=3))]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "its num_attention_heads is 3, wanted the transformer's, 2" in errors[1]


def test_commands_that_sample_otherwise_take_none(capsys):
    for command in ("decompose", "parity", "ablate"):
        with warnings.catch_warnings(), pytest.raises(SystemExit):
            cli.main([command, "in.png", "x", "-o", "out.png", "--controlnet", "net"])
        assert "--controlnet" in capsys.readouterr().err
