"""RF-Inversion's controller: the path is steered to noise on its way up, and to the source on its way down.

With the velocity v at latents x and sigma, source y and noise n:

    up      v <- v + gamma ((n - x) / (1 - sigma) - v)
    down    v <- v + eta ((x - y) / sigma - v),    in the first steps

At gamma 1 the way up leads to the noise itself and is left out.

Source: Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations, arXiv
2410.10792, algorithms 1 and 2, for FLUX: gamma 0.5, eta 0.9 in the first fifth of 28 steps. The way up has no
caption there; here both ways have the instruction, and the way up has no guidance.
"""

from functools import partial

from qwenedit.instruments.inversion import inverse_euler
from qwenedit.instruments.stepping import sampled_by, source_latents
from qwenedit.sampling.sampler import euler


def rf_inversion(pipe, gamma=0.5, eta=0.5, steps=range(5)):
    def sampler(predict, noise, sigmas, guidance, preserve):
        source = source_latents(pipe, predict, noise, sigmas[0])
        start = noise
        if gamma < 1:
            for step in inverse_euler(partial(predict, guided=False), source, sigmas):
                to_noise = (noise - step.latents) / (1 - step.sigma)
                step.velocity = step.velocity + gamma * (to_noise - step.velocity)
                start = step.after
        for step in euler(predict, start, sigmas, guidance, preserve):
            if step.index in steps:
                to_source = (step.latents - source) / step.sigma
                step.velocity = step.velocity + eta * (to_source - step.velocity)
            yield step

    return sampled_by(pipe, sampler)
