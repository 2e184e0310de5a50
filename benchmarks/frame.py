"""What a benchmark is: a case, its sides' factories, and what is measured of them.

A case gives a factory for our side and one for the reference's. A factory loads what it needs and returns
a function that prepares one point of the case (a size, a number of steps): what that returns is the call that
is measured.
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
class Goal:
    """The least ratios of reference / ours that are wanted; None: any."""

    time: float | None = None
    memory: float | None = None


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
        products: whether the time of its matrix products alone is measured beside it.
        goals: what is wanted at some of the points.
        host_memory: whether the process's memory is watched, not the accelerator's.
        needs: the kind of device without which it is skipped; "" for none.
        apart: whether the second side starts when the first has ended: both at once are too large.
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

    def row(self, point: float) -> str:
        return f"{self.about}, {point:g} {self.unit}" if self.unit else self.about


@dataclass(frozen=True)
class Reading:
    """One side's figures at one point: seconds of each round, and peak memory beyond what was held before;
    `floors` are seconds of its matrix products alone, where they are of interest.
    """

    seconds: tuple[float, ...]
    peak: int
    floors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Both sides at one point; `difference` is None where there is no output to compare."""

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


def anonymous_bytes() -> int:
    """Memory that this process owns: resident, without the pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: this benchmark needs Linux")


@contextmanager
def watched(device: str) -> Iterator[Callable[[], int]]:
    """Bytes by which the memory in use outgrew what it was: the device's, or this process's own."""
    import torch

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
