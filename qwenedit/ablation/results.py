"""What a sweep leaves behind: results.jsonl, which grows by a line a run, and the means over it.

A line is a JSON object: `key` and `status` ("done" or "failed", then with `error`), every setting, what the
run was made with, and, of runs that are done, `file`, `seconds`, `metrics` and `curves`.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenedit.ablation.spec import CALL, Spec
from qwenedit.files import replacing_file

__all__ = ["MEASURES", "Record", "Sweep", "append", "read_results", "write_csv", "write_results"]

Record = dict[str, Any]
Index = tuple[int, int, int]  # of a run in its spec: case, seed, cell

# What means are taken of: a name, and where a record has the number (see `metrics`).
MEASURES = {
    "psnr": ("metrics", "psnr"),
    "ssim": ("metrics", "ssim"),
    "changed": ("metrics", "changed"),
    "success": ("metrics", "success"),
    "strict": ("metrics", "strict"),
    "preserved": ("metrics", "preserved"),
    "encode": ("seconds", "encode"),
    "sample": ("seconds", "sample"),
    "decode": ("seconds", "decode"),
}


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

    def means(self) -> list[dict[str, float | None]]:
        """For each cell the mean of each measure, and of the norm ratio, over those of its runs that have it;
        None where none has.
        """
        return [
            {
                **{
                    name: _mean(record[part].get(key) for record in runs)
                    for name, (part, key) in MEASURES.items()
                },
                "norm_ratio": _mean(x for record in runs for x in record["curves"]["norm_ratio"]["mean"]),
            }
            for runs in map(self.of_cell, range(len(self.spec.cells)))
        ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known) if known else None


def read_results(path: Path) -> dict[str, Record]:
    """The records of a results.jsonl by key, the later of two; none if there is no such file.

    A last line that was cut off, when a sweep was killed while writing it, is left out.

    Raises:
        ValueError: another line is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    records = {}
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                record = json.loads(line)
                records[record["key"]] = record
                record["status"], record["file"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"line {number} of {path} is no result of a sweep ({error!r}): take another folder"
            ) from error
    return records


def append(path: Path, record: Record) -> None:
    """Add a line, on the disk when this returns."""
    with path.open("ab") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Write all lines anew, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(b"".join(map(_line, records)))


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n"


def write_csv(sweep: Sweep, path: Path) -> None:
    """A row a run, with its settings, metrics and timings; curves are in results.jsonl alone."""
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
            measured = {name: record.get(part, {}).get(key) for name, (part, key) in MEASURES.items()}
            reason = record.get("metrics", {}).get("reason")
            values: Mapping[str, Any] = sweep.spec.cells[cell].values
            row = {**record, **values, **measured, "reason": reason}
            rows.writerow({name: _field(value) for name, value in row.items()})


def _field(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
