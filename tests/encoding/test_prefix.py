"""The text encoder runs once over what both prompts begin with; the vision tower once in any case."""

import functools

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.encoding.prefix import common_prefix
from qwenedit.family import EDIT, TEXT_TO_IMAGE
from qwenedit.switches import Seen, Switches
from qwenedit.taps import taps
from tests.support import FP32, FP64
from tests.tiny import checkpoint

PROMPTS = ["make the circle red", "把左边的蓝色圆形变成红色 🔴, please, and all the rest of it as well", "x"]
NEGATIVES = [" ", "low quality, 低画质", "make the circle"]


def pictures():
    first = Image.open(mini.EXAMPLE).convert("RGB")
    return [first, first.rotate(90).resize((100, 60))]


def embeddings(pipe, image, prompt, negative=" ", **options):
    pipe.share_prefix = options.pop("share", False)
    made = pipe.condition(image, prompt, negative_prompt=negative, **options)
    return made.prompt, made.negative


@pytest.mark.parametrize("kind", ["edit", "plus"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.float64, FP64)])
def test_one_pass_equals_two(kind, dtype, tolerance):
    pipe = qwenedit.load(checkpoint(kind), device="cpu", progress=False)
    pipe.vision_language.to(dtype)
    image = pictures() if kind == "plus" else pictures()[0]
    for prompt, negative in ((PROMPTS[0], NEGATIVES[0]), (PROMPTS, NEGATIVES), (" ", " ")):
        plain = embeddings(pipe, image, prompt, negative)
        shared = embeddings(pipe, image, prompt, negative, share=True)
        for a, b in zip(plain, shared, strict=True):
            assert (a.embeds - b.embeds).abs().max() <= tolerance * a.embeds.abs().max()
            assert (a.mask is None and b.mask is None) or torch.equal(a.mask, b.mask)


def test_the_negative_prompt_does_not_see_the_prompt():
    """Another prompt of as many tokens changes no bit of the negative one's embeddings."""
    pipe = qwenedit.load(device="cpu", progress=False)
    made = [embeddings(pipe, pictures()[0], text, "a dog", share=True) for text in ("red", "blue")]
    (first, negative), (second, other) = made
    assert first.embeds.shape == second.embeds.shape and not torch.equal(first.embeds, second.embeds)
    assert torch.equal(negative.embeds, other.embeds)


def test_how_often_the_networks_run(monkeypatch):
    pipe = qwenedit.load(device="cpu", progress=False)
    ran = []
    towers = {"vision.tokens": lambda x, site: ran.append(site.labels["branch"])}
    with taps(pipe.vision_language, towers):
        embeddings(pipe, pictures()[0], PROMPTS[0])
    assert ran == ["cond"]
    with taps(pipe.vision_language, towers):
        embeddings(pipe, pictures()[0], PROMPTS[0], switches=Switches(seen=Seen(negative=False)))
    assert ran == ["cond"] * 2  # the negative prompt sees no picture

    tokens = []
    block = pipe.vision_language.language.blocks[0]
    forward = type(block).forward

    @functools.wraps(forward)  # so that it counts as the block's own: an observed model shares nothing
    def counted(self, x, *rest):
        if self is block:
            tokens.append(x.shape[1])
        return forward(self, x, *rest)

    monkeypatch.setattr(type(block), "forward", counted)
    embeddings(pipe, pictures()[0], PROMPTS[0])
    embeddings(pipe, pictures()[0], PROMPTS[0], share=True)
    two, one = tokens[:2], tokens[2:]
    assert len(one) == 1 and max(two) < one[0] < max(two) + 12 < sum(two)


def test_who_taps_sees_two_passes():
    pipe = qwenedit.load(device="cpu", progress=False)
    plain = embeddings(pipe, pictures()[0], PROMPTS[0])
    seen = []
    with taps(
        pipe.vision_language, {"language.blocks.0.out": lambda x, site: seen.append(site.labels["branch"])}
    ):
        tapped = embeddings(pipe, pictures()[0], PROMPTS[0], share=True)
    assert seen == ["cond", "uncond"]
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(plain, tapped, strict=True))
    hook = pipe.vision_language.language.norm.register_forward_hook(lambda *_: seen.append("hook"))
    embeddings(pipe, pictures()[0], PROMPTS[0], share=True)
    hook.remove()
    assert seen[2:] == ["hook", "hook"]


def test_a_negative_prompt_that_sees_something_else_is_encoded_alone():
    pipe = qwenedit.load(device="cpu", progress=False)
    switches = Switches(seen=Seen(negative=False))
    plain = embeddings(pipe, pictures()[0], PROMPTS[0], switches=switches)
    shared = embeddings(pipe, pictures()[0], PROMPTS[0], switches=switches, share=True)
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(plain, shared, strict=True))


def test_text_to_image_shares_its_template():
    pipe = qwenedit.load(device="cpu", progress=False)
    plain = embeddings(pipe, None, PROMPTS, NEGATIVES)
    shared = embeddings(pipe, None, PROMPTS, NEGATIVES, share=True)
    for a, b in zip(plain, shared, strict=True):
        assert (a.embeds - b.embeds).abs().max() <= FP32 * a.embeds.abs().max()


def test_the_common_prefix_ends_where_any_row_differs_or_is_padded():
    processor = qwenedit.load(device="cpu", progress=False).processor
    image = [pictures()[0]]

    def prefix(a, b):
        return common_prefix(processor(a, [image] * len(a), EDIT), processor(b, [image] * len(b), EDIT))

    start = (
        len(processor.tokenizer.encode(EDIT.render("", [16])).ids) - 5
    )  # <|im_end|> \n <|im_start|> assistant \n
    whole = processor(["red"], [image], EDIT).input_ids.shape[1]
    assert prefix(["red"], ["tea"]) == start
    assert prefix(["red"], ["red"]) == whole
    assert prefix(["red", "red"], ["red", "tea"]) == start
    assert prefix(["", "make the circle red"], ["", "make the circle red"]) == start + 5
    text = processor(["red"], None, TEXT_TO_IMAGE)
    assert common_prefix(text, processor(["tea"], None, TEXT_TO_IMAGE)) > 30
