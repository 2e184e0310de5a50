"""Inversion: from a picture back to the noise from which the sampler makes it.

latents, grid = picture_latents(pipe, picture)
conditioning = pipe.condition(None, "a red circle", height=64, width=64)
with torch.no_grad():
    for step in invert(pipe, conditioning, latents, num_inference_steps=50, iterations=5):
        pass
    noise = step.after
    again = pipe.sample(conditioning, latents=noise, num_inference_steps=50, true_cfg_scale=1.0)

A conditioning that has the picture as a reference works too, but it makes that picture from almost any noise,
so that the noise found says little about it. A step has the index and the label `step` of the sampler's step
over the same interval: tensors that a tap stores here can be replayed there (RF-Solver-Edit, arXiv
2411.04746).

Controlled inversion (RF-Inversion, arXiv 2410.10792) steers the path towards a chosen noise. It is one line
in the loop, because values written into a step are used:

    step.velocity = step.velocity + gamma * ((noise - step.latents) / (1 - step.sigma) - step.velocity)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image
from torch import Tensor

from qwenedit.call import Call
from qwenedit.checks import hinting, whole_number
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.encoding.encode import encode_pictures
from qwenedit.inputs import geometry
from qwenedit.inputs.pictures import as_picture
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import Grid
from qwenedit.memory.residency import while_present
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.guidance import TrueCFG, guidance_of
from qwenedit.sampling.sampler import Predict, Step, checked, euler, predict_at, require_interval
from qwenedit.sampling.switched import require_encoded, switched_predictor
from qwenedit.switches import Switches, VAEPath, switches_of
from qwenedit.taps import scope

__all__ = ["inverse_euler", "invert", "picture_latents"]


def picture_latents(
    pipe: QwenImageEdit, picture: Image.Image, path: VAEPath | None = None
) -> tuple[Tensor, Grid]:
    """A picture as packed normalised latents (1, S, 64), from the mode of the VAE's posterior, and its grid.

    It is resized to the checkpoint's area, as a reference is. With `path` the posterior may be sampled
    instead. Gradients are the caller's choice.

    Raises:
        ValueError: no picture, or one of extreme shape.
        NonFiniteError: NaN or infinity from the encoder.
    """
    picture = as_picture(picture, "picture")
    plan = geometry.plan([picture.size], areas=pipe.areas)
    ((latents,),) = encode_pictures([BatchRow("", None, [picture], plan)], pipe.vae, path)
    return latents[None].to(pipe.device, pipe.dtype), plan.pictures[0].grid


@hinting
def invert(
    pipe: QwenImageEdit,
    conditioning: Conditioning,
    latents: Tensor,
    *,
    true_cfg_scale: float = 1.0,
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    iterations: int = 0,
    switches: Switches | None = None,
) -> Iterator[Step]:
    """The steps of a run backwards, from the picture's latents (B, S, 64) at sigma 0 to the noise.

    The noise is the last step's `after`. Euler's `pipe.steps` from it, with the same conditioning, scale,
    steps, sigmas and switches, lead back to the picture. The arguments are those of `pipe.steps` and
    `inverse_euler`. Gradients are the caller's choice, as in `pipe.steps`.

    Raises:
        ValueError: bad input, before any network runs.
    """
    if latents is None:  # `prepare` would draw noise
        raise ValueError("latents are None, wanted a tensor: picture_latents makes those of a picture")
    switches = switches_of(switches)
    pictures = [len(row) for row in conditioning.reference_grids]
    negative = None if conditioning.negative is None else " "
    guidance = guidance_of(true_cfg_scale, negative, switches)
    call = Call(num_inference_steps=num_inference_steps, sigmas=sigmas, latents=latents)
    run = pipe.prepare(conditioning.target_grid, pictures, call, switches, guidance)
    if run.sampler not in ("euler", euler):
        raise ValueError(
            f"the pipeline's sampler is {run.sampler!r}, and only Euler's is inverted here: set pipe.sampler "
            "= 'euler'"
        )
    require_encoded(switches, conditioning)
    _require_invertible(guidance, iterations, len(run.sigmas) - 1)
    conditioning = conditioning.to(pipe.device, pipe.dtype)
    predict = switched_predictor(
        pipe.mmdit, conditioning, switches, guided=guidance is not None, micro_batch=pipe.micro_batch,
        sigmas=run.sigmas,
    )  # fmt: skip
    start = pipe.begin(run).latents
    steps = inverse_euler(predict, start, run.sigmas, guidance, iterations)
    return while_present([pipe.mmdit], checked(steps) if pipe.check_finite else steps)


def inverse_euler(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    iterations: int = 0,
) -> Iterator[Step]:
    """Yield every step of the flow from `sigmas[-1]` back to `sigmas[0]`, the last step of `euler` first.

    With x_i for the latents at sigma_i, the i-th step of `euler` is

        x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v(x_i, sigma_i)

    Its inverse needs the velocity at the unknown x_i. Without iterations the velocity is taken at the known
    latents (the explicit step, DDIM inversion's approximation; arXiv 2010.02502, 2105.05233):

        x_i = x_{i+1} + (sigma_i - sigma_{i+1}) v(x_{i+1}, sigma_{i+1})

    and the round trip's error is proportional to the steps' width. Each iteration then inserts the x_i that
    was found into the exact equation (fixed-point iteration; arXiv 2309.04907, 2312.12540):

        x_i <- x_{i+1} + (sigma_i - sigma_{i+1}) v(x_i, sigma_i)

    which converges to the exact inverse if a step's width times the velocity's Lipschitz constant is below 1.
    An iteration costs one prediction.

    A `Step` has the index i; its `sigma` and `latents` are those of i + 1, its `sigma_next` and `after` those
    of i; its predictions are the last iteration's. Labels: `step` i, `sigma` where the prediction is made,
    `iteration` from 0. The last iteration approximates what the sampler computes at step i.

    Raises:
        ValueError: guidance on clean latents, which cannot be estimated from a velocity at sigma 0.

    There and back in a field that the explicit step inverts roughly and iterations invert exactly:

    >>> import torch
    >>> from qwenedit.sampling.sampler import euler
    >>> def predict(latents, sigma):
    ...     return 0.5 * latents, None
    >>> sigmas, noise = [1.0, 0.5, 0.0], torch.ones(1, 1, 1)
    >>> *_, last = euler(predict, noise, sigmas)
    >>> for iterations in (0, 20):
    ...     *_, first = inverse_euler(predict, last.after, sigmas, iterations=iterations)
    ...     print(f"{first.after.item():.3f}")
    0.879
    1.000
    """
    _require_invertible(guidance, iterations, len(sigmas) - 1)
    for index in reversed(range(len(sigmas) - 1)):
        sigma_next, sigma = sigmas[index], sigmas[index + 1]
        place, sigma_there = latents, sigma
        for iteration in range(iterations + 1):
            with scope(step=index, sigma=sigma_there, iteration=iteration):
                cond, uncond = predict_at(predict, place, sigma_there, index, guidance)
            step = Step(index, sigma, sigma_next, latents, cond, uncond, guidance)
            if iteration < iterations:
                place, sigma_there = step.after, sigma_next
        yield step
        latents = step.after


def _require_invertible(guidance: TrueCFG | None, iterations: int, steps: int) -> None:
    whole_number("iterations", iterations, least=0)
    if guidance is not None and guidance.rule.on_x0:
        raise ValueError(f"{guidance.rule} works on clean latents, wanted guidance on velocities to invert")
    require_interval(guidance, steps)
