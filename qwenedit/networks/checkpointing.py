"""Activation checkpointing that keeps what the taps promise: memory for time, and the same gradients.

What a block computes is thrown away after the forward pass, and computed again when the backward pass needs
it. Then the functions on its taps are called again, on the same values, under the labels of the first call
and one more, `recomputation`: a function that counts or stores can tell by it, one that replaces needs not.
(A block's last taps are not called again: it is recomputed no further than the backward pass needs.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwenedit.taps import Tapped, current_labels, scope

__all__ = ["recomputed"]


def recomputed(block: nn.Module) -> Callable[..., Any]:
    """The block as a function that keeps its inputs only, where gradients are on.

    Raises:
        RuntimeError: in the backward pass, if the block's taps are not those of the forward pass. The
            gradients would be another network's.
    """
    if not torch.is_grad_enabled():
        return block
    if torch.compiler.is_compiling():  # labels are not for compiled code
        return lambda *inputs: checkpoint(block, *inputs, use_reentrant=False)
    labels, taps = current_labels(), _attached(block)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _again(block, taps, labels)

    return lambda *inputs: checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _again(block: nn.Module, taps: list[Any], labels: dict[str, Any]) -> Iterator[None]:
    now = _attached(block)
    if any(one is not other for one, other in zip(now, taps, strict=True)):
        raise RuntimeError(
            "taps were attached or detached between the forward and the backward pass: under checkpointing "
            "call backward within the same `with taps(...)`"
        )
    with scope(**{**labels, "recomputation": True}):
        yield


def _attached(block: nn.Module) -> list[Any]:
    """What `taps` attached to each of its modules: one object as long as nobody attaches or detaches."""
    return [module.__dict__.get("_taps") for module in block.modules() if isinstance(module, Tapped)]
