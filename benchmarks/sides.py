"""Measures the two sides of a case, each in a fresh process of its own, in turn.

Each side has its own memory and imports, and both meet the same state of the machine. A process lives for all
rounds of a case, or for one where the case is `fresh`.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.frame import At, Call, Case, Comparison, Peak, Reading, Setting, wait, watched

SIDES = ("ours", "reference")


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

    def time(self, point: float) -> float:
        """Seconds of one call."""
        return self._ask("time", point)

    def floor(self, point: float) -> float:
        """Seconds of the call's matrix products alone."""
        return self._ask("floor", point)

    def peak(self, point: float, save: Path) -> int:
        """Peak memory of one call, in bytes; the call's output is saved."""
        return self._ask("peak", point, save)

    def _ask(self, *question: Any) -> Any:
        self.pipe.send(question)
        return self.answer()

    def close(self) -> None:
        self.pipe.close()  # which ends the process
        self.process.join(30)
        self.process.kill()


def serve(pipe: Connection, case: str, side: str, setting: Setting) -> None:
    """The loop of a side's process."""
    try:
        import torch

        from benchmarks.products import floor_of

        at = _prepared(getattr(CASES[case], side), setting)
        memory_of = "cpu" if CASES[case].host_memory else setting.device
        pipe.send(("ready", None))
        before, call, floor = None, None, None
        while True:
            what, point, *save = pipe.recv()
            if call is None or point != before:
                before, call, floor = point, None, None  # free what the last point holds
                call = at(point)
            if what == "floor":
                floor = floor or floor_of(call, setting.device, getattr(torch, setting.dtype))
                answer: float = floor()
            elif what == "peak":
                answer = _peak(call, *save, setting.device, memory_of)
            else:
                answer = _seconds(call, setting.device)
            pipe.send(("ran", answer))
    except EOFError:
        return
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def _prepared(factory: Callable[[Setting], At], setting: Setting) -> At:
    import torch

    torch.set_num_threads(setting.threads)
    torch.set_grad_enabled(False)
    return factory(setting)


def _seconds(call: Call, device: str) -> float:
    """Memory is not watched meanwhile: that takes time."""
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def _peak(call: Call, save: Path, device: str, memory_of: str) -> int:
    import torch

    with watched(memory_of) as grown:
        output = call()
        wait(device)
    if isinstance(output, Peak):
        return output.bytes
    if output is not None:
        torch.save(output.float().cpu(), save)
    return grown()


def compare(case: Case, setting: Setting, rounds: int) -> list[Comparison]:
    """Compare all points of a case: one run to watch the memory and compare the outputs, then timed rounds.

    Raises:
        RuntimeError: a side failed, or the outputs differ by more than the case's tolerance.
    """
    if not case.fresh:
        return _of_two_processes(case, setting, range(rounds))
    started = [_of_two_processes(case, setting, range(i, i + 1)) for i in range(rounds)]
    return [joined(of_point) for of_point in zip(*started, strict=True)]


def joined(parts: Sequence[Comparison]) -> Comparison:
    """The rounds of several comparisons of one point as one."""

    def reading(of: Sequence[Reading]) -> Reading:
        seconds = tuple(x for one in of for x in one.seconds)
        floors = tuple(x for one in of for x in one.floors)
        return Reading(seconds, max(one.peak for one in of), floors)

    differences = [one.difference for one in parts if one.difference is not None]
    return replace(
        parts[0],
        ours=reading([one.ours for one in parts]),
        reference=reading([one.reference for one in parts]),
        difference=max(differences, default=None),
    )


def _of_two_processes(case: Case, setting: Setting, rounds: range) -> list[Comparison]:
    points = case.points + (() if setting.device == "cpu" else case.accelerator_points)
    if case.apart:
        return [_compared(case, point, setting, rounds) for point in points]
    with ExitStack() as stack:
        sides = {side: stack.enter_context(closing(Side(case.name, side, setting))) for side in SIDES}
        return [_compared(case, point, setting, rounds, sides) for point in points]


def _compared(
    case: Case, point: float, setting: Setting, rounds: range, sides: dict[str, Side] | None = None
) -> Comparison:
    """Without `sides`, one side starts after the other has ended."""
    saved = {side: setting.folder / f"{side}.pt" for side in SIDES}
    for path in saved.values():
        path.unlink(missing_ok=True)
    readings: dict[str, Reading] = {}
    if sides is None:
        for side in SIDES:
            with closing(Side(case.name, side, setting)) as alone:
                peaks = {side: alone.peak(point, saved[side])}
                readings |= _rounds(case, point, {side: alone}, peaks, rounds)
        difference = _checked_difference(case, point, setting, saved)
    else:
        peaks = {side: sides[side].peak(point, saved[side]) for side in SIDES}
        difference = _checked_difference(case, point, setting, saved)
        readings = _rounds(case, point, sides, peaks, rounds)
    return Comparison(case.name, case.row(point), point, *(readings[side] for side in SIDES), difference)


def _rounds(
    case: Case, point: float, sides: dict[str, Side], peaks: dict[str, int], rounds: range
) -> dict[str, Reading]:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    floors: dict[str, list[float]] = {side: [] for side in sides}
    for i in rounds:
        for side in list(sides)[:: 1 if i % 2 else -1]:  # they take turns in going first
            seconds[side].append(sides[side].time(point))
            if case.products:
                floors[side].append(sides[side].floor(point))
    return {side: Reading(tuple(seconds[side]), peaks[side], tuple(floors[side])) for side in sides}


def _checked_difference(case: Case, point: float, setting: Setting, saved: dict[str, Path]) -> float | None:
    difference = _difference(*saved.values())
    if difference is not None and not difference <= case.tolerance[setting.dtype]:
        raise RuntimeError(
            f"{case.row(point)}: the outputs differ by {difference:.2g} of the largest value, wanted at most "
            f"{case.tolerance[setting.dtype]:g}"
        )
    return difference


def _difference(ours: Path, reference: Path) -> float | None:
    if not ours.exists() and not reference.exists():
        return None
    import torch

    got, wanted = torch.load(ours), torch.load(reference)
    if got.shape != wanted.shape:
        raise RuntimeError(f"the outputs have shapes {tuple(got.shape)} and {tuple(wanted.shape)}")
    return float((got - wanted).abs().max() / wanted.abs().max())
