"""What both training stages share: weights in two precisions, schedules, and runs that survive a kill.

Everything random in a run is a function of its seed and of the step, so that the weights, the optimisers'
moments and the step number are all there is to save: a run that was killed and resumed is bit-equal to one
that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwenedit.files import replacing_file

__all__ = ["Run", "Weights", "learning_rate"]


class Weights:
    """Float32 master weights of modules that compute in another dtype, their averages and their optimisers.

    Attributes:
        average: exponential moving average of the masters, which is what gets exported.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        dtype: torch.dtype,
        rate: float,
        matrix_rate: float | None = None,
        decay: float = 0.999,
    ) -> None:
        """`matrix_rate`: train the matrices inside blocks with Muon, at this rate; the rest with AdamW."""
        named = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.names = list(named)
        self.masters: list[Tensor] = [nn.Parameter(p.detach().float().clone()) for p in named.values()]
        self.average = [p.detach().clone() for p in self.masters]
        for module in modules.values():
            module.to(dtype)
        self.live: list[Tensor] = list(named.values())
        self.decay = decay
        matrices = [
            p
            for name, p in zip(self.names, self.masters, strict=True)
            if matrix_rate is not None and p.ndim == 2 and ".blocks." in name and "_mod." not in name
        ]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.masters if id(p) not in chosen]
        adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        self.optimisers: list[torch.optim.Optimizer] = [adam]
        self.rates = [rate]
        if matrices:
            assert matrix_rate is not None
            self.optimisers.append(
                torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
            self.rates.append(matrix_rate)

    def step(self, share: float, count: int) -> None:
        """One update from the gradients of the live weights, clipped to a norm of 1.

        `share` scales the learning rates; `count` is the number of updates so far, for the average.
        """
        gradients = [
            torch.zeros_like(master) if p.grad is None else p.grad.float()
            for p, master in zip(self.live, self.masters, strict=True)
        ]
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()
        decay = min(self.decay, (1 + count) / (10 + count))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.masters, 1 - decay)
            torch._foreach_copy_(self.live, self.masters)
        for live, master in zip(self.live, self.masters, strict=True):
            live.grad = master.grad = None

    def averaged(self, prefix: str) -> dict[str, Tensor]:
        """The average of one module's weights, as its state_dict."""
        return {
            name.removeprefix(f"{prefix}."): x
            for name, x in zip(self.names, self.average, strict=True)
            if name.startswith(f"{prefix}.")
        }

    def state(self) -> dict[str, Any]:
        return {
            "masters": [x.detach() for x in self.masters],
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        torch._foreach_copy_(self.masters, state["masters"])
        torch._foreach_copy_(self.average, state["average"])
        torch._foreach_copy_(self.live, self.masters)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak rate: a linear rise, then half a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    way = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, way)))


class Run:
    """The loop of a run and its files in a folder: `state.pt` to go on from, `log.jsonl`, a line a report.

    Iterating yields the numbers of the steps that are left, with a progress bar, and saves as it goes: a kill
    loses at most `every` seconds. Reports after the saved step, which a resumed run makes again, stay in the
    log; the last one of a step counts.
    """

    def __init__(self, folder: Path, weights: Weights, *, steps: int, every: float = 45.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.weights, self.steps, self.every = folder, weights, steps, every
        self.step = 0  # of steps done, or in the loop's body begun
        self.seconds = 0.0  # of training before this process
        self.sums: dict[str, Tensor] = {}
        self.noted = 0
        self.started = time.monotonic()
        if (folder / "state.pt").is_file():
            state = torch.load(folder / "state.pt", weights_only=True)
            weights.restore(state)
            self.step, self.seconds = state["step"], state["seconds"]
            self.log(event="resumed")

    def __iter__(self) -> Iterator[int]:
        saved = time.monotonic()
        self.bar = tqdm(total=self.steps, initial=self.step, desc=self.folder.name, disable=None)
        with self.bar:
            while self.step < self.steps:
                self.step += 1
                yield self.step - 1
                self.bar.update()
                if time.monotonic() - saved > self.every:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def note(self, **losses: Tensor) -> None:
        """Add to the means of the next report."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + value.detach().cpu()
        self.noted += 1

    def report(self) -> None:
        """Log the means since the last report; a loss that is no number ends the run."""
        means = {name: float(total) / self.noted for name, total in self.sums.items()}
        self.sums, self.noted = {}, 0
        self.log(**means)
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"a loss is not finite at step {self.step}: {means}")

    def log(self, **values: Any) -> None:
        line = {"step": self.step, "seconds": round(self.elapsed(), 1), **values}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def save(self) -> None:
        state = {**self.weights.state(), "step": self.step, "seconds": self.elapsed()}
        with replacing_file(self.folder / "state.pt") as temporary:
            torch.save(state, temporary)
