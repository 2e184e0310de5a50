"""The transformer under a conditioning as a function of latents and sigma: what the sampler steps along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qwenedit.encoding.conditioning import Conditioning, Prompt, RowGroup
from qwenedit.latents import Layout
from qwenedit.networks.mmdit import Control, MMDiT, RunCache
from qwenedit.sampling.branches import Branches, one_after_the_other
from qwenedit.sampling.compiling import eager_if_modified
from qwenedit.sampling.controls import Controls, RunControl
from qwenedit.sampling.precomputed import PrecomputedCache, is_precomputed, timestep_of, without_modulation
from qwenedit.sampling.sampler import Predict
from qwenedit.taps import observed, scope

__all__ = ["predictor"]


def predictor(
    mmdit: MMDiT,
    conditioning: Conditioning,
    *,
    guided: bool,
    micro_batch: int | None = None,
    sigmas: Sequence[float] = (),
    controls: Sequence[RunControl] = (),
    each: bool = False,
    branches: Branches = one_after_the_other,
) -> Predict:
    """The transformer under a conditioning, as a function of latents and sigma.

    Args:
        guided: run the transformer twice a step, with the prompt and with the negative prompt and the same
            pictures, under the labels branch="cond" and "uncond". The function can be called with
            guided=False for steps that run the prompt alone.
        micro_batch: the most rows that run at a time, their texts cut to the longest among them; None: all.
            A matrix product's last bits depend on its number of rows. A row of a batch is therefore close to
            its single run, and with micro_batch=1 equal to it, bit by bit.
        sigmas: the run's sigmas, if known. `modulation="precomputed"` computes the adaLN vectors of all of
            them at once.
        controls: what ControlNets add to the target's tokens, in the steps in which they act.
        each: run the ControlNets for each branch; by default the positive prompt's residuals serve both.
        branches: how a step's branches are run.

    Rows whose reference pictures differ in size run in groups, so that each row is computed as it would be
    alone. If nothing observes the transformer (`taps.observed`), step-invariant tensors are cached between
    steps, and the last block computes the target's tokens only. Then last bits may differ, because its
    matrix products have fewer rows.

    Raises:
        ValueError: `guided` without a negative prompt, a conditioning of another model's widths, or a
            micro_batch that is no positive number.
    """
    if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
        raise ValueError(f"micro_batch is {micro_batch!r}, wanted a whole number of at least 1, or None")
    if guided and conditioning.negative is None:
        raise ValueError("guidance is on, but the conditioning has no negative prompt")
    _require_widths(conditioning, mmdit)
    groups = [part for group in conditioning.groups() for part in _parts(group, micro_batch)]
    order = torch.cat([group.index for group in groups]).argsort()

    run_cache = PrecomputedCache(sigmas) if is_precomputed(mmdit) else RunCache()
    controlled = Controls(controls, mmdit, groups, steps=len(sigmas), each=each, cache=run_cache)

    def predict(latents: Tensor, sigma: float, guided: bool = guided) -> tuple[Tensor, Tensor | None]:
        cache = None if observed(mmdit) else run_cache
        if isinstance(cache, PrecomputedCache):
            cache.sigma = sigma
        times = {
            count: _time(mmdit, sigma, latents, count) for count in {len(group.rows) for group in groups}
        }

        control_of = controlled.of_step()

        def branch(name: str) -> Tensor:
            parts = []
            for number, group in enumerate(groups):
                own = latents if len(group.rows) == latents.shape[0] else latents[group.index]
                time = times[len(group.rows)]
                control = control_of(number, name, own, time[0])
                parts.append(_velocity(mmdit, group, name, own, time, cache, control))
            return parts[0] if len(parts) == 1 else torch.cat(parts)[order]

        with _as_cached(mmdit, cache):
            return branches(branch, guided)

    return predict


def _as_cached(mmdit: MMDiT, cache: RunCache | None) -> AbstractContextManager[None]:
    if cache is None:
        return eager_if_modified(mmdit)
    return without_modulation(mmdit) if isinstance(cache, PrecomputedCache) else nullcontext()


def _time(mmdit: MMDiT, sigma: float, latents: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The arguments `timestep` and `addition_t` for `count` rows. Both branches of a step share the pair."""
    addition_t = None
    if mmdit.config.use_additional_t_cond:  # the reference's `is_rgb`: RGBA is asked for, always
        addition_t = torch.zeros(count, dtype=torch.int64, device=latents.device)
    return timestep_of(sigma, latents).expand(count), addition_t


def _parts(group: RowGroup, size: int | None) -> Iterator[RowGroup]:
    """The group in parts of at most `size` rows."""
    if size is None:
        yield group
        return
    for start in range(0, len(group.rows), size):
        stop = min(start + size, len(group.rows))
        index = torch.arange(start, stop, device=group.index.device)
        yield dataclasses.replace(
            group,
            rows=group.rows[start:stop],
            index=group.index[start:stop],
            references=None if group.references is None else group.references[start : start + size],
            prompt=_cut(group.prompt.rows(index)),
            negative=None if group.negative is None else _cut(group.negative.rows(index)),
        )


def _cut(prompt: Prompt) -> Prompt:
    """The prompt without the padding that all of its rows share."""
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
    mmdit: MMDiT,
    group: RowGroup,
    branch: str,
    latents: Tensor,
    time: tuple[Tensor, Tensor | None],
    cache: RunCache | None,
    control: Control | None,
) -> Tensor:
    prompt = group.prompt if branch == "cond" else group.negative
    assert prompt is not None
    layout = Layout(prompt.embeds.shape[1], group.grids)
    img = latents if group.references is None else torch.cat([latents, group.references], dim=1)
    with scope(branch=branch, layout=layout, rows=group.rows, text_lengths=prompt.lengths):
        velocity = mmdit(
            img, prompt.embeds, time[0], group.grids, prompt.mask, time[1],
            control=control, cache=cache, target_only=cache is not None,
        )  # fmt: skip
    return velocity[:, layout.target]  # the prediction for the reference tokens is dropped
