"""What a run of several processes does besides: it begins with an agreement, and starts from the same.

Without other processes (None) the functions change nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

from torch import nn

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.networks.low_rank import LowRankLinear
from qwenedit.parallel.branches import SharedBranches
from qwenedit.parallel.digest import about_run
from qwenedit.parallel.processes import Processes
from qwenedit.parallel.ulysses import share_out
from qwenedit.sampling.branches import Branches, one_after_the_other

__all__ = ["agree", "guarded", "in_one_run", "shared"]

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


def in_one_run(method: Method) -> Method:
    """A method that makes a run of `self.processes`: if it fails in one of them, the others do not wait."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.processes is None else self.processes.in_one_run():
            return method(self, *args, **kwargs)

    return cast("Method", run)


def guarded(processes: Processes | None, steps: Iterator[T]) -> Iterator[T]:
    """The steps of a run that has begun; likewise."""
    with nullcontext() if processes is None else processes.in_one_run(agreed=True):
        yield from steps


def agree(
    processes: Processes | None, call: Any, run: Any, networks: Sequence[nn.Module], micro_batch: int | None
) -> None:
    """Require that all processes are about to do the same run. One without a generator draws the same noise.

    Raises:
        ValueError: they are not; networks that were moved to another device; cfg=2 without guidance; tensor
            with a LoRA that is not fused; or a network that another pipeline shares otherwise.
        ProcessLost: a process failed before, or did not come.
    """
    networks = list(dict.fromkeys(networks))
    for network in networks:  # ControlNets may be put in at any time, from other pipelines, too
        shards: Any = getattr(network, "shards", None)
        if shards is not None and shards.shares.processes is not processes:
            raise ValueError(
                "a network of this run is shared in another pipeline's way: load it for this one"
            )
    if processes is None:
        return
    processes.spec.require_guidance(run.guidance is not None)
    own = processes.device.type
    kinds = {x.device.type for network in networks for x in network.parameters()} - {"cpu", "meta", own}
    if kinds:  # moved by `pipe.to`
        raise ValueError(
            f"the networks are on {', '.join(sorted(kinds))}, but the processes exchange tensors on {own}: "
            f"wanted load(parallel='{processes.spec}', device={min(kinds)!r})"
        )
    if processes.spec.tensor > 1 and any(isinstance(x, LowRankLinear) for x in networks[0].modules()):
        raise ValueError(
            f"parallel '{processes.spec}' splits layers, and a LoRA is beside them: call fuse_lora or "
            "unload_lora_weights first"
        )
    for network in networks:
        share_out(network, processes)
    about = {"parallel": str(processes.spec), "micro_batch": micro_batch, **about_run(call, run, networks)}
    processes.agree(about, draws=run.generator is None)


def shared(processes: Processes | None, conditioning: Conditioning) -> tuple[Conditioning, Branches]:
    """A run's conditioning, on its device, and how its branches are run.

    Raises:
        ValueError: the processes' conditionings have other shapes.
        ProcessLost: another process failed, or did not come.
    """
    if processes is None:
        return conditioning, one_after_the_other
    branches = SharedBranches(processes) if processes.spec.cfg > 1 else one_after_the_other
    return _of_first(processes, conditioning), branches


def _of_first(processes: Processes, conditioning: Conditioning) -> Conditioning:
    """Process 0's conditioning for all of them."""
    prompts = [p for p in (conditioning.prompt, conditioning.negative) if p is not None]
    about: dict[str, Any] = {
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
