"""Drift: ten edits in a row with one instruction, each of the last one's picture.

    picture_k = edit(picture_{k-1}, noise_k),    k = 1 ... 10

with noise_k the run's noise in all of them, or new noise in each but the first, one for all rows. The errors
of sampling, of decoding, of rounding to 8 bits and of encoding add up.

Source: the drift over several turns that FLUX.1 Kontext (arXiv 2506.15742) and the model card of
Qwen-Image-Edit-2511 are about. There each turn has its own instruction. Here there is one, and the text
encoder sees the first picture in all turns; only the reference latents are the last one's.
"""

from contextlib import contextmanager
from functools import partial

import torch

from qwenedit import picture_latents, taps
from qwenedit.inputs.pictures import to_pil
from qwenedit.instruments.stepping import sampled_by, source_tokens
from qwenedit.sampling.sampler import euler


@contextmanager
def drift(pipe, edits=10, fresh=True):
    seen = {}

    def last_picture(x, site):
        layout, source = site.labels["layout"], source_tokens(site.labels["layout"])
        seen["grid"] = layout.grids[0]
        if "latents" in seen:
            own = seen["latents"][site.labels["rows"]]
            return torch.cat([x[:, : source.start], own, x[:, source.stop :]], dim=1)

    def sampler(predict, noise, sigmas, guidance, preserve):
        for edit in range(edits):
            if edit and fresh:
                drawn = torch.randn(noise[:1].shape, generator=torch.Generator().manual_seed(edit))
                noise = drawn.to(noise).expand_as(noise)
            for step in euler(predict, noise, sigmas, guidance, preserve):
                yield step
            if edit < edits - 1:
                pictures = to_pil(pipe.decode(step.after, seen["grid"]))
                seen["latents"] = torch.cat([picture_latents(pipe, one)[0] for one in pictures])
        seen.clear()

    with taps(pipe.mmdit, {"latents": last_picture}), sampled_by(pipe, sampler):
        yield


same_seed = partial(drift, fresh=False)
fresh_seeds = partial(drift, fresh=True)
