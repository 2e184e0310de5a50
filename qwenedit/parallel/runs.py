"""What a run of several processes does besides: it begins with an agreement, and starts from the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.networks.low_rank import LowRankLinear
from qwenedit.parallel.digest import about_run
from qwenedit.parallel.processes import Processes
from qwenedit.parallel.ulysses import share_tokens

__all__ = ["agree_on_run", "conditioning_of_first", "guarded"]

T = TypeVar("T")


def agree_on_run(processes: Processes, call: Any, run: Any, networks: Sequence[nn.Module]) -> None:
    """Require that all processes are about to do the same run. One without a generator draws the same noise.

    Raises:
        ValueError: they are not; cfg=2 without guidance; or tensor with a LoRA that is not fused.
        ProcessLost: a process failed before, or did not come.
    """
    if processes.spec.cfg > 1 and run.guidance is None:
        raise ValueError(
            f"parallel '{processes.spec}' runs the two branches of guidance at the same time, but this run "
            "has none: wanted a true_cfg_scale above 1 and a negative prompt, or parallel without cfg"
        )
    if processes.spec.tensor > 1 and any(isinstance(x, LowRankLinear) for x in networks[0].modules()):
        raise ValueError(
            f"parallel '{processes.spec}' splits layers, and a LoRA is beside them: call fuse_lora or "
            "unload_lora_weights first"
        )
    for network in networks:  # ControlNets may be put in at any time
        share_tokens(network, processes)
    processes.agree(about_run(call, run, networks), draws=run.generator is None)


def conditioning_of_first(processes: Processes, conditioning: Conditioning) -> Conditioning:
    """Process 0's conditioning, on the run's device, for all of them.

    Raises:
        ValueError: the processes' conditionings have other shapes.
        ProcessLost: another process failed, or did not come.
    """
    prompts = [p for p in (conditioning.prompt, conditioning.negative) if p is not None]
    about = {
        "grids of the conditioning": [conditioning.target_grid, conditioning.reference_grids],
        "prompts of the conditioning": [[*p.embeds.shape, p.mask is None] for p in prompts],
    }
    processes.agree(about, draws=False)

    def same(prompt: Prompt) -> Prompt:
        mask = None if prompt.mask is None else processes.first(prompt.mask, "the prompts' mask")
        return Prompt(processes.first(prompt.embeds, "the prompts' embeddings"), mask)

    rows = conditioning.reference_latents
    return dataclasses.replace(
        conditioning,
        prompt=same(conditioning.prompt),
        negative=None if conditioning.negative is None else same(conditioning.negative),
        reference_latents=tuple(
            tuple(processes.first(x, "the references' latents") for x in row) for row in rows
        ),
    )


def guarded(processes: Processes, steps: Iterator[T]) -> Iterator[T]:
    """The steps of a run that has begun; if one fails in this process alone, the others do not wait."""
    with processes.in_one_run(agreed=True):
        yield from steps
