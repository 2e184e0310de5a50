"""Samplers beside `euler`: other ways from noise to latents under the same predictions, in the same form.

Each is a generator of `Step`s that is called as `euler` is. sigma' is the next sigma, v the velocity and
x0 = x - sigma v the estimate of the clean latents, as the caller left them in the step:

    stochastic   x' = (1 - sigma') x0 + sigma' noise
    flow_sde     x' = x + v dt + a drift and noise of the size eta, which leave the marginals as they are
    heun         x' = x + (v + v') dt / 2, a second prediction v' at the end of the interval
    dpmpp_2m     x' = q x + (1 - q) (x0, extrapolated from the step before), q = sigma' / sigma
    unipc        the same, after x is corrected by what its own prediction says about the step before

All but `heun` predict once a step. Writing `after` replaces a step's result, and what a later step corrects
it corrects from there, so that what the caller or `preserve` made of the latents is kept.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from qwenedit.latents import standard_normal
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import (
    Predict,
    Preserve,
    Step,
    Transition,
    euler,
    on_device,
    require_interval,
    step_at,
)

__all__ = [
    "SAMPLERS", "Generators", "Sampler", "count_predictions", "dpmpp_2m", "flow_sde", "heun", "name_of",
    "require_sampler", "sampler_of", "stochastic", "unipc",
]  # fmt: skip

Generators = Generator | Sequence[Generator] | None
Sampler = Callable[..., Iterator[Step]]  # (predict, latents, sigmas, guidance, preserve)


def stochastic(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    preserve: Preserve | None = None,
    generator: Generators = None,
) -> Iterator[Step]:
    """Every step jumps to the estimate of the clean latents and adds new noise up to the next sigma.

    The sampler of distilled models: only where x0 is exact does it keep the marginals of the flow.

    The noise (B, S, C) is drawn from `generator`, or for a list row by row, in float32. The last step draws,
    too, though its noise has the factor 0.

    Source: `FlowMatchEulerDiscreteScheduler.step` with stochastic_sampling=True, equal bit by bit. Its
        pipelines do not pass their generator on, so that there the noise is torch's global one.
    """
    require_interval(guidance, len(sigmas) - 1)
    average = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        rule = partial(_drawn, _renoised, _noise(latents, generator))
        step = step_at(
            predict, latents, index, sigma, sigma_next, guidance, average, preserve, rule,
            transition=_renoised if sigma_next > 0 else None,
        )  # fmt: skip
        yield step
        latents, average = step.after, step.average


def _renoised(step: Step) -> tuple[Tensor, Tensor]:
    """(1 - sigma') x0 and sigma'."""
    sigma, sigma_next = on_device(step)
    x0 = _wide(step.latents) - sigma * step.velocity  # the product in the velocity's dtype, as there
    return (1 - sigma_next) * x0, sigma_next


def flow_sde(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    preserve: Preserve | None = None,
    generator: Generators = None,
    eta: float = 0.7,
    window: tuple[int, int] | None = None,
) -> Iterator[Step]:
    """The flow as a stochastic differential equation with the same marginals, for training a policy.

        s = eta sqrt(sigma / (1 - sigma)),  dt = sigma' - sigma
        x' = x (1 + s^2 dt / 2 sigma) + v (1 + s^2 (1 - sigma) / 2 sigma) dt + s sqrt(-dt) noise

    Where sigma is 1, the root's denominator has the second sigma instead. All of it is in float32, and
    `step.log_prob()` is the draw's.

    Args:
        eta: the size of the noise, at least 0; at 0 it is `euler`.
        window: (start, stop) of the steps that draw, stop excluded; None for all but the last. The others are
            Euler's, and so is a step to sigma 0 always.
        generator: one for the batch, or a list with one for each row; used in the window only.

    Raises:
        ValueError: an eta or a window without meaning.
    Source: `sde_step_with_logprob` of flow_grpo (arXiv 2505.05470).
    """
    count = len(sigmas) - 1
    _require_noise(count, eta, window)
    start, stop = window or (0, count - 1)
    require_interval(guidance, count)
    average = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        rule = transition = None
        if start <= index < stop and sigma_next > 0 and eta > 0:
            transition = partial(_diffused, eta, sigmas[1])
            rule = partial(_drawn, transition, _noise(latents, generator))
        step = step_at(
            predict, latents, index, sigma, sigma_next, guidance, average, preserve, rule,
            transition=transition,
        )  # fmt: skip
        yield step
        latents, average = step.after, step.average


def _require_noise(count: int, eta: float = 0.7, window: tuple[int, int] | None = None, **_: Any) -> None:
    """Check the options of `flow_sde` for a run of so many steps."""
    start, stop = (0, count - 1) if window is None else window
    if not 0 <= start <= stop < max(count, 1):
        raise ValueError(
            f"window is {window}, wanted (start, stop) within the {count} steps, without the last of them"
        )
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is {eta}, wanted a number of at least 0")


def _diffused(eta: float, second: float, step: Step) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the SDE's next latents."""
    x, v = _wide(step.latents), _wide(step.velocity)
    sigma, sigma_next = on_device(step)
    dt = sigma_next - sigma
    s = eta * (sigma / (1 - (second if step.sigma == 1 else sigma))).sqrt()
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * (-dt).sqrt()


def heun(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    preserve: Preserve | None = None,
) -> Iterator[Step]:
    """Two steps an interval: Euler's, and one that predicts again at its end and takes the mean velocity.

        x~ = x + v dt,  x' = x~ + (v' - v) dt / 2  with v' = v(x~, sigma')

    Both are yielded. The second has `sigma` = `sigma_next`, the interval's end: its `latents` are x~, its
    `after` is x'. An interval that ends at sigma 0 has the first alone, so that N intervals make 2N - 1
    steps. `index` and the label `step` count the steps, so that each has records and a place of its own.
    Switches with an interval of steps (`guidance.steps`, `references.steps`) count the schedule's intervals,
    which are the label `interval`: both steps of one are guided alike.

    Source: `FlowMatchHeunDiscreteScheduler` without churn. The error of an interval is of third order in its
        width, Euler's of second.
    """
    require_interval(guidance, len(sigmas) - 1)
    average, index = None, 0
    for interval, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        first = step_at(
            predict, latents, index, sigma, sigma_next, guidance, average, preserve, interval=interval
        )
        yield first
        latents, average, index = first.after, first.average, index + 1
        if sigma_next > 0:
            second = step_at(
                predict, latents, index, sigma_next, sigma_next, guidance, average, preserve,
                partial(_mean_velocity, first), interval=interval,
            )  # fmt: skip
            yield second
            latents, average, index = second.after, second.average, index + 1


def _mean_velocity(first: Step, second: Step) -> Tensor:
    half = (first.sigma_next - first.sigma) / 2
    after = _wide(second.latents) + half * (_wide(second.velocity) - _wide(first.velocity))
    return after.to(second.velocity.dtype)


def dpmpp_2m(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    preserve: Preserve | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M): the estimate of the clean latents is extrapolated from the step before.

        x' = q x + (1 - q) (x0 + (x0 - x0_before) / 2r),  q = sigma' / sigma
        r = (lambda - lambda_before) / (lambda' - lambda),  lambda = log((1 - sigma) / sigma)

    The first step and the one to sigma 0 are Euler's, q x + (1 - q) x0. lambda is infinite at sigma 1, where
    it is taken at 1 - 1e-6, as `UniPCMultistepScheduler` does.

    Source: arXiv 2211.01095, algorithm 2; `DPMSolverMultistepScheduler` of order 2 with flow_prediction and
        use_flow_sigmas, "midpoint". All of it is in float32.
    """
    return _multistep(_extrapolated, predict, latents, sigmas, guidance, preserve)


def unipc(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    preserve: Preserve | None = None,
) -> Iterator[Step]:
    """UniPC of order 2: x is first corrected by its own prediction, then the step is that of `dpmpp_2m`.

    The step before led to x by its own x0 and the one before that. With the x0 that was predicted at x, its
    integral is known to one order more; x moves by the difference. No prediction is made at the corrected
    latents: `latents`, `x0` and the predictions of a step are those before the correction.

    Source: arXiv 2302.04867; `UniPCMultistepScheduler` of order 2 with flow_prediction and use_flow_sigmas,
        "bh2", in diffusers 0.39.0 and 0.42.1, which also truncates the timesteps that its pipelines pass on
        to whole numbers; ours are exact. All of it is in float32.
    """
    return _multistep(_corrected_and_extrapolated, predict, latents, sigmas, guidance, preserve)


_Past = tuple[tuple[float, Tensor], ...]  # sigma and x0 of up to two steps before, the newest last
_NO_PAST: _Past = ()


def _multistep(
    rule: Callable[[_Past, Step], Tensor],
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None,
    preserve: Preserve | None,
) -> Iterator[Step]:
    """The loop of the samplers that remember x0 of the steps before, as the caller left them."""
    require_interval(guidance, len(sigmas) - 1)
    average, past = None, _NO_PAST
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        advance = partial(rule, past)
        step = step_at(predict, latents, index, sigma, sigma_next, guidance, average, preserve, advance)
        yield step
        latents, average, past = step.after, step.average, (*past[-1:], (sigma, _x0(step)))


def _extrapolated(past: _Past, step: Step, latents: Tensor | None = None) -> Tensor:
    """The rule of `dpmpp_2m`, from these latents or from the step's."""
    x = _wide(step.latents) if latents is None else latents
    x0 = target = _x0(step)
    if past and step.sigma_next > 0:
        sigma_before, x0_before = past[-1]
        now = _lambda(step.sigma)
        r = (now - _lambda(sigma_before)) / (_lambda(step.sigma_next) - now)
        target = x0 + (x0 - x0_before) / (2 * r)
    q = step.sigma_next / step.sigma if step.sigma else 1.0  # from 0 to 0 nothing moves
    return (q * x + (1 - q) * target).to(step.velocity.dtype)


def _corrected_and_extrapolated(past: _Past, step: Step) -> Tensor:
    """The rule of `unipc`."""
    if not past or step.sigma == 0:
        return _extrapolated(past, step)
    before, x0_before = past[-1]
    h = _lambda(step.sigma) - _lambda(before)
    new = 0.5
    old: Tensor | float = 0.0
    if len(past) > 1:
        earlier, x0_earlier = past[-2]
        r = (_lambda(earlier) - _lambda(before)) / h
        # The weights a and `new` of both differences solve a + new = b_1, r a + new = b_2.
        e = math.expm1(-h)
        b_1 = -1 / h - 1 / e
        b_2 = -2 * b_1 / h - 1 / e
        a = (b_2 - b_1) / (r - 1)
        new, old = b_1 - a, (a - 0.5) / r * (x0_earlier - x0_before)  # the step before had the weight 1/2
    moved = (1 - step.sigma / before) * (old + new * (_x0(step) - x0_before))
    return _extrapolated(past, step, _wide(step.latents) + moved)


def _x0(step: Step) -> Tensor:
    return _wide(step.latents) - step.sigma * _wide(step.velocity)


def _wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _lambda(sigma: float) -> float:
    """log((1 - sigma) / sigma), half the logarithm of the signal-to-noise ratio; finite at sigma 1."""
    sigma = min(sigma, _ALMOST_1)
    return math.log((1 - sigma) / sigma)


_ALMOST_1 = torch.tensor(1 - 1e-6).item()  # the float32 number, whose distance from 1 is 1.3 % larger


def _noise(latents: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like the latents, in float32."""
    return standard_normal(
        len(latents), tuple(latents.shape[1:]), generator=generator, device=latents.device,
        dtype=torch.float32,
    )  # fmt: skip


def _drawn(transition: Transition, noise: Tensor, step: Step) -> Tensor:
    mean, std = transition(step)
    return (mean + std * noise).to(step.velocity.dtype)


SAMPLERS: dict[str, Sampler] = {
    "euler": euler, "stochastic": stochastic, "flow_sde": flow_sde, "heun": heun, "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}  # fmt: skip


def require_sampler(sampler: str | Sampler, steps: int | None = None) -> None:
    """Check that it is the name of a sampler, or a function, whose options fit a run of so many steps.

    Raises:
        ValueError: it is neither, or they do not.
    """
    if callable(sampler) or (isinstance(sampler, str) and sampler in SAMPLERS):
        if steps is not None and isinstance(sampler, partial) and sampler.func is flow_sde:
            _require_noise(steps, **sampler.keywords)
        return
    close = difflib.get_close_matches(sampler, SAMPLERS, n=1) if isinstance(sampler, str) else []
    hint = f": did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"sampler is {sampler!r}, wanted one of {', '.join(SAMPLERS)}, or a function{hint}")


def sampler_of(sampler: str | Sampler, generator: Generators = None) -> Sampler:
    """The sampler of a name, with the run's generator if it draws. A function is taken as it is.

    With `functools.partial` a sampler has other options than its own: partial(flow_sde, eta=1.2,
    generator=generator).

    Raises:
        ValueError: as `require_sampler`.
    """
    require_sampler(sampler)
    if callable(sampler):
        return sampler
    chosen = SAMPLERS[sampler]
    return partial(chosen, generator=generator) if sampler in ("stochastic", "flow_sde") else chosen


def name_of(sampler: str | Sampler) -> str:
    """What a sampler is called: its name among ours, or a function's module and name."""
    if isinstance(sampler, str):
        return sampler
    if (own := next((name for name, one in SAMPLERS.items() if one is sampler), None)) is not None:
        return own
    function: Any = sampler
    while isinstance(function, partial):
        function = function.func
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def count_predictions(sampler: str | Sampler, sigmas: Sequence[float]) -> int:
    """The number of steps that a sampler makes of the sigmas, one prediction each."""
    twice = sampler == "heun" or (sampler.func if isinstance(sampler, partial) else sampler) is heun
    return sum(1 + (twice and sigma > 0) for sigma in sigmas[1:])
