"""The command line: results, exit status, and one line for whatever goes wrong, with nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image

from qwenedit import cli, mini

QUICK = ["--steps", "1", "--quiet", "--device", "cpu"]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    Image.open(mini.EXAMPLE).resize((70, 50)).save(path)
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """The one line that a failing command prints."""
    before = set(os.listdir())
    try:
        status = run(*arguments)
    except SystemExit as exit:  # argparse's way
        status = exit.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and set(os.listdir()) == before
    assert "Traceback" not in printed.err
    (line,) = [x for x in printed.err.splitlines() if "embedded model" not in x]
    assert line.startswith("qwenedit: ")
    return line


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_edit_writes_a_picture_and_says_where(picture, capsys):
    assert run("edit", picture, "make the circle red", "-o", "out.png", "--seed", 1, *QUICK) == 0
    printed = capsys.readouterr()
    assert printed.out == "out.png\n" and "drawn shapes only" in printed.err
    with Image.open("out.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
    assert os.listdir() == ["out.png"]


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(picture, capsys):
    size = ("--height", 64, "--width", 32)
    assert run("edit", picture, "make the circle red", "-o", "out.png", *size, *QUICK) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "embedded model" not in x]
    assert line.startswith("qwenedit: warning: the output's token grid (4, 2) is not that of the picture")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(picture):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("edit", picture, "x", "-o", f"{name}.png", "--seed", seed, *QUICK) == 0
    a, b, c = (open(f"{name}.png", "rb").read() for name in "abc")
    assert a == b != c


def test_generate_several_at_a_size(capsys):
    options = ["--num-images", 2, "--height", 32, "--width", 48, "--true-cfg-scale", 1]
    assert run("generate", "a red circle", "-o", "out.jpg", *options, *QUICK) == 0
    assert capsys.readouterr().out == "out-1.jpg\nout-2.jpg\n"
    with Image.open("out-2.jpg") as image:
        assert image.size == (48, 32) and image.format == "JPEG"


def test_pictures_are_taken_upright(tmp_path):
    """A phone's portrait: stored lying, with an orientation tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 32)).save(tmp_path / "phone.jpg", exif=exif)
    assert run("edit", tmp_path / "phone.jpg", "x", "-o", "out.png", *QUICK) == 0
    with Image.open("out.png") as image:
        assert image.size == (32, 96)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK"])
def test_pictures_of_any_mode(tmp_path, mode):
    path = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    Image.open(mini.EXAMPLE).convert(mode).save(path)
    assert run("edit", path, "把圆变红 {x} 🔴", "-o", "out.png", *QUICK) == 0


def test_info_and_verify(capsys):
    assert run("info") == 0 and "Qwen-Image-Edit" in capsys.readouterr().out
    assert run("verify", mini.CHECKPOINT) == 0
    assert capsys.readouterr().out.count("all names, shapes and dtypes fit") == 3


def test_verify_of_a_folder_that_does_not_fit(tmp_path, capsys):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "checkpoint")
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    tensors.pop("decoder.conv_out.bias")
    safetensors.torch.save_file(tensors, file)
    assert run("verify", folder) == 2
    printed = capsys.readouterr()
    assert "1 missing: decoder.conv_out.bias" in printed.out
    assert len(printed.err.splitlines()) == 1 and "does not fit" in printed.err


def test_bad_pictures(tmp_path, picture, capsys):
    def edit(path):
        return fails(capsys, "edit", path, "x", "-o", "out.png", *QUICK)

    assert "no such picture: nowhere.png" in edit("nowhere.png")
    (tmp_path / "text.png").write_text("hello")
    assert "not a picture that Pillow can read" in edit(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    assert "not a picture that Pillow can read" in edit(tmp_path / "empty.png")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:-200])
    assert "cannot read picture" in edit(tmp_path / "cut.png")
    Image.new("RGB", (2010, 10)).save(tmp_path / "long.png")
    assert "ratio" in edit(tmp_path / "long.png")
    assert "takes one a prompt" in fails(capsys, "edit", picture, picture, "x", "-o", "out.png", *QUICK)


def test_bad_options(picture, capsys):
    def edit(*options):
        return fails(capsys, "edit", picture, "x", "-o", "out.png", *QUICK, *options)

    assert "height is 50, wanted a positive multiple of 16: the next one is 64" in edit("--height", 50)
    assert "width is -16" in edit("--width", -16)
    assert "--steps: 0 is not a positive number" in edit("--steps", 0)
    assert "--num-images: 0 is not a positive number" in edit("--num-images", 0)
    assert "device is 'bogus'" in edit("--device", "bogus")
    assert "dtype is 'int8'" in edit("--dtype", "int8")
    assert "invalid float value: 'much'" in edit("--true-cfg-scale", "much")
    assert "unrecognized arguments: --bogus" in edit("--bogus")
    assert "neither a local folder nor" in edit("--model", "nobody/nothing")
    assert "no such folder" in edit("--model", "./nothing")
    assert "required" in fails(capsys, "edit", picture, "-o", "out.png")
    assert "invalid choice: 'paint'" in fails(capsys, "paint")
    assert "contains <|image_pad|>" in fails(capsys, "edit", picture, "<|image_pad|>", "-o", "o.png", *QUICK)


def test_bad_outputs(picture, capsys, monkeypatch):
    def edit(output):
        return fails(capsys, "edit", picture, "x", "-o", output, *QUICK)

    assert "there is no folder absent" in edit("absent/out.png")
    assert "is no picture format" in edit("out.docx")
    assert "is no picture format" in edit("out")
    os.mkdir("folder.png")
    assert "it is a folder" in edit("folder.png")

    def full(_image, path, *_args, **_options):
        with open(path, "wb") as file:
            file.write(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "cannot write out.png: [Errno 28] No space left on device" in edit("out.png")


def test_nan_in_weights_is_named_by_component_and_step(tmp_path, picture, capsys):
    def poisoned(component, key):
        folder = shutil.copytree(mini.CHECKPOINT, tmp_path / component / key)
        (file,) = (folder / component).glob("*.safetensors")
        tensors = safetensors.torch.load_file(file)
        tensors[key] = torch.full_like(tensors[key], float("nan"))
        safetensors.torch.save_file(tensors, file)
        return fails(capsys, "edit", picture, "x", "-o", "out.png", "--model", folder, *QUICK)

    assert "text encoder: the embeddings of the cond prompt" in poisoned("text_encoder", "model.norm.weight")
    assert "VAE encoder" in poisoned("vae", "encoder.conv_in.bias")
    assert "transformer: the cond velocity has NaN or infinity at step 0" in poisoned(
        "transformer", "img_in.bias"
    )
    assert "VAE decoder" in poisoned("vae", "decoder.conv_in.bias")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no such folder"):
        run("info", "./nothing", "--debug")


def test_a_text_to_image_checkpoint_does_not_edit(tmp_path, picture, capsys):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "t2i")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "QwenImagePipeline"
    del index["processor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "processor")
    line = fails(capsys, "edit", picture, "x", "-o", "out.png", "--model", folder, *QUICK)
    assert "Qwen-Image makes pictures from text only" in line
    assert run("generate", "x", "-o", "out.png", "--model", folder, *QUICK) == 0


def test_the_installed_command_in_a_process_of_its_own(picture):
    done = subprocess.run(
        [sys.executable, "-m", "qwenedit.cli", "edit", picture, "x", "-o", "none/out.png"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "qwenedit: cannot write none/out.png: there is no folder none\n"
    done = subprocess.run([sys.executable, "-m", "qwenedit.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("qwenedit ")
