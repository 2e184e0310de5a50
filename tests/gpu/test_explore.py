"""A run that is looked at on the device: the plain run's bits, and the same noise for a second one."""

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini

PROMPT = "make the circle red"


@pytest.mark.parametrize("seed", [None, 0])
def test_the_pictures_are_those_of_edit(device, tmp_path, seed):
    pipe = qwenedit.load(device=device, dtype="bfloat16", progress=False)
    picture = Image.open(mini.EXAMPLE).convert("RGB")

    def options():
        torch.manual_seed(5)  # the device's own generator, where none is given
        return {
            "num_inference_steps": 4,
            "generator": None if seed is None else torch.Generator(device).manual_seed(seed),
        }

    wanted = [
        pipe.edit(picture, PROMPT, **options(), true_cfg_scale=scale).images[0].tobytes() for scale in (4, 2)
    ]
    second = {"true_cfg_scale": 2}
    result = qwenedit.explore(pipe, picture, PROMPT, tmp_path / "a.html", second=second, **options())
    assert [one.tobytes() for one in result.images] == wanted
