"""Pictures and numbers from callers: one entrance each, with the reference's results or a clear error."""

import dataclasses
import io
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.ablation.spec import read_spec
from qwenedit.cli import options as cli
from qwenedit.family import EDIT_PLUS
from qwenedit.inputs.pictures import FORMATS, as_picture, open_picture, to_pil
from qwenedit.inputs.rows import rows_of
from qwenedit.instruments.inversion import picture_latents
from qwenedit.memory.plan import plan
from qwenedit.parity import compare
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.switches import References, Seen, Switches
from tests.tiny import checkpoint, embedded_plus, picture, reference_pipeline, tiny_areas

QUICK = {"num_inference_steps": 1, "true_cfg_scale": 1.0, "negative_prompt": None, "output_type": "latent"}
PIXELS = 1e-4  # of whole runs against the reference, in [0, 1]
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def layered():
    return qwenedit.load(checkpoint("layered"), device="cpu", progress=False)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def stored(image, orientation=6, form="PNG", **options):
    """The picture as a camera stores it, opened again: lying, with a tag that says how to turn it."""
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 5: Image.Transpose.TRANSPOSE}
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    image.transpose(back[orientation]).save(file, form, exif=exif, **options)
    return Image.open(file)


def deep(levels, mode="I;16"):
    """A grey picture of one row."""
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
    return Image.frombytes(mode, (len(levels), 1), np.array(levels, kind).tobytes())


def latents(pipe, image, **options):
    return pipe.edit(image, "make the circle red", generator=seed(), **{**QUICK, **options}).images


# --- A8: upright


@pytest.fixture
def upright():
    return picture(40, 120, 3)


@pytest.mark.parametrize("orientation", [3, 5, 6])
def test_a8_a_picture_is_turned_upright_in_every_form(edit, plus, upright, orientation):
    lying = stored(upright, orientation)
    wanted = latents(edit, upright)
    assert torch.equal(latents(edit, lying), wanted)
    assert torch.equal(latents(edit, [[lying]]), wanted)
    rows = (rows_of("x", None, [lying, upright], pipe.variant, pipe.areas, None, None) for pipe in [plus])
    assert [[one.size for one in row.pictures] for (row,) in rows] == [[(40, 120)] * 2]


def test_a8_a_picture_is_turned_upright_at_every_entrance(edit, layered, upright, tmp_path, monkeypatch):
    lying = stored(upright)
    text = edit.condition(lying, "x")
    assert text.target_grid == edit.condition(upright, "x").target_grid == (1, 6, 2)
    got, wanted = (
        layered.decompose(one, "a fox", generator=seed(), layers=1, resolution=64, **QUICK).images
        for one in (lying, upright)
    )
    assert torch.equal(got, wanted)
    for got, wanted in zip(picture_latents(edit, lying), picture_latents(edit, upright), strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))
    for switches in (
        lambda one: Switches(references=References(latents="other", picture=one)),
        lambda one: Switches(seen=Seen(picture="other", other=one)),
    ):
        scene = picture(64, 64, 4)
        got, wanted = (latents(edit, scene, switches=switches(one)) for one in (lying, upright))
        assert torch.equal(got, wanted)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    upright.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "phone.png", exif=exif)
    switches = {"references.latents": "other", "references.picture": str(tmp_path / "phone.png")}
    as_file, as_object = (
        read_spec({"pictures": ["mini:0"], "switches": {**switches, "references.picture": one}})
        for one in (str(tmp_path / "phone.png"), Image.open(tmp_path / "phone.png"))
    )
    assert as_file.cells[0].settings == as_object.cells[0].settings
    shown = []
    monkeypatch.setattr(compare, "prepare", lambda *given: shown.append(given[3]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare.parity(None, tmp_path / "parity.json", picture=lying, device="cpu", progress=False)
    assert shown[0].size == (40, 120)


def test_a8_what_was_given_is_not_changed_nor_closed(edit, upright, tmp_path):
    lying = stored(upright)
    before = lying.size, lying.tobytes(), dict(lying.getexif()), dict(lying.info)
    latents(edit, lying)
    assert (lying.size, lying.tobytes(), dict(lying.getexif()), dict(lying.info)) == before
    frames = [picture(64, 64, k) for k in range(3)]
    frames[0].save(tmp_path / "three.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "three.gif") as moving:
        moving.seek(1)
        second = moving.convert("RGB")
        assert torch.equal(latents(edit, moving), latents(edit, second))
        assert moving.tell() == 1
        moving.seek(2)
    assert open_picture(tmp_path / "three.gif").convert("RGB").tobytes() != second.tobytes()
    with Image.open(tmp_path / "three.gif") as first:
        assert open_picture(tmp_path / "three.gif").convert("RGB").tobytes() == first.convert("RGB").tobytes()


def test_a8_one_object_given_twice_is_encoded_once(edit, monkeypatch):
    lying, seen, encode = stored(picture(64, 96)), [], edit.vae.encode
    monkeypatch.setattr(edit.vae, "encode", lambda x: seen.append(x.shape) or encode(x))
    edit.condition([[lying], [lying]], ["x", "y"])
    assert len(seen) == 1


def test_a8_a_sweep_tells_pictures_apart_by_what_is_seen():
    """A sweep runs equal settings once, so that different pictures need different values."""

    def flat(image):
        return Switches(references=References(latents="other", picture=image)).flat()["references.picture"]

    lying, turned = stored(picture(64, 64), 6), stored(picture(64, 64), 6)
    turned.getexif()[ORIENTATION] = 8
    assert flat(lying) != flat(turned) and flat(lying) == flat(stored(picture(64, 64), 6))
    assert flat(deep([256, 257])) != flat(deep([30000, 65535]))
    assert flat(picture(64, 64)) == flat(picture(64, 64).copy())


def test_a8_exif_that_cannot_be_read_is_named(edit):
    broken = picture(64, 64)
    broken.info["exif"] = b"Exif\0\0no TIFF at all"
    with pytest.raises(ValueError, match="image has EXIF data that cannot be read: "):
        latents(edit, broken)


# --- A9: levels


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a9_16_bits_of_grey_have_their_levels(edit, mode):
    image = deep([0, 128 * 257, 200 * 257, 65535], mode)
    assert list(as_picture(image).convert("L").tobytes()) == [0, 128, 200, 255]
    levels = (np.arange(4096).reshape(64, 64) * 16).astype("<u2" if mode == "I;16" else ">u2")
    whole = Image.frombytes(mode, (64, 64), levels.tobytes())
    grey = Image.fromarray((levels.astype("f8") / 257).round().astype("u1"))
    assert torch.equal(latents(edit, whole), latents(edit, grey))


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I;16")]
)
def test_a9_16_bits_of_grey_in_every_format(tmp_path, form, mode):
    path = tmp_path / "deep"
    deep([0, 128 * 257, 65535], mode).save(path, form)
    assert list(open_picture(path).convert("L").tobytes()) == [0, 128, 255]
    with Image.open(path) as opened:
        assert list(as_picture(opened).convert("L").tobytes()) == [0, 128, 255]


def test_a9_a_transparent_level_of_16_bits_stays_transparent(tmp_path):
    deep([5, 6, 65535]).save(tmp_path / "clear.png", transparency=5)
    with Image.open(tmp_path / "clear.png") as opened:
        alpha = as_picture(opened).convert("RGBA").getchannel("A")
    assert list(alpha.tobytes()) == [0, 255, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a9_levels_without_an_agreed_range_are_refused(edit, plus, layered, tmp_path, mode):
    image = deep([0, 255, 70000], mode)
    kind = {"I": "32-bit integers", "F": "floats"}[mode]
    other = Switches(seen=Seen(picture="other", other=image))
    for run, place in (
        (lambda: latents(edit, image), "image"),
        (lambda: latents(plus, [picture(64, 64), image]), r"image\[1\]"),
        (lambda: layered.decompose(image, "a fox", **QUICK), "image"),
        (lambda: latents(edit, picture(64, 64), switches=other), r"seen\.other"),
        (lambda: edit.processor(["x"], [[image]], edit.variant.template), r"pictures\[0\]\[0\]"),
    ):
        with pytest.raises(ValueError, match=f"^{place} has {kind}, whose black and white are not agreed"):
            run()
    image.save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=rf"^picture .*deep\.tif has {kind}"):
        open_picture(tmp_path / "deep.tif")


@pytest.mark.parametrize(("tag", "value"), [(258, 12), (262, 0)], ids=["12 bits", "white is 0"])
def test_a9_levels_that_pillow_leaves_unscaled_are_refused(edit, tag, value):
    file = io.BytesIO()
    deep([0, 4095]).save(file, "TIFF")
    before, number = file.getvalue(), {258: 16, 262: 1}[tag]
    entry = [tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + bytes([one, 0, 0, 0]) for one in (number, value)]
    assert before.count(entry[0]) == 1
    with pytest.raises(ValueError, match=r"image is grey TIFF that Pillow does not scale, wanted"):
        latents(edit, Image.open(io.BytesIO(before.replace(*entry))))


@pytest.mark.parametrize("mode", ["LAB", "La"])
def test_a9_modes_that_do_not_become_rgb_are_refused(edit, mode):
    with pytest.raises(ValueError, match=f"image has mode {mode}, which Pillow cannot convert"):
        latents(edit, Image.new(mode, (64, 64)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_a9_other_modes_stay_as_they_are(mode):
    image = picture(64, 64).convert("RGB" if mode == "LA" else mode).convert(mode if mode != "LA" else "L")
    assert as_picture(image) is image


# --- B4: formats


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
HEADER = ("SIMPLE  =  T", "BITPIX  =  8", "NAXIS   =  2", "NAXIS1  = 64", "NAXIS2  = 64", "END")
FITS = b"".join(card.encode().ljust(80) for card in HEADER).ljust(2880) + bytes(4096)
NO_PICTURES = {
    "PostScript": POSTSCRIPT,
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "FITS": FITS,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "metafile": b"\xd7\xcd\xc6\x9a\0\0" + bytes([0, 0, 0, 0, 64, 0, 64, 0, 72, 0]) + bytes(60),
}


@pytest.mark.parametrize("content", NO_PICTURES.values(), ids=NO_PICTURES)
def test_b4_what_is_no_picture_is_not_opened(tmp_path, monkeypatch, content, capsys):
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.chdir(tmp_path)
    Path("cat.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a picture that Pillow can read: cat\.png, wanted one of PNG"):
        open_picture("cat.png")
    assert cli.main(["edit", "cat.png", "x", "-o", "out.png"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ValueError, match="not a picture"):
        read_spec({"pictures": ["cat.png"], "prompts": ["x"]})


def test_b4_no_reader_of_another_program_runs_behind_an_opened_picture(edit, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    with pytest.raises(ValueError, match="image is EPS, which another program draws"):
        latents(edit, Image.open(io.BytesIO(POSTSCRIPT)))


def test_b4_every_file_of_the_package_opens_pictures_at_the_one_entrance():
    root = Path(qwenedit.__file__).parent
    calls = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8").count("Image.open(")
        for path in root.rglob("*.py")
    }
    assert {name for name, count in calls.items() if count} == {
        "inputs/pictures.py",
        "cli/picture_files.py",  # what it has just written to memory
        "batches/run.py",  # the text in a result, and none of its pixels
    }


@pytest.mark.parametrize("form", FORMATS)
def test_b4_formats_of_pictures_are_read(tmp_path, form):
    Image.init()
    if form not in Image.SAVE:
        assert form == "PSD"  # Pillow reads it only
        return
    picture(64, 64).save(tmp_path / "picture", form)
    side = 1024 if form == "ICNS" else 64  # it is written at several sizes, of which the largest is read
    assert open_picture(tmp_path / "picture").convert("RGB").size == (side, side)


@pytest.mark.parametrize("cut", [40, 200])
def test_b4_a_broken_picture_is_one_clear_error(edit, cut):
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    with pytest.raises(ValueError, match="image cannot be read: "):
        latents(edit, Image.open(io.BytesIO(file.getvalue()[:-cut])))
    closed = Image.open(io.BytesIO(file.getvalue()))
    closed.close()
    with pytest.raises(ValueError, match="image cannot be read: "):
        latents(edit, closed)


# --- C6: what is no picture, and where


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (lambda p: [p, None, None], r"^image\[1\] is None, wanted a PIL picture$"),
        (lambda p: [p, "b.png"], r"^image\[1\] is str 'b.png', wanted a PIL picture: open it first"),
        (lambda p: [p, np.zeros((8, 8, 3), "u1")], r"^image\[1\] is ndarray of shape \(8, 8, 3\) and uint8"),
        (lambda p: [[p], [p, 3]], r"^image\[1\]\[1\] is int, wanted a PIL picture$"),
        (lambda p: [[p], Path("c.png")], r"^image\[1\] is \w*Path 'c.png'"),
        (lambda p: [[p, []]], r"^image\[0\]\[1\] is an empty list"),
        (lambda p: (p, b""), r"^image\[1\] is an empty bytes"),
        (lambda p: [p, "\x1b[31m.png"], r"^image\[1\] is str '\\x1b\[31m.png'"),
    ],
)
def test_c6_the_place_of_what_is_no_picture_is_named(edit, plus, image, message):
    for pipe in (edit, plus):
        with pytest.raises(ValueError, match=message):
            latents(pipe, image(picture(64, 64)))


# --- C7: numbers


def test_c7_numbers_of_numpy_and_torch_in_a_run(edit):
    scene = picture(64, 64)
    options = {
        "height": 32,
        "width": 96,
        "true_cfg_scale": 4.0,
        "num_inference_steps": 2,
        "negative_prompt": " ",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a size that the picture does not have
        wanted = latents(edit, scene, **options)
        for integer, real in ((np.int64, np.float32), (torch.tensor, torch.tensor), (np.uint8, np.float64)):
            own = {"height": integer(32), "width": integer(96), "num_inference_steps": integer(2)}
            got = latents(edit, scene, **{**options, **own, "true_cfg_scale": real(4.0)})
            assert torch.equal(got, wanted)
        twice = edit.edit(scene, "x", num_images_per_prompt=np.int64(2), generator=seed(), **QUICK).images
        assert len(twice) == 2
        conditioning = edit.condition(scene, "x", height=np.int32(32), width=np.int64(96))
    assert json.dumps(conditioning.target_grid) == "[1, 2, 6]"
    assert type(TrueCFG(np.float32(2.5)).scale) is float
    assert edit.scheduler.sigmas(np.int64(3), 16) == edit.scheduler.sigmas(3, 16)
    assert conditioning.repeat(np.int64(2)).batch == 2


def test_c7_numbers_in_decompose_in_a_batch_and_in_an_inversion(edit, layered):
    options = {"layers": 2, "resolution": 64}
    wanted = layered.decompose(picture(64, 64), "a fox", generator=seed(), **QUICK, **options).images
    options = {"layers": np.int64(2), "resolution": np.int16(64), "num_images_per_prompt": np.int64(1)}
    got = layered.decompose(picture(64, 64), "a fox", generator=seed(), **QUICK, **options).images
    assert torch.equal(got, wanted)
    pipe = dataclasses.replace(edit, micro_batch=np.int64(1))
    run = {"generator": [seed(1), seed(2)], **QUICK}
    wanted = dataclasses.replace(edit, micro_batch=1).edit(picture(64, 64), ["x", "y"], **run).images
    run["generator"] = [seed(1), seed(2)]
    assert torch.equal(pipe.edit(picture(64, 64), ["x", "y"], **run).images, wanted)
    start, _ = picture_latents(edit, picture(64, 64))
    conditioning = edit.condition(picture(64, 64), "x", negative_prompt=None)
    options = {"num_inference_steps": np.int64(1), "iterations": np.int64(1)}
    assert len(list(qwenedit.invert(edit, conditioning, start, **options))) == 1


def test_c7_numbers_in_switches_become_pythons():
    plain = {
        "references.sigma": 0.5, "references.seed": 3, "references.steps": [0, 2], "references.order": [1, 0],
        "seen.size": [32, 64], "vae.seed": 7, "vae.posterior": "sample", "guidance.eta": 0.5,
        "time.sigmas": [1.0, 0.5],
    }  # fmt: skip
    own = {
        **plain, "references.sigma": np.float32(0.5), "references.seed": np.int64(3), "vae.seed": np.uint8(7),
        "references.steps": [np.int64(0), 2], "references.order": (torch.tensor(1), np.int8(0)),
        "seen.size": [np.int64(32), 64], "guidance.eta": np.float64(0.5),
        "time.sigmas": [np.float32(1), np.float32(0.5)],
    }  # fmt: skip
    assert json.dumps(Switches.from_flat(own).flat()) == json.dumps(Switches.from_flat(plain).flat())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("references.seed", np.float64(3)),
        ("references.sigma", np.bool_(True)),
        ("references.sigma", np.nan),
        ("references.steps", [0, 1.5]),
        ("seen.size", [1, 2, 3]),
        ("vae.seed", "3"),
        ("vae.seed", torch.tensor([1, 2])),
    ],
)
def test_c7_what_is_no_number_of_its_kind_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*, wanted "):
        Switches.from_flat({name: value})


def test_c7_a_seed_of_numpy_is_the_same_noise(edit):
    got, wanted = (
        latents(edit, picture(64, 64), switches=Switches(references=References(latents="noise", seed=number)))
        for number in (np.int64(5), 5)
    )
    assert torch.equal(got, wanted)


def test_c7_numbers_in_plans_loras_and_sweeps(edit):
    sizes = {"height": 64, "width": 32, "pictures": 1, "layers": 2, "steps": 3}
    own = {name: np.int64(value) for name, value in sizes.items()}
    assert str(plan(device="cpu", host_memory=2**30, **own)) == str(
        plan(device="cpu", host_memory=2**30, **sizes)
    )
    name = "transformer_blocks.0.attn.to_q"
    width = edit.mmdit.config.width
    lora = {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(width, 1)}
    edit.load_lora_weights(lora, adapter_name="a", scale=np.float32(0.5))
    try:
        assert json.dumps(edit.loras) == '{"a": 0.5}'
        edit.set_adapters(["a"], [np.float64(0.25)])
        assert json.dumps(edit.loras) == '{"a": 0.25}'
        with pytest.raises(ValueError, match=r"a LoRA's scale is .*nan.*, wanted a finite number"):
            edit.set_adapters("a", np.float32("nan"))
    finally:
        edit.unload_lora_weights()
    grid = {"references.sigma": [0, 0.5], "true_cfg_scale": [1, 4], "references.steps": [[0, 1], [0, 2]]}
    arrays = {
        "references.sigma": [0, np.float64(0.5)],
        "true_cfg_scale": [np.int64(1), np.float32(4)],
        "references.steps": [[np.int64(0), 1], [0, np.int32(2)]],
    }
    spec = {"pictures": ["mini:0"], "seeds": [0, 3], "steps": 2, "height": 32, "width": 64, "grid": grid}
    own = {
        **spec,
        "seeds": [np.int64(0), np.uint8(3)],
        "steps": np.int64(2),
        "height": np.int64(32),
        "grid": arrays,
    }
    got, wanted = read_spec(own), read_spec(spec)
    assert json.dumps([got.seeds, got.height]) == "[[0, 3], 32]"
    assert [json.dumps([c.values, c.settings]) for c in got.cells] == [
        json.dumps([c.values, c.settings]) for c in wanted.cells
    ]
    with pytest.raises(ValueError, match=r"grid: references.picture is .*, wanted a file's name"):
        read_spec({**spec, "grid": {"references.picture": [picture(64, 64)]}})


# --- C10: any number of pictures


@pytest.mark.parametrize(("count", "zero_cond_t"), [(4, False), (5, True)])
def test_c10_more_than_three_pictures_run_as_in_the_reference(monkeypatch, count, zero_cond_t):
    tiny_areas(monkeypatch)
    folder = checkpoint("plus", zero_cond_t=zero_cond_t)
    pipe, reference = qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)
    pictures = [picture(40 + 16 * k, 64, k) for k in range(count)]
    options = {"true_cfg_scale": 4.0, "negative_prompt": " ", "num_inference_steps": 2, "prompt": "both"}
    options["output_type"] = "pt"
    got, wanted = (run(image=pictures, generator=seed(), **options).images for run in (pipe, reference))
    assert (got - wanted).abs().max() <= PIXELS
    fewer = pipe(image=pictures[1:], generator=seed(), **options).images
    assert (fewer - got).abs().max() > PIXELS


def test_c10_pictures_are_numbered_on_and_on(plus):
    text = EDIT_PLUS.render("x", [1] * 12)
    assert re.findall(r"Picture (\d+): <\|vision_start\|>", text) == [str(k) for k in range(1, 13)]
    assert latents(plus, [[picture(32, 32, k) for k in range(6)]]).shape[0] == 1


def test_c10_info_and_plan_say_and_take_it(capsys):
    folder = embedded_plus()
    assert cli.main(["info", str(folder)]) == 0
    assert "preset Qwen-Image-Edit-2509: 40 steps" in (text := capsys.readouterr().out)
    assert "; made for 1 to 3 pictures, takes more" in text
    assert cli.main(["info"]) == 0 and "takes more" not in capsys.readouterr().out
    assert "from 7 pictures" in str(plan(folder, device="cpu", pictures=7))


# --- C12: prompts of spaces; long pictures


@pytest.mark.parametrize("prompt", ["\n", "  ", "\t", [""], [" "]])
def test_c12_a_prompt_of_spaces_runs_as_in_the_reference(layered, monkeypatch, prompt):
    tiny_areas(monkeypatch)
    reference = reference_pipeline(checkpoint("layered"))
    monkeypatch.setattr(reference, "get_image_caption", None)
    image = picture(64, 64).convert("RGBA")
    options = {**QUICK, "layers": 1, "prompt": prompt, "output_type": "pt"}
    (wanted,) = reference(image=image, generator=seed(), resolution=640, **options).images
    got = layered(image=image, generator=seed(), resolution=64, **options).images[0]
    assert (got - wanted).abs().max() <= PIXELS


@pytest.mark.parametrize("prompt", ["", " ", None])
def test_c12_what_the_reference_captions_is_refused(layered, prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        layered.decompose(picture(64, 64), prompt, **QUICK)


@pytest.mark.parametrize("size", [(603, 3), (3, 750), (1000, 4)])
def test_c12_long_pictures_in_edit_plus_have_the_references_sizes(size):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    pipe = qwenedit.load(embedded_plus(), device="cpu", text_encoder=False, progress=False)
    areas = qwenedit.inputs.geometry.Areas(token=16)
    (row,) = rows_of("x", None, [Image.new("RGB", size)], pipe.variant, areas, None, None)
    (planned,) = row.geometry.pictures
    ratio = size[0] / size[1]
    assert row.geometry.size == planned.vae == calculate_dimensions(1024 * 1024, ratio)
    assert planned.vl == calculate_dimensions(384 * 384, ratio)
    wanted = smart_resize(planned.vl[1], planned.vl[0], 28, 3136, 12845056)
    assert qwenedit.inputs.geometry.smart_resize(planned.vl[1], planned.vl[0], 28, 3136, 12845056) == wanted


def test_c12_what_the_language_model_cannot_see_is_refused_where_it_looks(edit, plus, layered):
    long = Image.new("RGB", (900, 3))
    official = qwenedit.inputs.geometry.Areas(token=16)
    for pipe, areas in ((plus, official), (edit, dataclasses.replace(official, vl=None))):
        with pytest.raises(ValueError, match=r"is 900x3, which the language model would see at "):
            rows_of("x", None, long, pipe.variant, areas, None, None)
    assert rows_of("x", None, long, layered.variant, dataclasses.replace(official, vl=None), None, None)


# --- C24: tensors and arrays


CASES = {
    "tensor": lambda x: x,
    "batch": lambda x: x[None].repeat(2, 1, 1, 1),
    "tensor in [-1, 1]": lambda x: 2 * x - 1,
    "bytes": lambda x: (x * 255).round().to(torch.uint8),
    "half": lambda x: x.to(torch.bfloat16),
    "array": lambda x: x.movedim(0, -1).numpy(),
    "array of bytes": lambda x: (x * 255).round().to(torch.uint8).movedim(0, -1).numpy(),
    "batch of arrays": lambda x: x.movedim(0, -1)[None].double().numpy(),
    "array in [-1, 1]": lambda x: (2 * x - 1).movedim(0, -1).numpy(),
}


@pytest.mark.parametrize("made", CASES.values(), ids=CASES)
@pytest.mark.parametrize("channels", [3, 4])
def test_c24_the_error_has_the_line_that_makes_this_picture(edit, made, channels):
    image = picture(64, 48, 5) if channels == 3 else picture(64, 48, 5).convert("RGBA")
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0) / 255
    x = made(pixels)
    with pytest.raises(
        ValueError, match=r"^image is (Tensor|ndarray) of shape .*, wanted a PIL picture"
    ) as error:
        latents(edit, x)
    line = re.search(r"import to_pil; (.*) makes one in 8 bits$", str(error.value))[1]
    got = eval(line, {"x": x, "torch": torch, "to_pil": to_pil})
    got = got[0] if isinstance(got, list) else got
    far = np.abs(np.array(got).astype(int) - np.array(image).astype(int)).max()
    assert got.mode == image.mode and far <= (1 if getattr(x, "dtype", None) == torch.bfloat16 else 0)
    assert latents(edit, got).isfinite().all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(1, 16, 8, 8), r"a tensor of one has \(3, H, W\)"),
        (torch.rand(64, 64, 3), r"a tensor of one has \(3, H, W\)"),
        (np.zeros((3, 64, 64), "u1"), r"an array \(H, W, 3\)"),
        (torch.rand(3, 0, 64), r"a tensor of one has \(3, H, W\)"),
        (255 * torch.rand(3, 64, 64), r"levels would be within \[0, 1\]"),
        (torch.full((3, 64, 64), torch.nan), r"levels would be within \[0, 1\]"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "levels would be uint8"),
        (np.zeros((64, 64, 3), bool), "levels would be uint8"),
    ],
)
def test_c24_what_is_no_picture_in_the_references_ranges_is_said(edit, x, message):
    for image, place in ((x, "image"), ([picture(64, 64), x], r"image\[1\]")):
        with pytest.raises(ValueError, match=f"^{place} is .*{message}"):
            latents(edit, image)


def test_c24_the_references_edit_pipelines_take_neither():
    for kind in ("edit", "plus", "layered"):
        reference = reference_pipeline(checkpoint(kind))
        for x in (torch.rand(1, 3, 64, 64), np.zeros((64, 64, 3))):
            with pytest.raises(TypeError, match="not subscriptable"):
                reference(image=x, prompt="x", num_inference_steps=1)


def test_the_command_line_takes_the_examples_of_the_embedded_model(tmp_path, monkeypatch):
    from qwenedit.mini import demo

    exif = Image.Exif()
    exif[ORIENTATION] = 3
    with Image.open(mini.EXAMPLE) as example:
        example.convert("RGB").transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
    seen = []
    monkeypatch.setattr(
        demo,
        "load",
        lambda **_: type("Pipe", (), {"edit": lambda _, image, *__, **___: seen.append(image) or 1 / 0})(),
    )
    with pytest.raises(ZeroDivisionError):
        demo.main([str(tmp_path / "turned.png"), "x", "--out", str(tmp_path)])
    assert seen[0].tobytes() == Image.open(mini.EXAMPLE).convert("RGB").tobytes()
