"""cfg=2: half of the processes run the branch with the prompt, half the one with the negative prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from qwenedit.parallel.processes import Processes
from qwenedit.taps import scope

__all__ = ["SharedBranches"]

BRANCHES = ("cond", "uncond")


class SharedBranches:
    """A step's predictions, of which each process computes one (`sampling.branches.Branches`).

    Both then have both, and guidance and the sampler's rule run on each of them. Taps see the branch of their
    process alone; the label `elsewhere` names the other one.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __call__(self, branch: Callable[[str], Tensor], guided: bool) -> tuple[Tensor, Tensor | None]:
        """In an unguided step all processes compute the one branch.

        Raises:
            ValueError: the prediction has a gradient, which would end here.
            ProcessLost: another process failed, or did not come.
        """
        if not guided:
            return branch("cond"), None
        name, other = BRANCHES[:: -1 if self._processes.place("cfg") else 1]
        with scope(elsewhere=other):
            own = branch(name).contiguous()
        if own.requires_grad:
            raise ValueError(
                "gradients do not cross processes: wrap the run in torch.no_grad(), or load without cfg=2"
            )
        both = [torch.empty_like(own) for _ in BRANCHES]
        with self._processes.waiting("cfg", "predictions"):
            dist.all_gather(
                [x.view(torch.uint8) for x in both],
                own.view(torch.uint8),
                group=self._processes.group("cfg"),
            )
        return both[0], both[1]
