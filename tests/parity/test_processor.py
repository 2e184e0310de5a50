"""Ids, masks, patches and pixels against transformers and diffusers, bit by bit."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from qwenedit.inputs import processor as ours
from qwenedit.inputs.pictures import denormalise_pixels, resize_rgb, to_pil, vae_pixels
from tests import tiny_tokenizer

FORMS = ("json", "files")
OFFICIAL = dict(min_pixels=3136, max_pixels=12845056, patch_size=14, merge_size=2, temporal_patch_size=2)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

LOOK_ALIKES = ["<|im_end", "|>", "<|", "<|placeholder|>", "{}", "{0}", "{prompt}", "{{", "%s", "Picture 1: "]
ENGLISH = ["the red circle", " don't", "'ta", "'Ta", "'da", "1024x768", "50%", "ﬁ", "ſ", "naïve"]
SPACES = ["\n", "\r\n", "\n\n", "  ", "\t", "\xa0", "\u200d", "\ufeff", "\0"]
COMPOSING = ["e\u0301", "\u0301", "A\u030a\u0323", "\u1e9b\u0323", "\u1112\u1161\u11ab", "\u2126", "\u0338"]
SCRIPTS = ["把红色的圆变成蓝色", "，4K", "한국어", "مرحبا", "नमस्ते", "👩‍👩‍👧", "🦊🏽", "🇩🇪", "²½Ⅷ"]
FRAGMENTS = st.sampled_from(
    [
        *tiny_tokenizer.SPECIAL,
        *tiny_tokenizer.NOT_SPECIAL,
        *LOOK_ALIKES,
        *ENGLISH,
        *SPACES,
        *COMPOSING,
        *SCRIPTS,
    ]
)
# Every way in which a text is split, with the neighbours that a wrong split would join.
BOUNDARIES = "a'ta 'Ta 'da  1024 .- 4 a,a .a\n\n-\r\n \n a \n\n .\n\n1  \t  "
TEXT = st.lists(st.one_of(FRAGMENTS, st.text(max_size=6)), max_size=12).map("".join)


class Processor(Qwen2VLProcessor):
    """The reference's processor without its video part, which would need torchvision."""

    attributes = ("image_processor", "tokenizer")

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)


class TextEncoder:
    """Keeps what the pipeline feeds it and returns the ids as embeddings, so that what is dropped shows."""

    dtype = torch.float32

    def __call__(self, **inputs):
        self.inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        hidden = inputs["input_ids"].float()[..., None]
        return type("Output", (), {"hidden_states": [hidden]})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {form: tiny_tokenizer.write(tmp_path_factory.mktemp(form) / "tokenizer", form) for form in FORMS}


@pytest.fixture(scope="module")
def processor(folders):
    return ours.Processor.from_folder(folders["files"].parent)


def reference_pipeline(cls, folder):
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessor(**OFFICIAL, image_mean=MEAN, image_std=STD)
    extra = {} if cls is QwenImagePipeline else {"processor": Processor(image_processor, tokenizer)}
    return cls(
        scheduler=None, vae=None, text_encoder=TextEncoder(), tokenizer=tokenizer, transformer=None, **extra
    )


# The tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_ids_equal_the_fast_tokenizers(folders, form):
    tokenizer = ours.load_tokenizer(folders[form])
    reference = Qwen2TokenizerFast.from_pretrained(folders[form])

    @settings(max_examples=300)
    @example(text=BOUNDARIES)
    @given(text=TEXT)
    def holds(text):
        assert tokenizer.encode(text).ids == reference(text).input_ids

    holds()


def test_ids_equal_the_slow_tokenizers(folders):
    # A combining mark after a special token is the one case in which the slow tokenizer differs.
    tokenizers = [ours.load_tokenizer(folders[form]) for form in FORMS]
    reference = Qwen2Tokenizer.from_pretrained(folders["files"])

    @settings(max_examples=300)
    @example(text=BOUNDARIES)
    @given(text=TEXT.map(lambda text: text.replace(">", "> ")))
    def holds(text):
        wanted = reference(text).input_ids
        assert [tokenizer.encode(text).ids for tokenizer in tokenizers] == [wanted, wanted]

    holds()


@pytest.mark.parametrize("form", FORMS)
def test_added_tokens_and_decoding_equal_the_references(folders, form):
    tokenizer = ours.load_tokenizer(folders[form])
    reference = Qwen2TokenizerFast.from_pretrained(folders[form])
    got = {index: repr(token) for index, token in tokenizer.get_added_tokens_decoder().items()}
    assert got == {index: repr(token) for index, token in reference.added_tokens_decoder.items()}
    assert len(got) == 22
    ids = reference("<|im_start|>Make 把红色 circle<tool_call> blue<|im_end|>").input_ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(
            ids, skip_special_tokens=skip
        )


def test_the_older_list_of_added_tokens_gives_what_it_gives_in_the_reference(tmp_path):
    folder = tiny_tokenizer.write(tmp_path, "files")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    tiny_tokenizer.dump(folder / "tokenizer_config.json", config)
    tokenizer, reference = ours.load_tokenizer(folder), Qwen2TokenizerFast.from_pretrained(folder)
    got = {index: repr(token) for index, token in tokenizer.get_added_tokens_decoder().items()}
    assert got == {index: repr(token) for index, token in reference.added_tokens_decoder.items()}
    assert len(got) == 22


@pytest.mark.parametrize("first_line", ["#version: 0.2\n", ""])
def test_a_merge_of_a_hash_is_not_taken_for_a_comment(tmp_path, first_line):
    folder = tiny_tokenizer.write(tmp_path, "files")
    vocab, merges = tiny_tokenizer.vocabulary()
    merges = [("#", "#"), ("#", "v"), *(pair for pair in merges if pair[0] != "#")]
    vocab = {**vocab}
    for token in ("##", "#v"):
        vocab.setdefault(token, len(vocab))
    start = len(vocab)
    added = {token: start + i for i, token in enumerate(tiny_tokenizer.added_ids())}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(added[token["content"]]): token for token in config["added_tokens_decoder"].values()
    }
    tiny_tokenizer.dump(folder / "vocab.json", vocab)
    tiny_tokenizer.dump(folder / "added_tokens.json", added)
    tiny_tokenizer.dump(folder / "tokenizer_config.json", config)
    (folder / "merges.txt").write_text(
        first_line + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    tokenizer = ours.load_tokenizer(folder)
    for text in ("## heading", "#version", "####"):
        assert tokenizer.encode(text).ids == Qwen2TokenizerFast.from_pretrained(folder)(text).input_ids
    assert tokenizer.encode("##").ids == [vocab["##"]]


# Templates and the whole processor


@pytest.mark.parametrize(
    ("cls", "template"),
    [
        (QwenImagePipeline, ours.TEXT_TO_IMAGE),
        (QwenImageEditPipeline, ours.EDIT),
        (QwenImageEditPlusPipeline, ours.EDIT_PLUS),
    ],
)
@given(prompt=TEXT)
def test_templates_are_the_pipelines(cls, template, prompt):
    pipe = cls(**dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer")), **(
        {} if cls is QwenImagePipeline else {"processor": None}
    ))  # fmt: skip
    assert template.drop_index == pipe.prompt_template_encode_start_idx
    pads = [1] * template.pictures[0]
    assert template.render(prompt, pads) == pipe.prompt_template_encode.format(prompt)
    if template.max_tokens is not None:
        assert template.max_tokens == pipe.tokenizer_max_length


def check_row_by_row(output, rows, dropped):
    """Our batch against what the reference fed its text encoder; `rows` are its inputs one prompt each."""
    length = max(inputs["input_ids"].shape[1] for inputs in rows)
    assert output.input_ids.shape == output.attention_mask.shape == (len(rows), length)
    assert output.input_ids.dtype == output.attention_mask.dtype == torch.long
    for i, inputs in enumerate(rows):
        real = inputs["input_ids"].shape[1]
        assert torch.equal(output.input_ids[i, :real], inputs["input_ids"][0])
        assert output.attention_mask[i].tolist() == [1] * real + [0] * (length - real)
        assert (output.input_ids[i, real:] == tiny_tokenizer.added_ids()["<|endoftext|>"]).all()
        kept = output.input_ids[i, output.drop_index : real]
        assert torch.equal(kept.float(), dropped[i])
    if "pixel_values" in rows[0]:
        assert torch.equal(output.pixel_values, torch.cat([inputs["pixel_values"] for inputs in rows]))
        grids = [tuple(grid) for inputs in rows for grid in inputs["image_grid_thw"].tolist()]
        assert output.image_grid_thw == grids and all(type(side) is int for grid in grids for side in grid)
    else:
        assert output.pixel_values is None and output.image_grid_thw is None


# Texts that the reference can process beside pictures: it takes these three for pictures.
BESIDE_PICTURES = TEXT.filter(
    lambda s: not any(t in s for t in ("<|image_pad|>", "<|video_pad|>", "<|placehold"))
)


@st.composite
def pictures(draw, mode=None, largest=150):
    """Noise of extreme values, so that resampling over- and undershoots, in any mode."""
    width, height = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    mode = mode or draw(st.sampled_from(["RGB", "RGBA", "L", "P", "LA", "CMYK", "1", "I;16", "I"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = {"RGB": 3, "RGBA": 4, "L": 1, "P": 1, "LA": 2, "CMYK": 4, "1": 1, "I;16": 2, "I": 4}[mode]
    noise = random.choice([0, 7, 130, 255, 254], width * height * size).astype(np.uint8)
    if mode == "1":
        return PIL.Image.frombytes("L", (width, height), noise.tobytes()).convert("1")
    picture = PIL.Image.frombytes(mode, (width, height), noise.tobytes())
    if mode == "P":
        picture.putpalette(random.integers(0, 256, 768).astype(np.uint8).tobytes())
    return picture


RESIZED = pictures(mode="RGB").map(lambda p: p.resize((32 * (1 + p.width // 60), 32 * (1 + p.height // 60))))


@pytest.mark.parametrize("form", FORMS)
def test_text_to_image_inputs_equal_the_pipelines(folders, processor, form):
    pipe = reference_pipeline(QwenImagePipeline, folders[form])

    @given(prompts=st.lists(TEXT, min_size=1, max_size=4))
    def holds(prompts):
        output = processor(prompts, None, ours.TEXT_TO_IMAGE)
        rows, dropped = [], []
        for prompt in prompts:
            dropped.append(pipe._get_qwen_prompt_embeds([prompt], device="cpu")[0][0, :, 0])
            rows.append(pipe.text_encoder.inputs)
        check_row_by_row(output, rows, dropped)
        pipe._get_qwen_prompt_embeds(prompts, device="cpu")
        assert torch.equal(output.input_ids, pipe.text_encoder.inputs["input_ids"])
        assert torch.equal(output.attention_mask, pipe.text_encoder.inputs["attention_mask"])

    holds()


@pytest.mark.parametrize("tokens", [1000, 1019, 1020, 1500])
def test_long_prompts_are_cut_as_in_text_to_image_and_nowhere_else(folders, processor, tokens):
    prompt = " 把" * tokens  # one token each, with the five that follow it
    pipe = reference_pipeline(QwenImagePipeline, folders["json"])
    pipe._get_qwen_prompt_embeds([prompt, "short"], device="cpu")
    output = processor([prompt, "short"], None, ours.TEXT_TO_IMAGE)
    assert torch.equal(output.input_ids, pipe.text_encoder.inputs["input_ids"])
    assert torch.equal(output.attention_mask, pipe.text_encoder.inputs["attention_mask"])
    assert output.input_ids.shape[1] <= 1024 + 34

    picture = PIL.Image.new("RGB", (64, 96), (200, 30, 30))
    for cls, template in ((QwenImageEditPipeline, ours.EDIT), (QwenImageEditPlusPipeline, ours.EDIT_PLUS)):
        pipe = reference_pipeline(cls, folders["json"])
        pipe._get_qwen_prompt_embeds([prompt], [picture], device="cpu")
        output = processor([prompt], [[picture]], template)
        assert torch.equal(output.input_ids, pipe.text_encoder.inputs["input_ids"])
        assert output.input_ids.shape[1] > tokens


@pytest.mark.parametrize("prompt", ["\n", "\n\nred", " \n red", "\r\n", "\u0338", ""])
def test_a_prompt_may_share_a_token_with_the_prefix(folders, processor, prompt):
    pipe = reference_pipeline(QwenImagePipeline, folders["json"])
    embeds, _ = pipe._get_qwen_prompt_embeds([prompt], device="cpu")
    output = processor([prompt], None, ours.TEXT_TO_IMAGE)
    assert torch.equal(output.input_ids[:, output.drop_index :].float(), embeds[..., 0])


@pytest.mark.parametrize("form", FORMS)
def test_edit_inputs_equal_the_pipelines(folders, processor, form):
    pipe = reference_pipeline(QwenImageEditPipeline, folders[form])

    @given(batch=st.lists(st.tuples(BESIDE_PICTURES, RESIZED), min_size=1, max_size=3))
    def holds(batch):
        prompts, images = [prompt for prompt, _ in batch], [image for _, image in batch]
        output = processor(prompts, [[image] for image in images], ours.EDIT)
        rows, dropped = [], []
        for prompt, image in batch:
            dropped.append(pipe._get_qwen_prompt_embeds([prompt], image, device="cpu")[0][0, :, 0])
            rows.append(pipe.text_encoder.inputs)
        check_row_by_row(output, rows, dropped)
        pipe._get_qwen_prompt_embeds(prompts, images, device="cpu")
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(getattr(output, name), pipe.text_encoder.inputs[name])
        assert torch.equal(torch.tensor(output.image_grid_thw), pipe.text_encoder.inputs["image_grid_thw"])

    holds()


@pytest.mark.parametrize("form", FORMS)
def test_edit_plus_inputs_equal_the_pipelines(folders, processor, form):
    pipe = reference_pipeline(QwenImageEditPlusPipeline, folders[form])
    sample = st.tuples(BESIDE_PICTURES, st.lists(RESIZED, min_size=1, max_size=3))

    @given(batch=st.lists(sample, min_size=1, max_size=3))
    def holds(batch):
        output = processor([prompt for prompt, _ in batch], [images for _, images in batch], ours.EDIT_PLUS)
        rows, dropped = [], []
        for prompt, images in batch:
            dropped.append(pipe._get_qwen_prompt_embeds([prompt], images, device="cpu")[0][0, :, 0])
            rows.append(pipe.text_encoder.inputs)
        check_row_by_row(output, rows, dropped)

    holds()


# Pictures


@settings(max_examples=150)
@given(
    picture=pictures(),
    patch_size=st.sampled_from([8, 14]),
    merge_size=st.sampled_from([1, 2]),
    temporal_patch_size=st.sampled_from([1, 2]),
    limits=st.sampled_from([(56 * 56, 12845056), (28 * 28, 60 * 60), (100 * 100, 120 * 120)]),
)
def test_patches_equal_the_picture_processors(picture, patch_size, merge_size, temporal_patch_size, limits):
    sizes = dict(patch_size=patch_size, merge_size=merge_size, temporal_patch_size=temporal_patch_size)
    sizes |= dict(min_pixels=limits[0], max_pixels=limits[1])
    reference = Qwen2VLImageProcessor(**sizes, image_mean=MEAN, image_std=STD)
    # At 1 and 3 pixels of height the reference takes rows for channels unless told.
    told = {"input_data_format": "channels_last"} if picture.height in (1, 3) else {}
    wanted = reference(picture, return_tensors="pt", **told)
    config = ours.ImageProcessorConfig(
        **sizes, image_mean=tuple(MEAN), image_std=tuple(STD), rescale_factor=1 / 255
    )
    patches, grid = ours.picture_patches(picture, config)
    assert patches.dtype == torch.float32 and torch.equal(patches, wanted.pixel_values)
    assert [list(grid)] == wanted.image_grid_thw.tolist()


@settings(max_examples=60)
@given(picture=pictures(mode="RGB"), width=st.integers(1, 200), height=st.integers(1, 200))
def test_vae_pixels_equal_the_image_processors(picture, width, height):
    reference = VaeImageProcessor(vae_scale_factor=1)  # takes any size; the pipelines' are multiples of 16
    resized = resize_rgb(picture, width, height)
    assert resized.tobytes() == reference.resize(picture, height, width).tobytes()
    pixels = vae_pixels(picture, width, height)
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, height, width) and pixels.is_contiguous()
    assert torch.equal(pixels, reference.preprocess(picture, height, width))
    # Edit resizes once for both networks; resizing its picture to its own size changes nothing.
    assert torch.equal(vae_pixels(resized, width, height), pixels)


@given(picture=pictures())
def test_every_mode_is_converted_to_rgb_before_it_is_resized(picture):
    assert resize_rgb(picture, 17, 40).tobytes() == resize_rgb(picture.convert("RGB"), 17, 40).tobytes()


@given(
    shape=st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_pictures_out_equal_the_image_processors(shape, seed, dtype):
    decoded = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.8).to(dtype)
    reference = VaeImageProcessor(vae_scale_factor=16)
    pixels = denormalise_pixels(decoded)
    assert torch.equal(pixels, reference.postprocess(decoded, output_type="pt"))
    got, wanted = to_pil(pixels), reference.postprocess(decoded, output_type="pil")
    assert [(p.mode, p.size, p.tobytes()) for p in got] == [(p.mode, p.size, p.tobytes()) for p in wanted]


def test_halves_are_rounded_to_even_as_in_the_reference():
    pixels = (torch.arange(0, 255 * 3).reshape(1, 3, 15, 17) % 255 + 0.5) / 255
    (got,), (wanted,) = (
        to_pil(pixels),
        VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels)),
    )
    assert got.tobytes() == wanted.tobytes()
