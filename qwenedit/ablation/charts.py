"""Small line charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

__all__ = ["Line", "chart", "nice_range"]

WIDTH, HEIGHT = 240.0, 120.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 30.0, 6.0, 18.0, 16.0  # margins, for the labels

Numbers = Sequence[float | None]  # None: the line has a gap


@dataclass(frozen=True)
class Line:
    """A line of a chart; `style` is its CSS class, `band` the lower and upper edge of a shaded area."""

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
) -> str:
    """An SVG with a name, ticks and lines; x may run from high to low, and y is clamped to its range."""

    def across(value: float) -> float:
        return _LEFT + (value - x[0]) / (x[1] - x[0]) * (WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        inside = min(max(value, y[0]), y[1])
        return _TOP + (y[1] - inside) / (y[1] - y[0]) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(name)}">',
        f'<text class="name" x="{_LEFT:g}" y="10">{escape(name)}</text>',
    ]
    for value in _ticks(*y):
        parts.append(
            f'<line class="rule" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{down(value):.1f}" '
            f'y2="{down(value):.1f}"/><text x="{_LEFT - 4:g}" y="{down(value) + 3:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    for value, anchor in ((x[0], "start"), (x[1], "end")):
        parts.append(
            f'<text x="{across(value):.1f}" y="{HEIGHT - 4:g}" text-anchor="{anchor}">{value:g}</text>'
        )
    middle = (x[0] + x[1]) / 2
    parts.append(
        f'<text x="{across(middle):.1f}" y="{HEIGHT - 4:g}" text-anchor="middle">{escape(along)}</text>'
    )
    for line in lines:
        if line.band is not None:
            for low, high in zip(_pieces(line.x, line.band[0]), _pieces(line.x, line.band[1]), strict=True):
                corners = [f"{across(a):.1f},{down(b):.1f}" for a, b in [*low, *reversed(high)]]
                parts.append(f'<polygon class="band" points="{" ".join(corners)}"/>')
        for piece in _pieces(line.x, line.y):
            points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in piece)
            parts.append(f'<polyline class="{line.style}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def _pieces(x: Sequence[float], y: Numbers) -> list[list[tuple[float, float]]]:
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
