"""Bytes of networks' weights, counted from the headers of their files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qwenedit.memory.residency import BLOCK_LISTS, MODULATION_LAYERS, Modes
from qwenedit.weights.formats import Stored
from qwenedit.weights.loading import dtype_beside, run_dtype

__all__ = ["BlockSize", "NetworkSize", "itemsize", "network_sizes"]

_BLOCK = re.compile("(" + "|".join(path for paths in BLOCK_LISTS.values() for path in paths) + r")\.\d+\.")


@dataclass
class BlockSize:
    """Bytes of a block's weights, and of its adaLN layers among them."""

    all: int = 0
    modulation: int = 0


@dataclass(frozen=True)
class NetworkSize:
    """Bytes of a network's weights: of its blocks, in the run's dtype and in 8 bits; and of the rest."""

    blocks: dict[str, BlockSize]
    float8: dict[str, BlockSize]
    rest: int

    @property
    def all(self) -> int:
        return sum(block.all for block in self.blocks.values()) + self.rest

    def in_memory(self, mode: Modes, *, runs: bool = True) -> int:
        """Bytes in memory while the network runs, or waits in memory for its turn.

        With "stream" that is, while it runs, two blocks, the running one and the next; with "float8" all
        blocks in 8 bits and, while it runs, two widened ones.
        """
        gone = mode.modulation == "precomputed"
        whole, shrunk = (
            sorted(block.all - block.modulation * gone for block in blocks.values())
            for blocks in (self.blocks, self.float8)
        )
        if mode.storage == "float8":
            return sum(shrunk) + sum(whole[-2:]) * runs + self.rest
        return (sum(whole[-2:]) * runs if mode.residency == "stream" else sum(whole)) + self.rest


def network_sizes(
    found: Mapping[str, Mapping[str, Stored]], dtype: torch.dtype | None
) -> dict[str, NetworkSize]:
    """Sizes of networks whose stored weights are `found`, in the dtype that `load` would run them in."""
    sizes = {}
    for component, stored in found.items():
        beside = component.startswith("controlnet")
        own = dtype_beside(found["transformer"], dtype) if beside else run_dtype(stored.values(), dtype)
        sizes[component] = _network_size(stored, own, precomputed=component == "transformer")
    return sizes


def _network_size(
    found: Mapping[str, Stored], dtype: torch.dtype | None, *, precomputed: bool
) -> NetworkSize:
    """The size in a dtype; `precomputed`: whether its adaLN layers can be."""
    blocks: dict[str, BlockSize] = {}
    float8: dict[str, BlockSize] = {}
    rest = 0
    for name, stored in found.items():
        values = math.prod(stored.shape)
        size = stored.bytes if dtype is None else values * dtype.itemsize
        if (match := _BLOCK.match(name)) is None:
            rest += size
            continue
        small = values if len(stored.shape) > 1 else size  # norms and biases are not rounded
        for form, takes in ((blocks, size), (float8, small)):
            block = form.setdefault(match.group(), BlockSize())
            block.all += takes
            block.modulation += takes * (precomputed and name[match.end() :].startswith(MODULATION_LAYERS))
    return NetworkSize(blocks, float8, rest)


def itemsize(dtype: torch.dtype | None) -> int:
    """Bytes of a value; 2, as in the released checkpoints, for None, the stored dtype."""
    return 2 if dtype is None else dtype.itemsize
