"""What the training stages share: options, weights in two precisions, and a loop that survives a kill.

Everything random in a run is a function of its seed and the step. A run therefore saves only the weights, the
optimisers' moments and the step number, and a run that was killed and resumed is bit-equal to an
uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from qwenedit.checks import progress_bar
from qwenedit.files import replacing_file
from qwenedit.taps import taps

__all__ = ["Options", "Run", "Weights", "learning_rate", "unfused_attention"]

DECAY = 0.999  # of the weights' moving average


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a stage is trained.

    Attributes:
        steps: number of updates.
        batch: rows of a step.
        rate: AdamW's peak learning rate.
        matrix_rate: Muon's peak learning rate, for the matrices inside blocks; None: AdamW trains them too.
        warmup: steps during which the learning rate rises, at most a tenth of all.
        dtype: of the networks' arithmetic; the master weights are float32.
        report_every: steps between two lines of the log.
        save_every: seconds between two saves.
    """

    steps: int
    batch: int
    rate: float
    matrix_rate: float | None = None
    warmup: int = 100
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"
    report_every: int = 50
    save_every: float = 45.0


class Weights:
    """Float32 master weights of modules that compute in another dtype, their averages and their optimisers.

    Attributes:
        average: exponential moving average of the masters; it is what gets exported.
    """

    def __init__(self, modules: Mapping[str, nn.Module], options: Options) -> None:
        named = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.names = list(named)
        self.masters: list[Tensor] = [nn.Parameter(p.detach().float().clone()) for p in named.values()]
        self.average = [p.detach().clone() for p in self.masters]
        for module in modules.values():
            module.to(options.dtype)
        self.live: list[Tensor] = list(named.values())
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in zip(self.names, self.masters, strict=True):
            inside = p.ndim == 2 and ".blocks." in name and "_mod." not in name
            (matrices if inside and options.matrix_rate is not None else others).append(p)
        adam = torch.optim.AdamW(others, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        self.optimisers: list[torch.optim.Optimizer] = [adam]
        if matrices:
            assert options.matrix_rate is not None
            muon = torch.optim.Muon(
                matrices, lr=options.matrix_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            self.optimisers.append(muon)
        self.rates = [optimiser.defaults["lr"] for optimiser in self.optimisers]

    def step(self, share: float, count: int) -> None:
        """One update from the gradients of the live weights, clipped to a norm of 1.

        `share` scales the learning rates; `count` is the number of updates so far, for the average.
        """
        for live, master in zip(self.live, self.masters, strict=True):
            master.grad = torch.zeros_like(master) if live.grad is None else live.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()
        decay = min(DECAY, (1 + count) / (10 + count))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.masters, 1 - decay)
            torch._foreach_copy_(self.live, self.masters)
        for live, master in zip(self.live, self.masters, strict=True):
            live.grad = master.grad = None

    def averaged(self, prefix: str) -> dict[str, Tensor]:
        """The average of the weights under a prefix, as a state_dict."""
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
    """The loop of a stage and its files in a folder: `state.pt` to resume from, `log.jsonl` with the reports.

        run = Run(folder, {"vae": vae}, options)
        for step, generator in run:
            run.update(loss_of(...))

    Iterating yields the number of each step that is left and a generator seeded for it, shows a progress bar,
    and saves: a kill loses at most `save_every` seconds. A resumed run repeats the reports after the saved
    step; the log keeps both, and the last one of a step counts.
    """

    def __init__(self, folder: Path, modules: Mapping[str, nn.Module], options: Options) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options = folder, options
        self.weights = Weights(modules, options)
        self.step = 0  # steps done, the present one included
        self.seconds = 0.0  # of training before this process
        self.losses: list[dict[str, Tensor]] = []  # since the last report
        self.started = time.monotonic()
        if (folder / "state.pt").is_file():
            state = torch.load(folder / "state.pt", weights_only=True)
            self.weights.restore(state)
            self.step, self.seconds = state["step"], state["seconds"]
            self.log(event="resumed")

    def __iter__(self) -> Iterator[tuple[int, Generator]]:
        saved = time.monotonic()
        self.bar = progress_bar(total=self.options.steps, initial=self.step, desc=self.folder.name)
        with self.bar:
            for step in range(self.step, self.options.steps):
                self.step = step + 1
                yield step, torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
                self.bar.update()
                if time.monotonic() - saved > self.options.save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def update(self, loss: Tensor, **parts: Tensor) -> None:
        """Update the weights from the loss of the present step, and report it with its parts when due.

        Raises:
            FloatingPointError: the mean of a loss since the last report is not finite.
        """
        loss.backward()
        step, steps = self.step - 1, self.options.steps
        self.weights.step(learning_rate(step, steps, min(self.options.warmup, steps // 10)), step)
        self.losses.append({name: x.detach() for name, x in {"loss": loss, **parts}.items()})
        if self.due(self.options.report_every):
            means = {
                name: float(torch.stack([one[name] for one in self.losses]).mean()) for name in self.losses[0]
            }
            self.losses = []
            self.log(**means)
            self.bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"a loss is not finite at step {self.step}: {means}")

    def due(self, every: int) -> bool:
        """True after every so many steps, and after the last one."""
        return self.step % every == 0 or self.step == self.options.steps

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


def unfused_attention(module: nn.Module) -> AbstractContextManager[object]:
    """Attention as plain matrix products and softmax, which is faster than the fused kernel at this size.

    It is what a tap on its probabilities asks for.
    """
    return taps(module, {"*.probs": lambda _x, _site: None}, eager=False)
