"""Steering by a direction from recorded activations: the difference of two prompts, added in one block.

    d = mean over steps and the target's tokens of (h(prompt a) - h(prompt b)),    h <- h + scale d

with h the image stream after a block, both prompts on the same picture from the same noise.

Source: Activation Addition, arXiv 2308.10248, and Contrastive Activation Addition, arXiv 2312.06681, for language
models, where d is that of chosen positions, or a mean over many pairs. In h there are the target's tokens of
the branch with the prompt alone.
"""

import torch
from PIL import Image

from qwenedit import Recorder, add, taps
from qwenedit.mini import EXAMPLE


def direction(pipe, block, prompts, picture, steps):
    seen = Recorder(branch="cond")
    noise = [torch.Generator().manual_seed(0) for _ in prompts]
    with taps(pipe.mmdit, {f"blocks.{block}.img_out": seen}):
        pipe.edit([picture] * 2, list(prompts), generator=noise, num_inference_steps=steps, output_type="latent")
    means = [x.float().mean(1) for x in seen.values()]  # B D, of all image tokens
    return torch.stack([a - b for a, b in means]).mean(0)


def steering(pipe, scale=1.0, block=2, prompts=("make the circle blue", "make the circle red"), steps=4):
    vector = direction(pipe, block, prompts, Image.open(EXAMPLE), steps)
    return taps(pipe.mmdit, {f"blocks.{block}.img_out": add(vector, scale, branch="cond", tokens="target")})
