"""Runs from a picture, under masks and ControlNets, at the official size."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwenedit.switches import Mask, Switches
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_holes, write_sparse

DATA = Path(__file__).parents[1] / "data"
BLOCKS = {"transformer": 6, "language": 2, "vision": 8}  # a ControlNet has five or six
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sparse(tmp_path_factory.mktemp("official"), "Qwen-Image-Edit", blocks=BLOCKS)


def controlnet(folder, name):
    """An official ControlNet, which has five or six blocks."""
    (folder / name).mkdir()
    config = json.loads((DATA / "controlnets.json").read_text())["configs"][f"Qwen-Image-ControlNet-{name}"]
    (folder / name / "config.json").write_text(json.dumps(config))
    shapes = json.loads((DATA / "keys" / f"controlnet_{name.lower()}.json").read_text())
    write_holes(folder / name / "diffusion_pytorch_model.safetensors", shapes)
    return folder / name


def require_on_device(ran, allowed):
    assert ran.images.device.type == "cuda" and ran.images.dtype == torch.bfloat16
    steps = [after - before for before, after in zip(ran.waits, ran.waits[1:], strict=False)]
    assert steps == [1] * len(steps) and len(steps) >= 2
    made = {place.split()[0] for place, where, _ in ran.stages["sampling"].placed if where == "cpu"}
    assert made <= allowed


@pytest.mark.parametrize("preserve", ["latent", "velocity", "x0"])
def test_an_edit_under_a_mask(folder, preserve):
    mask = Image.new("L", (1024, 1024), 255)
    mask.paste(0, (0, 0, 512, 512))
    with fake_device() as device:
        pipe = models.load(folder)
        ran = models.run(
            pipe, device, "Qwen-Image-Edit", mask_image=mask, strength=0.8, num_inference_steps=STEPS,
            switches=Switches(mask=Mask(preserve=preserve)),
        )  # fmt: skip
    require_on_device(ran, {"inputs/pictures.py", "inputs/masks.py", "latents.py", "encoding/sources.py"})


@pytest.mark.parametrize("name", ["Union", "Inpainting"])
def test_an_edit_under_a_controlnet(folder, tmp_path, name):
    net = controlnet(tmp_path, name)
    picture = Image.new("RGB", (1024, 1024), "grey")
    options = {"control_mask": Image.new("L", (1024, 1024), 255)} if name == "Inpainting" else {}
    with fake_device() as device:
        pipe = models.load(folder, controlnet=net)
        ran = models.run(
            pipe, device, "Qwen-Image-Edit", control_image=picture, num_inference_steps=STEPS,
            control_guidance_end=0.6, **options,
        )  # fmt: skip
    require_on_device(ran, {"inputs/pictures.py", "inputs/masks.py", "latents.py", "sampling/controls.py"})
