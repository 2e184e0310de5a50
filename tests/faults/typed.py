"""Uses of the package that a type checker must accept; `make check` runs mypy on this file."""

from __future__ import annotations

from functools import partial

from PIL import Image
from torch import Tensor

from qwenedit import QwenImageEdit
from qwenedit.sampling.samplers import flow_sde


def use(pipe: QwenImageEdit, picture: Image.Image) -> None:
    """Results in all their forms."""
    pipe.edit(picture, "make the circle red", num_inference_steps=1).images[0].save("out.png")
    size: tuple[int, int] = pipe.generate("x", height=64, width=64, num_inference_steps=1).images[0].size
    pixels: Tensor = pipe.edit(picture, "x", num_inference_steps=1, output_type="pt").images
    conditioning = pipe.condition(picture, "x")
    latents: Tensor = pipe.sample(conditioning, sigmas=[1.0], output_type="latent").images
    pipe.sample(conditioning, num_inference_steps=1).images[0].save("out.png")
    assert size == (64, 64) and pixels.shape[1:] == (3, 64, 64) and latents.ndim == 3
    pipe(picture, "x", " ", num_inference_steps=1).images[0].save("out.png")
    (images,) = pipe(picture, "x", " ", num_inference_steps=1, return_dict=False)
    assert len(images) == 1
    own = partial(flow_sde, eta=1.2, window=(0, 1))
    for step in pipe.steps(conditioning, num_inference_steps=2, sampler=own):
        if step.transition is not None:
            probability: Tensor = step.log_prob(step.after)
            assert probability.shape == (1,)
    pipe.edit(picture, "x", num_inference_steps=2, sampler="heun").images[0].save("out.png")
