"""The results of a sweep: results.jsonl, which grows by one line per run, and the means over its runs.

A line is a JSON object with `key`, `status` ("done" or "failed"), every setting and the environment of the
run. Runs that are done have `file`, `seconds`, `metrics` and `curves`; failed runs have `error`.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qwenedit.ablation.attention import GROUPS
from qwenedit.ablation.spec import CALL, Spec
from qwenedit.checks import real_number, whole_number
from qwenedit.files import read_lines, replacing_file
from qwenedit.foreign import shown
from qwenedit.sampling.samplers import count_predictions

__all__ = [
    "MEASURES", "PICTURES", "Mean", "Record", "Sweep", "picture_of", "quoted", "read_results", "write_csv",
]  # fmt: skip

Record = dict[str, Any]
PICTURES = "pictures"  # the folder of the results
T = TypeVar("T")
Index = tuple[int, int, int]  # of a run in its spec: case, seed, cell

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

# The numbers that means are taken of -> the part of a record that has them.
MEASURES = {
    **dict.fromkeys(("psnr", "ssim", "changed", "success", "strict", "preserved"), "metrics"),
    **dict.fromkeys(("encode", "sample", "decode"), "seconds"),
}
_TEXTS = (
    "key", "model", "picture", "prompt", "fingerprint", "device", "dtype", "qwenedit", "torch", "python",
    "at",
)  # fmt: skip
_KINDS: dict[type, str] = {dict: "an object", str: "a text", list: "a list", type(None): "null"}


class Mean(NamedTuple):
    """A mean, None if nothing was measured, and the number of edits that it is of."""

    value: float | None
    edits: int


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep that has run: its spec, and the record of every run by its place in it."""

    folder: Path
    spec: Spec
    records: dict[Index, Record]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records.values() if record["status"] == "failed"]

    def of_cell(self, cell: int) -> list[Record]:
        """The runs of a cell that are done, over all pictures and seeds."""
        return [
            record for (_, _, at), record in self.records.items() if at == cell and record["status"] == "done"
        ]

    def means(self) -> list[dict[str, Mean]]:
        """For each cell the mean of each measure, and of the norm ratio, over the runs that have a number."""
        return [
            {
                **{
                    name: _mean([record[part].get(name)] for record in runs)
                    for name, part in MEASURES.items()
                },
                "norm_ratio": _mean(record["curves"]["norm_ratio"]["mean"] for record in runs),
            }
            for runs in map(self.of_cell, range(len(self.spec.cells)))
        ]


def _mean(of_runs: Iterable[Sequence[float | None]]) -> Mean:
    """The mean of all numbers of all runs, and the number of runs that have any."""
    known = [[value for value in values if value is not None] for values in of_runs]
    numbers = [value for values in known for value in values]
    return Mean(statistics.fmean(numbers) if numbers else None, sum(map(bool, known)))


def read_results(path: Path) -> dict[str, Record]:
    """The records of a results.jsonl by key, the later of two; see `files.read_lines`.

    Raises:
        ValueError: a line is no record, or a field of it is not as a sweep writes it.
    """
    records = read_lines(path, _record, "result of a sweep (take another folder)")
    return {record["key"]: record for record in records}


def picture_of(key: str) -> str:
    """The file of a run's picture, in the sweep's folder."""
    return f"{PICTURES}/{key}.png"


def _record(value: Any) -> Record:
    """A line's content with every field that is read checked. Raises a ValueError that names the field."""
    record: Record = _wanted("the line", value, dict)
    for name in _TEXTS:
        _wanted(name, record.get(name), str)
    for name in ("seed", "threads", "steps"):
        whole_number(name, record.get(name), least=0)
    if record.get("status") == "failed":
        _wanted("error", record.get("error"), str)
        _wanted("file", record.get("file"), type(None))
        return record
    if record.get("status") != "done":
        raise ValueError(f"status is {shown(repr(record.get('status')))}, wanted 'done' or 'failed'")
    wanted = picture_of(record["key"])
    if not re.fullmatch("[0-9a-f]{20}", record["key"]) or record.get("file") != wanted:
        # The page links to the pictures and embeds them: they must be the sweep's own.
        raise ValueError(f"file is {shown(repr(record.get('file')))}, wanted {shown(wanted)}")
    baseline = record.get("baseline")
    metrics, seconds, curves = (_wanted(x, record.get(x), dict) for x in ("metrics", "seconds", "curves"))
    for part, content in (("metrics", metrics), ("seconds", seconds)):
        for name, number in content.items():  # success and the like are true or false
            if MEASURES.get(name) == part and number is not None and not isinstance(number, bool):
                real_number(f"{part}.{name}", number)
    if baseline is not None:
        _wanted("baseline", baseline, str)
        if "psnr" not in metrics:
            raise ValueError("metrics.psnr is absent, wanted the comparison with the baseline")
    if "success" in metrics and metrics.get("reason", "") is not None:
        _wanted("metrics.reason", metrics.get("reason"), str)
    ratios = _wanted("curves.norm_ratio", curves.get("norm_ratio"), dict)
    sampler = _wanted("sampler", record.get("sampler", "euler"), str)  # older records have none
    count = count_predictions(sampler, [*[1.0] * record["steps"], 0.0])
    for name in ("sigma", "velocity"):
        _numbers(f"curves.{name}", curves.get(name), count)
    for name in ("mean", "min", "max"):
        _numbers(f"curves.norm_ratio.{name}", ratios.get(name), count, holes=True)
    for group, blocks in _wanted("attention", record.get("attention", {}), dict).items():
        if group not in GROUPS:
            raise ValueError(f"attention has {shown(repr(group))}, wanted {', '.join(GROUPS)}")
        for steps in _wanted(f"attention.{group}", blocks, list):
            _numbers(f"attention.{group}", steps, len(blocks[0]) if isinstance(blocks[0], list) else 0)
    return record


def _numbers(name: str, values: Any, count: int, holes: bool = False) -> None:
    """Check a list of numbers; with `holes` some may be None."""
    if len(_wanted(name, values, list)) != count:
        raise ValueError(f"{name} has {len(values)} values, wanted {count}")
    for value in values:
        if value is not None or not holes:
            real_number(f"a value of {name}", value)


def _wanted(name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shown(repr(value))}, wanted {_KINDS[kind]}")
    return value


def write_csv(sweep: Sweep, path: Path) -> None:
    """A row a run, with its settings, metrics and timings; curves are in results.jsonl alone.

    Spreadsheets run a text that begins with one of `FORMULA`. It gets a quotation mark in front.
    """
    switches = sorted(set(sweep.spec.axes) - set(CALL))
    head = [
        "key",
        "status",
        "picture",
        "prompt",
        "seed",
        *CALL,
        *switches,
        *MEASURES,
        "reason",
        "file",
        "error",
    ]
    with replacing_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, head, extrasaction="ignore")
        rows.writeheader()
        for (_, _, cell), record in sweep.records.items():
            measured = {name: record.get(part, {}).get(name) for name, part in MEASURES.items()}
            reason = record.get("metrics", {}).get("reason")
            row = {**record, **sweep.spec.cells[cell].values, **measured, "reason": reason}
            rows.writerow({name: _field(value) for name, value in row.items()})


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
