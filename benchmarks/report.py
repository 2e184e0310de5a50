"""Ratios, growth, a Markdown table and plots of the comparisons.

Ratios are reference / ours: above 1 is better.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, linear_regression, median
from typing import Any

from PIL import Image, ImageDraw

from benchmarks.frame import Case, Comparison, Goal, Reading, Setting
from qwenedit.files import replacing_file
from qwenedit.foreign import shown

MIB = 1 << 20
LEAST = 16 * MIB  # less memory than this is noise, and has no ratio


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over the rounds, and its extremes."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.least:.2f}–{self.most:.2f})"


def time_ratio(comparison: Comparison) -> Ratio:
    """The ratios are taken round by round, so that a slow spell of the machine affects both sides alike."""
    pairs = zip(comparison.reference.seconds, comparison.ours.seconds, strict=True)
    ratios = [reference / ours for reference, ours in pairs]
    return Ratio(median(ratios), min(ratios), max(ratios))


def memory_ratio(comparison: Comparison) -> float | None:
    """The ratio of the peaks; None if one is too small to tell."""
    ours, reference = comparison.ours.peak, comparison.reference.peak
    return None if min(ours, reference) < LEAST else reference / ours


def exponent(points: Sequence[float], seconds: Sequence[float]) -> float:
    """The k of seconds ~ point^k, by least squares on the logarithms.

    Raises:
        ValueError: fewer than two different points, or a value that has no logarithm.
    """
    if len(points) != len(seconds) or len(set(points)) < 2 or min(*points, *seconds) <= 0:
        raise ValueError(f"points are {points} and seconds {seconds}, wanted positive ones, two or more")
    return linear_regression([math.log(x) for x in points], [math.log(y) for y in seconds]).slope


def medians(comparisons: Sequence[Comparison], side: str) -> list[float]:
    return [median(getattr(comparison, side).seconds) for comparison in comparisons]


def growth_rows(cases: dict[str, Case], comparisons: Sequence[Comparison]) -> list[list[str]]:
    """The growth of the time of a whole edit and the cost of guidance, for ours and for the reference."""
    found = []
    for name in dict.fromkeys(comparison.case for comparison in comparisons):
        case, rows = cases[name], [comparison for comparison in comparisons if comparison.case == name]
        points = [row.point for row in rows]
        sides = [medians(rows, "ours"), medians(rows, "reference")]
        if case.grows:
            powers = [f"{exponent(points, seconds):.2f}" for seconds in sides]
            found.append([f"{case.about}: time ~ {case.unit}^k", *powers])
        if name == "guidance":
            ratios = [f"{seconds[-1] / seconds[0]:.2f}" for seconds in sides]
            found.append(["guidance on / off, time", *ratios])
    return found


def share(reading: Reading) -> float | None:
    """The share of the time that the matrix products take alone; at 1 nothing around them is left to gain."""
    if not reading.floors:
        return None
    return median(floor / seconds for floor, seconds in zip(reading.floors, reading.seconds, strict=True))


def goals_of(cases: dict[str, Case], one: Comparison) -> list[tuple[str, bool]]:
    """The goals of a row, and whether each is reached."""
    goal = cases[one.case].goals.get(one.point, Goal())
    found = (("time", goal.time, time_ratio(one).middle), ("memory", goal.memory, memory_ratio(one)))
    return [
        (f"{what} ≥ {wanted:g}", got is not None and got >= wanted)
        for what, wanted, got in found
        if wanted is not None
    ]


def out_folder(text: str, *, renews: str = "") -> Path:
    """The value of --out, for argparse, which tells a wrong one before the work and not after it.

    Args:
        renews: a page that has to be in the folder. Without one, a missing folder is made.
    """
    path = Path(text)
    if renews:
        if not (path / renews).is_file():
            raise argparse.ArgumentTypeError(f"{shown(path)} has no {renews}, wanted the folder of that page")
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{shown(path)} cannot be a folder: {error.strerror}") from error
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def renew(page: Path, parts: dict[str, str]) -> None:
    """Replace parts of a Markdown page: what stands between the lines <!-- name --> and <!-- end -->.

    Raises:
        ValueError: the page has no such lines.
    """
    text = page.read_text(encoding="utf-8")
    for name, new in parts.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{page} has no lines <!-- {name} --> and <!-- end -->")
        text = f"{before}{start}{new}\n{end}{after}"
    with replacing_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


HEAD = (
    "what", "time ratio", "goal", "ours, s", "reference, s", "memory ratio", "ours, MiB", "reference, MiB",
    "matrix products alone", "largest difference",
)  # fmt: skip


def row_of(cases: dict[str, Case], one: Comparison) -> list[str]:
    goals, memory = goals_of(cases, one), memory_ratio(one)
    shares = [share(one.ours), share(one.reference)]
    return [
        one.row,
        str(time_ratio(one)),
        "; ".join(f"{text}: {'reached' if reached else '**not reached**'}" for text, reached in goals),
        *(f"{median(side.seconds):.3g}" for side in (one.ours, one.reference)),
        "" if memory is None else f"{memory:.2f}",
        *(f"{side.peak / MIB:.0f}" for side in (one.ours, one.reference)),
        ", ".join(f"{part:.0%}" for part in shares if part is not None),
        "" if one.difference is None else f"{one.difference:.1e}",
    ]


def markdown(
    cases: dict[str, Case], comparisons: Sequence[Comparison], machine: dict[str, Any], rounds: int
) -> str:
    """The tables, below a line on the machine and one on how to read them."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        f"Ratios are reference / ours, above 1 is better: the median of {rounds} rounds in turn (min–max). "
        "Memory is the peak above what was held before. Matrix products alone: the share of a block's time "
        "that its matrix products take by themselves in the same run, for ours and for the reference.",
        "",
        table(HEAD, [row_of(cases, one) for one in comparisons]),
    ]
    if goals := [(one.row, *goal) for one in comparisons for goal in goals_of(cases, one)]:
        missed = [f"{row} ({text})" for row, text, reached in goals if not reached]
        lines += ["", f"{len(goals) - len(missed)} of {len(goals)} goals are reached."]
        if missed:
            lines[-1] += f" Not reached: {'; '.join(missed)}."
    if growth := growth_rows(cases, comparisons):
        lines += ["", table(["growth", "ours", "reference"], growth)]
    return "\n".join(lines) + "\n"


def machine_of(setting: Setting) -> dict[str, Any]:
    """Device, threads, dtype and versions: the figures depend on them."""
    import importlib.util

    import diffusers
    import torch
    import transformers

    device = platform.processor() or platform.machine()
    if setting.device == "cpu":
        for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
            if line.startswith("model name"):
                device = line.split(":", 1)[1].strip()
                break
    else:
        device = torch.cuda.get_device_name() if setting.device.startswith("cuda") else setting.device
    return {
        "device": device,
        "threads": setting.threads,
        "dtype": setting.dtype,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": "installed" if importlib.util.find_spec("accelerate") else "not installed",
    }


def document(comparisons: Sequence[Comparison], machine: dict[str, Any], rounds: int) -> dict[str, Any]:
    """All measurements, for JSON."""
    rows = [{**asdict(one), "time_ratio": asdict(time_ratio(one))} for one in comparisons]
    return {"machine": machine, "rounds": rounds, "comparisons": rows}


BAR, LABEL, WIDTH, MARGIN = 22, 560, 420, 30  # pixels
TIME, MEMORY, INK, GREY = (45, 105, 175), (220, 150, 60), (20, 20, 20), (190, 190, 190)


def plot(comparisons: Sequence[Comparison]) -> Image.Image:
    """One bar per ratio from 1 on a logarithmic axis: time with its extremes above, memory below."""
    bars = [(one.row, time_ratio(one), memory_ratio(one)) for one in comparisons]
    extremes = [1.0]
    for _, ratio, memory in bars:
        extremes += [ratio.least, ratio.most] + ([] if memory is None else [memory])
    low, high = math.floor(math.log2(min(extremes))), max(1, math.ceil(math.log2(max(extremes))))
    page = Image.new("RGB", (LABEL + WIDTH + 2 * MARGIN, (len(bars) + 1) * BAR + 2 * MARGIN), "white")
    ink = ImageDraw.Draw(page)

    def across(ratio: float) -> float:
        return LABEL + MARGIN + WIDTH * (math.log2(ratio) - low) / (high - low)

    bottom = MARGIN + len(bars) * BAR
    for power in range(low, high + 1):
        x = across(2.0**power)
        ink.line([(x, MARGIN), (x, bottom)], fill=INK if power == 0 else GREY)
        ink.text((x, bottom + 4), f"{2.0**power:g}x", fill=INK, anchor="ma")
    for i, (row, ratio, memory) in enumerate(bars):
        top = MARGIN + i * BAR
        ink.text((LABEL + MARGIN - 8, top + BAR / 2), row, fill=INK, anchor="rm")
        _bar(ink, across(1.0), across(ratio.middle), top + 3, top + 10, TIME)
        ink.line([(across(ratio.least), top + 6), (across(ratio.most), top + 6)], fill=INK)
        if memory is not None:
            _bar(ink, across(1.0), across(memory), top + 12, top + 18, MEMORY)
    ink.text((LABEL + MARGIN, 8), "reference / ours: time", fill=TIME)
    ink.text((LABEL + MARGIN + 150, 8), "peak memory", fill=MEMORY)
    return page


def _bar(ink: ImageDraw.ImageDraw, start: float, end: float, top: float, bottom: float, colour: Any) -> None:
    ink.rectangle([min(start, end), top, max(start, end), bottom], fill=colour)


PANEL, REFERENCE = (420, 320), (220, 150, 60)  # ours is drawn in `TIME`


def growth_plot(cases: dict[str, Case], comparisons: Sequence[Comparison]) -> Image.Image | None:
    """Seconds over the points, both logarithmic, with one panel per case that grows; None without any.

    The lines are the fitted power laws.
    """
    grown: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if cases[one.case].grows:
            grown.setdefault(one.case, []).append(one)
    if not grown:
        return None
    page = Image.new("RGB", (PANEL[0] * len(grown), PANEL[1]), "white")
    for i, (name, rows) in enumerate(grown.items()):
        _growth_panel(ImageDraw.Draw(page), i * PANEL[0], cases[name], rows)
    return page


def _growth_panel(ink: ImageDraw.ImageDraw, left: float, case: Case, rows: Sequence[Comparison]) -> None:
    points = [one.point for one in rows]
    sides = {side: medians(rows, side) for side in ("ours", "reference")}
    seconds = [x for of_side in sides.values() for x in of_side]
    low, high = min(seconds) / 1.5, max(seconds) * 1.5

    def place(point: float, x: float) -> tuple[float, float]:
        across = math.log(point / points[0]) / math.log(points[-1] / points[0])
        up = math.log(x / low) / math.log(high / low)
        return left + 70 + (PANEL[0] - 100) * across, PANEL[1] - 50 - (PANEL[1] - 100) * up

    ink.text((left + 70, 8), f"{case.about}: seconds against {case.unit}", fill=INK)
    for point in points:
        x, bottom = place(point, low)
        ink.line([(x, bottom), (x, place(point, high)[1])], fill=GREY)
        ink.text((x, bottom + 6), f"{point:g}", fill=INK, anchor="ma")
    for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1):
        start, end = place(points[0], 2.0**power), place(points[-1], 2.0**power)
        ink.line([start, end], fill=GREY)
        ink.text((start[0] - 6, start[1]), f"{2.0**power:g}", fill=INK, anchor="rm")
    for i, (side, colour) in enumerate((("ours", TIME), ("reference", REFERENCE))):
        k = exponent(points, sides[side])
        at_one = geometric_mean(y / x**k for x, y in zip(points, sides[side], strict=True))
        ink.line([place(x, at_one * x**k) for x in (points[0], points[-1])], fill=colour, width=2)
        for point, x in zip(points, sides[side], strict=True):
            across, down = place(point, x)
            ink.ellipse([across - 4, down - 4, across + 4, down + 4], fill=colour)
        ink.text((left + 70, 24 + 12 * i), f"{side}: time ~ {case.unit}^{k:.2f}", fill=colour)
