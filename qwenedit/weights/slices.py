"""Weights that are split over the processes of a run: this process's own part of each, and the whole of all.

A split weight is a `DTensor` of torch: its shape is that of the whole, and its values here are the process's
own part. `parallel.split` splits the weights of a network on the meta device; `loading` then reads the parts.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "is_first",
    "is_split",
    "is_split_weight",
    "own_part",
    "part_bytes",
    "placed_like",
    "put_back",
    "whole",
    "write_whole",
]


def is_split(module: nn.Module) -> bool:
    """True if a weight of the module is split over processes."""
    return any(is_split_weight(weight) for weight in module.parameters())


def is_first() -> bool:
    """True in the first of several processes, and in one that is alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def is_split_weight(weight: Tensor) -> TypeGuard[Any]:
    # By an attribute, not by its type: torch.distributed need not be imported, nor be there at all.
    return hasattr(weight, "placements")


def own_part(weight: Tensor) -> tuple[slice, ...] | None:
    """The slices of a weight that this process holds, one a dimension; None if it holds the whole."""
    if not is_split_weight(weight):
        return None
    part = [slice(0, size) for size in weight.shape]
    (placement,) = weight.placements  # along the mesh's one axis
    if placement.is_shard():
        size, count = weight.shape[placement.dim], weight.device_mesh.size()
        each, own = -(-size // count), weight.device_mesh.get_local_rank()  # as `torch.chunk` does
        part[placement.dim] = slice(min(size, own * each), min(size, (own + 1) * each))
    return tuple(part)


def part_bytes(weight: Tensor, size: int) -> int:
    """The bytes of this process's part of a weight that takes `size` bytes as a whole."""
    part = own_part(weight)
    if part is None:
        return size
    return size * math.prod(one.stop - one.start for one in part) // max(1, math.prod(weight.shape))


def placed_like(value: Tensor, weight: Tensor) -> nn.Parameter:
    """A parameter with this process's values, which is split like `weight`, if that is split."""
    if is_split_weight(weight):
        value = type(weight).from_local(
            value, weight.device_mesh, weight.placements,
            run_check=False, shape=weight.shape, stride=weight.stride(),
        )  # fmt: skip
    return nn.Parameter(value, requires_grad=False)


def put_back(network: nn.Module) -> None:
    """Drop the weights that `fully_shard` has gathered and kept, so that the parts can be written to."""
    reshard: Any = getattr(network, "reshard", None)
    if reshard is not None:
        reshard()


def whole(weight: Tensor) -> Tensor:
    """All values of a weight. Of a split one every process asks at the same time."""
    full: Tensor = weight.full_tensor() if is_split_weight(weight) else weight
    return full


@torch.no_grad()
def write_whole(weight: Tensor, value: Tensor) -> None:
    """Write all values of a weight; of a split one this process writes its own part."""
    if is_split_weight(weight):
        weight.to_local().copy_(value[own_part(weight)])
    else:
        weight.copy_(value)
