"""Lines of lists of edits: what they may say, what they are completed by, and every fault at once."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qwenedit import mini
from qwenedit.batches.lines import OPTIONS, lines_of, raw_lines
from qwenedit.family import PRESETS, Preset
from qwenedit.switches import Switches

PLAIN = Preset(name="none")


@pytest.fixture
def base(tmp_path):
    for name in ("a", "b", "mask"):
        Image.new("RGB", (32, 48), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "style.safetensors").write_bytes(b"")
    return tmp_path


def read(base, *lines, options=None, preset=PLAIN):
    path = base / "edits.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return lines_of(raw_lines(path), base, options or {}, preset)


def fault(base, *lines, **options):
    with pytest.raises(ValueError) as error:
        read(base, *lines, **options).require_good([])
    return str(error.value)


def test_a_line_that_says_everything(base):
    line = {
        "image": ["a.png", "b.png"], "prompt": "给猫戴上帽子", "name": "cats/第一", "seed": 2**64 - 1,
        "negative_prompt": "blurry", "true_cfg_scale": 2, "steps": 7, "height": 64, "width": 32,
        "sampler": "heun", "strength": 0.5, "mask": "mask.png", "mask_crop": 8,
        "switches": {"guidance.norm": "none"}, "lora": "style.safetensors", "lora_scale": 0.5,
        "size_of": "a.png", "copies": {"cats/source": "a.png"},
    }  # fmt: skip
    assert set(OPTIONS) < line.keys()
    (one,) = read(base, line).lines
    assert one.pictures == (base / "a.png", base / "b.png") and one.prompt == "给猫戴上帽子"
    assert one.file == "cats/第一.png" and one.files == ["cats/source.png", "cats/第一.png"]
    assert (one.seed, one.negative_prompt, one.true_cfg_scale) == (2**64 - 1, "blurry", 2.0)
    assert (one.num_inference_steps, one.height, one.width) == (7, 64, 32)
    assert (one.sampler, one.strength, one.mask, one.mask_crop) == ("heun", 0.5, base / "mask.png", 8)
    assert one.switches == Switches.from_flat({"guidance.norm": "none"})
    assert (one.lora, one.lora_scale, one.size_of) == (base / "style.safetensors", 0.5, base / "a.png")
    assert json.loads(json.dumps(one.settings | one.sources)) == one.settings | one.sources


def test_what_a_line_does_not_say_is_the_options_and_then_the_presets(base):
    lines = [{"prompt": "x"}, {"prompt": "y", "steps": 3, "seed": 1, "switches": {"vae.posterior": "sample"}}]
    options = {"steps": 9, "seed": 5, "switches": {"guidance.norm": "none"}}
    first, second = read(base, *lines, options=options).lines
    assert (first.num_inference_steps, first.seed, first.file) == (9, 5, "0001.png")
    assert (second.num_inference_steps, second.seed, second.file) == (3, 1, "0002.png")
    assert second.switches.flat() == {"guidance.norm": "none", "vae.posterior": "sample"}
    (plain,) = read(base, lines[0]).lines
    assert (plain.num_inference_steps, plain.true_cfg_scale, plain.negative_prompt) == (50, 4.0, " ")
    assert (plain.seed, plain.pictures, plain.strength, plain.sampler) == (0, (), None, None)
    (fast,) = read(base, lines[0], preset=PRESETS["lightning-4"]).lines
    assert (fast.num_inference_steps, fast.true_cfg_scale, fast.negative_prompt) == (4, 1.0, None)
    assert fast.switches.flat() == {"time.sigmas": "lightning"}


def test_names_of_the_pipelines_arguments_are_names_of_lines(base):
    line = {
        "images": "a.png", "prompt": "x", "num_inference_steps": 3, "cfg": 2, "mask_image": "mask.png",
        "padding_mask_crop": 4,
    }  # fmt: skip
    (one,) = read(base, line).lines
    assert (one.num_inference_steps, one.true_cfg_scale, one.mask, one.mask_crop) == (
        3, 2.0, base / "mask.png", 4,
    )  # fmt: skip
    assert "steps is given twice, as num_inference_steps too" in fault(
        base, {"prompt": "x", "steps": 3, "num_inference_steps": 3}
    )


def test_pictures_may_be_given_in_memory():
    picture = Image.open(mini.EXAMPLE)
    raw = [("edit 0", {"image": [picture, mini.EXAMPLE], "prompt": "x", "size_of": picture})]
    (one,) = lines_of(raw, Path(), {}, PLAIN).lines
    assert one.pictures == (picture, Path(mini.EXAMPLE)) and one.size_of is picture
    assert one.sources["pictures"] == ["a given picture", str(mini.EXAMPLE)]


def test_empty_lines_do_not_count_and_a_last_line_needs_no_break(tmp_path):
    path = tmp_path / "edits.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\n  \n{"prompt": "a\\u2028b"}')
    found = lines_of(raw_lines(path), tmp_path, {}, PLAIN).lines
    assert [(line.place, line.prompt) for line in found] == [("line 1", "x"), ("line 4", "a\u2028b")]


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "x", "stepz": 1}, "there is no 'stepz'; did you mean steps?"),
        ({"image": "a.png"}, "prompt is None, wanted a text"),
        ({"image": "none.png", "prompt": "x"}, "no such picture"),
        ({"image": [], "prompt": "x"}, "image is [], wanted a picture or a list of them"),
        ({"image": ["a.png", None], "prompt": "x"}, "image has None in its list"),
        ({"image": 3, "prompt": "x"}, "image is 3, wanted the name of a picture's file"),
        ({"image": "", "prompt": "x"}, "image is '', wanted the name of a picture's file"),
        ({"prompt": "x", "steps": 0}, "steps is 0, wanted a whole number of at least 1"),
        ({"prompt": "x", "steps": True}, "steps is True"), ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "seed": 2**64}, "seed is 18446744073709551616, wanted at most"),
        ({"prompt": "x", "true_cfg_scale": "4"}, "true_cfg_scale is '4', wanted a finite number"),
        ({"prompt": "x", "negative_prompt": 1}, "negative_prompt is 1, wanted a text"),
        ({"prompt": "x", "sampler": "eular"}, "did you mean 'euler'?"),
        ({"prompt": "x", "name": "../x"}, "wanted the name of a file inside its folder"),
        ({"prompt": "x", "name": "/x"}, "wanted the name of a file inside its folder"),
        ({"prompt": "x", "name": 7}, "name is 7, wanted a text"),
        ({"prompt": "x", "name": "a/.qwenedit-b"}, "wanted one that is not that of a temporary file"),
        ({"prompt": "x", "name": "a", "copies": {"A.png": "a.png"}}, "'a.png' is that of line 2, wanted"),
        ({"prompt": "x", "copies": {"../y": "a.png"}}, "wanted the name of a file inside its folder"),
        ({"prompt": "x", "copies": ["a.png"]}, "copies is ['a.png'], wanted an object"),
        ({"prompt": "x", "switches": {"guidance.nrom": "none"}}, "did you mean guidance.norm"),
        ({"prompt": "x", "switches": []}, "switches is [], wanted an object"),
        ({"prompt": "x", "lora": "none.safetensors"}, "no such LoRA"),
        ({"prompt": "x", "height": 0}, "height is 0"), (["x"], "it is ['x'], wanted an object"),
        ({"prompt": "x", "size_of": "none.png"}, "no such picture"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(base, line, message):
    found = fault(base, {"prompt": "good"}, line)
    assert found.startswith("1 of 2 edits cannot be made: line 2: ") and message in found


def test_all_faults_are_listed(base):
    (base / "edits.jsonl").write_text(
        '{"prompt": "x"}\n{"prompt"\n{"prompt": 1}\n{"prompt": "y", "prompt": 2}'
    )
    edits = lines_of(raw_lines(base / "edits.jsonl"), base, {}, PLAIN)
    with pytest.raises(ValueError) as error:
        edits.require_good([(1, "line 1: of another kind")])
    parts = str(error.value).split("; ")
    assert parts[0] == "4 of 4 edits cannot be made: line 1: of another kind"
    assert parts[1].startswith("line 2: it cannot be read as JSON")
    assert parts[2] == "line 3: prompt is 1, wanted a text" and "a key comes twice" in parts[3]
    assert fault(base, *[{"prompt": 1}] * 30).endswith("; and 10 more")


def test_two_results_of_one_name_are_refused(base):
    for other in ("cat", "cat.png", "CAT.png"):
        found = fault(base, {"prompt": "x", "name": "cat"}, {"prompt": "y", "name": other})
        assert "line 2: the name" in found and "is that of line 1, wanted another" in found
    found = fault(base, {"prompt": "x", "name": "0002"}, {"prompt": "y"})
    assert "line 2: the name '0002.png' is that of line 1" in found
    for one, other in (("a", "a.png/b"), ("A.png/b/c", "a")):
        found = fault(base, {"prompt": "x", "name": one}, {"prompt": "y", "name": other})
        assert "line 2: the name" in found and "and that of line 1 are a folder and a file in it" in found
    assert not read(base, {"prompt": "x", "name": "a/b"}, {"prompt": "y", "name": "a"}).faults
    assert "copies" not in fault(
        base, {"prompt": "x", "copies": {"b": "a.png"}}, {"prompt": "y", "name": "b"}
    )


def test_lists_without_edits_and_bad_options_are_refused(base):
    with pytest.raises(ValueError, match="the list has no edits"):
        read(base)
    with pytest.raises(ValueError, match="an option of all edits is 'prompt', wanted one of seed"):
        read(base, {"prompt": "x"}, options={"prompt": "y"})
    with pytest.raises(ValueError, match="no such list of edits"):
        raw_lines(base / "none.jsonl")
