"""What one process needs of a run that several share: its part of the weights, and of what is computed.

`parallel.split` splits the weights; here are the same parts, counted from headers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from qwenedit.memory.residency import BLOCK_LISTS, Modes
from qwenedit.memory.sizes import NetworkSize
from qwenedit.weights.formats import Stored

__all__ = ["SPLIT_LAYERS", "SPLIT_NETWORKS", "Spec", "in_words", "own_computed", "own_parts"]

SPLIT_NETWORKS = ("transformer", "text_encoder")  # those that `split_weights` splits
# What `tensor` splits in a block of the transformer: layers, and the dimension of their weights. Layers of
# columns, 1, add up their outputs, and every process has their biases.
SPLIT_LAYERS = {
    "attn.img_q": 0, "attn.img_k": 0, "attn.img_v": 0, "attn.img_out": 1,
    "attn.txt_q": 0, "attn.txt_k": 0, "attn.txt_v": 0, "attn.txt_out": 1,
    "img_mlp.up": 0, "img_mlp.down": 1, "txt_mlp.up": 0, "txt_mlp.down": 1,
    "img_mod.linear": 0, "txt_mod.linear": 0,
}  # fmt: skip
_WHOLE = 10  # widths a token in sampling that `tensor` does not split: the streams, and what is summed


class Spec(Protocol):
    """How processes share a run: `parallel.spec.ParallelSpec`."""

    @property
    def ulysses(self) -> int: ...

    @property
    def tensor(self) -> int: ...

    @property
    def processes(self) -> int: ...

    def require_heads(self, heads: int) -> None: ...


def own_parts(
    found: Mapping[str, Mapping[str, Stored]], spec: Spec, *, split_weights: bool
) -> dict[str, dict[str, Stored]]:
    """The weights of each component as the first process, which has the largest parts, keeps them."""
    parts: dict[str, dict[str, Stored]] = {}
    for component, weights in found.items():
        lists = tuple(f"{path}." for path in BLOCK_LISTS.get(component, ()))
        own = parts[component] = dict(weights)
        for name, stored in weights.items():
            if split_weights and component in SPLIT_NETWORKS:
                if component == "transformer" or name.startswith(lists):
                    own[name] = _part(stored, 0, spec.processes)
            elif component == "transformer" and name.startswith(lists):
                layer, _, leaf = name.split(".", 2)[2].rpartition(".")
                dim = SPLIT_LAYERS.get(layer)
                if dim is not None and not (dim == 1 and leaf == "bias"):
                    own[name] = _part(stored, dim, spec.tensor)
    return parts


def _part(stored: Stored, dim: int, count: int) -> Stored:
    shape = list(stored.shape)
    shape[dim] = math.ceil(shape[dim] / count)
    size = stored.bytes * math.prod(shape) // max(1, math.prod(stored.shape))
    return replace(stored, shape=tuple(shape), bytes=size)


def own_computed(
    computed: Mapping[str, int],
    sizes: Mapping[str, NetworkSize],
    widths: float,
    spec: Spec,
    *,
    split_weights: bool,
) -> dict[str, int]:
    """Bytes that one process needs besides its weights, by stage, in place of the whole run's `computed`.

    `widths` a token are computed in sampling; `tensor` splits those beyond `_WHOLE`. Under `ulysses` the
    streams are whole before the first block and after the last: 2 widths. With `split_weights` two blocks
    are gathered, the running one and the next, as in streaming, and what is in no block of the transformer.
    """
    own = _WHOLE + (widths - _WHOLE) / spec.tensor
    own = own / spec.ulysses + (2 if spec.ulysses > 1 else 0)
    made = {**computed, "sampling": round(computed["sampling"] * own / widths)}
    if split_weights:
        stream = Modes("stream")
        made["sampling"] += sizes["transformer"].in_memory(stream)
        if "text_encoder" in sizes:
            made["text encoding"] += sizes["text_encoder"].in_memory(stream) - sizes["text_encoder"].rest
    return made


def in_words(spec: Spec, *, split_weights: bool) -> str:
    return f", each of {spec.processes} processes ({spec}{', split weights' * split_weights})"
