"""Whole runs under control against the reference's two ControlNet pipelines."""

import diffusers
import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImageMultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import qwenedit
from qwenedit.networks.controlnet import KEY_TABLE, ControlNet, ControlNetConfig
from qwenedit.weights.configs import config_from
from tests.parity.test_pipeline import CHINESE, PICTURES, PROMPT, generator
from tests.support import copy_weights
from tests.tiny import checkpoint, picture, reference_pipeline
from tests.tiny_controlnet import INPAINTING, controlnet

SIZES = [(64, 64), (48, 80), (112, 16)]  # height, width


def net_of(folder):
    """Ours and the reference's of a folder."""
    reference = QwenImageControlNetModel.from_pretrained(folder)
    with torch.device("meta"):
        ours = ControlNet(config_from(ControlNetConfig, dict(reference.config), "config.json"))
    copy_weights(ours, reference, KEY_TABLE)
    return ours.requires_grad_(False), reference


def both(*, several=False, inpaints=False, layers=5, kind="generate", **changes):
    folder = checkpoint(kind, layers=layers)
    extra = INPAINTING if inpaints else 0
    ours, net = net_of(controlnet(extra_condition_channels=extra, **changes))
    parts = {
        name: getattr(reference_pipeline(folder), name)
        for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    }
    parts["controlnet"] = QwenImageMultiControlNetModel([net]) if several else net
    name = "QwenImageControlNetInpaintPipeline" if inpaints else "QwenImageControlNetPipeline"
    reference = getattr(diffusers, name)(**parts)
    reference.set_progress_bar_config(disable=True)
    pipe = qwenedit.load(folder, device="cpu", progress=False)
    pipe.controlnets = [ours]
    return pipe, reference


def mask(width, height):
    """White on the right, with a grey edge."""
    return picture(width, height, seed=9).convert("L").point(lambda level: 255 if level > 110 else level)


def compare(ours, reference, prompt=PROMPT, *, call=None, **options):
    options = {
        "negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 4, "output_type": "pt",
        **options,
    }  # fmt: skip
    wanted = reference(prompt=prompt, generator=generator(), **options).images
    got = (call or ours.generate)(prompt=prompt, generator=generator(), **options).images
    assert got.shape == wanted.shape
    if options["output_type"] == "pt":
        inside = ((wanted > 0) & (wanted < 1)).float().mean()
        assert inside > 0.5, f"only {inside:.2f} of the reference's pixels are not clamped"
    bound = PICTURES * (1 if options["output_type"] == "pt" else float(wanted.abs().max()))
    assert (got - wanted).abs().max() <= bound
    plain = {key: value for key, value in options.items() if not key.startswith("control")}
    without = ours.generate(prompt=prompt, generator=generator(), **plain).images
    assert (without - got).abs().max() > 100 * bound  # the control is not for nothing
    return got


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("guided", [False, True])
def test_a_control_picture(height, width, guided):
    ours, reference = both()
    guidance = {} if guided else {"true_cfg_scale": 1.0, "negative_prompt": None}
    compare(
        ours, reference, height=height, width=width, control_image=picture(width, height, 3),
        controlnet_conditioning_scale=0.8, **guidance,
    )  # fmt: skip


ENDS = [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.2, 0.9), (0.0, 0.99)]


@pytest.mark.parametrize("start, end", ENDS)
def test_a_control_that_acts_in_a_part_of_the_run(start, end):
    ours, reference = both()
    compare(
        ours, reference, height=48, width=64, control_image=picture(64, 48, 3),
        control_guidance_start=start, control_guidance_end=end,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:the control picture is")
@pytest.mark.parametrize("kind, layers", [("generate", 1), ("generate", 3), ("edit", 4)])
def test_other_numbers_of_blocks_and_an_editing_checkpoint(kind, layers):
    ours, reference = both(kind=kind, layers=layers)
    compare(ours, reference, CHINESE, height=64, width=48, control_image=picture(50, 70, 1))


@pytest.mark.filterwarnings("ignore:the control picture is")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"controlnet_conditioning_scale": [0.5, 1.25]},
        {"control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.5, 1.0]},
        {"control_guidance_start": 0.25, "control_guidance_end": [0.75, 1.0]},
        {"true_cfg_scale": 1.0, "negative_prompt": None},
    ],
)
def test_several_control_pictures(options):
    ours, reference = both(several=True)
    options = {"controlnet_conditioning_scale": [0.7, 0.7], **options}  # the reference takes lists alone
    images = [picture(64, 48, 3), picture(60, 20, 4)]
    compare(ours, reference, height=48, width=64, control_image=images, **options)


def test_three_control_pictures_one_of_them_without_effect():
    ours, reference = both(several=True)
    images = [picture(64, 48, seed) for seed in (1, 2, 3)]
    scales = [1.0, 0.0, -0.5]
    options = {"control_image": images, "controlnet_conditioning_scale": scales}
    compare(ours, reference, CHINESE, height=48, width=64, **options)


def test_a_batch_of_prompts_with_one_control_picture():
    ours, reference = both()
    prompts, negatives = [PROMPT, CHINESE, ""], ["a dog", " ", "low quality, 低画质"]
    got = compare(
        ours, reference, prompts, negative_prompt=negatives, height=48, width=64,
        control_image=picture(64, 48, 3),
    )  # fmt: skip
    assert len(got) == 3


def test_a_batch_with_a_control_picture_a_prompt():
    """The reference's single net takes the pictures as they are, its several nets one list for each."""
    images = [picture(64, 48, 3), picture(64, 48, 4)]
    for several in (False, True):
        ours, reference = both(several=several)
        scale = {"controlnet_conditioning_scale": [1.0]} if several else {}
        options = {"height": 48, "width": 64, "negative_prompt": [" ", "a dog"], **scale}
        wanted = reference(
            prompt=[PROMPT, CHINESE], generator=generator(), num_inference_steps=3, output_type="pt",
            control_image=[images] if several else images, **options,
        ).images  # fmt: skip
        got = ours.generate(
            [PROMPT, CHINESE], generator=generator(), num_inference_steps=3, output_type="pt",
            control_image=[images], **options,
        ).images  # fmt: skip
        assert (got - wanted).abs().max() <= PICTURES


def test_several_images_of_a_prompt_and_a_list_of_generators():
    ours, reference = both()
    options = {
        "num_images_per_prompt": 2, "height": 48, "width": 64, "num_inference_steps": 3, "output_type": "pt",
    }  # fmt: skip
    runs = [
        {"control_image": picture(64, 48, 3), "prompt": PROMPT, "negative_prompt": " "},
        # the reference tiles the masks of several prompts; these two are equally long
        {
            "control_image": [picture(64, 48, 3), picture(64, 48, 4)],
            "prompt": [PROMPT, PROMPT.replace("red", "green")],
            "negative_prompt": [" ", "a"],
        },
    ]
    for several, run in enumerate(runs):
        count = 4 if several else 2
        wanted = reference(generator=[generator(k) for k in range(count)], **run, **options).images
        if several:
            run["control_image"] = [run["control_image"]]
        got = ours.generate(generator=[generator(k) for k in range(count)], **run, **options).images
        assert got.shape == wanted.shape and (got - wanted).abs().max() <= PICTURES


def test_the_reference_call_and_its_callback():
    ours, reference = both()

    def halved(_pipe, step, _time, tensors):
        return {"latents": tensors["latents"] * (0.5 if step == 0 else 1)}

    options = {"height": 48, "width": 64, "callback_on_step_end": halved, "num_inference_steps": 3}
    options |= {"control_image": picture(64, 48, 3), "true_cfg_scale": 4.0, "negative_prompt": " "}
    options |= {"controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.7, "output_type": "pt"}
    wanted = reference(prompt=PROMPT, generator=generator(), **options).images
    got = ours(prompt=PROMPT, generator=generator(), **options).images
    assert (got - wanted).abs().max() <= PICTURES


# --- inpainting nets


@pytest.fixture
def honest(monkeypatch):
    """The reference's inpainting pipeline samples from torch's global generator; let it be the caller's."""
    own = generator()
    sample = DiagonalGaussianDistribution.sample
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: sample(self, generator or own)
    )
    return own


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("guided", [False, True])
def test_an_inpainting_net(height, width, guided, honest):
    ours, reference = both(inpaints=True)
    guidance = {"true_cfg_scale": 4.0 if guided else 1.0, "negative_prompt": " " if guided else None}
    options = {"height": height, "width": width, "num_inference_steps": 4, **guidance}
    options |= {"control_image": picture(width, height, 3), "control_mask": mask(width, height)}
    options |= {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.75, "output_type": "pt"}
    wanted = reference(prompt=CHINESE, generator=honest, **options).images
    got = ours.generate(CHINESE, generator=generator(), **options).images
    assert (got - wanted).abs().max() <= PICTURES
    other = ours.generate(
        CHINESE, generator=generator(), **{**options, "control_mask": mask(width, height).rotate(180)}
    ).images
    assert (got - other).abs().max() > 10 * PICTURES


@pytest.mark.filterwarnings("ignore:the control picture is")
def test_an_inpainting_net_with_pictures_of_other_sizes_for_a_batch(honest):
    ours, reference = both(inpaints=True)
    options = {
        "height": 48, "width": 64, "num_inference_steps": 3, "output_type": "pt",
        "negative_prompt": [" ", "a dog"],
    }  # fmt: skip
    images, masks = [picture(50, 80, 3), picture(64, 48, 4)], [mask(100, 30), mask(64, 48).rotate(180)]
    wanted = reference(
        prompt=[PROMPT, CHINESE], generator=honest, control_image=images, control_mask=masks, **options
    ).images
    got = ours.generate(
        [PROMPT, CHINESE], generator=generator(), control_image=[images], control_mask=[masks], **options
    ).images
    assert (got - wanted).abs().max() <= PICTURES


def test_an_inpainting_net_honours_the_generator_unlike_the_reference():
    ours, reference = both(inpaints=True)
    options = {"height": 48, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    options |= {"control_image": picture(64, 48, 3), "control_mask": mask(64, 48)}
    options |= {"negative_prompt": None, "true_cfg_scale": 1.0}

    def runs(call):
        return [call(prompt=PROMPT, generator=generator(), **options).images for _ in range(2)]

    one, other = runs(ours.generate)
    assert torch.equal(one, other)
    one, other = runs(reference)
    assert not torch.equal(one, other)
    noise = torch.randn(1, 12, 64, generator=generator(3))
    torch.manual_seed(5)
    wanted = reference(prompt=PROMPT, latents=noise, **options).images
    got = ours.generate(PROMPT, latents=noise, generator=generator(5), **options).images
    assert (got - wanted).abs().max() <= PICTURES
