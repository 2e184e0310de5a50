"""Editing by replaced image queries and keys: the source's layout, under the instruction's words.

In the first steps, in chosen blocks, for the target's tokens:

    q_i <- q_i of the source's pass,    k_i <- k_i of the source's pass

Queries and keys of the text stay, and so do all values.

Source: Exploring Multimodal Diffusion Transformers for Enhanced Prompt-based Image Editing, arXiv 2508.07519,
section 4, for Stable Diffusion 3 and FLUX. There both passes start from one noise, under two captions, and a
mask from attention maps blends the latents; here the source's pass is that of `masactrl`, and nothing is
blended.
"""

from .masactrl import two_passes


def query_key(pipe, blocks="0..3", steps=range(4)):
    return two_passes(pipe, f"blocks.{{{blocks}}}.attn.img_{{q,k}}", steps)
