"""Steering by a direction from recorded activations: the difference of two prompts, added after a block.

    d = mean over steps and the target's tokens of (h(prompt a) - h(prompt b)),    h <- h + scale d

with h the image stream, for both prompts on one picture from one noise. In the edit it acts on the target's
tokens, in the branch with the prompt.

Source: Activation Addition, arXiv 2308.10248, and Contrastive Activation Addition, arXiv 2312.06681, for
language models, where d is that of some positions, or a mean over many pairs.
"""

import torch
from PIL import Image

from qwenedit import Recorder, add, taps
from qwenedit.mini import EXAMPLE


def direction(pipe, block, prompts, picture, steps):
    means = []
    for prompt in prompts:
        seen, noise = Recorder(branch="cond"), torch.Generator().manual_seed(0)
        with taps(pipe.mmdit, {f"blocks.{block}.img_out": seen}):
            pipe.edit(picture, prompt, generator=noise, num_inference_steps=steps, output_type="latent")
        targets = [x[0, : x.shape[1] // 2] for x in seen.values()]  # the reference has as many tokens
        means.append(torch.stack(targets).float().mean((0, 1)))
    return means[0] - means[1]


def steering(pipe, scale=1.0, block=2, prompts=("make the circle blue", "make the circle red"), steps=4):
    vector = direction(pipe, block, prompts, Image.open(EXAMPLE), steps)
    return taps(pipe.mmdit, {f"blocks.{block}.img_out": add(vector, scale, branch="cond", tokens="target")})
