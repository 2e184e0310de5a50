"""The Euler loop as a generator: the caller reads, replaces, stops and differentiates without callbacks.

for step in pipe.steps(conditioning, num_inference_steps=20):
    print(step.index, step.sigma, step.x0.std())
latents = step.after
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from qwenedit.taps import current_labels, require_finite, scope

if TYPE_CHECKING:  # not at run time: this file also works without the rest of the package
    from qwenedit.sampling.guidance import TrueCFG

__all__ = [
    "Predict", "Preserve", "Step", "Transition", "checked", "current_interval", "euler", "euler_step",
    "on_device", "predict_at", "require_interval", "step_at",
]  # fmt: skip

# latents, sigma -> cond, uncond. Steps outside of the guided interval pass guided=False and get cond, None.
Predict = Callable[..., "tuple[Tensor, Tensor | None]"]


# A step -> mean and standard deviation of the latents after it.
Transition = Callable[["Step"], "tuple[Tensor, Tensor]"]


class Preserve(Protocol):
    """What keeps a part of a picture during a run: a change at any of three places of a step.

    `interval` is the interval of the schedule that the step belongs to, counted from 0.
    """

    def before(self, latents: Tensor, sigma: float, interval: int) -> Tensor:
        """The latents that the step starts from and the transformer sees."""
        ...

    def velocity(self, velocity: Tensor, latents: Tensor, sigma: float, interval: int) -> Tensor:
        """The step's velocity, after guidance, or as the caller writes it."""
        ...

    def after(self, latents: Tensor, sigma: float, interval: int) -> Tensor:
        """The step's result, at the next sigma."""
        ...


class Step:
    """One step before it is taken. The loop uses the values that the caller writes into it.

    Attributes:
        index, sigma, sigma_next: which step, counted by predictions; sigma in [0, 1], 1 = noise.
        latents: (B, S, C) packed normalised latents at `sigma`.
        cond, uncond: the predictions with the prompt and with the negative prompt (None without guidance).
        velocity: the direction of the step: `cond`, or with an `uncond` the guided prediction, and then what
            `preserve` makes of it, also of one that is written. Writing `cond` or `uncond` has it computed
            anew. In a checked step reading it raises NonFiniteError if guidance gives NaN or infinity.
        x0: the estimate of the clean latents, latents - sigma * velocity; writing it sets the velocity.
        after: the latents at `sigma_next`: what the sampler's rule `advance` and then `preserve` make of the
            values above. Writing it replaces the result of the step, whatever else is written.
        norm_ratio: (B, S), |cond| over the norm of the combined prediction for each token: the factor in the
            reference's guidance, whatever norm this run has. None without guidance.
        average: the state of guidance with momentum for the next step (see `TrueCFG.average`), or None.
        transition: mean (B, S, C) and standard deviation of the latents at `sigma_next`, which a stochastic
            sampler draws, before `preserve`; in float32. None at a step without a draw.
    """

    def __init__(
        self,
        index: int,
        sigma: float,
        sigma_next: float,
        latents: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        guidance: TrueCFG | None,
        average: Tensor | None = None,
        *,
        advance: Callable[[Step], Tensor] | None = None,
        preserve: Preserve | None = None,
        transition: Transition | None = None,
        interval: int | None = None,
    ) -> None:
        self.index = index
        self.sigma = sigma
        self.sigma_next = sigma_next
        self.latents = latents
        self._cond = cond
        self._uncond = uncond
        self._guidance = guidance
        self._at = latents, sigma  # where the predictions were made, also if `latents` is replaced
        self._average = average
        self._advance = advance or euler_step
        self._preserve = preserve
        self._transition = transition
        self._interval = index if interval is None else interval
        self._velocity: Tensor | None = None
        self._after: Tensor | None = None
        self._checked = False

    def check(self) -> None:
        """Raise NonFiniteError if a prediction has NaN or infinity; if guidance has, on reading `velocity`.

        All at once, since a check waits for an accelerator. A velocity that the sampler has written stays.
        """
        self._checked = True
        guided = self._guided()
        named = {"cond": self._cond, "uncond": self._uncond}
        branches = {branch: x for branch, x in named.items() if x is not None}
        every = [*branches.values(), *([] if guided is self._cond else [guided])]
        if torch.isfinite(torch.cat(every)).all():
            self._velocity = self._preserved(guided) if self._velocity is None else self._velocity
            return
        for branch, velocity in branches.items():
            require_finite(
                velocity,
                f"transformer: the {branch} velocity at step {self.index}, sigma {self._at[1]:.4f}",
                "look for it in the weights and the conditioning, or, in float16, for an overflow",
            )

    def _guided(self) -> Tensor:
        if self._guidance is None or self._uncond is None:
            return self._cond
        return self._guidance(self._cond, self._uncond, self._at, self._average)

    def _preserved(self, velocity: Tensor) -> Tensor:
        if self._preserve is None:
            return velocity
        return self._preserve.velocity(velocity, self.latents, self.sigma, self._interval)

    def __repr__(self) -> str:
        guided = "" if self._uncond is None else ", guided"
        shape, dtype = tuple(self.latents.shape), self.latents.dtype
        return (
            f"Step {self.index}: sigma {self.sigma:.4f} to {self.sigma_next:.4f}, latents {shape} "
            f"{dtype}{guided}"
        )

    @property
    def cond(self) -> Tensor:
        return self._cond

    @cond.setter
    def cond(self, value: Tensor) -> None:
        self._cond, self._velocity = value, None

    @property
    def uncond(self) -> Tensor | None:
        return self._uncond

    @uncond.setter
    def uncond(self, value: Tensor | None) -> None:
        self._uncond, self._velocity = value, None

    @property
    def velocity(self) -> Tensor:
        if self._velocity is None:
            guided = self._guided()
            if self._checked and guided is not self._cond:
                require_finite(
                    guided,
                    f"guidance: the guided velocity at step {self.index}, sigma {self.sigma:.4f},",
                    "the predictions cancel out, or overflow",
                )
            self._velocity = self._preserved(guided)
        return self._velocity

    @velocity.setter
    def velocity(self, value: Tensor) -> None:
        self._velocity = self._preserved(value)

    @property
    def x0(self) -> Tensor:
        return self.latents - self.sigma * self.velocity

    @x0.setter
    def x0(self, value: Tensor) -> None:
        self.velocity = (self.latents - value) / self.sigma

    @property
    def after(self) -> Tensor:
        if self._after is not None:
            return self._after
        after = self._advance(self)
        if self._preserve is None:
            return after
        return self._preserve.after(after, self.sigma_next, self._interval)

    @after.setter
    def after(self, value: Tensor) -> None:
        self._after = value

    @property
    def transition(self) -> tuple[Tensor, Tensor] | None:
        return None if self._transition is None else self._transition(self)

    def log_prob(self, of: Tensor | None = None) -> Tensor:
        """The log-probability (B,) of latents at `sigma_next`, by default of the step's own `after`.

        It is the mean over a row's elements, in float32. Gradients flow to the velocity, not to `of`. A run's
        log-probabilities are computed again, bit by bit, from its saved latents: go through the same run once
        more, from the same generator's state, and write the next into each step
        (`step.after = saved[step.index]`).

        Raises:
            ValueError: a step without a draw, as of other samplers; one with `preserve`, which keeps what was
                not drawn; or latents of another shape.
        Source: `sde_step_with_logprob` of flow_grpo (arXiv 2505.05470).
        """
        if self._transition is None:
            raise ValueError(
                f"log_prob of step {self.index}, which draws nothing: wanted a step of the samplers "
                "'stochastic' or 'flow_sde', and not the last"
            )
        if self._preserve is not None:
            raise ValueError("log_prob of a step that preserves a part of the latents, which is not drawn")
        latents = self.after if of is None else of
        if latents.shape != self.latents.shape:
            got, wanted = tuple(latents.shape), tuple(self.latents.shape)
            raise ValueError(f"log_prob of latents of shape {got}, wanted {wanted}")
        mean, std = self._transition(self)
        squares = (latents.detach().to(mean.dtype) - mean) ** 2 / (2 * std**2)
        return (-squares - std.log() - math.log(2 * math.pi) / 2).flatten(1).mean(dim=1)

    @property
    def norm_ratio(self) -> Tensor | None:
        if self._guidance is None or self._uncond is None:
            return None
        return self._guidance.ratio(self._cond, self._uncond, self._at, self._average)

    @property
    def average(self) -> Tensor | None:
        if self._guidance is None or self._uncond is None:
            return self._average
        return self._guidance.average(self._cond, self._uncond, self._at[1], self._average)


def euler(
    predict: Predict,
    latents: Tensor,
    sigmas: Sequence[float],
    guidance: TrueCFG | None = None,
    preserve: Preserve | None = None,
) -> Iterator[Step]:
    """Yield every step of the flow from `sigmas[0]` to `sigmas[-1]`; the last one's `after` is the result.

    Raises:
        ValueError: guidance whose interval starts after the last step.
    Source: `FlowMatchEulerDiscreteScheduler.step` and the pipelines' loop. Gradients flow if the caller lets
        them.

    A constant velocity, and a caller who replaces the result of the last step:

    >>> clean, noise = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> for step in euler(lambda latents, sigma: (noise - clean, None), noise, [1.0, 0.5, 0.0]):
    ...     print(step.index, step.sigma, step.latents.tolist(), step.x0.tolist())
    ...     if step.index == 1:
    ...         step.x0 = torch.tensor([[[0.0, 7.0]]])
    0 1.0 [[[1.0, 1.0]]] [[[0.0, 0.0]]]
    1 0.5 [[[0.5, 0.5]]] [[[0.0, 0.0]]]
    >>> step.after.tolist()
    [[[0.0, 7.0]]]
    """
    require_interval(guidance, len(sigmas) - 1)
    average = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        step = step_at(predict, latents, index, sigma, sigma_next, guidance, average, preserve)
        yield step
        latents, average = step.after, step.average


def checked(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps of a sampler, each checked once for NaN and infinity (`Step.check`).

    Raises:
        NonFiniteError: a prediction or a guided velocity, naming it and its step.
    """
    for step in steps:
        step.check()
        yield step


def euler_step(step: Step) -> Tensor:
    """latents + (sigma_next - sigma) * velocity: the rule of `euler`.

    Source: `FlowMatchEulerDiscreteScheduler.step`: the sum in float32, the product in the velocity's dtype.
    """
    sigma, sigma_next = on_device(step)
    return (step.latents.float() + (sigma_next - sigma) * step.velocity).to(step.velocity.dtype)


def on_device(step: Step) -> tuple[Tensor, Tensor]:
    """The step's two sigmas as numbers on its device. They are filled there: a copy from the host waits."""
    device = step.latents.device
    return torch.full((), step.sigma, device=device), torch.full((), step.sigma_next, device=device)


def step_at(
    predict: Predict,
    latents: Tensor,
    index: int,
    sigma: float,
    sigma_next: float,
    guidance: TrueCFG | None,
    average: Tensor | None = None,
    preserve: Preserve | None = None,
    advance: Callable[[Step], Tensor] | None = None,
    *,
    transition: Transition | None = None,
    interval: int | None = None,
) -> Step:
    """Predict at these latents: the step as its sampler yields it.

    Args:
        advance: the sampler's rule; `euler_step` by default.
        transition: of a stochastic sampler: the distribution that `advance` draws from.
        interval: which interval of the schedule the step belongs to, if that is not `index`. Switches with an
            interval of steps count these, by a label of this name.
    """
    counted = index if interval is None else interval
    if preserve is not None:
        latents = preserve.before(latents, sigma, counted)
    labels = {} if interval is None else {"interval": interval}
    with scope(step=index, sigma=sigma, **labels):
        cond, uncond = predict_at(predict, latents, sigma, counted, guidance)
    return Step(
        index, sigma, sigma_next, latents, cond, uncond, guidance, average,
        advance=advance, preserve=preserve, transition=transition, interval=interval,
    )  # fmt: skip


def current_interval() -> int:
    """The interval of the schedule that is being predicted in: the label `interval`, by default `step`."""
    labels = current_labels()
    return int(labels.get("interval", labels["step"]))


def require_interval(guidance: TrueCFG | None, steps: int) -> None:
    """Raise a ValueError if the guided interval starts after the last of the steps."""
    if guidance is not None and guidance.rule.steps is not None and guidance.rule.steps[0] >= steps:
        raise ValueError(f"guided steps are {guidance.rule.steps}, but the run has {steps}")


def predict_at(
    predict: Predict, latents: Tensor, sigma: float, index: int, guidance: TrueCFG | None
) -> tuple[Tensor, Tensor | None]:
    """The predictions of step `index`, without the unconditional one if the step is not guided."""
    if guidance is None or guidance.rule.guides(index):
        return predict(latents, sigma)
    return predict(latents, sigma, guided=False)
