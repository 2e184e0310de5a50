"""The tables of a sweep as files: results.csv, summary.csv, and for a paper summary.tex and pictures.tex."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwenedit.ablation.figures import source_file
from qwenedit.ablation.labels import axis_text, bands
from qwenedit.ablation.measures import Measure
from qwenedit.ablation.results import Sweep
from qwenedit.ablation.spec import CALL, COLUMNS
from qwenedit.ablation.statistics import (
    LEVEL,
    RESAMPLES,
    Estimate,
    compared,
    differences,
    estimates,
    noise_floor,
)
from qwenedit.foreign import shown
from qwenedit.version import __version__

__all__ = [
    "TERMS",
    "quoted",
    "tex",
    "write_csv",
    "write_picture_tex",
    "write_summary_csv",
    "write_summary_tex",
]

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
TERMS = (
    f"Intervals are percentile bootstrap intervals at {LEVEL:.0%}: whole edits are drawn with all of their "
    f"seeds {RESAMPLES:,} times (the seeds of a single edit). Differences are those of pairs: a run and the "
    "unablated run of the same edit and seed. The noise floor is the unablated run against itself at another "
    "seed."
).replace("%", " %")
_TEX_COLUMNS = 6  # measures beside each other
_TEX_PICTURES = 5  # results beside each other, and beside their source


def write_csv(sweep: Sweep, path: Path) -> None:
    """A row a run, with its settings, metrics and timings; curves are in results.jsonl alone.

    Values of the grid that come to the same setting are in one field. Spreadsheets run a text that begins
    with one of `FORMULA`. It gets a quotation mark in front.
    """
    start, end = COLUMNS[:5], COLUMNS[5:]
    axes = [axis for axis in sweep.spec.axes if axis not in CALL]
    measures = [one for one in sweep.measures if one.part != "curves"]
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictWriter(file, [*start, *CALL, *axes, *(one.name for one in measures), *end],
                              extrasaction="ignore")  # fmt: skip
        rows.writeheader()
        for (_, _, k), record in sweep.records.items():
            done = record["status"] == "done"
            measured = {one.name: record.get(one.part, {}).get(one.name) for one in measures if done}
            varied = sweep.spec.axes if sweep.spec.cells[k].combinations else ()
            chosen = {axis: _axis_value(sweep, k, axis) for axis in varied}
            reason = record.get("metrics", {}).get("reason")
            row = {**record, **chosen, **measured, "reason": reason}
            rows.writerow({name: _field(value) for name, value in row.items()})


def _axis_value(sweep: Sweep, cell: int, axis: str) -> Any:
    """The value itself, if there is one; the texts of several."""
    values = [one[axis] for one in sweep.spec.cells[cell].combinations]
    alike = {json.dumps(value) for value in values}
    return values[0] if len(alike) == 1 else axis_text(sweep.spec, cell, axis)


def _field(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
    return quoted(text) if isinstance(text, str) else text


def quoted(text: str) -> str:
    """The text for a cell of a table, such that no spreadsheet takes it for a formula.

    >>> quoted("=1+1"), quoted("make it red")
    ("'=1+1", 'make it red')
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def write_summary_csv(sweep: Sweep, path: Path) -> None:
    """A row for each setting and measure: its mean, its paired difference to the unablated run, and the noise
    floor, each with its interval and its n; and a sentence that says what was compared with what.

    Numbers are in the measure's unit.
    """
    axes = list(sweep.spec.axes)
    kinds = ("mean", "difference", "floor")
    parts = [kind + end for kind in kinds for end in ("", "_low", "_high", "_n")]
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.writer(file)
        rows.writerow([*axes, "unablated", "measure", "unit", *parts, "compared"])
        floor = noise_floor(sweep)
        for k in range(len(sweep.spec.cells)):
            means, paired = estimates(sweep, k), differences(sweep, k)
            sentence = quoted(compared(sweep, k))
            for one in sweep.measures:
                if not means[one.name].n and not floor[one.name].n:
                    continue
                found = (means[one.name], paired.get(one.name), floor[one.name])
                numbers = [number for estimate in found for number in _numbers(one, estimate)]
                settings = [quoted(axis_text(sweep.spec, k, axis)) for axis in axes]
                rows.writerow([*settings, int(k == 0), one.name, one.unit, *numbers, sentence])


def _numbers(measure: Measure, estimate: Estimate | None) -> list[Any]:
    """Value, low, high and n; an empty field for None."""
    if estimate is None:
        return ["", "", "", 0]
    return [*("" if x is None else f"{measure.factor * x:.6g}" for x in estimate[:3]), estimate.n]


def write_summary_tex(sweep: Sweep, path: Path) -> None:
    r"""The summary as LaTeX tables, of some measures each, so that they fit on a page: \input{summary.tex}.

    Beside a mean is the paired difference to the unablated run, and under it that difference's interval;
    under a distance to that run its own.
    """
    axes = list(sweep.spec.axes) or ["settings"]
    every = [estimates(sweep, k) for k in range(len(sweep.spec.cells))]
    paired = [differences(sweep, k) for k in range(len(sweep.spec.cells))]
    measures = [one for one in sweep.measures if not one.minor and any(row[one.name].n for row in every)]
    lines = [
        f"% Made by qwenedit {__version__}. Needs \\usepackage{{booktabs}}.",
        *(f"% {part}." for part in TERMS.rstrip(".").split(". ")),
    ]
    floor = noise_floor(sweep)
    for start in range(0, len(measures), _TEX_COLUMNS):
        of_table = measures[start : start + _TEX_COLUMNS]
        lines += ["", "{\\footnotesize", f"\\begin{{tabular}}{{{'l' * len(axes)}{'r' * len(of_table)}r}}"]
        lines += ["\\toprule", _tex_row([*map(tex, axes), *(tex(one.heading) for one in of_table), "$n$"])]
        if any(one.unit for one in of_table):
            lines.append(_tex_row([*[""] * len(axes), *(tex(one.unit) for one in of_table), ""]))
        lines.append("\\midrule")
        for k in range(len(sweep.spec.cells)):
            settings = [tex(axis_text(sweep.spec, k, axis)) for axis in axes]
            runs = len(sweep.of_cell(k))
            means = [_tex_mean(one, every[k][one.name], runs, paired[k].get(one.name)) for one in of_table]
            lines.append(f"{_tex_row([*settings, *means, str(runs)])} % {shown(compared(sweep, k), 1000)}")
            below = [
                _tex_interval(one, every[k][one.name] if one.to_unablated else paired[k][one.name])
                for one in of_table
            ]
            if any(below):
                lines.append(_tex_row([*[""] * len(axes), *below, ""]))
        floors = [_tex_mean(one, floor[one.name], floor[one.name].n) for one in of_table]
        pairs = max(floor[one.name].n for one in of_table)
        if pairs:
            lines += ["\\midrule", _tex_row(["noise floor", *[""] * (len(axes) - 1), *floors, str(pairs)])]
        lines += ["\\bottomrule", "\\end{tabular}}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


def _tex_row(fields: Iterable[str]) -> str:
    return " & ".join(fields) + " \\\\"


def _tex_mean(measure: Measure, mean: Estimate, runs: int, difference: Estimate | None = None) -> str:
    """With its n, where that is not the row's, and with its difference to the unablated run."""
    if mean.value is None:
        return "--"
    text = measure.shown(mean.value).replace("-", "$-$")
    text += "" if mean.n == runs else f"$_{{n={mean.n}}}$"
    if difference is None or difference.value is None:
        return text
    return f"{text} {{\\scriptsize ${measure.shown(difference.value, sign=True)}$}}"


def _tex_interval(measure: Measure, estimate: Estimate) -> str:
    if estimate.low is None:
        return ""
    low, high = (measure.shown(x, sign=not measure.to_unablated) for x in (estimate.low, estimate.high))
    return f"{{\\scriptsize $[{low}, {high}]$}}"


_TEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%",
    "_": "\\_", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}",
    ">": "\\textgreater{}", "|": "\\textbar{}", '"': "''", "–": "--", "σ": "$\\sigma$",
}  # fmt: skip


def tex(text: str) -> str:
    r"""A text as LaTeX shows it.

    >>> print(tex("50 % of true_cfg_scale"))
    50 \% of true\_cfg\_scale
    """
    return "".join(_TEX.get(character, character) for character in shown(text, 1000))


def write_picture_tex(sweep: Sweep, path: Path) -> None:
    r"""The pictures as LaTeX tables as wide as the text: \input{pictures.tex}, with \graphicspath set.

    A row for each edit and seed; settings that do not fit beside each other follow in the next table.
    """
    axes = sweep.spec.axes
    lines = [
        f"% Made by qwenedit {__version__}. Needs \\usepackage{{booktabs,graphicx}}, and "
        "\\graphicspath{{FOLDER/}}."
    ]
    for at in bands(len(sweep.spec.cells), _TEX_PICTURES):
        share = f"{0.94 / (_TEX_PICTURES + 1):.3f}\\linewidth"
        lines += [
            "",
            "{\\footnotesize\\setlength{\\tabcolsep}{1pt}",
            f"\\begin{{tabular}}{{c{'c' * len(at)}}}",
        ]
        lines.append("\\toprule")
        for axis in axes or ["settings"]:
            texts = [axis, *(axis_text(sweep.spec, k, axis) for k in at)]
            heads = (f"\\parbox{{{share}}}{{\\centering\\scriptsize {tex(text)}}}" for text in texts)
            lines.append(_tex_row(heads))
        lines.append("\\midrule")
        for edit, case in enumerate(sweep.spec.cases):
            for j, seed in enumerate(sweep.spec.seeds):
                files = [source_file(edit), *(sweep.records[edit, j, k]["file"] for k in at)]
                fields = (
                    f"\\includegraphics[width={share}]{{{file}}}" if file else "failed" for file in files
                )
                lines.append(
                    f"{_tex_row(fields)} % {shown(case.name)}, seed {seed}: {shown(case.prompt, 1000)}"
                )
        lines += ["\\bottomrule", "\\end{tabular}}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
