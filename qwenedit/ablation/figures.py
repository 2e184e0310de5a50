"""The figures of a sweep, for its page and as SVG and PDF: effects with intervals, and curves over steps."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from qwenedit.ablation.charts import HEIGHT, WIDTH, Line, Row, chart, intervals, nice_range
from qwenedit.ablation.drawing import Drawing, Text
from qwenedit.ablation.labels import axis_text, label
from qwenedit.ablation.measures import Measure, Record
from qwenedit.ablation.results import Sweep
from qwenedit.ablation.statistics import Estimate, differences, estimates, noise_floor
from qwenedit.files import replacing_file

__all__ = ["FIGURES", "effects", "source_file", "step_charts", "write_figures"]

FIGURES = "figures"  # the folder of the files
BAND = 4.0  # the norm ratio's axis is cut off at this multiple of the largest mean


def write_figures(sweep: Sweep, folder: Path) -> None:
    """Write every figure as NAME.svg and NAME.pdf, one for each measure and `steps`; and the sources."""
    folder.mkdir(exist_ok=True)
    for edit, case in enumerate(sweep.spec.cases):
        with replacing_file(sweep.folder / source_file(edit)) as temporary:
            case.shown.convert("RGB").save(temporary)
    figures = effects(sweep)
    if cards := step_charts(sweep):
        figures["steps"] = _sheet(cards)
    for name, drawing in figures.items():
        with replacing_file(folder / f"{name}.svg") as temporary:
            temporary.write_text(drawing.svg_file(), encoding="utf-8", errors="replace")
        with replacing_file(folder / f"{name}.pdf") as temporary:
            temporary.write_bytes(drawing.pdf())


def source_file(edit: int) -> str:
    """The file of an edit's pictures, in the sweep's folder."""
    return f"{FIGURES}/source-{edit + 1}.png"


def effects(sweep: Sweep) -> dict[str, Drawing]:
    """For each measure with numbers: what each setting does to it, compared with the unablated run.

    Distances to the unablated run are means, and all others paired differences, with their intervals and the
    noise floor.
    """
    cells = range(1, len(sweep.spec.cells))
    means = {k: estimates(sweep, k) for k in cells}
    paired = {k: differences(sweep, k) for k in cells}
    floor = noise_floor(sweep)
    found = {}
    for one in sweep.measures:
        of_cells = {k: (means if one.to_unablated else paired)[k][one.name] for k in cells}
        if not one.minor and any(estimate.n for estimate in of_cells.values()):
            found[one.name] = _effect(sweep, one, of_cells, floor[one.name])
    return found


def _effect(sweep: Sweep, measure: Measure, of_cells: dict[int, Estimate], floor: Estimate) -> Drawing:
    def scaled(value: float | None) -> float | None:
        return None if value is None else measure.factor * value

    axes = sweep.spec.axes
    rows = [
        Row(
            tuple(axis_text(sweep.spec, k, axis) for axis in axes),
            scaled(one.value),
            scaled(one.low),
            scaled(one.high),
        )
        for k, one in of_cells.items()
    ]
    kind = "to the unablated run" if measure.to_unablated else "difference to the unablated run"
    unit = f" ({measure.unit})" if measure.unit else ""
    count = max(one.n for one in of_cells.values())
    return intervals(
        f"{measure.heading}{unit}, {kind}", axes, rows, floor=scaled(floor.value),
        differences=not measure.to_unablated, across=f"means of up to {count} runs, 95 % intervals",
    )  # fmt: skip


def _sheet(cards: list[tuple[str, list[Drawing]]], columns: int = 2) -> Drawing:
    """All charts on one page, with their captions."""
    width, height, gap = 2 * WIDTH + 12, HEIGHT + 20, 16
    lines = -(-len(cards) // columns)
    page = Drawing("steps", columns * (width + gap) - gap, lines * (height + gap) - gap)
    for k, (caption, charts) in enumerate(cards):
        x, y = k % columns * (width + gap), k // columns * (height + gap)
        page.marks.append(Text(x, y + 11, caption, style="name"))
        for place, one in enumerate(charts):
            page.add(one, x + place * (WIDTH + 12), y + 18)
    return page


def step_charts(sweep: Sweep) -> list[tuple[str, list[Drawing]]]:
    """The schedules of sigmas, then the charts of each setting, on common axes; none if no run is done."""
    of_cells = [_mean_curves(sweep.of_cell(k)) for k in range(len(sweep.spec.cells))]
    known = [one for one in of_cells if one is not None]
    if not known:
        return []
    velocity = nice_range(value for one in known for value in one["velocity"])
    means = [value for one in known for value in one["mean"] if value is not None]
    lows = [value for one in known for value in one["min"] if value is not None]
    highest = BAND * max(means, default=0.0)
    highs = [min(value, highest) for one in known for value in one["max"] if value is not None]
    ratio = nice_range([*lows, *highs])
    cards = []
    for schedule in dict.fromkeys(tuple(one["sigma"]) for one in known):
        points = Line([*range(1, len(schedule) + 1)], schedule)
        svg = chart("σ", [points], x=(1, max(2, len(schedule))), y=(0, 1), along="step")
        cards.append((f"schedule of {len(schedule)} steps", [svg]))
    for k, one in enumerate(of_cells):
        if one is None:
            continue
        plain = of_cells[0] if k else None

        def lines(name: str, line: Line, plain: dict[str, list[Any]] | None = plain) -> list[Line]:
            return [line] if plain is None else [Line(plain["sigma"], plain[name], "ghost"), line]

        speed = lines("velocity", Line(one["sigma"], one["velocity"]))
        charts = [chart("|velocity|", speed, x=(1, 0), y=velocity, along="σ")]
        if any(value is not None for value in one["mean"]):
            band = lines("mean", Line(one["sigma"], one["mean"], band=(one["min"], one["max"])))
            charts.append(chart("norm ratio", band, x=(1, 0), y=ratio, along="σ"))
        cards.append((label(sweep.spec, k), charts))
    return cards


def _mean_curves(records: list[Record]) -> dict[str, list[Any]] | None:
    """Step by step over the runs of a cell: means, and the least and greatest norm ratio."""
    if not records:
        return None
    curves = [{**record["curves"], **record["curves"]["norm_ratio"]} for record in records]

    def over(name: str, fold: Any) -> list[float | None]:
        at_steps = zip(*(one[name] for one in curves), strict=True)
        known = [[x for x in values if x is not None] for values in at_steps]
        return [fold(values) if values else None for values in known]

    folds = {"sigma": fmean, "velocity": fmean, "mean": fmean, "min": min, "max": max}
    return {name: over(name, fold) for name, fold in folds.items()}
