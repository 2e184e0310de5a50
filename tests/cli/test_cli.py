"""The command line: results, exit status, and one line for whatever goes wrong, with nothing written."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image

from qwenedit import mini
from qwenedit.cli import commands
from qwenedit.cli import options as cli
from qwenedit.inputs.pictures import open_picture

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
    assert "cut.png cannot be read: " in edit(tmp_path / "cut.png")
    Image.new("RGB", (2010, 10)).save(tmp_path / "long.png")
    assert "ratio" in edit(tmp_path / "long.png")
    assert "takes one a prompt" in fails(capsys, "edit", picture, picture, "x", "-o", "out.png", *QUICK)


def test_bad_options(picture, capsys):
    def edit(*options):
        return fails(capsys, "edit", picture, "x", "-o", "out.png", *QUICK, *options)

    assert "height is 50, wanted a positive multiple of 16: the next one is 64" in edit("--height", 50)
    assert "--width: -16 is not a positive number" in edit("--width", -16)
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


@pytest.fixture
def no_loading(monkeypatch):
    """What is refused here is refused before any weight is read."""
    for name in ("qwenedit.cli.commands.load", "qwenedit.weights.loading.load_network"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.usefixtures("no_loading")
def test_numbers_that_are_none_or_too_large(picture, capsys):
    def edit(*options):
        return fails(capsys, "edit", picture, "x", "-o", "out.png", *QUICK, *options)

    assert "--steps: '1e3' is not a whole number" in edit("--steps", "1e3")
    assert "--num-images: 1000000000 is more than 1000" in edit("--num-images", 10**9)
    for seed in (10**30, -1):
        assert f"--seed: {seed} is not from 0 to 2**64 - 1" in edit("--seed", seed)
    assert "--height: 1000000000 is more than 16384" in edit("--height", 10**9)
    for scale in ("nan", "inf"):
        assert f"true_cfg_scale is {scale}, wanted a finite number" in edit("--true-cfg-scale", scale)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("text", ["red <|image_pad|>", "<|video_pad|>", "\ud800"])
def test_prompts_that_cannot_be_run_are_refused_before_loading(picture, capsys, text):
    wanted = "not valid Unicode" if text == "\ud800" else "contains <|image_pad|> or <|video_pad|>"
    assert wanted in fails(capsys, "edit", picture, text, "-o", "out.png", *QUICK)
    assert wanted in fails(capsys, "edit", picture, "x", "--negative-prompt", text, "-o", "out.png", *QUICK)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "pipeline, size", [("QwenImageEditPipeline", (2010, 10)), ("QwenImageEditPlusPipeline", (3000, 10))]
)
def test_a_too_long_picture_is_refused_at_the_official_areas(tmp_path, capsys, pipeline, size):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "official")
    index = json.loads((folder / "model_index.json").read_text())
    del index["_qwenedit"]
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    Image.new("RGB", size).save(tmp_path / "long.png")
    line = fails(capsys, "edit", tmp_path / "long.png", "x", "-o", "out.png", "--model", folder, *QUICK)
    assert f"the picture is {size[0]}x{size[1]}, which the language model would see at" in line
    assert "wanted a ratio of its sides of at most 200" in line


@pytest.mark.usefixtures("no_loading")
def test_bad_outputs(picture, capsys, monkeypatch):
    def edit(output, *options):
        return fails(capsys, "edit", picture, "x", "-o", output, *QUICK, *options)

    assert "there is no folder absent" in edit("absent/out.png")
    for suffix in (".docx", ".xbm", ".palm", ".msp", ".h5", ".wmf"):  # Pillow knows all but the first
        assert f"'{suffix}' is no format for a picture in colour" in edit(f"out{suffix}")
    assert "'no suffix' is no format for a picture in colour" in edit("out")
    assert "File name too long" in edit(f"{'x' * 300}.png")
    os.mkdir("folder.png")
    assert "it is a folder" in edit("folder.png")
    os.mkdir("out-2.png")
    assert "cannot write out-2.png: it is a folder" in edit("out.png", "--num-images", 2)

    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot write out.png: [Errno 13] Permission denied" in edit("out.png")


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_leaves_no_file_at_all(picture, capsys, monkeypatch, count):
    """Where several are written, neither those that still fitted."""
    save, saved = Image.Image.save, []

    def full(image, target, *arguments, **options):
        if not isinstance(target, io.BytesIO):
            saved.append(target)
            if len(saved) == count:
                target.write_bytes(b"half a pict")
                raise OSError(28, "No space left on device")
        save(image, target, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    line = fails(capsys, "edit", picture, "x", "-o", "out.png", "--num-images", count, *QUICK)
    name = "out.png" if count == 1 else "out-2.png"
    assert f"cannot write {name}: [Errno 28] No space left on device" in line and len(saved) == count


def test_the_longest_name_that_a_folder_takes(picture):
    name = "x" * 251 + ".png"
    assert run("edit", picture, "x", "-o", name, *QUICK) == 0
    assert os.listdir() == [name]


def test_a_name_that_the_terminal_cannot_print(picture, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    assert run("edit", picture, "x", "-o", "图.png", *QUICK) == 0
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"\\u56fe.png\n" and os.listdir() == ["图.png"]


def test_grey_pictures_of_16_bits_are_scaled_not_clipped(tmp_path):
    deep = Image.new("I;16", (4, 1))
    for column, level in enumerate((0, 128 * 257, 200 * 257, 65535)):
        deep.putpixel((column, 0), level)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    deep.save(tmp_path / "deep.png", exif=exif)
    picture = open_picture(tmp_path / "deep.png")
    assert picture.mode == "L" and list(picture.tobytes()) == [255, 200, 128, 0]


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
    assert "transformer: the cond velocity at step 0, sigma 1.0000 has NaN or infinity" in poisoned(
        "transformer", "img_in.bias"
    )
    assert "VAE decoder" in poisoned("vae", "decoder.conv_in.bias")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no such folder"):
        run("info", "./nothing", "--debug")


@pytest.mark.parametrize("words", [["edit", "in.png", "make the circle red"], ["generate", "a red circle"]])
def test_compile_reaches_load(picture, monkeypatch, words):
    shutil.copy(picture, "in.png")
    given, load = [], commands.load

    def uncompiled(*arguments, compile, **options):
        given.append(compile)
        return load(*arguments, **options)

    monkeypatch.setattr(commands, "require_compiler", lambda: None)
    monkeypatch.setattr(commands, "load", uncompiled)
    assert run(*words, "-o", "out.png", *QUICK) == run(*words, "-o", "out.png", "--compile", *QUICK) == 0
    assert given == [False, True]


def test_compile_without_a_compiler_is_refused_before_loading(picture, capsys):
    from torch._inductor import config

    command = ["edit", picture, "x", "-o", "x.png", "--compile", "--model", "no/such-model", *QUICK]
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):  # monkeypatch would leave it without a value
        line = fails(capsys, *command)
    assert "needs a C++ compiler" in line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--compile", "--residency", "stream"], "compile=True needs weights that stay"),
        (["--storage", "float8", "--residency", "stream"], "wanted one of them"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--device", "potato"], "device is 'potato'"),
    ],
)
def test_how_to_run_is_checked_before_a_download(picture, capsys, monkeypatch, options, message):
    monkeypatch.setattr(commands, "require_compiler", lambda: None)
    model = ["--model", "no/such-model"]
    assert message in fails(capsys, "edit", picture, "x", "-o", "x.png", *model, *QUICK, *options)


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
        [sys.executable, "-m", "qwenedit", "edit", picture, "x", "-o", "none/out.png"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "qwenedit: cannot write none/out.png: there is no folder none\n"
    done = subprocess.run([sys.executable, "-m", "qwenedit", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("qwenedit ")


def test_a_lora_and_switches_change_the_picture(picture, tmp_path):
    module = "transformer_blocks.0.attn.to_q"
    lora = {f"{module}.lora_down.weight": torch.ones(2, 128), f"{module}.lora_up.weight": torch.ones(128, 2)}
    safetensors.torch.save_file(lora, tmp_path / "a:b.safetensors")
    made = {}
    for name, options in {
        "plain": (),
        "lora": ("--lora", tmp_path / "a:b.safetensors"),
        "less": ("--lora", f"{tmp_path}/a:b.safetensors:0.5"),
        "none": ("--lora", f"{tmp_path}/a:b.safetensors:0"),
        "noise": ("--switch", "references.latents=noise"),
        "seed": ("--switch", "references.latents=noise", "--switch", "references.seed=1"),
        "steps": ("--switch", "references.steps=[0, 0]"),
        "left out": ("--switch", "references.latents=left_out"),
    }.items():
        assert run("edit", picture, "x", "-o", f"{name}.png", "--seed", 1, *QUICK, *options) == 0
        made[name] = Image.open(f"{name}.png").tobytes()
    assert made["plain"] == made["none"] and made["steps"] == made["left out"]
    assert len(set(made.values())) == 6


@pytest.mark.usefixtures("no_loading")
def test_bad_loras_and_switches_are_refused_before_loading(picture, tmp_path, capsys):
    safetensors.torch.save_file({"other.lora_down.weight": torch.ones(2, 128)}, tmp_path / "x.safetensors")
    for options, message in (
        (("--lora", "gone.safetensors"), "no such LoRA: gone.safetensors"),
        (("--lora", "gone.safetensors:x"), "wanted FILE or FILE:SCALE"),
        (("--lora", tmp_path / "x.safetensors"), "1 of 1 tensors are not: other.lora_down.weight"),
        (("--switch", "references.latents"), "is not NAME=VALUE"),
        (("--switch", "references.latent=zeroed"), "did you mean references.latents"),
        (("--switch", "references.latents=zero"), "did you mean 'zeroed'"),
        (("--switch", "references.blocks=[0, 7]"), "there are 6"),
        (("--switch", "references.steps=[0, 7]"), "there are 1"),
        (("--switch", "time.sigmas=[1, 0.5]"), "got 2 sigmas for 1 steps"),
    ):
        assert message in fails(capsys, "edit", picture, "x", "-o", "o.png", *QUICK, *options)
    line = fails(capsys, "generate", "x", "-o", "o.png", *QUICK, "--switch", "seen.picture=blank")
    assert "this run has none" in line
