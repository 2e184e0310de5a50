"""Stable Flow: the source picture's keys and values, in the vital blocks alone, in all steps.

A block's vitality is how far a picture moves if the block is left out, and the most vital are chosen:

    vitality(l) = distance(picture, picture without block l)

Source: Stable Flow, arXiv 2411.14430, sections 3.1 and 3.2, for FLUX. There the distance is one of DINOv2
over many prompts; here it is the mean absolute difference of pixels. There source and target are generated
together; here the source's pass is that of `masactrl`.
"""

from qwenedit import skip, taps

from .masactrl import two_passes


def vitality(pipe, image, prompt, **options):
    """How far an edit's pixels move without each of the blocks, a number a block."""
    plain = pipe.edit(image, prompt, output_type="pt", **options).images
    moved = []
    for block in range(len(pipe.mmdit.blocks)):
        with taps(pipe.mmdit, skip([block])):
            without = pipe.edit(image, prompt, output_type="pt", **options).images
        moved.append(float((without - plain).abs().mean()))
    return moved


def stable_flow(pipe, vital=(0, 1)):
    blocks = ",".join(map(str, vital))
    return two_passes(pipe, f"blocks.{{{blocks}}}.attn.img_{{k,v}}", range(1000) if vital else ())
