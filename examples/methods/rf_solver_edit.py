"""RF-Solver-Edit: the values of the source's inversion, replayed in the first steps of the way back.

The source is inverted to noise, and the edit starts there. In the first steps, in the last blocks, for the
target's tokens:

    V <- V of the inversion at the same step

Source: Taming Rectified Flow for Inversion and Editing, arXiv 2411.04746, section 3.3, for FLUX and OpenSora:
FLUX's last single-stream blocks, in the first few of 25 steps. Its second-order solver is Euler's method
here, inverted with one iteration. The inversion has the instruction here, and the source's caption there.
"""

from qwenedit import Recorder, patch_from, taps
from qwenedit.instruments.inversion import inverse_euler
from qwenedit.instruments.stepping import sampled_by, source_latents
from qwenedit.sampling.sampler import euler


def rf_solver_edit(pipe, blocks="3..5", steps=range(5)):
    values = f"blocks.{{{blocks}}}.attn.img_v"

    def sampler(predict, latents, sigmas, guidance, preserve):
        source = source_latents(pipe, predict, latents, sigmas[0])
        seen = Recorder(steps=steps, to=latents.device)
        with taps(pipe.mmdit, {values: seen}):
            *_, last = inverse_euler(predict, source, sigmas, iterations=1)

        def replayed(x, sigma, **guided):
            replay = patch_from(seen, missing="keep", tokens="target")
            with taps(pipe.mmdit, {values: replay}, first=True):
                return predict(x, sigma, **guided)

        return euler(replayed, last.after, sigmas, guidance, preserve)

    return sampled_by(pipe, sampler)
