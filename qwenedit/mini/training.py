"""What the stages of the embedded model's training share: their options, and what they give to the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qwenedit.taps import taps
from qwenedit.training.loop import Options, Run, adamw

__all__ = ["Stage", "averaged", "begin", "go_on_from", "unfused_attention"]


@dataclass(frozen=True, kw_only=True)
class Stage(Options):
    """How a stage is trained.

    Attributes:
        batch: rows of a step.
        rate: AdamW's peak learning rate.
        matrix_rate: Muon's peak learning rate, for the matrices inside blocks; None: AdamW trains them too.
        warmup: steps during which the learning rate rises, at most a tenth of all.
        ema: decay of the weights' average, which is what gets exported.
        dtype: of the networks' arithmetic; the master weights are float32.
    """

    batch: int
    rate: float
    matrix_rate: float | None = None
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float | None = 0.999
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"
    report_every: int = 50
    save_every: float = 45.0


def begin(folder: Path, modules: Mapping[str, nn.Module], stage: Stage) -> Run:
    """The loop over the weights of modules, which compute in the stage's dtype from now on."""
    live = {
        f"{prefix}.{name}": x
        for prefix, module in modules.items()
        for name, x in module.named_parameters()
        if x.requires_grad
    }
    masters = {name: x.detach().float().clone().requires_grad_(True) for name, x in live.items()}
    for module in modules.values():
        module.to(stage.dtype)

    def optimisers(masters: dict[str, Tensor]) -> list[Optimizer]:
        matrices = {
            name: x
            for name, x in masters.items()
            if stage.matrix_rate is not None and x.ndim == 2 and ".blocks." in name and "_mod." not in name
        }
        made = adamw(stage.rate, betas=(0.9, 0.98))({n: x for n, x in masters.items() if n not in matrices})
        if stage.matrix_rate is not None:
            made.append(
                torch.optim.Muon(
                    matrices.values(), lr=stage.matrix_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
                )
            )
        return made

    options = dataclasses.replace(stage, warmup=min(stage.warmup, stage.steps // 10))
    return Run(folder, live, options, optimisers, masters=masters)


def go_on_from(network: nn.Module, trained: nn.Module) -> None:
    """Give a network the weights of a trained one.

    Raises:
        ValueError: the trained one has another size. Nothing has changed then.
    """
    own, given = network.state_dict(), trained.state_dict()
    for name in sorted({*own, *given}):
        want, got = (list(one[name].shape) if name in one else None for one in (own, given))
        if got != want:
            raise ValueError(f"the weights to go on from are of another size: {name} is {got}, wanted {want}")
    network.load_state_dict(given)


def averaged(run: Run, prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The average of a module's weights as a state_dict in float32 on the CPU; frozen weights as they are."""
    average = run.weights.average
    assert average is not None
    return {
        name: average.get(f"{prefix}.{name}", x).detach().float().cpu()
        for name, x in module.state_dict().items()
    }


def unfused_attention(module: nn.Module) -> AbstractContextManager[object]:
    """Attention as plain matrix products and softmax, which is faster than the fused kernel at this size.

    It is what a tap on its probabilities asks for. Without a picture the vision tower's do not fire.
    """
    return taps(module, {"*.probs": lambda _x, _site: None}, eager=False, strict=False)
