"""Vital layers: which blocks does an edit need most, and what is left of it without the one it needs least?

Vitality is that of `methods.stable_flow`: how far the pixels move if a block is skipped.
"""

import torch
from methods.stable_flow import vitality
from PIL import Image

from qwenedit import skip, taps
from qwenedit.mini import EXAMPLE
from research import report


def vital(pipe, picture, prompt, steps):
    """The vitality of each block, by number; all edits are from one noise."""
    latents = pipe.edit(picture, prompt, num_inference_steps=1, output_type="latent").images
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return dict(enumerate(vitality(pipe, picture, prompt, latents=noise, num_inference_steps=steps)))


def least_vital_skipped(pipe, steps=4):
    moved = vital(pipe, Image.open(EXAMPLE), "make the circle red", steps)
    return taps(pipe.mmdit, skip([min(moved, key=moved.get)]))


def study(pipe, picture, prompt, steps=20):
    moved = vital(pipe, picture, prompt, steps)
    return {f"block {block} moves pixels by": moved[block] for block in sorted(moved, key=moved.get)[::-1]}


if __name__ == "__main__":
    report(study)
