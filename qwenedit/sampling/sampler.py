"""The Euler loop as a generator that the caller owns: read, replace, stop, differentiate, without callbacks.

for step in pipe.steps(conditioning, num_inference_steps=20):
    print(step.index, step.sigma, step.x0.std())
latents = step.after
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qwenedit.checks import require_finite
from qwenedit.encoding.conditioning import Conditioning, Prompt, RowGroup
from qwenedit.latents import Layout
from qwenedit.networks.mmdit import MMDiT
from qwenedit.sampling.fast import FastRun, FastStep, timestep_of, uncompiled_if_changed
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.taps import current_labels, scope

__all__ = ["Predict", "Step", "euler", "predictor"]

# latents, sigma -> cond, uncond; with guided=False, as steps out of the guided interval ask, cond, None
Predict = Callable[..., "tuple[Tensor, Tensor | None]"]


class Step:
    """One step before it is taken. What the caller writes into it is what is used.

    Attributes:
        index, sigma, sigma_next: which step; sigma in [0, 1], 1 = noise.
        latents: (B, S, C) packed normalised latents at `sigma`.
        cond, uncond: the predictions with the prompt and with the negative prompt (None without guidance).
        velocity: what the step moves along: `cond`, guided where there is an `uncond`. It follows what is
            written into `cond` or `uncond`, until it is written itself. Where guidance makes NaN or infinity,
            reading it raises NonFiniteError.
        x0: the estimate of the clean latents, latents - sigma * velocity; writing it sets the velocity.
        after: the latents at `sigma_next`.
        norm_ratio: (B, S), |cond| over the norm of the combined prediction, token by token: what the
            reference's guidance multiplies by, whatever norm this run's has. None where there is no guidance.
        average: what guidance with momentum carries to the next step (see `TrueCFG.average`), or None.
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
    ) -> None:
        self.index = index
        self.sigma = sigma
        self.sigma_next = sigma_next
        self.latents = latents
        self._cond = cond
        self._uncond = uncond
        self._guidance = guidance
        self._at = latents, sigma  # where the predictions were made, whatever is written into `latents`
        self._average = average
        self._velocity: Tensor | None = None

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
            if self._guidance is None or self._uncond is None:
                self._velocity = self._cond
            else:
                self._velocity = self._guidance(self._cond, self._uncond, self._at, self._average)
                require_finite(
                    self._velocity,
                    f"guidance: the guided velocity at step {self.index}, sigma {self.sigma:.4f},",
                    "the predictions cancel out, or overflow",
                )
        return self._velocity

    @velocity.setter
    def velocity(self, value: Tensor) -> None:
        self._velocity = value

    @property
    def x0(self) -> Tensor:
        return self.latents - self.sigma * self.velocity

    @x0.setter
    def x0(self, value: Tensor) -> None:
        self.velocity = (self.latents - value) / self.sigma

    @property
    def after(self) -> Tensor:
        # In float32 whatever the dtype, but with the product in the velocity's: the reference's casts.
        sigma, sigma_next = torch.tensor([self.sigma, self.sigma_next], device=self.latents.device)
        return (self.latents.float() + (sigma_next - sigma) * self.velocity).to(self.velocity.dtype)

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
    predict: Predict, latents: Tensor, sigmas: Sequence[float], guidance: TrueCFG | None = None
) -> Iterator[Step]:
    """Yield every step of the flow from `sigmas[0]` to `sigmas[-1]`; the last one's `after` is the result.

    Raises:
        ValueError: guidance whose interval starts after the last step.
    Source: `FlowMatchEulerDiscreteScheduler.step` and the pipelines' loop. Gradients flow if the caller lets
        them.

    A velocity that knows the way, and a caller who changes where it leads to:

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
        with scope(step=index, sigma=sigma):
            cond, uncond = predict_at(predict, latents, sigma, index, guidance)
        step = Step(index, sigma, sigma_next, latents, cond, uncond, guidance, average)
        yield step
        latents, average = step.after, step.average


def require_interval(guidance: TrueCFG | None, steps: int) -> None:
    if guidance is not None and guidance.rule.steps is not None and guidance.rule.steps[0] >= steps:
        raise ValueError(f"guided steps are {guidance.rule.steps}, but the run has {steps}")


def predict_at(
    predict: Predict, latents: Tensor, sigma: float, index: int, guidance: TrueCFG | None
) -> tuple[Tensor, Tensor | None]:
    """The predictions of step `index`, without the unconditional one where the step is not guided."""
    if guidance is None or guidance.rule.guides(index):
        return predict(latents, sigma)
    return predict(latents, sigma, guided=False)


def predictor(
    mmdit: MMDiT,
    conditioning: Conditioning,
    *,
    guided: bool,
    micro_batch: int | None = None,
    sigmas: Sequence[float] = (),
) -> Predict:
    """The transformer under a conditioning, as a function of latents and sigma.

    With `guided` it runs twice, with the prompt and with the negative prompt and the same pictures, under the
    labels branch="cond" and "uncond"; called with guided=False, only with the prompt. Rows whose reference
    pictures differ in size run one group after another, so that each row is computed as it would be alone.

    `micro_batch` is the most rows that run at a time, their texts cut to the longest among them; None: all. A
    matrix product's last bits depend on how many rows it has, so that a row of a batch is close to its single
    run, and at 1 it is that run, bit by bit.

    `sigmas` are those that are going to be asked for, as far as is known: for who computes ahead what depends
    on them alone.

    Where nobody looks inside, the transformer runs in the form of `fast`, which may differ from
    `MMDiT.forward` in last bits.

    Raises:
        ValueError: `guided` without a negative prompt, a conditioning of another model's widths, or a
            micro_batch that is no positive number.
        NonFiniteError: while predicting, a velocity with NaN or infinity.
    """
    if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
        raise ValueError(f"micro_batch is {micro_batch!r}, wanted a whole number of at least 1, or None")
    if guided and conditioning.negative is None:
        raise ValueError("guidance is on, but the conditioning has no negative prompt")
    _require_widths(conditioning, mmdit)
    groups = [part for group in conditioning.groups() for part in _parts(group, micro_batch)]
    order = torch.tensor([row for group in groups for row in group.rows]).argsort()

    fast_run = FastRun(mmdit, sigmas)

    def branch(name: str, latents: Tensor, timestep: Tensor, fast: FastStep | None) -> Tensor:
        parts = [_velocity(mmdit, fast, group, name, latents, timestep) for group in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[order.to(latents.device)]

    def predict(latents: Tensor, sigma: float, guided: bool = guided) -> tuple[Tensor, Tensor | None]:
        timestep = timestep_of(sigma, latents)
        fast = fast_run.step(timestep)
        cond = branch("cond", latents, timestep, fast)
        uncond = branch("uncond", latents, timestep, fast) if guided else None
        _require_finite_predictions(cond, uncond)
        return cond, uncond

    return predict


def _parts(group: RowGroup, size: int | None) -> Iterator[RowGroup]:
    """The group, `size` rows at a time."""
    if size is None:
        yield group
        return
    for start in range(0, len(group.rows), size):
        index = torch.arange(start, min(start + size, len(group.rows)))
        yield dataclasses.replace(
            group,
            rows=group.rows[start : start + size],
            references=None if group.references is None else group.references[start : start + size],
            prompt=_cut(group.prompt.rows(index)),
            negative=None if group.negative is None else _cut(group.negative.rows(index)),
        )


def _cut(prompt: Prompt) -> Prompt:
    """Without the padding that all rows have."""
    if prompt.mask is None:
        return prompt
    length = int(prompt.mask.any(dim=0).nonzero().max()) + 1
    mask = prompt.mask[:, :length]
    return Prompt(prompt.embeds[:, :length], None if mask.all() else mask)


def _require_widths(conditioning: Conditioning, mmdit: MMDiT) -> None:
    prompts = [conditioning.prompt] + ([conditioning.negative] if conditioning.negative else [])
    for what, tensors, wanted in (
        ("prompt embeddings", [prompt.embeds for prompt in prompts], mmdit.config.joint_attention_dim),
        (
            "reference latents",
            [x for row in conditioning.reference_latents for x in row],
            mmdit.config.in_channels,
        ),
    ):
        for x in tensors:
            if x.shape[-1] != wanted:
                raise ValueError(f"{what} are {x.shape[-1]} wide, wanted {wanted}: is it another model's?")


def _velocity(
    mmdit: MMDiT, fast: FastStep | None, group: RowGroup, branch: str, latents: Tensor, timestep: Tensor
) -> Tensor:
    prompt = group.prompt if branch == "cond" else group.negative
    assert prompt is not None
    own = latents if len(group.rows) == latents.shape[0] else latents[group.rows]
    layout = Layout(prompt.embeds.shape[1], group.grids)
    addition_t = None
    if mmdit.config.use_additional_t_cond:  # the reference's `is_rgb`: RGBA is asked for, always
        addition_t = torch.zeros(len(own), dtype=torch.int64, device=own.device)
    with scope(branch=branch, layout=layout, rows=group.rows):
        if fast is not None:
            return fast.velocity(own, group.references, prompt, group.grids, addition_t)
        img = own if group.references is None else torch.cat([own, group.references], dim=1)
        with uncompiled_if_changed(mmdit):
            velocity = mmdit(
                img, prompt.embeds, timestep.expand(len(own)), group.grids, prompt.mask, addition_t
            )
    return velocity[:, layout.target]  # the prediction for the reference tokens is dropped


def _require_finite_predictions(cond: Tensor, uncond: Tensor | None) -> None:
    # One look at both: on an accelerator each look waits for all that was asked for so far.
    if torch.isfinite(cond if uncond is None else torch.cat([cond, uncond])).all():
        return
    labels = current_labels()
    where = f"step {labels['step']}, sigma {labels['sigma']:.4f}" if "step" in labels else "this sigma"
    for branch, velocity in (("cond", cond), ("uncond", uncond)):
        if velocity is not None:
            require_finite(
                velocity,
                f"transformer: the {branch} velocity at {where}",
                "look for it in the weights and the conditioning, or, in float16, for an overflow",
            )
