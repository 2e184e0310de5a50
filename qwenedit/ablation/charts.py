"""Small line charts, and intervals of all settings beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from qwenedit.ablation.drawing import Drawing, Point, Stroke, Text, text_width

__all__ = ["HEIGHT", "WIDTH", "Line", "Row", "chart", "intervals", "nice_range"]

WIDTH, HEIGHT = 240.0, 120.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 30.0, 6.0, 18.0, 16.0  # margins, for the labels

_SPARE = 1.15  # fonts in Helvetica's place may be wider

Numbers = Sequence[float | None]  # None: the line has a gap


@dataclass(frozen=True)
class Line:
    """A line, in a style of `drawing.LOOKS`; `band` is the lower and upper edge of a shaded area."""

    x: Sequence[float]
    y: Numbers
    style: str = "line"
    band: tuple[Numbers, Numbers] | None = None


def nice_range(values: Iterable[float | None]) -> tuple[float, float]:
    """A range around the values, from a round number to a round number."""
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 4)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def chart(
    name: str, lines: Sequence[Line], *, x: tuple[float, float], y: tuple[float, float], along: str
) -> Drawing:
    """A chart with a name, ticks and lines; x may run from high to low, and y is clamped to its range."""

    def across(value: float) -> float:
        return _LEFT + (value - x[0]) / (x[1] - x[0]) * (WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        inside = min(max(value, y[0]), y[1])
        return _TOP + (y[1] - inside) / (y[1] - y[0]) * (HEIGHT - _TOP - _BOTTOM)

    made = Drawing(name, WIDTH, HEIGHT, [Text(_LEFT, 10, name, style="name")])
    for value in _ticks(*y):
        made.marks.append(Stroke([(_LEFT, down(value)), (WIDTH - _RIGHT, down(value))], "rule"))
        made.marks.append(Text(_LEFT - 4, down(value) + 3, f"{value:g}", "end"))
    for value, anchor in ((x[0], "start"), (x[1], "end")):
        made.marks.append(Text(across(value), HEIGHT - 4, f"{value:g}", anchor))
    made.marks.append(Text(across((x[0] + x[1]) / 2), HEIGHT - 4, along, "middle"))
    for line in lines:
        if line.band is not None:
            for low, high in zip(_pieces(line.x, line.band[0]), _pieces(line.x, line.band[1]), strict=True):
                made.marks.append(Stroke([(across(a), down(b)) for a, b in [*low, *reversed(high)]], "band"))
        for piece in _pieces(line.x, line.y):
            made.marks.append(Stroke([(across(a), down(b)) for a, b in piece], line.style))
    return made


@dataclass(frozen=True)
class Row:
    """A mean and its interval, with its labels; None: there is none."""

    labels: tuple[str, ...]
    value: float | None
    low: float | None
    high: float | None


def intervals(
    name: str,
    heads: Sequence[str],
    rows: Sequence[Row],
    *,
    floor: float | None,
    differences: bool,
    across: str,
) -> Drawing:
    """The rows below each other on one axis, with a column for each of their labels.

    `floor` is the noise floor. Of `differences` it is shaded on both sides of zero, which is drawn too; for
    other means it is a dashed line.
    """
    columns = zip(heads, *(row.labels for row in rows), strict=True)
    widths = [_SPARE * max(map(text_width, column)) + 12 for column in columns]
    places = [6 + sum(widths[:k]) for k in range(len(widths))]
    left, plot, step, top = 6 + sum(widths), 260.0, 16.0, 34.0
    known = [x for row in rows for x in (row.value, row.low, row.high)]
    edges = [x for x in (floor, -floor if floor is not None and differences else None) if x is not None]
    low, high = nice_range([*known, *edges, 0.0 if differences else None])
    bottom = top + step * len(rows)
    made = Drawing(name, max(left + plot + 20, text_width(name, 10) + 20), bottom + 34)
    made.marks.append(Text(6, 12, name, style="name"))
    made.marks += [Text(x, top - 4, head) for x, head in zip(places, heads, strict=True)]

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * plot

    def upright(value: float, style: str) -> Stroke:
        return Stroke([(place(value), top), (place(value), bottom)], style)

    for value in _ticks(low, high):
        made.marks += [upright(value, "rule"), Text(place(value), bottom + 12, f"{value:g}", "middle")]
    if len(edges) == 2:
        right, left_edge = map(place, edges)
        corners = [(right, top), (left_edge, top), (left_edge, bottom), (right, bottom)]
        made.marks.append(Stroke(corners, "floor"))
    elif edges:
        made.marks.append(upright(edges[0], "ghost"))
    if differences:
        made.marks.append(upright(0.0, "zero"))
    made.marks.append(Text(left + plot / 2, bottom + 26, across, "middle"))
    for k, row in enumerate(rows):
        y = top + step * (k + 0.5)
        made.marks += [
            Text(x, y + 3, text, style="label") for x, text in zip(places, row.labels, strict=True)
        ]
        if row.low is not None and row.high is not None:
            made.marks.append(Stroke([(place(row.low), y), (place(row.high), y)], "line"))
        if row.value is not None:
            made.marks.append(Stroke(_diamond(place(row.value), y), "dot"))
    return made


def _diamond(x: float, y: float) -> list[Point]:
    return [(x - 3.2, y), (x, y - 3.2), (x + 3.2, y), (x, y + 3.2)]


def _pieces(x: Sequence[float], y: Numbers) -> list[list[Point]]:
    """The runs of points between gaps."""
    points = zip(x, y, strict=True)
    runs = groupby(points, key=lambda point: point[1] is None)
    return [[(a, b) for a, b in run if b is not None] for is_gap, run in runs if not is_gap]


def _ticks(low: float, high: float) -> list[float]:
    step = _round_step((high - low) / 4)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
