"""How the processes of a run share its work, as text: "cfg=2,ulysses=4,tensor=1"."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import torch.distributed as dist

from qwenedit.checks import whole_number
from qwenedit.foreign import shown
from qwenedit.memory.residency import Modes

__all__ = ["AXES", "ParallelSpec", "checked_spec", "fitting_spec", "processes_started", "spec_of"]

AXES = ("cfg", "ulysses", "tensor")  # outermost first: neighbours in the last axes exchange the most


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """The number of processes along each axis; their product is the number of processes.

    Attributes:
        cfg: 2 runs the two branches of guidance at the same time.
        ulysses: shares the tokens, and in attention the heads, out among so many.
        tensor: shares the transformer's matrices out among so many.

    Raises:
        ValueError: no whole number of at least 1, or more than two branches.
    """

    cfg: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = whole_number(f"parallel {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, size)
        if self.cfg > 2:
            raise ValueError(f"parallel cfg is {self.cfg}, wanted 1 or 2: guidance has two branches")

    @property
    def processes(self) -> int:
        return self.cfg * self.ulysses * self.tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of `AXES`."""
        return self.cfg, self.ulysses, self.tensor

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)

    def require_heads(self, heads: int) -> None:
        """Check that so many attention heads can be shared out.

        Raises:
            ValueError: they cannot.
        """
        if heads % (self.ulysses * self.tensor):
            raise ValueError(
                f"the transformer has {heads} attention heads, which ulysses={self.ulysses} times "
                f"tensor={self.tensor} does not divide: wanted a product of the two that does"
            )

    def require_guidance(self, guided: bool) -> None:
        """Check that a run has the branches that cfg runs at the same time.

        Raises:
            ValueError: it has one.
        """
        if self.cfg > 1 and not guided:
            raise ValueError(
                f"parallel '{self}' runs guidance's two branches at the same time, but this run has none: "
                "wanted a true_cfg_scale above 1 and a negative prompt, or parallel without cfg"
            )


def spec_of(parallel: Any) -> ParallelSpec | None:
    """The spec that a text describes, like "cfg=2,ulysses=4"; None for one process.

    Raises:
        ValueError: no such axis, one that is given twice, or no whole number.

    >>> spec_of("cfg=2, ulysses=4")
    ParallelSpec(cfg=2, ulysses=4, tensor=1)
    >>> spec_of("cfg=1") is None
    True
    """
    if parallel is None:
        return None
    if isinstance(parallel, ParallelSpec):
        return parallel if parallel.processes > 1 else None
    if not isinstance(parallel, str):
        raise ValueError(f"parallel is {type(parallel).__name__}, wanted a text like 'cfg=2,ulysses=2'")
    sizes: dict[str, int] = {}
    for part in parallel.split(","):
        axis, equals, size = (text.strip() for text in part.partition("="))
        if axis not in AXES or not equals:
            raise ValueError(
                f"parallel has {shown(repr(part.strip()))}, wanted AXIS=N with one of {', '.join(AXES)}, "
                "like 'cfg=2,ulysses=2'"
            )
        if axis in sizes:
            raise ValueError(f"parallel has {axis} twice, wanted it once")
        if not size.isascii() or not size.isdecimal():
            raise ValueError(f"parallel {axis} is {shown(repr(size))}, wanted a whole number of at least 1")
        sizes[axis] = int(size[:9])
    spec = ParallelSpec(**sizes)
    return spec if spec.processes > 1 else None


def checked_spec(
    parallel: Any, *, compile: bool = False, split_weights: bool = False, modes: Modes | None = None
) -> ParallelSpec | None:
    """`fitting_spec`, checked against the processes that were started.

    Raises:
        ValueError: as `fitting_spec`; another number of processes.
    """
    spec = fitting_spec(parallel, compile=compile, split_weights=split_weights, modes=modes)
    if spec is None:
        return None
    if not dist.is_available():
        raise ValueError(f"parallel '{spec}' needs torch.distributed, which this torch was built without")
    if (count := processes_started()) != spec.processes:
        raise ValueError(
            f"parallel '{spec}' wanted {spec.processes} processes, got {count}: start with torchrun "
            f"--nproc-per-node {spec.processes} -m qwenedit ..., or with torchrun and your script"
        )
    return spec


def processes_started() -> int:
    """How many processes torchrun, or the caller, has started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def fitting_spec(
    parallel: Any, *, compile: bool = False, split_weights: bool = False, modes: Modes | None = None
) -> ParallelSpec | None:
    """`spec_of`, checked against the other arguments of `load`.

    Raises:
        ValueError: as `spec_of`; or what excludes each other: compiled blocks and such that exchange tensors,
            or split weights and memory modes that drop them.
    """
    spec = spec_of(parallel)
    if spec is None:
        if split_weights:
            raise ValueError(
                "split_weights=True splits them over the processes that share a run: wanted parallel, too, "
                "like 'cfg=2' or 'ulysses=2'"
            )
        return None
    if split_weights or spec.tensor > 1:
        _require_splitting(spec, split_weights=split_weights, compile=compile, modes=modes or Modes())
    if compile and spec.ulysses > 1:
        raise ValueError(
            f"compile=True does not go with parallel '{spec}', whose blocks exchange tensors: wanted one of "
            "the two, or cfg alone"
        )
    return spec


def _require_splitting(spec: ParallelSpec, *, split_weights: bool, compile: bool, modes: Modes) -> None:
    """Check that weights can be split: by `split_weights`, or else by the spec's tensor."""
    how = "split_weights=True" if split_weights else f"parallel tensor={spec.tensor}"
    if split_weights and spec.tensor > 1:
        raise ValueError(
            f"{how} and parallel tensor={spec.tensor} both split the weights: wanted one of them"
        )
    if compile:
        raise ValueError(f"compile=True does not go with {how}, whose blocks exchange tensors: wanted one")
    if modes not in (Modes(), Modes("auto")):
        raise ValueError(
            f"{how} keeps a part of the weights in each process's memory, which '{modes}' does not: wanted "
            "residency='resident', modulation='live' and storage=None, or cfg and ulysses alone"
        )
