"""MasaCtrl's two passes: the target's queries look at the source picture's own keys and values.

In the steps and blocks from a first one on, with (q, k, v) of the target's tokens and (q_s, k_s, v_s) of the
same tokens in a pass over the source, noised to the same sigma:

    Attention(q, k, v)  becomes  Attention(q, k_s, v_s)

Source: MasaCtrl, arXiv 2304.08465, sections 4.1 and 4.2, for Stable Diffusion: from step 4 of 50 and layer 10
of 16. There the source's pass is an inversion under its own caption; here it is (1 - sigma) source + sigma
noise, with the run's noise, under the same instruction. Text and reference tokens are seen as before.
"""

from qwenedit import Recorder, patch_from, taps
from qwenedit.instruments.stepping import sampled_by, source_latents
from qwenedit.sampling.sampler import euler
from qwenedit.taps import current_labels


def two_passes(pipe, tensors, steps):
    """Each prediction in these steps has the target's tokens of these taps from a pass over the source."""

    def sampler(predict, latents, sigmas, guidance, preserve):
        source = source_latents(pipe, predict, latents, sigmas[0])

        def predicted(x, sigma, **guided):
            if current_labels()["step"] not in steps:
                return predict(x, sigma, **guided)
            seen = Recorder(to=x.device)
            with taps(pipe.mmdit, {tensors: seen}):
                predict((1 - sigma) * source + sigma * latents, sigma, **guided)
            with taps(pipe.mmdit, {tensors: patch_from(seen, tokens="target")}, first=True):
                return predict(x, sigma, **guided)

        return euler(predicted, latents, sigmas, guidance, preserve)

    return sampled_by(pipe, sampler)


def masactrl(pipe, blocks="3..5", steps=range(4, 1000)):
    return two_passes(pipe, f"blocks.{{{blocks}}}.attn.img_{{k,v}}", steps)
