"""Activation checkpointing that works with taps: it trades time for memory, with the same gradients.

A block's activations are dropped after the forward pass and recomputed in the backward pass. The functions on
its taps are then called again, on the same values, under the labels of the first call and the additional
label `recomputation`. Functions that count or store can check it; functions that replace need not. (A block's
last taps are not called again, because recomputation stops where the backward pass needs no more.)
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
    """The block as a function that, with gradients on, keeps only its inputs for the backward pass.

    Raises:
        RuntimeError: in the backward pass, if the block's taps have changed since the forward pass. The
            gradients would be wrong.
    """
    if not torch.is_grad_enabled():
        return block
    if torch.compiler.is_compiling():  # compiled code reads no labels
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
    """The attached functions of each module. `taps` replaces these objects, it never writes to them."""
    return [module.__dict__.get("_taps") for module in block.modules() if isinstance(module, Tapped)]
