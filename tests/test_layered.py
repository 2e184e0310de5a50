"""What `decompose` and its command refuse, what they write, and which components go together."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit.cli import options as cli
from qwenedit.cli.picture_files import check_alpha
from qwenedit.family import PRESETS
from qwenedit.inputs.pictures import rgba_pixels, to_pil
from qwenedit.verify import verify
from tests.tiny import checkpoint, picture

QUICK = {"num_inference_steps": 1, "layers": 2, "resolution": 64, "true_cfg_scale": 1.0, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(checkpoint("layered"), device="cpu", progress=False)


@pytest.mark.parametrize("prompt", [None, "", " ", [], [None]])
def test_an_empty_prompt_is_named(pipe, prompt):
    wanted = {"[]": "prompt is an empty list", "[None]": "a prompt is NoneType, wanted a string"}.get(
        str(prompt), "the prompt is empty, .* nothing captions it here"
    )
    with pytest.raises(ValueError, match=wanted):
        pipe.decompose(picture(64, 64), prompt, **QUICK)
    if prompt is None:
        with pytest.raises(ValueError, match=wanted):
            pipe(picture(64, 64), **QUICK)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": 0}, "layers is 0, wanted a whole number of at least 1"),
        ({"layers": 2.0}, r"layers is 2\.0, wanted a whole number"),
        ({"resolution": 0}, "resolution is 0, wanted a whole number"),
        ({"resolution": 8}, "wanted no side of 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"max_sequence_length": 2000}, "max_sequence_length is 2000, wanted at most 1024"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"latents": torch.zeros(1, 16, 64)}, r"latents are shape \(1, 16, 64\), wanted .* \(1, 48, 64\)"),
        ({"generator": [torch.Generator()] * 2}, "got 2 generators"),
        ({"image": None}, "image is None, wanted a PIL picture"),
        ({"image": "fox.png"}, "image is str"),
        ({"image": [picture(64, 64)] * 2}, r"got 2 pictures for 1 prompt\(s\)"),
        ({"image": [picture(64, 64), picture(64, 128)], "prompt": ["a", "b"]}, "outputs of different sizes"),
        ({"prompt": 5}, "prompt is int"),
    ],
)
def test_bad_input_is_named_before_any_network_runs(pipe, monkeypatch, options, message):
    monkeypatch.setattr(type(pipe.vision_language), "forward", None)
    with pytest.raises(ValueError, match=message):
        pipe.decompose(**{"image": picture(64, 64), "prompt": "fox", **QUICK, **options})


def test_each_method_has_its_checkpoints(pipe):
    for run in (pipe.edit, pipe.condition, lambda _image, prompt: pipe.generate(prompt)):
        with pytest.raises(
            ValueError, match=r"Qwen-Image-Layered only takes pictures apart .* use decompose"
        ):
            run(picture(64, 64), "fox")
    with pytest.raises(ValueError, match=r"Qwen-Image-Edit makes no layers: .* wants a Qwen-Image-Layered"):
        qwenedit.load(device="cpu", progress=False).decompose(picture(64, 64), "fox", **QUICK)
    with pytest.raises(ValueError, match="has 3 frames, wanted 1: decode_layers takes several"):
        pipe.decode(torch.zeros(1, 12, 64), (3, 2, 2))


def test_a_call_is_decompose(pipe):
    options = {**QUICK, "latents": torch.randn(1, 48, 64)}
    (called,) = pipe(picture(64, 64), "fox", use_en_prompt=True, **options).images
    assert torch.equal(called[None], pipe.decompose(picture(64, 64), "fox", **options).images)


def test_no_warning_about_a_norm_that_nobody_asked_for(pipe, recwarn):
    pipe.decompose(picture(64, 64), "fox", **{**QUICK, "negative_prompt": None, "cfg_normalize": True})
    pipe.decompose(picture(64, 64), "fox", **{**QUICK, "negative_prompt": None})
    assert not recwarn.list


def test_what_is_transparent_does_not_shine_through():
    """Half of the picture is transparent red: none of it is in the green of the other half."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 32, 64))
    pixels = rgba_pixels(image, 24, 24) * 0.5 + 0.5
    red, green, _, alpha = pixels[0]
    visible = alpha > 0
    assert ((alpha > 0) & (alpha < 1)).any()  # the edge
    assert (red[visible] == 0).all() and (green[visible] > 0.9).all()
    (got,) = to_pil(pixels)
    assert got.mode == "RGBA" and got.size == (24, 24)


def edited(tmp_path, kind, file, **changes):
    folder = shutil.copytree(checkpoint(kind), tmp_path / kind)
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**raw, **changes}))
    return folder


@pytest.mark.parametrize(
    "kind, file, changes, message",
    [
        ("layered", "transformer/config.json", {"use_layer3d_rope": False}, "use_layer3d_rope is False"),
        ("edit", "transformer/config.json", {"use_additional_t_cond": True}, "use_additional_t_cond is True"),
        ("layered", "vae/config.json", {"input_channels": 3}, "vae's input_channels is 3, wanted .* 4"),
        ("edit", "vae/config.json", {"input_channels": 4}, "vae's input_channels is 4, wanted .* 3"),
        (
            "layered",
            "transformer/config.json",
            {"patch_size": 1, "in_channels": 16},
            "patch_size is 1, wanted the pipeline's, 2",
        ),
        (
            "edit",
            "model_index.json",
            {"_class_name": "QwenImageLayeredPipeline"},
            "use_additional_t_cond is False, wanted the pipeline's, True",
        ),
    ],
)
def test_components_that_do_not_go_together_are_named(tmp_path, kind, file, changes, message):
    with pytest.raises(ValueError, match=message):
        qwenedit.load(edited(tmp_path, kind, file, **changes), device="cpu", progress=False)


def test_verify_and_info():
    report = verify(checkpoint("layered"))
    assert report.ok and report.variant.name == "Qwen-Image-Layered"
    text = str(PRESETS["Qwen-Image-Layered"])
    assert text.endswith("; 4 layers, resolution 640, cfg_normalize True")


def run(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's way
        return exit.code


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    picture(97, 51).save(tmp_path / "in.png")
    options = ["--model", checkpoint("layered"), "--resolution", 64, "--steps", 1, "--quiet"]
    return ["decompose", tmp_path / "in.png", "一只狐狸", *options, "--device", "cpu"]


def test_the_command_writes_each_layer(command, capsys):
    assert run(*command, "-o", "out.png", "--layers", 3, "--seed", 1) == 0
    names = ["out-1.png", "out-2.png", "out-3.png"]
    assert capsys.readouterr().out.split() == names == sorted(os.listdir())
    pictures = []
    for name in names:
        with Image.open(name) as image:
            assert image.size == (96, 32) and image.mode == "RGBA"
            pictures.append(image.tobytes())
    pipe = qwenedit.load(checkpoint("layered"), device="cpu", progress=False)
    again = pipe.decompose(
        Image.open(command[1]), "一只狐狸", layers=3, resolution=64, num_inference_steps=1,
        cfg_normalize=True, generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    assert [image.tobytes() for image in again] == pictures


def test_four_layers_and_the_cards_settings_are_the_default(command, monkeypatch):
    called = {}

    def decompose(_pipe, *_arguments, **options):
        called.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("qwenedit.pipeline.QwenImageEdit.decompose", decompose)
    command = [*command[:3], "--model", checkpoint("layered"), "--quiet", "--device", "cpu"]
    assert run(*command, "-o", "out.png") == 130
    assert called == {
        "negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 50, "layers": 4,
        "resolution": 640, "cfg_normalize": True, "generator": None, "sampler": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (["-o", "out.jpg"], "cannot write out.jpg: '.jpg' has no alpha channel (try .png)"),
        (["-o", "out.gif"], "'.gif' has no alpha channel"),
        (["-o", "nowhere/out.png"], "there is no folder nowhere"),
        (["-o", "out.png", "--layers", 0], "0 is not a positive number"),
        (["-o", "out.png", "--resolution", 8], "wanted no side of 0"),
        (["-o", "out.png", "--true-cfg-scale", "nan"], "true_cfg_scale is nan"),
        (["-o", "out.png", "--model", checkpoint("edit")], "Qwen-Image-Edit makes no layers"),
    ],
)
def test_bad_usage_is_one_line_before_weights_are_read(command, monkeypatch, capsys, options, message):
    monkeypatch.setattr("qwenedit.cli.commands.load", None)
    assert run(*command, *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert os.listdir() == []


def test_other_commands_refuse_layered_before_weights_are_read(command, monkeypatch, capsys):
    monkeypatch.setattr("qwenedit.cli.commands.load", None)
    for words in (["edit", command[1], "x"], ["generate", "x"]):
        assert run(*words, "--model", checkpoint("layered"), "-o", "out.png", "--quiet") == 2
        assert "only takes pictures apart into layers: use decompose" in capsys.readouterr().err
    assert run("decompose", command[1], " ", "--model", checkpoint("layered"), "-o", "out.png") == 2
    assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".tif"])
def test_formats_with_alpha(tmp_path, suffix):
    check_alpha(tmp_path / f"out{suffix}")
