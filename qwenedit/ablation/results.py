"""The results of a sweep: results.jsonl, which grows by one line per run.

A line is a JSON object with `key`, `status` ("done" or "failed"), every setting and the environment of the
run. Runs that are done have `file`, `seconds`, `metrics` and `curves`, and what measuring.py adds: `baseline`
(the key of the unablated run that they were compared with), `mask`, `floor`, and of the caller's metrics
`own`, `own_by` and `own_errors`. Failed runs have `error`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwenedit.ablation.attention import GROUPS
from qwenedit.ablation.measures import MEASURES, Measure, Record, measures_of
from qwenedit.ablation.spec import Spec
from qwenedit.checks import real_number, whole_number
from qwenedit.files import read_lines
from qwenedit.foreign import shown
from qwenedit.sampling.samplers import SAMPLERS, count_predictions
from qwenedit.shards import record_file, shard_files

__all__ = ["PICTURES", "RESULTS", "Sweep", "known_results", "picture_of", "read_results"]

PICTURES = "pictures"  # the folder of the results
RESULTS = "results"  # the stem of the files of records
T = TypeVar("T")
Index = tuple[int, int, int]  # of a run in its spec: case, seed, cell

_PARTS = {one.name: one.part for one in MEASURES}
_TEXTS = (
    "key", "model", "picture", "prompt", "fingerprint", "device", "dtype", "qwenedit", "torch", "python",
    "at",
)  # fmt: skip
_KINDS: dict[type, str] = {dict: "an object", str: "a text", list: "a list", type(None): "null"}


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep that has run: its spec, and the record of every run by its place in it."""

    folder: Path
    spec: Spec
    records: dict[Index, Record]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records.values() if record["status"] == "failed"]

    @property
    def failed_metrics(self) -> list[tuple[str, str]]:
        """The name and the message of each metric of the caller's that failed, for every run."""
        return [error for record in self.records.values() for error in record.get("own_errors", {}).items()]

    def of_cell(self, cell: int) -> list[Record]:
        """The runs of a cell that are done, over all pictures and seeds."""
        return [
            record for (_, _, at), record in self.records.items() if at == cell and record["status"] == "done"
        ]

    @property
    def measures(self) -> tuple[Measure, ...]:
        masked = any(case.mask is not None for case in self.spec.cases)
        return measures_of(self.spec.metrics, masked=masked)


def read_results(path: Path) -> dict[str, Record]:
    """The records of a results.jsonl by key, the later of two; see `files.read_lines`.

    Raises:
        ValueError: a line is no record, or a field of it is not as a sweep writes it.
    """
    records = read_lines(path, _record, "result of a sweep (take another folder)")
    return {record["key"]: record for record in records}


def known_results(folder: Path) -> dict[str, Record]:
    """The records of a sweep's folder by key, those of its shards included; of two, one that is done.

    Raises:
        ValueError: as `read_results`.
    """
    found: dict[str, Record] = {}
    for path in (*shard_files(folder, RESULTS), record_file(folder, RESULTS)):
        for key, record in read_results(path).items():
            if key not in found or record["status"] == "done":
                found[key] = record
    return found


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
            if _PARTS.get(name) == part and number is not None and not isinstance(number, bool):
                real_number(f"{part}.{name}", number)
    if baseline is not None:
        _wanted("baseline", baseline, str)
        if "psnr" not in metrics:
            raise ValueError("metrics.psnr is absent, wanted the comparison with the baseline")
    if "success" in metrics and metrics.get("reason", "") is not None:
        _wanted("metrics.reason", metrics.get("reason"), str)
    _own(record)
    ratios = _wanted("curves.norm_ratio", curves.get("norm_ratio"), dict)
    sampler = _wanted("sampler", record.get("sampler", "euler"), str)  # older records have none
    count = count_predictions(sampler, [*[1.0] * record["steps"], 0.0])
    intervened = record.get("intervention", "none") != "none"  # which may have set another sampler
    if record.get("strength", 1) != 1 or sampler not in SAMPLERS or intervened:  # only the run knew it
        count = len(_wanted("curves.sigma", curves.get("sigma"), list))
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


def _own(record: Record) -> None:
    """Check the optional parts: the noise floor's distances and the caller's metrics."""
    floor = _wanted("floor", record.get("floor", {}), dict)
    if floor:
        _wanted("floor.key", floor.get("key"), str)
        for name in ("psnr", "ssim", "changed"):
            real_number(f"floor.{name}", floor.get(name))
    if record.get("mask") is not None:
        _wanted("mask", record["mask"], str)
    for name, number in _wanted("own", record.get("own", {}), dict).items():
        if number is not None:
            real_number(f"own.{name}", number)
    for part in ("own_by", "own_errors"):
        for name, text in _wanted(part, record.get(part, {}), dict).items():
            _wanted(f"{part}.{name}", text, str)


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
