"""Picture to picture, inpainting and masked edits against the reference's pipelines for them."""

import inspect

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import qwenedit
from tests.support import assert_close
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

RUNS = 1e-4  # on pixels in [0, 1], and on latents against their largest value
PROMPT = "make the circle red"
CHINESE = "把左边的蓝色圆形变成红色，{保持}其他不变 🔴"
CLASSES = {
    "img2img": ("generate", "QwenImageImg2ImgPipeline"),
    "inpaint": ("generate", "QwenImageInpaintPipeline"),
    "edit": ("edit", "QwenImageEditInpaintPipeline"),
}
STRENGTHS = [0.25, 0.3, 0.5, 0.85, 1.0]


@pytest.fixture(autouse=True)
def _tiny_areas(monkeypatch):
    tiny_areas(monkeypatch)


def both(kind, **config):
    own, name = CLASSES[kind]
    folder = checkpoint(own, **config)
    return qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder, name=name)


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def blob(width, height, seed=0):
    """A mask with soft edges: an ellipse and a bar, whose greys are on both sides of the half."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    x, y = (seed * 7) % (width // 3 + 1), (seed * 5) % (height // 3 + 1)
    draw.ellipse((x, y, x + width // 2, y + height // 2), fill=255)
    draw.rectangle((width // 4, height - height // 6, width, height), fill=160)
    return mask.resize((width // 2, height // 2)).resize((width, height), Image.Resampling.BICUBIC)


def arguments(kind, image, mask, size):
    """How our own functions and the reference's take them."""
    given = {"image": image} if kind == "img2img" else {"image": image, "mask_image": mask}
    return given if kind == "edit" else {**given, "width": size[0], "height": size[1]}


def run_ours(ours, kind, prompt, **options):
    if kind == "edit":
        return ours.edit(options.pop("image"), prompt, **options).images
    return ours.generate(prompt, **options).images


def compare(kind, ours, reference, prompt=PROMPT, outputs=("pt", "latent"), seeds=7, **options):
    options = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 4, **options}

    def generators():
        return [generator(seed) for seed in seeds] if isinstance(seeds, list) else generator(seeds)

    for output_type in outputs:
        own, theirs = generators(), generators()
        got = run_ours(ours, kind, prompt, generator=own, output_type=output_type, **options)
        wanted = reference(prompt=prompt, generator=theirs, output_type=output_type, **options).images
        for one, other in zip(own, theirs, strict=True) if isinstance(own, list) else [(own, theirs)]:
            assert torch.equal(one.get_state(), other.get_state()), "other draws"
        if output_type == "latent":
            assert_close(got, wanted, RUNS)
        else:
            assert got.shape == wanted.shape and ((wanted > 0) & (wanted < 1)).float().mean() > 0.5
            assert (got - wanted).abs().max() <= RUNS
    return got


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_strengths_with_and_without_guidance(kind, guided, strength):
    ours, reference = both(kind, seed=3)
    image, mask = picture(97, 51), blob(97, 51)
    own = {} if guided else {"true_cfg_scale": 1.0, "negative_prompt": None}
    given = arguments(kind, image, mask, (80, 48))
    compare(kind, ours, reference, CHINESE, strength=strength, **given, **own)


@pytest.mark.parametrize("size", [(64, 64), (131, 40), (33, 90)])
@pytest.mark.parametrize("kind", CLASSES)
def test_sizes(kind, size):
    ours, reference = both(kind)
    given = arguments(kind, picture(*size), blob(*size, seed=1), (112, 32))
    compare(kind, ours, reference, strength=0.6, **given)


def test_a_mask_of_another_size_than_its_picture():
    ours, reference = both("inpaint")
    given = arguments("inpaint", picture(90, 60), blob(45, 30), (64, 48))
    compare("inpaint", ours, reference, strength=0.6, **given)
    ours, reference = both("edit")
    given = arguments("edit", picture(90, 60), blob(40, 60), ())
    with pytest.warns(UserWarning, match="the mask is 40x60 and its picture 90x60"):
        compare("edit", ours, reference, strength=0.6, **given)


@pytest.mark.parametrize("pad", [0, 5, 200])
@pytest.mark.parametrize(
    "kind, size, output",
    [("inpaint", (90, 61), (64, 48)), ("inpaint", (50, 130), (96, 32)), ("edit", (96, 32), None)],
)
def test_crops(kind, size, output, pad):
    """The reference's crop of an edit needs a mask of the size to which it resizes the picture."""
    ours, reference = both(kind)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] // 2, size[1] // 4, size[0] - 3, size[1] // 4 * 3), fill=255)
    image = picture(192, 64) if kind == "edit" else picture(*size)
    options = {**arguments(kind, image, mask, output), "strength": 0.85, "padding_mask_crop": pad}
    options |= {"negative_prompt": " ", "num_inference_steps": 3, "num_images_per_prompt": 2}
    got = run_ours(ours, kind, PROMPT, generator=generator(), **options)
    wanted = reference(prompt=PROMPT, generator=generator(), **options).images
    assert [one.size for one in got] == [one.size for one in wanted] == [size] * 2
    for one, other in zip(got, wanted, strict=True):
        levels = torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))
        # A pixel on the edge of two levels may round either way; Lanczos then spreads it.
        assert levels.abs().max() <= 2 and (levels != 0).float().mean() < 0.01
    assert got[0].tobytes() != got[1].tobytes()


@pytest.mark.parametrize("kind", CLASSES)
def test_several_outputs_and_lists_of_generators(kind):
    ours, reference = both(kind)
    given = arguments(kind, picture(60, 60), blob(60, 60), (64, 64))
    for seeds in (7, [1, 2]):
        got = compare(kind, ours, reference, strength=0.7, seeds=seeds, num_images_per_prompt=2, **given)
        assert (got[0] - got[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
@pytest.mark.parametrize("seeds", [7, [1, 2]])
def test_a_batch_of_prompts(kind, seeds):
    """One picture for both, and a picture and a mask each."""
    ours, reference = both(kind)
    prompts = {"prompt": [PROMPT, CHINESE], "negative_prompt": [" ", "a dog"], "seeds": seeds}
    alone = arguments(kind, picture(60, 60), blob(60, 60), (64, 48))
    compare(kind, ours, reference, strength=0.7, **prompts, **alone)
    images, masks = [picture(64, 48, seed) for seed in (1, 2)], [blob(64, 48, seed) for seed in (1, 2)]
    each = arguments(kind, images, masks, (64, 48))
    compare(kind, ours, reference, strength=0.7, **prompts, **each)


@pytest.mark.parametrize("seeds", [7, [1, 2]])
def test_a_batch_of_edits(seeds):
    """With pictures of the planned size, as in tests/parity/test_pipeline.py, and prompts of one length: the
    reference resizes a list of pictures by its first one, and pads masks for the wrong prompts."""
    ours, reference = both("edit")
    images, masks = [picture(96, 32, seed) for seed in (1, 2)], [blob(96, 32, seed) for seed in (1, 2)]
    prompts = {"prompt": [PROMPT, PROMPT], "negative_prompt": [" ", " "], "seeds": seeds}
    compare("edit", ours, reference, strength=0.7, image=images, mask_image=masks, **prompts)


@pytest.mark.parametrize("kind", CLASSES)
def test_given_sigmas(kind):
    ours, reference = both(kind)
    given = arguments(kind, picture(60, 60), blob(60, 60), (64, 64))
    sigmas = {"sigmas": [0.9, 0.7, 0.4, 0.1]}
    compare(kind, ours, reference, strength=0.75, **sigmas, **given)


SIDES = st.integers(20, 130)


@settings(max_examples=10)
@given(
    kind=st.sampled_from(list(CLASSES)),
    zero_cond_t=st.booleans(),
    own=st.tuples(SIDES, SIDES),
    rows=st.integers(2, 6),
    columns=st.integers(2, 6),
    steps=st.integers(2, 6),
    strength=st.floats(0.2, 1.0),
    seed=st.integers(0, 100),
)
def test_any_picture_and_strength(kind, zero_cond_t, own, rows, columns, steps, strength, seed):
    ours, reference = both(kind, seed=seed % 3, zero_cond_t=zero_cond_t and kind == "edit")
    given = arguments(kind, picture(*own, seed=seed), blob(*own, seed=seed), (16 * columns, 16 * rows))
    compare(
        kind, ours, reference, CHINESE, outputs=("latent",), seeds=seed, strength=strength,
        num_inference_steps=steps, **given,
    )  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_scripts_for_the_reference(kind):
    """By name and by place, with each class's order and its default strength."""
    ours, reference = both(kind)
    image, mask = picture(96, 32), blob(96, 32)
    places = {
        "img2img": (PROMPT, " ", 3.0, image, 32, 96),
        "inpaint": (PROMPT, " ", 3.0, image, mask, None, 32, 96),
        "edit": (image, PROMPT, " ", mask, None, 3.0),
    }[kind]
    options = {"num_inference_steps": 5, "output_type": "pt"}
    got = ours(*places, generator=generator(), **options).images
    wanted = reference(*places, generator=generator(), **options).images
    assert (got - wanted).abs().max() <= RUNS
    assert ours.num_timesteps == reference.num_timesteps == 3
    named = arguments(kind, image, mask, (96, 32)) | {"true_cfg_scale": 3.0, "negative_prompt": " "}
    again = ours(prompt=PROMPT, generator=generator(), **named, **options).images
    assert torch.equal(again, got)


def test_a_callback_sees_what_is_kept():
    ours, reference = both("edit")
    seen = {"ours": [], "theirs": []}

    def keeping(name):
        def see(_pipe, index, _time, tensors):
            seen[name].append(tensors["latents"])
            return {"latents": tensors["latents"] * 1.01} if index == 0 else tensors

        return see

    options = {"negative_prompt": " ", "num_inference_steps": 4, "strength": 0.8, "output_type": "latent"}
    options |= {"image": picture(64, 64), "mask_image": blob(64, 64), "prompt": PROMPT}
    got = ours(generator=generator(), callback_on_step_end=keeping("ours"), **options).images
    wanted = reference(generator=generator(), callback_on_step_end=keeping("theirs"), **options).images
    assert_close(got, wanted, RUNS)
    assert len(seen["ours"]) == len(seen["theirs"]) == 4
    for one, other in zip(seen["ours"], seen["theirs"], strict=True):
        assert_close(one, other, RUNS)


def test_an_editing_checkpoint_generates_from_a_picture():
    folder = checkpoint("edit")
    ours = qwenedit.load(folder, device="cpu", progress=False)
    reference = reference_pipeline(folder, name="QwenImageInpaintPipeline")
    given = arguments("inpaint", picture(60, 60), blob(60, 60), (64, 48))
    compare("inpaint", ours, reference, strength=0.6, **given)


@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16_is_no_further_from_fp32_than_the_reference(kind, monkeypatch):
    own, name = CLASSES[kind]
    folder = checkpoint(own)
    given = arguments(kind, picture(64, 50), blob(64, 50), (64, 64))
    options = {**given, "num_inference_steps": 5, "strength": 0.8, "negative_prompt": " "}
    options |= {"output_type": "latent", "true_cfg_scale": 4.0}

    def rounded(*size, dtype=None, **options):  # the same numbers in every dtype
        return randn(*size, dtype=torch.bfloat16, **options).to(dtype or torch.float32)

    def run(dtype):
        ours = qwenedit.load(folder, device="cpu", dtype=dtype, progress=False)
        return run_ours(ours, kind, PROMPT, generator=generator(3), **options).float()

    randn = torch.randn
    monkeypatch.setattr(torch, "randn", rounded)
    truth, got = run("float32"), run("bfloat16")
    reference = reference_pipeline(folder, torch.bfloat16, name)
    wanted = reference(prompt=PROMPT, generator=generator(3), **options).images.float()
    assert (got - truth).pow(2).mean().sqrt() <= 1.25 * (wanted - truth).pow(2).mean().sqrt()


def test_the_defaults_are_the_classes():
    for _, name in CLASSES.values():
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert parameters["strength"].default == qwenedit.call.STRENGTH
