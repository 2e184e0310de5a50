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
    seen = Recorder(branch="cond")
    noise = [torch.Generator().manual_seed(0) for _ in prompts]
    with taps(pipe.mmdit, {f"blocks.{block}.img_out": seen}):
        pipe.edit(
            [picture] * 2, list(prompts), generator=noise, num_inference_steps=steps, output_type="latent"
        )
    targets = [x[:, : x.shape[1] // 2] for x in seen.values()]  # the reference has as many tokens
    means = [x.float().mean(1) for x in targets]
    return torch.stack([a - b for a, b in means]).mean(0)


def steering(pipe, scale=1.0, block=2, prompts=("make the circle blue", "make the circle red"), steps=4):
    vector = direction(pipe, block, prompts, Image.open(EXAMPLE), steps)
    return taps(pipe.mmdit, {f"blocks.{block}.img_out": add(vector, scale, branch="cond", tokens="target")})
