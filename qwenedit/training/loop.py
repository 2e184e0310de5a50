"""A training loop that survives a kill: any weights, any optimisers, any batches, any loss.

    weights = {name: x for name, x in network.named_parameters() if x.requires_grad}
    run = Run(folder, weights, Options(steps=300, warmup=20), adamw(1e-4))
    for step, generator in run:
        for loss, share in micro_batches(step, generator):  # shares that sum to 1
            run.add(loss, share)
        run.update()

Everything random in a step is a function of the seed and the step: the generator, and torch's global ones,
which dropout draws from. A run therefore saves its weights, their averages, the optimisers' moments and the
number of steps, and one that was killed and resumed is bit-equal to one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from qwenedit.checks import ProgressBar, progress_bar, real_number, whole_number
from qwenedit.files import append_line, read_lines, replacing_file, write_lines
from qwenedit.foreign import shown
from qwenedit.taps import NonFiniteError
from qwenedit.weights.slices import whole

__all__ = ["MOST_SEED", "SCHEDULES", "Options", "Run", "Weights", "adamw", "learning_rate"]

SCHEDULES = ("constant", "cosine")
MOST_SEED = 2**32 - 1  # a step's own seed stays below 2**64
# Makes the optimisers of the masters, by name. Each master belongs to exactly one.
Optimisers = Callable[[dict[str, Tensor]], list[Optimizer]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How weights are trained.

    Attributes:
        steps: number of updates.
        seed: of everything random.
        warmup: steps during which the learning rates rise linearly from 0.
        schedule: what follows: "constant", or "cosine", half a cosine down to 1 % at the last step.
        clip: the largest norm of all gradients together; None: any.
        ema: decay of the weights' moving average; None: no average. In step n, from 0, it is at most
            (1 + n) / (10 + n), so that the average leaves the first weights behind.
        report_every: steps between two lines of the log, which has the means over those steps.
        save_every: seconds between two saves.

    Raises:
        ValueError: values out of range.
    """

    steps: int
    seed: int = 0
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = 1.0
    ema: float | None = None
    report_every: int = 10
    save_every: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("report_every", 1)):
            whole_number(name, getattr(self, name), least=least)
        whole_number("seed", self.seed, least=0, most=MOST_SEED)
        if self.schedule not in SCHEDULES:
            got = shown(repr(self.schedule))
            raise ValueError(f"schedule is {got}, wanted one of {', '.join(SCHEDULES)}")
        if self.clip is not None and real_number("clip", self.clip) <= 0:
            raise ValueError(f"clip is {self.clip}, wanted a number above 0, or none")
        if self.ema is not None and not 0 <= real_number("ema", self.ema) < 1:
            raise ValueError(f"ema is {self.ema}, wanted a number in [0, 1), or none")
        if real_number("save_every", self.save_every) < 0:
            raise ValueError(f"save_every is {self.save_every}, wanted at least 0 seconds")


def adamw(
    rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimisers:
    """torch's AdamW for all weights, one by one: `foreach` would need the memory of all once more."""

    def make(masters: dict[str, Tensor]) -> list[Optimizer]:
        settings: dict[str, Any] = {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        return [torch.optim.AdamW(masters.values(), **settings, foreach=False)]

    return make


def learning_rate(step: int, options: Options) -> float:
    """The share of the peak learning rate in a step, from 0.

    >>> [learning_rate(step, Options(steps=9, warmup=2, schedule="cosine")) for step in (0, 1, 2)]
    [0.5, 1.0, 1.0]
    """
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    way = (step - options.warmup) / max(1, options.steps - options.warmup)
    return 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, way)))


class Weights:
    """What is trained: float32 masters of the live weights, their averages, and their optimisers.

    A live weight in float32 or float64 is its own master. One in bfloat16 or float16 would lose small
    updates; it has a copy in float32, whose rounded values it takes after every update.

    Attributes:
        live: the networks' parameters, by name.
        masters: what the optimisers update.
        average: exponential moving average of the masters; None without.

    Shapes: all of these may be sharded over devices (DTensor): only operations element by element, and norms,
        are done on them.
    """

    def __init__(
        self,
        live: Mapping[str, Tensor],
        optimisers: Optimisers,
        ema: float | None = None,
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.live = dict(live)
        given = dict(masters or {})
        self.masters = {name: given.get(name, _master(x)) for name, x in self.live.items()}
        self.ema = ema
        self.average = None if ema is None else {n: x.detach().clone() for n, x in self.masters.items()}
        self.optimisers = optimisers(self.masters)
        self.rates = [[group["lr"] for group in one.param_groups] for one in self.optimisers]
        owners = {
            id(x): one for one in self.optimisers for group in one.param_groups for x in group["params"]
        }
        self.owners = {name: owners[id(x)] for name, x in self.masters.items()}
        self._round()

    def collect(self) -> None:
        """Add the live weights' gradients to those of the masters, where they are summed in float32."""
        for name, x in self.live.items():
            master = self.masters[name]
            if master is not x and x.grad is not None:
                grad = x.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad + grad
                x.grad = None

    def step(self, share: float, count: int, clip: float | None) -> Tensor:
        """One update from the collected gradients; returns the norm of all, before it is clipped.

        `share` scales the learning rates; `count` is the number of updates so far, for the average. A weight
        without a gradient has one of zeros. If the norm is not finite, nothing is updated.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        most = math.inf if clip is None else clip
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters.values(), most))
        if bool(norm.isfinite()):
            for optimiser, rates in zip(self.optimisers, self.rates, strict=True):
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                optimiser.step()
            self._average(count)
            self._round()
        for x in self.masters.values():
            x.grad = None
        return norm

    @torch.no_grad()
    def _average(self, count: int) -> None:
        if self.ema is not None and self.average is not None:
            share = 1 - min(self.ema, (1 + count) / (10 + count))
            for name, x in self.average.items():
                x.lerp_(self.masters[name], share)

    @torch.no_grad()
    def _round(self) -> None:
        """Give the live weights the masters' values."""
        for name, x in self.live.items():
            if self.masters[name] is not x:
                x.copy_(self.masters[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the live weights are the average; without `ema` they are what they are."""
        if self.average is None:
            yield
            return
        with torch.no_grad():
            kept = {name: x.detach().clone() for name, x in self.live.items()}
            try:
                for name, x in self.live.items():
                    x.copy_(self.average[name])
                yield
            finally:
                for name, x in self.live.items():
                    x.copy_(kept[name])

    def state(self) -> dict[str, dict[str, Any]]:
        """All that is to be saved, by the weights' names: the tensors themselves, not copies."""
        return {
            "masters": {name: x.detach() for name, x in self.masters.items()},
            "average": dict(self.average or {}),
            "moments": {name: dict(self.owners[name].state.get(x, {})) for name, x in self.masters.items()},
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take what `state` gave.

        Raises:
            ValueError: it is of other weights. Nothing has changed then.
        """
        parts = {"masters": self.masters, "average": self.average or {}}
        for what, own in parts.items():
            got, wanted = ({name: tuple(x.shape) for name, x in one.items()} for one in (state[what], own))
            if got != wanted:
                other = sorted(name for name in {*got, *wanted} if got.get(name) != wanted.get(name))
                raise ValueError(f"the saved state is of other weights: {', '.join(map(shown, other[:4]))}")
        for what, own in parts.items():
            for name, x in own.items():
                x.copy_(state[what][name])
        for name, x in self.masters.items():
            self.owners[name].state[x] = {
                key: value.to(x.device) if value.ndim else value  # torch counts steps on the CPU
                for key, value in state["moments"][name].items()
            }
        self._round()


class Run:
    """The loop and its files in a folder: `state.pt` to resume from, `log.jsonl` with what it reports.

    Iterating yields the number of each step that is left and a generator seeded for it. Meanwhile torch's
    global generators are seeded for the step, too. It saves after the step if it is time, and at the end.

    Args:
        folder: is made if it is not there; a state in it is gone on from.
        live: the weights to train, by name. Their networks compute, the caller calls them.
        optimisers: such as `adamw(1e-4)`; their learning rates are the peaks.
        masters: float32 values to start from, for weights whose networks were rounded already.
        progress: a progress bar on stderr, if that is a terminal.

    Raises:
        ValueError: a state that cannot be read, or is of other weights.
    """

    def __init__(
        self,
        folder: Path,
        live: Mapping[str, Tensor],
        options: Options,
        optimisers: Optimisers,
        *,
        masters: Mapping[str, Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        if not live:
            raise ValueError("there are no weights to train, wanted at least one")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options = folder, options
        self.weights = Weights(live, optimisers, options.ema, masters)
        self.device = next(iter(live.values())).device
        self.step = 0  # steps done, the present one included
        self.seconds = 0.0  # of training before this process
        self.parts: dict[str, float] = {}  # of the present step's loss
        self.pending: list[dict[str, float]] = []  # those of the steps since the last report
        self.started = time.monotonic()
        self.bar: ProgressBar | None = None
        self.progress = progress
        self._resume()

    def __iter__(self) -> Iterator[tuple[int, Generator]]:
        saved = time.monotonic()
        steps, seed = self.options.steps, self.options.seed
        with progress_bar(
            progress=self.progress, total=steps, initial=self.step, desc=self.folder.name
        ) as self.bar:
            for step in range(self.step, steps):
                self.step = step + 1
                own = seed * 1_000_003 + step
                with _seeded(own + 2**40, self.device):  # or dropout would draw what the generator draws
                    yield step, Generator().manual_seed(own)
                self.bar.update()
                if self.save_due(saved):
                    self.save()
                    saved = time.monotonic()

    def add(self, loss: Tensor, share: float = 1.0, **parts: Tensor) -> None:
        """Add the gradients of a micro-batch's loss. The shares of a step's micro-batches sum to 1.

        With shares in proportion to the weights that each loss is a mean over, gradients and reports are
        those of one large batch. `parts` are reported beside the loss.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        named = {name: float(x.detach()) for name, x in {"loss": loss, **parts}.items()}
        self._require_finite(named)
        (loss * share).backward()
        self.weights.collect()
        for name, value in named.items():
            self.parts[name] = self.parts.get(name, 0.0) + share * value

    def update(self) -> None:
        """Update the weights with the gradients of the present step, and report it when due.

        Raises:
            NonFiniteError: a gradient is not finite. The weights have not changed, and the state on the disk
                is that of the last save.
        """
        step = self.step - 1
        norm = self.weights.step(learning_rate(step, self.options), step, self.options.clip)
        parts, self.parts = {**self.parts, "gradient": float(norm)}, {}
        self._require_finite(parts)
        self.pending.append(parts)
        if self.due(self.options.report_every):
            means = {
                name: sum(one[name] for one in self.pending) / len(self.pending) for name in self.pending[0]
            }
            self.pending = []
            self.log(**means)
            if self.bar is not None:
                self.bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})

    def due(self, every: int) -> bool:
        """True after every so many steps, and after the last one."""
        return self.step % every == 0 or self.step == self.options.steps

    def log(self, **values: Any) -> None:
        """Add a line to the log, with the step's number."""
        line = {"step": self.step, "seconds": round(self.elapsed(), 1), **values}
        append_line(self.folder / "log.jsonl", line)

    def elapsed(self) -> float:
        """Seconds of training, those before it was resumed included."""
        return self.seconds + time.monotonic() - self.started

    def save_due(self, saved: float) -> bool:
        """True at the last step, and if it is time since the last save."""
        return time.monotonic() - saved > self.options.save_every or self.step == self.options.steps

    def save(self) -> None:
        """Write the state, whole or not at all."""
        state = {**self.weights.state(), "step": self.step, "seconds": self.elapsed()}
        with replacing_file(self.folder / "state.pt") as temporary:
            torch.save({**state, "pending": self.pending}, temporary)

    def _resume(self) -> None:
        """Go on from the state in the folder, without what the log says of later steps: they come again."""
        last = -1
        if (state := self._saved()) is not None:
            self.weights.restore(state)
            self.step, self.seconds, self.pending = state["step"], state["seconds"], state["pending"]
            last = self.step
        self._cut_log(last)

    def _cut_log(self, last: int) -> None:
        log = self.folder / "log.jsonl"
        lines = read_lines(log, lambda line: {**line, "step": int(line["step"])}, "line of a log")
        if (
            log.exists()
        ):  # also without the line that a kill or a full disk cut off: the next one would join it
            write_lines(log, [line for line in lines if line["step"] <= last])

    def _saved(self) -> dict[str, Any] | None:
        """The saved state, if there is one."""
        if any(self.folder.glob("state-[0-9]*")):
            raise ValueError(
                f"{shown(self.folder)} has a state of several processes: go on with torchrun, or give "
                "another output"
            )
        file = self.folder / "state.pt"
        return _read(file) if file.is_file() else None

    def _require_finite(self, parts: Mapping[str, float]) -> None:
        if not all(map(math.isfinite, parts.values())):
            got = ", ".join(f"{name} {value:g}" for name, value in parts.items())
            raise NonFiniteError(
                f"NaN or infinity in step {self.step} of the training: {got}; the last saved state is in "
                f"{self.folder / 'state.pt'}: a lower learning rate may help"
            )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators, of the CPU and of a device, are seeded within this block."""
    own = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(own, device_type=device.type if own else "cuda"):
        torch.manual_seed(seed)
        yield


def _master(live: Tensor) -> Tensor:
    if live.dtype in (torch.float32, torch.float64):
        return live
    return live.detach().float().clone().requires_grad_(True)


def _read(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not {"masters", "average", "moments", "step", "seconds", "pending"} <= state.keys():
            raise ValueError("parts are missing")
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{shown(file)} is no saved state of a training: {shown(error)}") from error
    return dict(state)
