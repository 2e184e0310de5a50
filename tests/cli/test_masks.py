"""Masks and starting pictures on the command line; what is wrong with them is one line before any weight."""

import pytest
from PIL import Image

from qwenedit import mini
from qwenedit.cli import commands
from tests.cli.test_cli import fails, run

QUICK = ["--steps", "3", "--device", "cpu", "--quiet", "--seed", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.open(mini.EXAMPLE).convert("RGB")
    picture.save("in.png")
    picture.resize((128, 96)).save("large.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    mask.save("mask.png")
    mask.resize((128, 96)).save("large-mask.png")
    Image.new("L", (64, 64)).save("black.png")


def test_an_edit_keeps_what_is_black():
    assert run("edit", "in.png", "make the circle red", "-o", "plain.png", *QUICK) == 0
    assert run("edit", "in.png", "make the circle red", "-o", "out.png", "--mask", "mask.png", *QUICK) == 0
    options = ["--mask", "mask.png", "--strength", "0.5", "--switch", "mask.preserve=velocity"]
    assert run("edit", "in.png", "make the circle red", "-o", "other.png", *options, *QUICK) == 0
    pictures = [Image.open(f"{name}.png").tobytes() for name in ("plain", "out", "other")]
    assert len(set(pictures)) == 3


def test_a_crop_is_laid_back():
    crop = ["--mask", "mask.png", "--mask-crop", "2", "--num-images", "2"]
    assert run("edit", "in.png", "make the circle red", "-o", "out.png", *crop, *QUICK) == 0
    source = Image.open("in.png").crop((41, 0, 64, 64)).tobytes()
    for number in (1, 2):
        assert Image.open(f"out-{number}.png").crop((41, 0, 64, 64)).tobytes() == source


def test_generate_from_a_picture():
    size = ["--height", "48", "--width", "64"]
    for name, options in {
        "a": [], "b": ["--strength", "0.9"], "c": ["--mask", "large-mask.png"],
        "d": ["--mask", "large-mask.png", "--mask-crop", "0"],
    }.items():  # fmt: skip
        start = ["--image", "large.png", *size, *options]
        assert run("generate", "a red circle", "-o", f"{name}.png", *start, *QUICK) == 0
    pictures = {name: Image.open(f"{name}.png") for name in "abcd"}
    assert [one.size for one in pictures.values()] == [(64, 48)] * 3 + [(128, 96)]
    assert len({one.tobytes() for one in pictures.values()}) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mask", "gone.png"], "no such"),
        (["--mask", "black.png"], "the mask changes nothing"),
        (["--mask", "mask.png", "--strength", "1.5"], "strength is 1.5, wanted a number in [0, 1]"),
        (["--mask", "mask.png", "--strength", "0"], "leaves none of 3 steps"),
        (["--mask", "mask.png", "--strength", "x"], "argument --strength"),
        (["--mask-crop", "4"], "--mask-crop is given without --mask, wanted both"),
        (["--mask", ""], "argument --mask: the name is empty, wanted a path"),
        (["--mask", "mask.png", "--mask", "black.png"], "argument --mask: it is given twice, wanted one"),
        (["--control-image", ""], "argument --control-image: the name is empty"),
        (["--control-mask", ""], "argument --control-mask: the name is empty"),
        (
            ["--control-mask", "mask.png", "--control-mask", "mask.png"],
            "argument --control-mask: it is given",
        ),
        (["--controlnet", ""], "controlnet is an empty name, wanted a hub id, a folder or a file"),
        (["--mask", "mask.png", "--mask-crop", "-1"], "padding_mask_crop is -1"),
        (["--mask", "mask.png", "--mask-crop", "1.5"], "is not a whole number"),
        (["--switch", "mask.preserve=x0"], "mask.preserve acts on a mask"),
        (["--mask", "mask.png", "--switch", "mask.preserve=x"], "mask.preserve is 'x', wanted 'latent'"),
    ],
)
def test_what_is_refused_before_any_weight_is_read(capsys, monkeypatch, words, message):
    def read(*_arguments, **_options):
        raise AssertionError("weights are read")

    monkeypatch.setattr(commands, "load", read)
    for command in (["edit", "in.png", "x"], ["generate", "x", "--image", "in.png"]):
        assert message in fails(capsys, *command, "-o", "out.png", *words, *QUICK)


def test_names_of_pictures(capsys):
    for words, message in (
        (["generate", "x", "--image", ""], "argument --image: the name is empty"),
        (["generate", "x", "--image", "in.png", "--image", "in.png"], "argument --image: it is given twice"),
        (["edit", "", "x"], "the name is empty"),
    ):
        assert message in fails(capsys, *words, "-o", "out.png", *QUICK)


def test_a_mask_needs_a_picture(capsys):
    for words, name in ((["--mask", "mask.png"], "mask_image"), (["--strength", "0.5"], "strength")):
        line = fails(capsys, "generate", "x", "-o", "out.png", *words, *QUICK)
        assert f"{name} is given without an image" in line
