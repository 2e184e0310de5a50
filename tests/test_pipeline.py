"""The pipeline beyond the reference: batches row by row, saved conditionings, forms of input, refusals."""

import dataclasses
import warnings

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.taps import taps

PROMPTS = ["make the circle red", "把左边的蓝色圆形变成红色 🔴", ""]
TOLERANCE = 1e-4  # on pixels in [0, 1]


def picture(width, height, hue):
    image = Image.new("HSV", (width, height), (hue, 200, 220)).convert("RGB")
    image.paste((255, 255, 255), (width // 4, height // 4, width // 2, height // 2))
    return image


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipe, *arguments, **options):
    options = {"num_inference_steps": 2, "output_type": "pt", **options}
    call = pipe.generate if len(arguments) == 1 else pipe.edit
    return call(*arguments, **options).images


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_each_row_of_a_batch_equals_its_single_run(edit):
    images = [picture(64, 64, 10), picture(70, 70, 90), picture(100, 40, 170)]
    size = {"height": 64, "width": 64}
    whole = run(edit, images, PROMPTS, generator=generators(1, 2, 3), **size)
    for row in range(3):
        alone = run(edit, images[row], PROMPTS[row], generator=generators(row + 1), **size)
        assert (whole[row] - alone[0]).abs().max() <= TOLERANCE
    assert (whole[0] - whole[1]).abs().max() > 10 * TOLERANCE


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_each_row_of_a_multi_picture_batch_equals_its_single_run(plus):
    """The reference refuses such a batch; here rows even differ in number and shapes of their pictures."""
    images = [
        [picture(64, 64, 10)],
        [picture(100, 40, 90), picture(60, 64, 200)],
        [picture(40, 90, 130), picture(64, 64, 40), picture(64, 50, 220)],
    ]
    size = {"height": 48, "width": 64}
    negatives = ["a dog", " ", "low quality, 低画质"]
    whole = run(plus, images, PROMPTS, negative_prompt=negatives, generator=generators(1, 2, 3), **size)
    for row in range(3):
        alone = run(
            plus,
            images[row],
            PROMPTS[row],
            negative_prompt=negatives[row],
            generator=generators(row + 1),
            **size,
        )
        assert (whole[row] - alone[0]).abs().max() <= TOLERANCE


def test_several_images_a_prompt_are_prompt_major(edit):
    images = [picture(64, 64, 10), picture(64, 64, 90)]
    whole = run(edit, images, PROMPTS[:2], num_images_per_prompt=2, generator=generators(1, 2, 3, 4))
    for output, (row, seed) in enumerate([(0, 1), (0, 2), (1, 3), (1, 4)]):
        alone = run(edit, images[row], PROMPTS[row], generator=generators(seed))
        assert (whole[output] - alone[0]).abs().max() <= TOLERANCE


def test_one_picture_serves_every_prompt_and_is_encoded_once(edit):
    image, encoded = picture(64, 64, 10), []
    with taps(edit.vae, {"encoder.in": lambda x, site: encoded.append(x)}, strict=False):
        whole = run(edit, image, PROMPTS[:2], generator=generators(1, 2))
    assert len(encoded) == 1
    assert torch.equal(whole, run(edit, [[image], [image]], PROMPTS[:2], generator=generators(1, 2)))


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_the_forms_of_image_for_several_pictures(plus):
    images = [picture(64, 64, 10), picture(64, 32, 90)]
    flat = run(plus, images, PROMPTS[0], generator=generators(1))
    assert torch.equal(flat, run(plus, [images], [PROMPTS[0]], generator=generators(1)))
    both = run(plus, images, PROMPTS[:2], generator=generators(1, 2), height=64, width=64)
    assert torch.equal(
        both, run(plus, [images] * 2, PROMPTS[:2], generator=generators(1, 2), height=64, width=64)
    )


def test_the_order_of_pictures_and_every_input_matter(plus):
    a, b = picture(64, 64, 10), picture(64, 64, 90)
    base = run(plus, [a, b], PROMPTS[0], generator=generators(1))
    for other in (
        run(plus, [b, a], PROMPTS[0], generator=generators(1)),
        run(plus, [a], PROMPTS[0], generator=generators(1)),
        run(plus, [a, b], PROMPTS[1], generator=generators(1)),
        run(plus, [a, b], PROMPTS[0], generator=generators(1), negative_prompt="a dog"),
        run(plus, [a, b], PROMPTS[0], generator=generators(1), true_cfg_scale=2.0),
        run(plus, [a, b], PROMPTS[0], generator=generators(2)),
    ):
        assert (base - other).abs().max() > 0


def test_an_edit_is_repeated_from_a_file_without_the_text_encoder(edit, tmp_path):
    image = picture(64, 64, 10)
    whole = run(edit, image, PROMPTS[0], generator=generators(1))
    edit.condition(image, PROMPTS[0]).save(tmp_path / "edit.safetensors")
    small = qwenedit.load(device="cpu", text_encoder=False, progress=False)
    assert small.vision_language is None
    with taps(small.vae, {"encoder.*": lambda x, site: pytest.fail("the encoder ran")}, strict=False):
        again = small.sample(
            Conditioning.load(tmp_path / "edit.safetensors"),
            num_inference_steps=2,
            generator=generators(1),
            output_type="pt",
        ).images
    assert torch.equal(whole, again)
    with pytest.raises(ValueError, match="loaded without its text encoder"):
        small.edit(image, PROMPTS[0])


def test_steps_are_the_callers(edit):
    conditioning = edit.condition(picture(64, 64, 10), PROMPTS[0])
    wanted = edit.sample(
        conditioning, num_inference_steps=3, generator=generators(1), output_type="latent"
    ).images
    seen = []
    for step in edit.steps(conditioning, num_inference_steps=3, generator=generators(1)):
        seen.append((step.sigma, step.x0.std()))
    assert torch.equal(step.after, wanted) and len(seen) == 3
    latents = torch.randn(1, 16, 64, generator=generators(5)[0], requires_grad=True)
    step = next(edit.steps(conditioning, num_inference_steps=3, latents=latents))
    step.x0.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_without_guidance_the_negative_prompt_is_not_encoded(edit):
    labels = []
    record = {"language.*.in": lambda x, site: labels.append(site.labels["branch"])}
    with taps(edit.vision_language, {next(iter(record)): record["language.*.in"]}, strict=False):
        run(edit, picture(64, 64, 10), PROMPTS[0], true_cfg_scale=1.0)
        assert set(labels) == {"cond"}
        run(edit, picture(64, 64, 10), PROMPTS[0])
        assert set(labels) == {"cond", "uncond"}


def test_scripts_for_the_reference_run_unchanged():
    pipe = qwenedit.QwenImageEdit.from_pretrained(
        mini.CHECKPOINT, torch_dtype=torch.float32, device="cpu", use_safetensors=True,
        low_cpu_mem_usage=True, variant=None, local_files_only=True,
    )  # fmt: skip
    pipe.to(torch.float32)
    pipe.to("cpu")
    pipe.set_progress_bar_config(disable=None)
    image = picture(64, 64, 10)
    inputs = {
        "image": [image],
        "prompt": PROMPTS[0],
        "generator": torch.manual_seed(0),
        "true_cfg_scale": 4.0,
        "negative_prompt": " ",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "num_images_per_prompt": 1,
        "max_sequence_length": 512,
        "return_dict": True,
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    with torch.inference_mode():
        output = pipe(**inputs)
    assert output.images[0].size == (64, 64)
    text_only = pipe(prompt="a red circle", height=32, width=48, num_inference_steps=1).images
    assert text_only[0].size == (48, 32)
    with pytest.warns(UserWarning, match="guidance_scale has no effect"):
        pipe(prompt="x", guidance_scale=3.5, num_inference_steps=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"callback_on_step_end": print}, "callback_on_step_end returned NoneType, wanted a dict"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            "has noise, wanted latents or prompt_embeds; loop",
        ),
        ({"prompt_embeds": torch.zeros(1, 3, 128)}, "prompt and prompt_embeds are both given"),
        ({"attention_kwargs": {"gligen": 1}}, "attention_kwargs has gligen, .* attach `taps` instead"),
        ({"max_sequence_length": 1025}, "max_sequence_length is 1025, wanted at most 1024"),
        ({"max_sequence_length": "x"}, "max_sequence_length is 'x', wanted a whole number"),
    ],
)
def test_what_the_reference_takes_and_we_do_not(edit, options, message):
    with pytest.raises(ValueError, match=message):
        edit(prompt="x", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "fp16"}, "variant is 'fp16', wanted None: give the folder that holds the files"),
        ({"use_safetensors": False}, "use_safetensors is False, wanted None or True: there is no other"),
        ({"local_files_only": True}, "nobody/nothing is not on this machine"),
    ],
)
def test_what_the_reference_loads_and_we_do_not(options, message):
    with pytest.raises(ValueError, match=message):
        qwenedit.QwenImageEdit.from_pretrained("nobody/nothing", **options)


def test_max_sequence_length_cuts_the_prompt_of_text_to_image_only(edit):
    lengths = []
    record = {"txt_in": lambda x, site: lengths.append(x.shape[1])}
    with taps(edit.mmdit, record):
        for length in (3, 9):
            edit(prompt="red " * 20, max_sequence_length=length, num_inference_steps=1, true_cfg_scale=1.0)
    assert lengths == [3, 9]
    short, long = (
        edit(A, "red " * 20, max_sequence_length=length, num_inference_steps=1, output_type="pt",
             generator=generators(1)).images
        for length in (3, 1024)
    )  # fmt: skip
    assert torch.equal(short, long)


def test_guidance_wants_both_a_scale_and_a_negative_prompt(edit):
    image = picture(64, 64, 10)
    plain = run(edit, image, PROMPTS[0], generator=generators(1), true_cfg_scale=1.0)
    with pytest.warns(UserWarning, match="without a negative_prompt the run is unguided"):
        unguided = run(edit, image, PROMPTS[0], generator=generators(1), negative_prompt=None)
    assert torch.equal(plain, unguided)
    with pytest.warns(UserWarning, match="at true_cfg_scale 1.0 the run is unguided"):
        run(edit, image, PROMPTS[0], true_cfg_scale=1.0, negative_prompt="a dog")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(edit, image, PROMPTS[0], true_cfg_scale=1.0)


def test_a_size_of_other_proportions_warns(edit):
    with pytest.warns(
        UserWarning, match=r"token grid \(2, 4\) is not that of the picture it follows, \(4, 4\)"
    ):
        run(edit, picture(64, 64, 10), PROMPTS[0], height=32, width=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(edit, picture(64, 64, 10), PROMPTS[0], height=64, width=64)


A = picture(64, 64, 10)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((A, []), {}, "prompt is an empty list"),
        ((A, [3]), {}, "a prompt is int, wanted a string"),
        (([], "x"), {}, "image is an empty list, wanted a PIL picture"),
        (("in.png", "x"), {}, "image is str 'in.png', wanted a PIL picture"),
        (
            (torch.zeros(1, 3, 64, 64), "x"),
            {},
            r"image is Tensor of shape \(1, 3, 64, 64\) and float32, wanted a PIL picture",
        ),
        (([["a.png"]], "x"), {}, r"image\[0\]\[0\] is str 'a.png', wanted a PIL picture"),
        (([A, A], "x"), {}, "got 2 pictures for 1 prompt"),
        (([[A, A]], "x"), {}, r"got 2 pictures for a prompt, but Qwen-Image-Edit takes 1"),
        (([[A], [A]], "x"), {}, "got 2 lists of pictures, wanted 1"),
        (
            ([A, picture(64, 20, 1)], ["x", "y"]),
            {},
            r"outputs of different sizes \[\(64, 64\), \(128, 32\)\]",
        ),
        ((A, "x"), {"height": 50}, "height is 50, wanted a positive multiple of 16: the next one is 64"),
        ((A, "x"), {"width": 0}, "width is 0"),
        ((A, "x"), {"output_type": "jpg"}, "output_type is 'jpg', wanted one of pil, pt, np, latent"),
        (
            (A, "x"),
            {"num_inference_steps": 0},
            "num_inference_steps is 0, wanted a whole number of at least 1",
        ),
        (
            (A, "x"),
            {"num_images_per_prompt": 0},
            "num_images_per_prompt is 0, wanted a whole number of at least 1",
        ),
        (
            (A, "x"),
            {"latents": torch.zeros(1, 9, 64)},
            r"latents are shape \(1, 9, 64\), wanted a tensor of shape \(1, 16, 64\)",
        ),
        ((A, "x"), {"generator": generators(1, 2)}, "got 2 generators, wanted one, or a list of 1"),
        ((A, "x"), {"sigmas": [0.5, 0.7]}, "wanted strictly falling numbers"),
        ((A, "x"), {"sigmas": [1.0]}, "got 1 sigmas for 2 steps"),
        ((A, ["x", "y"]), {"negative_prompt": ["a", "b", "c"]}, "got 3 negative prompts, wanted one, or 2"),
        ((A, "<|image_pad|>"), {}, r"contains <\|image_pad\|>"),
        ((A, "x"), {"negative_prompt": "<|video_pad|>"}, r"contains <\|image_pad\|> or <\|video_pad\|>"),
        ((A, "\ud800"), {}, "a prompt is not valid Unicode"),
        ((A, "x"), {"negative_prompt": "\ud800"}, "a prompt is not valid Unicode"),
        ((Image.new("RGB", (3, 900)), "x"), {}, "ratio of width to height is 0.0033.* wanted no side of 0"),
        ((A, None), {}, "prompt is NoneType, wanted a string or a list of at least one"),
        ((A, 5), {}, "prompt is int, wanted a string or a list of at least one"),
        ((None,), {}, "prompt is NoneType, wanted a string"),
        ((None, "x"), {}, "image is None, wanted a PIL picture"),
        ((["a.png"], "x"), {}, r"image\[0\] is str 'a.png', wanted a PIL picture"),
        (([A, None], ["x", "y"]), {}, r"image\[1\] is None, wanted a PIL picture"),
        ((A, "x"), {"negative_prompt": 5}, "negative_prompt is int, wanted a string"),
        ((A, "x"), {"negative_prompt": []}, "negative_prompt is an empty list"),
        ((A, "x"), {"generator": 5}, r"a generator is int, wanted a torch\.Generator, or a list of them"),
        ((A, "x"), {"generator": [1]}, r"a generator is int, wanted a torch\.Generator"),
        ((A, "x"), {"num_inference_steps": "2"}, "num_inference_steps is '2', wanted a whole number"),
        ((A, "x"), {"num_inference_steps": 2.0}, r"num_inference_steps is 2\.0, wanted a whole number"),
        ((A, "x"), {"num_images_per_prompt": None}, "num_images_per_prompt is None, wanted a whole number"),
        ((A, "x"), {"num_images_per_prompt": 2.0}, r"num_images_per_prompt is 2\.0, wanted a whole number"),
        ((A, "x"), {"true_cfg_scale": "4"}, "true_cfg_scale is '4', wanted a finite number"),
        ((A, "x"), {"true_cfg_scale": None}, "true_cfg_scale is None, wanted a finite number"),
        ((A, "x"), {"true_cfg_scale": float("nan")}, "true_cfg_scale is nan, wanted a finite number"),
        ((A, "x"), {"true_cfg_scale": float("inf")}, "true_cfg_scale is inf, wanted a finite number"),
        ((A, "x"), {"latents": [0.0]}, r"latents are list, wanted a tensor of shape \(1, 16, 64\)"),
        ((A, "x"), {"sigmas": 5}, "sigmas are 5, wanted falling numbers"),
        ((A, "x"), {"sigmas": ["a", "b"]}, r"sigmas are \['a', 'b'\], wanted"),
    ],
)
def test_bad_input_is_refused_before_any_network_runs(edit, arguments, options, message):
    def ran(*_):
        pytest.fail("a network ran")

    hooks = [m.register_forward_pre_hook(ran) for m in (edit.vision_language, edit.mmdit, edit.vae.encoder)]
    try:
        with pytest.raises(ValueError, match=message):
            run(edit, *arguments, **options)
    finally:
        for hook in hooks:
            hook.remove()


def test_no_picture_is_no_edit(plus):
    """The template of the multi-picture variants would take it."""
    with pytest.raises(ValueError, match="image is None, wanted a PIL picture or a list of them"):
        plus.edit(None, "x")


def test_a_run_from_a_conditioning_without_negative_prompt_says_that_it_is_unguided(edit):
    conditioning = edit.condition(A, "x", negative_prompt=None)
    with pytest.warns(UserWarning, match="without a negative_prompt the run is unguided"):
        edit.sample(conditioning, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.sample(conditioning, num_inference_steps=1, true_cfg_scale=1.0)
        edit.sample(edit.condition(A, "x"), num_inference_steps=1, true_cfg_scale=1.0)


def test_a_conditioning_of_another_model_is_refused(edit):
    conditioning = edit.condition(A, "x", negative_prompt=None)
    prompt = Prompt(conditioning.prompt.embeds[..., :-1])
    with pytest.raises(ValueError, match="prompt embeddings are 127 wide, wanted 128"):
        edit.sample(dataclasses.replace(conditioning, prompt=prompt), true_cfg_scale=1.0)
    latents = ((conditioning.reference_latents[0][0][:, :-1],),)
    with pytest.raises(ValueError, match="reference latents are 63 wide, wanted 64"):
        edit.sample(dataclasses.replace(conditioning, reference_latents=latents), true_cfg_scale=1.0)


def test_one_step_is_a_step(edit):
    """The reference's schedule is NaN for one step."""
    assert torch.isfinite(run(edit, A, "x", num_inference_steps=1)).all()
