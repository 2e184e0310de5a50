"""What acts on a pipeline during one edit of a sweep, a LoRA and an intervention, and if it is gone after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from qwenedit.ablation.model import settings_of
from qwenedit.ablation.spec import NONE, Cell, Spec
from qwenedit.networks.low_rank import Change
from qwenedit.pipeline import QwenImageEdit
from qwenedit.taps import fingerprint, observed

__all__ = ["acting", "intervened", "lora", "state_of"]


@contextmanager
def acting(pipe: QwenImageEdit, spec: Spec, cell: Cell) -> Iterator[None]:
    """The cell's LoRA, beside those that are active, and its intervention, for the length of a `with` block.

    Raises:
        ValueError: the intervention returns no context manager, or the LoRA does not fit.
    """
    with lora(pipe, cell.lora_file, cell.lora_scale):
        if cell.intervention == NONE:
            yield
            return
        with intervened(pipe, spec.interventions[cell.intervention]):
            yield


def intervened(
    pipe: QwenImageEdit, function: Callable[[QwenImageEdit], AbstractContextManager[Any]]
) -> AbstractContextManager[Any]:
    """The context manager that an intervention makes for a pipeline.

    Raises:
        ValueError: it returns something else.
    """
    context = function(pipe)
    if not (hasattr(type(context), "__enter__") and hasattr(type(context), "__exit__")):
        raise ValueError(
            f"the intervention returned {type(context).__name__}, wanted a context manager: put "
            "@contextlib.contextmanager above a function with one yield"
        )
    return context


@contextmanager
def lora(pipe: QwenImageEdit, file: Path | None, scale: float) -> Iterator[None]:
    """A LoRA beside those that are active, for the length of a `with` block; without a file nothing."""
    if file is None:
        yield
        return
    name = "of one edit"
    before = [(one, one.active, one.disabled) for one in pipe.mmdit.modules() if isinstance(one, Change)]
    pipe.load_lora_weights(file, name, scale=scale)
    try:
        for one, active, disabled in before:  # loading makes a LoRA the only active one
            one.active, one.disabled = active, disabled
        yield
    finally:
        pipe.delete_adapters(name)


@torch.no_grad()
def state_of(pipe: QwenImageEdit) -> tuple[Any, ...]:
    """A value that changes if weights, configs, parts, taps or hooks of the pipeline do, or what trains."""
    given = (pipe.vision_language, pipe.vae, pipe.mmdit, *pipe.controlnets)
    networks = [one for one in given if one is not None]
    modules = [module for network in networks for module in network.modules()]
    held = [*vars(pipe).values(), *vars(pipe.processor).values(), *modules]
    held += [vars(module).get(name) for module in modules for name in ("_taps", "forward")]
    hooks = [
        (list(module._forward_hooks.items()), list(module._forward_pre_hooks.items())) for module in modules
    ]
    trained = [x.requires_grad for network in networks for x in network.parameters()]
    parts = [(id(value), value) for value in held]  # held, so that no other value can get its id
    settings = [settings_of(network) for network in networks]
    return fingerprint(networks), [observed(one) for one in networks], parts, hooks, trained, settings
