"""What is measured on the pictures of a sweep, from their files: a record may be completed later."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qwenedit.ablation.cases import Case
from qwenedit.ablation.measures import Record
from qwenedit.ablation.metrics import distances, source_distances
from qwenedit.checks import real_number
from qwenedit.inputs.pictures import open_picture

__all__ = ["Functions", "add_floor", "mask_hash", "measure"]

Functions = dict[str, tuple[Any, str]]  # the caller's metrics: a function and the hash of its code
_NOTHING: dict[str, Any] = {"psnr": None, "ssim": None, "changed": None}


def measure(folder: Path, case: Case, record: Record, plain: Record, metrics: Functions) -> None:
    """Add to a run's record what it lacks: its distances to the source and to its unablated run, `plain`, and
    the caller's metrics. A metric that raises is noted under `own_errors`; the others go on.
    """
    if record["status"] != "done":
        return
    mask = mask_hash(case)
    baseline = plain["key"] if plain["status"] == "done" and plain is not record else None
    if "source_psnr" not in record["metrics"] or record.get("mask") != mask:
        of_parts = source_distances(open_picture(folder / record["file"]), case.source, case.mask)
        others = {
            name: x for name, x in record["metrics"].items() if not name.startswith(("inside_", "outside_"))
        }
        record |= {"metrics": {**others, **of_parts}, "mask": mask}
    if "psnr" not in record["metrics"] or record["baseline"] != baseline:
        between = _distances(folder, record, plain) if baseline else _NOTHING
        record |= {"metrics": {**record["metrics"], **between}, "baseline": baseline}
    _measure_own(folder, case, record, plain, metrics)


def mask_hash(case: Case) -> str | None:
    if case.mask is None:
        return None
    grey = case.mask.convert("L")
    return hashlib.sha256(f"{grey.size}".encode() + grey.tobytes()).hexdigest()[:20]


def _distances(folder: Path, record: Record, other: Record) -> dict[str, float]:
    return distances(*(open_picture(folder / one["file"]) for one in (record, other)))


def _measure_own(folder: Path, case: Case, record: Record, plain: Record, metrics: Functions) -> None:
    own, own_by = dict(record.get("own", {})), dict(record.get("own_by", {}))
    errors: dict[str, str] = {}
    for name, (function, code) in metrics.items():
        by = " ".join(map(str, (code, record["baseline"], record["mask"])))
        if own.get(name) is not None and own_by.get(name) == by:
            continue
        unablated = open_picture(folder / plain["file"]) if plain["status"] == "done" else None
        own[name], own_by[name] = None, by
        try:
            own[name] = _number(
                function(
                    open_picture(folder / record["file"]),
                    case.source,
                    prompt=case.prompt,
                    pictures=list(case.pictures),
                    mask=case.mask,
                    unablated=unablated,
                )
            )
        except Exception as error:  # whatever the caller's function raises
            errors[name] = f"{type(error).__name__}: {error}"
    if metrics or own:
        record |= {"own": own, "own_by": own_by, "own_errors": errors}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, bool) else real_number("its result", value)


def add_floor(folder: Path, records: list[Record]) -> None:
    """Add to the unablated runs of one edit, in the order of their seeds, their distances to the next one."""
    pairs = list(zip(records, [*records[1:], records[0]], strict=True))
    for record, other in pairs[: 1 if len(pairs) == 2 else None]:  # two seeds are one pair
        if record is other or record["status"] != "done" or other["status"] != "done":
            continue
        if record.get("floor", {}).get("key") != other["key"]:
            record["floor"] = {"key": other["key"], **_distances(folder, record, other)}
