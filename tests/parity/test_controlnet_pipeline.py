"""Whole runs under control against the reference's two ControlNet pipelines."""

import diffusers
import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImageMultiControlNetModel

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
    print("error", (got - wanted).abs().max())
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
