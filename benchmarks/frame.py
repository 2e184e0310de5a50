"""What a benchmark is, and how its two sides are measured: each in a process of its own, in turn.

A case gives a factory for our side and one for the reference's. A factory runs in the side's own fresh
process, loads what it needs and returns a function that prepares one point of the case (a size, a number of
steps): what that returns is the call that is measured. So each side has its own memory and imports, and both
meet the same state of the machine.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SIDES = ("ours", "reference")
WATCH = 0.002  # seconds between looks at the process's memory


@dataclass(frozen=True)
class Setting:
    """What the cases of a run share: "cpu" or an accelerator, a dtype's name, threads, a folder of files."""

    device: str
    dtype: str
    threads: int
    folder: Path


@dataclass(frozen=True)
class Peak:
    """What a call returns in place of an output where it knows its own peak memory, in bytes."""

    bytes: int


Call = Callable[[], "Tensor | Peak | None"]
At = Callable[[float], Call]


@dataclass(frozen=True)
class Case:
    """One comparison, over one or several points.

    Attributes:
        name: what --only selects.
        about: the rows' text.
        ours, reference: factories, see above.
        points: what is prepared and measured, one row each.
        accelerator_points: more of them where there is an accelerator.
        unit: of the points, "" where there is one only.
        files: which of `files.WRITERS` it reads.
        tolerance: of max |difference| / max |reference|, by dtype; outputs beyond it are an error.
        grows: whether the time's growth with the points is of interest.
    """

    name: str
    about: str
    ours: Callable[[Setting], At]
    reference: Callable[[Setting], At]
    points: tuple[float, ...] = (1,)
    accelerator_points: tuple[float, ...] = ()
    unit: str = ""
    files: tuple[str, ...] = ()
    tolerance: dict[str, float] = field(default_factory=lambda: {"float32": 1e-4, "bfloat16": 0.1})
    grows: bool = False

    def row(self, point: float) -> str:
        return f"{self.about}, {point:g} {self.unit}" if self.unit else self.about


@dataclass(frozen=True)
class Reading:
    """One side's figures at one point: seconds of each round, and peak memory beyond what was held before."""

    seconds: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Comparison:
    """Both sides at one point; `difference` is None where there is no output to compare."""

    case: str
    row: str
    point: float
    ours: Reading
    reference: Reading
    difference: float | None


class Side:
    """One side of a case in its own process."""

    def __init__(self, case: str, side: str, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case, side, setting), daemon=True)
        self.process.start()
        theirs.close()
        self.name = f"{case}, {side}"
        self.answer()

    def answer(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name}: the process ended with {self.process.exitcode}") from None
        if kind == "error":
            raise RuntimeError(f"{self.name}:\n{value}")
        return value

    def run(self, point: float, save: Path | None = None) -> tuple[float, int]:
        """One call: its seconds, or, where the output is to be saved, its peak memory."""
        self.pipe.send((point, save))
        return self.answer()

    def close(self) -> None:
        self.pipe.close()  # which ends the process
        self.process.join(30)
        self.process.kill()


def serve(pipe: Connection, case: str, side: str, setting: Setting) -> None:
    """The loop of a side's process."""
    try:
        from benchmarks.cases import CASES

        at = _prepared(getattr(CASES[case], side), setting)
        pipe.send(("ready", None))
        before, call = None, None
        while True:
            point, save = pipe.recv()
            if call is None or point != before:
                before, call = point, None  # what the last point holds goes first
                call = at(point)
            pipe.send(("ran", _measured(call, save, setting.device)))
    except EOFError:
        return
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def _prepared(factory: Callable[[Setting], At], setting: Setting) -> At:
    import torch

    torch.set_num_threads(setting.threads)
    torch.set_grad_enabled(False)
    return factory(setting)


def _measured(call: Call, save: Path | None, device: str) -> tuple[float, int]:
    """Time is taken without the watch on memory, which costs some."""
    import torch

    if save is None:
        start = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - start, 0
    with _watched(device) as grown:
        output = call()
        _wait(device)
    if isinstance(output, Peak):
        return 0.0, output.bytes
    if output is not None:
        torch.save(output.float().cpu(), save)
    return 0.0, grown()


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def _watched(device: str) -> Iterator[Callable[[], int]]:
    """Bytes by which the memory in use outgrew what it was: the device's, or this process's own."""
    import torch

    from benchmarks.load_memory import anonymous_bytes

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(WATCH):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(peak, anonymous_bytes()) - before
    finally:
        done.set()
        watcher.join()


def compare(case: Case, setting: Setting, rounds: int) -> list[Comparison]:
    """All points of a case: one run whose memory is watched and whose output is compared, then timed rounds.

    Raises:
        RuntimeError: a side failed, or the outputs differ by more than the case's tolerance.
    """
    sides: dict[str, Side] = {}
    try:
        for side in SIDES:
            sides[side] = Side(case.name, side, setting)
        points = case.points + (() if setting.device == "cpu" else case.accelerator_points)
        return [_compared(case, point, sides, setting, rounds) for point in points]
    finally:
        for one in sides.values():
            one.close()


def _compared(case: Case, point: float, sides: dict[str, Side], setting: Setting, rounds: int) -> Comparison:
    saved = {side: setting.folder / f"{side}.pt" for side in SIDES}
    for path in saved.values():
        path.unlink(missing_ok=True)
    peaks = {side: sides[side].run(point, saved[side])[1] for side in SIDES}
    difference = _difference(*saved.values())
    if difference is not None and not difference <= case.tolerance[setting.dtype]:
        raise RuntimeError(
            f"{case.row(point)}: the outputs differ by {difference:.2g} of the largest value, wanted at most "
            f"{case.tolerance[setting.dtype]:g}"
        )
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for i in range(rounds):
        for side in SIDES if i % 2 else SIDES[::-1]:  # who goes first changes
            seconds[side].append(sides[side].run(point)[0])
    ours, reference = (Reading(tuple(seconds[side]), peaks[side]) for side in SIDES)
    return Comparison(case.name, case.row(point), point, ours, reference, difference)


def _difference(ours: Path, reference: Path) -> float | None:
    if not ours.exists() and not reference.exists():
        return None
    import torch

    got, wanted = torch.load(ours), torch.load(reference)
    if got.shape != wanted.shape:
        raise RuntimeError(f"the outputs have shapes {tuple(got.shape)} and {tuple(wanted.shape)}")
    return float((got - wanted).abs().max() / wanted.abs().max())
