"""What the processor and the tokenizer's loading refuse, what they say, and the small promises."""

import json
import shutil

import pytest
import torch
from PIL import Image

from qwenedit.family import EDIT, EDIT_PLUS, TEXT_TO_IMAGE, Template
from qwenedit.inputs.pictures import denormalise_pixels, to_pil, vae_pixels
from qwenedit.inputs.processor import QWEN2_5_VL, ImageProcessorConfig, Processor, picture_patches
from qwenedit.inputs.tokenizer import load_tokenizer
from tests import tiny_tokenizer

OFFICIAL = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(load_tokenizer(tiny_tokenizer.write(tmp_path_factory.mktemp("tokenizer"))))


def picture(width=64, height=96, colour=(200, 30, 30)):
    return Image.new("RGB", (width, height), colour)


def edited(folder, name, change):
    """Change a JSON file of a folder in place."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    tiny_tokenizer.dump(folder / name, content)


# Templates and prompts


def test_the_tiny_tokenizer_has_the_official_prefixes(processor):
    assert processor.drop_index(TEXT_TO_IMAGE) == 34
    assert processor.drop_index(EDIT) == processor.drop_index(EDIT_PLUS) == 64
    kept = processor(["red"], None, TEXT_TO_IMAGE).input_ids[0, 34:]
    assert processor.tokenizer.decode(kept.tolist()) == "red\nassistant\n"


def test_a_template_of_another_length_is_refused(processor):
    template = Template(system="Be brief.", picture="", pictures=(0, 0), drop_index=34)
    with pytest.raises(ValueError, match=r"prefix has \d+ tokens, wanted 34: .* not this model family's"):
        processor(["red"], None, template)


def test_braces_in_a_prompt_are_text():
    prompt = "{} {0} {prompt} {{}} Picture {}: %s"
    text = EDIT_PLUS.render(prompt, [1, 2])
    first, second = (f"Picture {n}: <|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (1, 2))
    assert text == f"{EDIT_PLUS.prefix}{first}{second}{prompt}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "count", "wanted"), [(TEXT_TO_IMAGE, 1, "0"), (EDIT, 0, "1"), (EDIT, 2, "1")]
)
def test_a_template_takes_its_number_of_pictures(processor, template, count, wanted):
    with pytest.raises(ValueError, match=f"has {count} pictures, wanted {wanted} for this template"):
        processor(["red"], [[picture()] * count], template)


def test_edit_plus_takes_any_number_of_pictures_a_prompt(processor):
    output = processor(["red", "blue", "green"], [[picture()] * 3, [], [picture(32, 32)]], EDIT_PLUS)
    assert output.image_grid_thw == [(1, 6, 4)] * 3 + [(1, 4, 4)]
    assert output.pixel_values.shape == (3 * 24 + 16, 3 * 2 * 14 * 14)
    counts = (output.input_ids == processor.image_token_id).sum(1)
    assert counts.tolist() == [18, 0, 4]
    assert (output.input_ids[~output.attention_mask.bool()] == processor.pad_token_id).all()
    without = processor(["blue"], None, EDIT_PLUS)
    assert without.pixel_values is None and without.image_grid_thw is None
    length = without.input_ids.shape[1]
    assert torch.equal(output.input_ids[1, :length], without.input_ids[0])


@pytest.mark.parametrize("pad", ["<|image_pad|>", "<|video_pad|>"])
def test_a_prompt_with_a_picture_token_is_refused_beside_pictures(processor, pad):
    with pytest.raises(ValueError, match=r"a prompt contains <\|image_pad\|> or <\|video_pad\|>"):
        processor([f"red {pad}"], [[picture()]], EDIT)
    with pytest.raises(ValueError, match=r"a prompt contains <\|image_pad\|>"):
        processor(["red", pad], [[picture()], []], EDIT_PLUS)
    ids = processor([f"red {pad}"], None, TEXT_TO_IMAGE).input_ids  # beside none it is a token like others
    assert tiny_tokenizer.added_ids()[pad] in ids


def test_a_placeholder_in_a_prompt_is_text(processor):
    output = processor(["<|placeholder|>"], [[picture()]], EDIT)
    assert int((output.input_ids == processor.image_token_id).sum()) == 6


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "wanted a list of at least one text"),
        ("red", "prompts are 'red', wanted a list"),
        ([None], "a prompt is NoneType, wanted a string"),
        (["red", b"blue"], "a prompt is bytes, wanted a string"),
        (["\ud800"], "a prompt is not valid Unicode"),
    ],
)
def test_prompts_that_are_no_texts_are_refused(processor, prompts, message):
    with pytest.raises(ValueError, match=message):
        processor(prompts, None, TEXT_TO_IMAGE)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "got pictures for 0 prompts, wanted 1"),
        ([[picture()], [picture()]], "got pictures for 2 prompts, wanted 1"),
        ([picture()], "prompt 0 has a Image for pictures, wanted a list of PIL pictures"),
        ([[torch.zeros(3, 8, 8)]], r"pictures\[0\]\[0\] is Tensor of shape \(3, 8, 8\)"),
        ([[picture(), "a.png"]], r"pictures\[0\]\[1\] is str 'a.png', wanted a PIL picture"),
    ],
)
def test_pictures_that_are_none_are_refused(processor, pictures, message):
    with pytest.raises(ValueError, match=message):
        processor(["red"], pictures, EDIT)


def test_a_picture_too_long_is_refused(processor):
    with pytest.raises(ValueError, match="201x1, wanted a ratio of its sides of at most 200"):
        processor(["red"], [[picture(201, 1)]], EDIT)


# preprocessor_config.json


def test_the_official_file_is_the_familys_default():
    assert ImageProcessorConfig.from_json(OFFICIAL) == QWEN2_5_VL


def test_the_limits_may_be_given_as_size_alone_and_count_before_it():
    raw = {key: value for key, value in OFFICIAL.items() if not key.endswith("_pixels")}
    assert ImageProcessorConfig.from_json(raw) == QWEN2_5_VL
    assert ImageProcessorConfig.from_json({**raw, "min_pixels": None, "max_pixels": None}) == QWEN2_5_VL
    both = ImageProcessorConfig.from_json({**OFFICIAL, "max_pixels": 4000})
    assert (both.min_pixels, both.max_pixels) == (3136, 4000)


def test_keys_that_are_off_or_private_have_no_effect():
    raw = {
        **OFFICIAL,
        "do_center_crop": None,
        "do_pad": False,
        "_processor": "x",
        "data_format": "channels_first",
    }
    assert ImageProcessorConfig.from_json(raw) == QWEN2_5_VL
    required = {
        key: value for key, value in OFFICIAL.items() if not key.startswith("do_") and key != "resample"
    }
    assert ImageProcessorConfig.from_json(required) == QWEN2_5_VL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, "resample is 2, wanted 3"),
        ({"do_rescale": False}, "do_rescale is False, wanted True"),
        ({"do_center_crop": True}, "unknown keys: do_center_crop"),
        ({"crop_size": {"height": 5}}, "unknown keys: crop_size"),
        ({"patch_size": None}, "lacks patch_size"),
        ({"min_pixels": None, "max_pixels": None, "size": None}, "lacks min_pixels, max_pixels"),
        ({"min_pixels": 0}, "min_pixels is 0, wanted a whole number of at least 1"),
        ({"patch_size": 14.5}, "patch_size is 14.5, wanted a whole number"),
        ({"max_pixels": 100}, "max_pixels is 100, wanted a whole number of at least 3136"),
        ({"max_pixels": "many"}, "max_pixels is 'many', wanted a whole number of at least"),
        ({"image_mean": 0.5}, "image_mean is 0.5, wanted three numbers"),
        ({"image_std": [0.1, 0.2]}, "wanted three numbers each"),
        ({"image_std": [0.1, 0.2, 0]}, "no deviation of 0"),
    ],
)
def test_configs_that_are_not_supported_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessorConfig.from_json({**OFFICIAL, **change})


# Folders


@pytest.mark.parametrize("form", ["json", "files"])
@pytest.mark.parametrize("where", ["tokenizer", "processor"])
def test_a_checkpoints_folders(tmp_path, form, where):
    tiny_tokenizer.write(tmp_path / where, form)
    (tmp_path / "processor").mkdir(exist_ok=True)
    tiny_tokenizer.dump(tmp_path / "processor" / "preprocessor_config.json", {**OFFICIAL, "patch_size": 8})
    processor = Processor.from_folder(tmp_path)
    assert (
        processor.config.patch_size == 8
        and processor.image_token_id == tiny_tokenizer.added_ids()["<|image_pad|>"]
    )


def test_the_tokenizer_folder_counts_before_the_processors(tmp_path):
    tiny_tokenizer.write(tmp_path / "tokenizer", "files")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "tokenizer.json").write_text("broken")
    tiny_tokenizer.dump(tmp_path / "processor" / "preprocessor_config.json", OFFICIAL)
    assert Processor.from_folder(tmp_path).config == QWEN2_5_VL


def test_text_to_image_checkpoints_have_no_processor(tmp_path):
    tiny_tokenizer.write(tmp_path / "tokenizer", "files")
    assert Processor.from_folder(str(tmp_path)).config == QWEN2_5_VL


def test_a_processor_folder_without_its_config_is_refused(tmp_path):
    tiny_tokenizer.write(tmp_path / "tokenizer")
    (tmp_path / "processor").mkdir()
    with pytest.raises(ValueError, match=r"no such file: .*preprocessor_config\.json"):
        Processor.from_folder(tmp_path)


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"tokenizer lacks vocab\.json and merges\.txt, wanted both or tokenizer"
    ):
        Processor.from_folder(tmp_path)
    tiny_tokenizer.write(tmp_path / "tokenizer", "files")
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"tokenizer lacks merges\.txt, wanted both"):
        Processor.from_folder(tmp_path)


def test_another_familys_tokenizer_is_refused(tmp_path):
    folder = tiny_tokenizer.write(tmp_path, "files")
    merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(merges[:50]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"prefix has \d+ tokens, wanted 34"):
        Processor(load_tokenizer(folder))


def test_missing_special_tokens_are_named(tmp_path):
    folder = tiny_tokenizer.write(tmp_path, "files")
    for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"lacks <\|endoftext\|>, .*<\|video_pad\|>: it is not this model"):
        Processor(load_tokenizer(folder))


def test_truncation_and_padding_left_in_a_tokenizer_file_are_dropped(tmp_path, processor):
    folder = tiny_tokenizer.write(tmp_path)
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    edited(folder, "tokenizer.json", lambda c: c.update(truncation=truncation, padding=padding))
    text = "Make the red circle blue."
    assert load_tokenizer(folder).encode(text).ids == processor.tokenizer.encode(text).ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff{}", b""])
def test_broken_files_are_named(tmp_path, name, content):
    folder = tiny_tokenizer.write(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_tokenizer(folder)


def test_json_that_is_no_tokenizer_is_refused(tmp_path):
    folder = tiny_tokenizer.write(tmp_path)
    (folder / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("line", ["justone", "a b c", " a", "a ", "a  b"])
def test_lines_that_are_no_merges_are_named(tmp_path, line):
    folder = tiny_tokenizer.write(tmp_path, "files")
    with (folder / "merges.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    number = len(tiny_tokenizer.vocabulary()[1]) + 2
    with pytest.raises(ValueError, match=rf"merges\.txt, line {number}: '{line}' is no merge"):
        load_tokenizer(folder)


def test_merges_in_another_encoding_are_refused(tmp_path):
    folder = tiny_tokenizer.write(tmp_path, "files")
    (folder / "merges.txt").write_bytes(b"\xff \xfe\n")
    with pytest.raises(ValueError, match=r"merges\.txt is not text in UTF-8"):
        load_tokenizer(folder)


def test_merges_out_of_the_vocabulary_are_refused(tmp_path):
    folder = tiny_tokenizer.write(tmp_path, "files")
    with (folder / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("a QQQ\n")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt do not fit: .*QQQ"):
        load_tokenizer(folder)


def test_merges_with_windows_line_ends_are_read(tmp_path, processor):
    folder = tiny_tokenizer.write(tmp_path, "files")
    text = (folder / "merges.txt").read_text(encoding="utf-8")
    (folder / "merges.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert load_tokenizer(folder).encode(text).ids == processor.tokenizer.encode(text).ids


@pytest.mark.parametrize("change", [{"!": 1}, {"!": 5000}, {"!": "zero"}, {"!": -1}])
def test_a_vocabulary_with_clashes_or_gaps_is_refused(tmp_path, change):
    folder = tiny_tokenizer.write(tmp_path, "files")
    edited(folder, "vocab.json", lambda c: c.update(change))
    with pytest.raises(ValueError, match=r"vocab\.json: the ids clash or have gaps, wanted 0 to"):
        load_tokenizer(folder)


@pytest.mark.parametrize("form", ["json", "files"])
@pytest.mark.parametrize("listed_in", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("shift", [1, 100])
def test_added_tokens_that_clash_or_leave_gaps_are_refused(tmp_path, form, listed_in, shift):
    folder = tiny_tokenizer.write(tmp_path, form)
    last = "<|file_sep|>"
    index = tiny_tokenizer.added_ids()[last]

    def change(content):
        if listed_in == "added_tokens.json":
            content[last] += shift
        else:
            decoder = content["added_tokens_decoder"]
            decoder[str(index + shift)] = decoder.pop(str(index))

    edited(folder, listed_in, change)
    message = rf"{last.replace('|', '[|]')} has id {index + shift} in one file, the others make it {index}"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "decoder", [[], {"600": "x"}, {"600": {}}, {"600": {"content": 5}}, {"x": {"content": "a"}}]
)
def test_added_tokens_that_are_listed_wrongly_are_refused(tmp_path, decoder):
    folder = tiny_tokenizer.write(tmp_path, "files")
    edited(folder, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    with pytest.raises(ValueError, match="not listed as they should be"):
        load_tokenizer(folder)


def test_added_tokens_of_the_older_list_that_are_no_numbers_are_refused(tmp_path):
    folder = tiny_tokenizer.write(tmp_path, "files")
    edited(folder, "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder"))
    edited(folder, "added_tokens.json", lambda c: c.update({"<|im_end|>": "x"}))
    with pytest.raises(ValueError, match="not listed as they should be"):
        load_tokenizer(folder)


def test_a_tokenizer_file_needs_no_other(tmp_path, processor):
    folder = tiny_tokenizer.write(tmp_path / "all")
    (tmp_path / "one").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "one")
    alone = load_tokenizer(tmp_path / "one")
    assert alone.to_str() == load_tokenizer(folder).to_str() == processor.tokenizer.to_str()


# Pixels


def test_pixels_in_and_out_are_the_picture():
    generator = torch.Generator().manual_seed(0)
    values = bytes(torch.randint(0, 256, (48 * 80 * 3,), generator=generator).tolist())
    image = Image.frombytes("RGB", (48, 80), values)
    pixels = vae_pixels(image, 48, 80)
    assert pixels.shape == (1, 3, 80, 48) and -1 <= float(pixels.min()) and float(pixels.max()) <= 1
    (back,) = to_pil(denormalise_pixels(pixels))
    assert back.size == image.size and back.tobytes() == image.tobytes()


def test_patches_hold_the_picture_once_a_frame():
    config = ImageProcessorConfig(
        min_pixels=1, max_pixels=10**6, patch_size=4, merge_size=2, temporal_patch_size=2,
        image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0), rescale_factor=1.0,
    )  # fmt: skip
    image = Image.new("RGB", (24, 16))
    image.putdata([(x, y, 7) for y in range(16) for x in range(24)])
    patches, grid = picture_patches(image, config)
    assert grid == (1, 4, 6)
    patches = patches.view(2, 3, 2, 2, 3, 2, 4, 4)  # rows, columns, rows, columns within; C, frame, pixels
    assert torch.equal(patches[..., 0, :, :], patches[..., 1, :, :])
    for row, column, i, j in [(0, 0, 0, 0), (1, 2, 0, 1), (0, 1, 1, 0), (1, 0, 1, 1)]:
        red, green, blue = patches[row, column, i, j, :, 0]
        left, top = 8 * column + 4 * j, 8 * row + 4 * i
        assert red.tolist() == [[left, left + 1, left + 2, left + 3]] * 4
        assert green.T.tolist() == [[top, top + 1, top + 2, top + 3]] * 4
        assert (blue == 7).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 5, 8, 8), (1, 3, 1, 8, 8)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"wanted \(B, 3, H, W\)"):
        to_pil(torch.zeros(shape))


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_pixels_out_of_range_are_refused(value):
    pixels = torch.full((1, 3, 4, 4), 0.5)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"outside of \[0, 1\], or NaN"):
        to_pil(pixels)


def test_pixels_with_a_gradient_become_pictures():
    assert to_pil(torch.full((2, 3, 4, 5), 0.5, requires_grad=True))[1].size == (5, 4)
