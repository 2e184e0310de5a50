"""The parts of a benchmark: a case, its two sides, and their measurements.

A case has a factory for our side and one for the reference's. A factory loads what it needs and returns a
function that prepares one point of the case (a size, a number of steps) and returns the call to measure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WATCH = 0.002  # seconds between looks at the process's memory


@dataclass(frozen=True)
class Setting:
    """The setting of all cases of a run; `folder` holds the checkpoints."""

    device: str
    dtype: str
    threads: int
    folder: Path


@dataclass(frozen=True)
class Peak:
    """Returned by a call in place of an output if it measures its own peak memory, in bytes."""

    bytes: int


Call = Callable[[], "Tensor | Peak | None"]
At = Callable[[float], Call]


@dataclass(frozen=True)
class Goal:
    """The wanted ratios of reference / ours, at least; None: any."""

    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison, over one or several points.

    Attributes:
        name: the value of --only.
        about: the rows' text.
        ours, reference: factories, see above.
        points: measured points, one row each.
        accelerator_points: further points on an accelerator.
        unit: of the points; "" if there is only one.
        files: the checkpoints that it reads, by their names in `files.WRITERS`.
        tolerance: of max |difference| / max |reference|, by dtype; larger differences are an error.
        grows: fit the growth of the time with the points.
        products: also measure the time of the matrix products alone.
        goals: by point.
        host_memory: watch the process's memory, not the accelerator's.
        needs: skip the case on other devices; "" for none.
        apart: start the second side after the first has ended: both at once are too large.
        fresh: new processes in every round: where its memory lies makes a process faster or slower by up to
            a tenth, for as long as it lives.
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
    products: bool = False
    goals: dict[float, Goal] = field(default_factory=dict)
    host_memory: bool = False
    needs: str = ""
    apart: bool = False
    fresh: bool = False

    def row(self, point: float) -> str:
        return f"{self.about}, {point:g} {self.unit}" if self.unit else self.about


@dataclass(frozen=True)
class Reading:
    """One side at one point: the seconds of each round, and the bytes by which memory grew at its peak.

    `floors` are the seconds of the matrix products alone, for cases with `products`.
    """

    seconds: tuple[float, ...]
    peak: int
    floors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Both sides at one point; `difference` is None if there is no output to compare."""

    case: str
    row: str
    point: float
    ours: Reading
    reference: Reading
    difference: float | None


def wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


def status_bytes(key: str) -> int:
    """A size of this process by its name in /proc/self/status.

    "RssAnon" is the memory that the process owns: resident, without the pages of mapped files.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status: this benchmark needs Linux")


@contextmanager
def watched(device: str) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the peak growth of memory in bytes, of the device or this process."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    before = peak = status_bytes("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(WATCH):
            peak = max(peak, status_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(peak, status_bytes("RssAnon")) - before
    finally:
        done.set()
        watcher.join()
