"""The report of `qwenedit parity`: what counts as equal, the rows that say so, and the files of a run.

float32    max |ours - reference| / max |reference|: at most 1e-5 for a module, 1e-4 for the error that has
           accumulated from the start of a network to its end
bfloat16   our error against the reference's float32 (root mean square, relative): at most 1.25 times the
           reference's own error
the rest   tokens, positions, patches, sizes, sigmas, noise: equal
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwenedit.files import append_line, read_lines, replacing_file, write_lines
from qwenedit.foreign import shown
from qwenedit.parity.reference import Streams

__all__ = ["DTYPES", "END_TO_END", "FLOAT32", "Parity", "Progress", "Row", "compared"]

DTYPES = ("float32", "bfloat16")
FLOAT32 = 1e-5  # of a module, relative to the largest value
END_TO_END = 1e-4  # of the error accumulated in a network, likewise
BFLOAT16 = 1.25  # times the reference's own error
PATCHES = (  # what they were compared with
    "input.patches: of Qwen2VLImageProcessor, which resizes with PIL; Qwen2VLImageProcessorFast, which\n"
    "diffusers loads where torchvision is installed, differs from it by up to 2 of 255 levels"
)
ROUNDING = 1e-5  # in addition, for parts that are float32 in any dtype (tables)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A module in one dtype.

    Attributes:
        module: component.module, by our names.
        dtype: "float32" or "bfloat16"; "exact" for values that must be equal.
        ok: whether the difference is within the tolerance.
        max_abs, relative: max |ours - reference|, and that over max |reference|; None if it is not finite.
        ours, reference: in bfloat16, the errors of both against the reference's float32.
        first: in a module that differs, the first tap or output that differs.
        removed_by: the single entry of a dialect under which it does not differ, if there is one.
    """

    module: str
    dtype: str
    ok: bool
    max_abs: float | None = None
    relative: float | None = None
    ours: float | None = None
    reference: float | None = None
    first: str | None = None
    removed_by: str | None = None


@dataclass(frozen=True)
class Parity:
    """The rows of a comparison; `str()` of it is what `qwenedit parity` prints."""

    folder: Path
    about: dict[str, Any]
    rows: list[Row]

    @property
    def differing(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        return not self.differing

    def verdict(self) -> str:
        """The result in one line, with the place of the first difference."""
        if self.ok:
            against = self.about.get("against", "diffusers")
            whom = "the reference" if against == "diffusers" else against
            return f"no difference from {whom} in {len(self.rows)} comparisons"
        row = self.differing[0]
        where = f": {shown(row.first)}" if row.first else ""
        where += f", which {shown(row.removed_by)} removes" if row.removed_by else ""
        return (
            f"{len(self.differing)} of {len(self.rows)} comparisons differ, the first in {shown(row.module)} "
            f"({shown(row.dtype)}){where}"
        )

    def __str__(self) -> str:
        by_module: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            by_module.setdefault(shown(row.module), {})[row.dtype] = row
        wide = max(map(len, by_module))
        heads = ("max |Δ|", "relative", "max |Δ|", "relative", "  error", "reference's")
        lines = [
            f"{shown(self.folder)}: {shown(self.about['variant'])}",
            f"{'':<{wide}}  {'float32':<17}  bfloat16",
            f"{'':<{wide}}  {'  '.join(heads)}",
        ]
        for module, rows in by_module.items():
            single, half = (rows.get(dtype) for dtype in DTYPES)
            cells = [_cell(single, name) for name in ("max_abs", "relative")]
            cells += [_cell(half, name) for name in ("max_abs", "relative", "ours", "reference")]
            line = "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))
            if "exact" in rows:
                line = f"{'equal' if rows['exact'].ok else '':<{len(line)}}"
            bad = next((row for row in rows.values() if not row.ok), None)
            if bad is not None:
                line += f"  DIFFERS {shown(bad.first or '')}"
                line += f" (equal under {shown(bad.removed_by)})" if bad.removed_by else ""
            lines.append(f"{module:<{wide}}  {line}".rstrip())
        if "input.patches" in by_module:
            lines.append(PATCHES)
        return "\n".join([*lines, self.verdict()])


def _cell(row: Row | None, name: str) -> str:
    if row is None:
        return ""
    value = getattr(row, name)
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def compared(module: str, dtype: str, got: Streams, wanted: Streams, truth: Streams, tolerance: float) -> Row:
    """The worst of a stage's outputs: the first that differs by more than the tolerance, else the largest Δ.

    `truth` is the reference's float32.
    """
    rows = []
    for name, other in wanted.items():
        x, y, z = (tensor.cpu().double() for tensor in (got[name], other, truth[name]))
        if x.shape != y.shape:
            return Row(module=module, dtype=dtype, ok=False, first=f"{name}, of another shape")
        largest = float((x - y).abs().max())
        relative = _ratio(largest, float(y.abs().max()))
        ours = reference = None
        if dtype == "float32":
            ok = relative is not None and relative <= tolerance
        else:
            ours, reference = (_ratio(_rms(one - z), _rms(z)) for one in (x, y))
            ok = ours is not None and reference is not None and ours <= BFLOAT16 * reference + ROUNDING
        row = Row(
            module=module,
            dtype=dtype,
            ok=ok,
            max_abs=largest if math.isfinite(largest) else None,
            relative=relative,
            ours=ours,
            reference=reference,
        )
        if not ok:
            return replace(row, first=name)
        rows.append(row)
    return max(rows, key=lambda row: row.relative or 0.0)


def _rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def _ratio(error: float, size: float) -> float | None:
    if error == 0:
        return 0.0
    return error / size if size and math.isfinite(error) and math.isfinite(size) else None


class Progress:
    """The files that a run resumes from: its rows, line by line, and the streams after the last stage."""

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.lines = output.with_suffix(".jsonl")
        self.streams = output.with_suffix(".streams.safetensors")
        self.fingerprint = fingerprint

    def read_rows(self) -> dict[tuple[str, str], Row]:
        """The rows with this run's fingerprint.

        Raises:
            ValueError: the file holds something else.
        """

        def parse(line: dict[str, Any]) -> tuple[str, Row]:
            return line.pop("fingerprint"), Row(**line)

        found = read_lines(self.lines, parse, "row of parity")
        if found:  # without a last line that was cut off: the next one follows
            write_lines(self.lines, ({"fingerprint": mark, **asdict(row)} for mark, row in found))
        return {(row.module, row.dtype): row for mark, row in found if mark == self.fingerprint}

    def add_row(self, row: Row) -> None:
        append_line(self.lines, {"fingerprint": self.fingerprint, **asdict(row)})

    def read_streams(self, device: torch.device) -> tuple[int, dict[str, Streams]]:
        """The number of stages that are done and the streams after them; 0 and none if there is no file."""
        lanes: dict[str, Streams] = {}
        try:
            with safe_open(self.streams, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self.fingerprint:
                    return 0, {}
                for key in file.keys():
                    lane, _, name = key.partition("/")
                    lanes.setdefault(lane, {})[name] = file.get_tensor(key).to(device)
            return int(about["done"]), lanes
        except (FileNotFoundError, SafetensorError):
            return 0, {}

    def write_streams(self, done: int, lanes: dict[str, Streams]) -> None:
        flat = {
            f"{lane}/{name}": x.cpu().contiguous().clone()  # safetensors refuses tensors that share memory
            for lane, streams in lanes.items()
            for name, x in streams.items()
        }
        about = {"fingerprint": self.fingerprint, "done": str(done)}
        with replacing_file(self.streams) as temporary:
            save_file(flat, temporary, about)
