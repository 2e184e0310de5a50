"""Drift: ten edits in a row with one instruction, each of the last one's picture.

    picture_k = edit(picture_{k-1}, noise_k),    k = 1 ... 10

with noise_k the run's noise in all of them, or new noise for each but the first. Errors of decoding, rounding to
8 bits and encoding add up, and those of the sampler, too; the same noise repeats its own error.

Source: the multi-turn consistency that Qwen-Image-Edit-2511's model card and FLUX.1 Kontext (arXiv 2506.15742,
figure 12) measure. There each turn has an instruction of its own; here the text encoder sees the first picture
in all turns.
"""

from contextlib import contextmanager

import torch

from qwenedit import picture_latents, taps
from qwenedit.inputs.pictures import to_pil
from qwenedit.instruments.stepping import sampled_by, source_tokens
from qwenedit.sampling.sampler import euler


@contextmanager
def drift(pipe, edits=10, fresh=True):
    seen = {}

    def last_picture(x, site):
        seen["grid"], source = site.labels["layout"].grids[0], source_tokens(site.labels["layout"])
        if "latents" in seen:
            return torch.cat([x[:, : source.start], seen["latents"][site.labels["rows"]], x[:, source.stop :]], 1)

    def sampler(predict, noise, sigmas, guidance, preserve):
        for edit in range(edits):
            if edit:
                pictures = to_pil(pipe.decode(step.after, seen["grid"]))
                seen["latents"] = torch.cat([picture_latents(pipe, one)[0] for one in pictures])
            if edit and fresh:
                noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(edit)).to(noise)
            for step in euler(predict, noise, sigmas, guidance, preserve):
                yield step
        seen.clear()

    with taps(pipe.mmdit, {"latents": last_picture}), sampled_by(pipe, sampler):
        yield


def same_seed(pipe):
    return drift(pipe, fresh=False)


def fresh_seeds(pipe):
    return drift(pipe, fresh=True)
