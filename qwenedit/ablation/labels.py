"""Settings as texts, the same ones on the page, in the tables and in the figures."""

from __future__ import annotations

import json
from typing import Any

from qwenedit.ablation.spec import Spec
from qwenedit.foreign import shown

__all__ = ["axis_text", "bands", "label", "text_of", "values_text"]


def text_of(value: Any) -> str:
    """A value of the grid.

    >>> text_of(7.5), text_of(" "), text_of([0, 5])
    ('7.5', '" "', '[0, 5]')
    """
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return shown(value) if value.strip() else f'"{shown(value)}"'
    return json.dumps(value, ensure_ascii=False)


def axis_text(spec: Spec, cell: int, axis: str) -> str:
    """The value that a setting has on an axis of the grid; all values, where they come to the same."""
    combinations = spec.cells[cell].combinations
    if not combinations:
        return "unablated"
    return ", ".join(dict.fromkeys(text_of(values[axis]) for values in combinations))


def bands(cells: int, most: int) -> list[list[int]]:
    """The settings in parts that fit beside each other; each part begins with the unablated run.

    >>> bands(6, 4)
    [[0, 1, 2, 3], [0, 4, 5]]
    """
    others = range(1, cells)
    return [[0, *others[start : start + most - 1]] for start in range(0, max(1, len(others)), most - 1)]


def label(spec: Spec, cell: int) -> str:
    """A setting in one line."""
    values = values_text(spec, cell)
    if cell == 0:
        return f"unablated ({values})" if values else "unablated"
    return values


def values_text(spec: Spec, cell: int) -> str:
    """The values of a setting by axis; empty for a run outside of the grid."""
    axes = spec.axes if spec.cells[cell].combinations else ()
    return ", ".join(f"{axis} {axis_text(spec, cell, axis)}" for axis in axes)
