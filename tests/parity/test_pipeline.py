"""Whole edits against the reference pipelines: same checkpoint folder, pictures, prompts and seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwenedit
from tests.support import assert_close
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

PICTURES = 1e-4  # on pixels in [0, 1]
PROMPT = "make the circle red"
CHINESE = "把左边的蓝色圆形变成红色，{保持}其他不变 🔴"


@pytest.fixture(autouse=True)
def _tiny_areas(monkeypatch):
    tiny_areas(monkeypatch)


def both(kind, **config):
    folder = checkpoint(kind, **config)
    return qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def compare(ours, reference, image, prompt, **options):
    options = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 3, **options}
    images = {} if image is None else {"image": image}
    wanted = reference(prompt=prompt, generator=generator(), output_type="pt", **images, **options).images
    got = ours(prompt=prompt, generator=generator(), output_type="pt", **images, **options).images
    assert got.shape == wanted.shape
    inside = ((wanted > 0) & (wanted < 1)).float().mean()
    assert inside > 0.5, f"only {inside:.2f} of the reference's pixels are not clamped: nothing to compare"
    assert (got - wanted).abs().max() <= PICTURES
    return got


@pytest.mark.parametrize("size", [{}, {"height": 48, "width": 80}, {"height": 112, "width": 16}])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_generate(size, scale):
    ours, reference = both("generate")
    size = size or {"height": 64, "width": 64}
    negative = " " if scale > 1 else None
    compare(ours, reference, None, PROMPT, true_cfg_scale=scale, negative_prompt=negative, **size)


def test_generate_a_batch_of_prompts_of_different_length():
    ours, reference = both("generate")
    prompts = [PROMPT, CHINESE, ""]
    negatives = ["a dog", " ", "low quality, 低画质"]
    compare(ours, reference, None, prompts, negative_prompt=negatives, height=48, width=64)
    compare(ours, reference, None, prompts, height=48, width=64, max_sequence_length=7)


def test_generate_takes_what_stands_for_pictures_as_text():
    ours, reference = both("generate")
    prompts = ["a <|image_pad|> b", "<|vision_start|><|image_pad|><|vision_end|> <|video_pad|>红"]
    compare(ours, reference, None, prompts, negative_prompt="<|image_pad|>", height=48, width=64)


@pytest.mark.parametrize("kind", ["edit", "plus"])
def test_generate_works_with_an_editing_checkpoint(kind):
    ours, reference = both(kind)
    parts = {name: getattr(reference, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    import diffusers

    text_only = diffusers.QwenImagePipeline(transformer=reference.transformer, **parts)
    text_only.set_progress_bar_config(disable=True)
    compare(ours, text_only, None, PROMPT, height=64, width=48)


@pytest.mark.filterwarnings("ignore:the output's token grid")
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize(
    "size, options",
    [
        ((64, 64), {}),
        ((97, 51), {"true_cfg_scale": 1.0, "negative_prompt": None}),
        ((40, 131), {"num_inference_steps": 2}),
        ((97, 51), {"height": 80, "width": 48}),  # odd grids, and not the reference's own
        ((33, 64), {"negative_prompt": "模糊 blurry"}),
    ],
)
def test_edit(zero_cond_t, size, options):
    ours, reference = both("edit", zero_cond_t=zero_cond_t, seed=3)
    compare(ours, reference, picture(*size), CHINESE, **options)


def test_edit_a_batch_with_a_picture_a_prompt():
    """The reference resizes every picture of a list to the first one's size for the VAE and not at all for
    the language model; pictures of the planned size are what both of us mean."""
    ours, reference = both("edit")
    images = [picture(96, 32, seed=1), picture(96, 32, seed=2)]
    options = {"negative_prompt": [" ", "a much longer negative prompt"]}
    compare(ours, reference, images, [PROMPT, CHINESE], **options)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("sizes", [[(64, 64)], [(80, 40), (50, 70)], [(64, 64), (30, 90), (100, 61)]])
@pytest.mark.parametrize("options", [{}, {"true_cfg_scale": 1.0, "negative_prompt": None}])
def test_edit_plus(zero_cond_t, sizes, options):
    ours, reference = both("plus", zero_cond_t=zero_cond_t)
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    compare(ours, reference, images, CHINESE, **options)


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_edit_plus_with_one_picture_not_in_a_list_and_a_size():
    ours, reference = both("plus")
    compare(ours, reference, picture(70, 50), PROMPT, height=48, width=112)


@pytest.mark.parametrize("kind", ["edit", "plus"])
def test_several_images_of_one_prompt(kind):
    """One prompt without padding: there the reference's tiled masks and latents do no harm."""
    ours, reference = both(kind)
    got = compare(ours, reference, picture(60, 60), PROMPT, num_images_per_prompt=2)
    assert (got[0] - got[1]).abs().max() > 1e-3


SIDES = st.integers(20, 130)


@pytest.mark.filterwarnings("ignore:the output's token grid")
@settings(max_examples=8)
@given(
    kind=st.sampled_from(["generate", "edit", "plus"]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    axes=st.sampled_from([(4, 6, 6), (2, 4, 10), (8, 4, 4)]),
    zero_cond_t=st.booleans(),
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3),
    output=st.none() | st.tuples(st.integers(2, 6), st.integers(2, 6)),
    guided=st.booleans(),
    steps=st.integers(2, 3),
    seed=st.integers(0, 100),
)
def test_any_configuration_and_any_pictures(
    kind, layers, heads, axes, zero_cond_t, sizes, output, guided, steps, seed
):
    ours, reference = both(kind, seed=seed, layers=layers, heads=heads, axes=axes, zero_cond_t=zero_cond_t)
    pictures = [picture(*size, seed=seed + i) for i, size in enumerate(sizes)]
    image = {"generate": None, "edit": pictures[0], "plus": pictures}[kind]
    options = {"num_inference_steps": steps}
    if output is not None or kind == "generate":
        rows, columns = output or (4, 4)
        options |= {"height": 16 * rows, "width": 16 * columns}
    if not guided:
        options |= {"true_cfg_scale": 1.0, "negative_prompt": None}
    compare(ours, reference, image, CHINESE, **options)


def test_a_list_of_generators_and_given_latents_and_sigmas():
    ours, reference = both("edit")
    image, options = picture(64, 64), {"num_inference_steps": 3, "output_type": "pt", "negative_prompt": " "}
    options["num_images_per_prompt"] = 2
    got = ours(image, PROMPT, generator=[generator(1), generator(2)], **options).images
    wanted = reference(image, PROMPT, generator=[generator(1), generator(2)], **options).images
    assert (got - wanted).abs().max() <= PICTURES
    latents = torch.randn(2, 16, 64, generator=generator())
    options |= {"latents": latents, "sigmas": [1.0, 0.6, 0.1]}
    wanted = reference(image, PROMPT, **options).images
    assert (ours(image, PROMPT, **options).images - wanted).abs().max() <= PICTURES


def test_latent_and_pil_outputs():
    ours, reference = both("edit")
    image, options = picture(70, 50), {"num_inference_steps": 2, "negative_prompt": " "}
    for output_type in ("latent", "pil"):
        got = ours(image, PROMPT, generator=generator(), output_type=output_type, **options).images
        wanted = reference(image, PROMPT, generator=generator(), output_type=output_type, **options).images
        if output_type == "latent":
            assert_close(got, wanted, PICTURES)
        else:
            assert [x.size for x in got] == [x.size for x in wanted]
            levels = torch.tensor([list(x.tobytes()) for x in got]) - torch.tensor(
                [list(x.tobytes()) for x in wanted]
            )
            assert levels.abs().max() <= 1  # a pixel on the edge of two levels may round either way


def test_whole_edit_in_fp64():
    """What the reference rounds to float32 on purpose stays; everything else shrinks."""
    folder = checkpoint("edit")
    reference = reference_pipeline(folder, torch.float64)
    ours = qwenedit.load(folder, device="cpu", dtype=torch.float64, progress=False)
    image, options = picture(64, 50), {"num_inference_steps": 3, "output_type": "pt", "negative_prompt": " "}
    wanted = reference(image, CHINESE, generator=generator(), **options).images
    got = ours(image, CHINESE, generator=generator(), **options).images
    assert (got - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["edit", "plus"])
def test_bfloat16_is_no_further_from_fp32_than_the_reference(kind):
    folder = checkpoint(kind)
    image, options = (
        picture(64, 50),
        {"num_inference_steps": 4, "output_type": "latent", "negative_prompt": " "},
    )
    noise = torch.randn(1, 4 * 4, 64, generator=generator()).to(torch.bfloat16)

    def run(pipeline, latents):
        return pipeline(image, PROMPT, latents=latents, height=64, width=64, **options).images.float()

    truth = run(qwenedit.load(folder, device="cpu", progress=False), noise.float())
    got = run(qwenedit.load(folder, device="cpu", dtype="bfloat16", progress=False), noise)
    wanted = run(reference_pipeline(folder, torch.bfloat16), noise)
    assert (got - truth).pow(2).mean().sqrt() <= 1.25 * (wanted - truth).pow(2).mean().sqrt()
