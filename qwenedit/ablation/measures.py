"""What a sweep measures of every run: the table that the page, the tables and the figures share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qwenedit.ablation.metrics import CHANGED

__all__ = ["MEASURES", "Measure", "Record", "measures_of"]

Record = dict[str, Any]  # of a run, as results.py describes it


@dataclass(frozen=True)
class Measure:
    """A number of a run, and how it is shown: `factor` * number, with `decimals`, in `unit`.

    `part` is the part of a record that has it. `to_unablated` marks distances to the unablated run of the
    same edit and seed; all others are a run's own, and their differences to the unablated run are taken.
    `minor` ones are in the CSV files alone.
    """

    name: str
    heading: str
    unit: str
    factor: float
    decimals: int
    meaning: str
    part: str = "metrics"
    to_unablated: bool = False
    minor: bool = False

    def of(self, record: Record) -> float | None:
        """The number of a run that is done; None where nothing was measured."""
        if self.name == "norm_ratio":
            known = [x for x in record["curves"]["norm_ratio"]["mean"] if x is not None]
            return fmean(known) if known else None
        value = record.get(self.part, {}).get(self.name)
        return None if value is None else float(value)

    def shown(self, value: float | None, *, sign: bool = False) -> str:
        """The number as text, without its unit; "–" for None."""
        if value is None:
            return "–"
        text = f"{self.factor * value:{'+' if sign else ''}.{self.decimals}f}"
        return text if float(text) else text.lstrip("+-")


_SSIM = "structural similarity, with a Gaussian window of 11 pixels, sigma 1.5"
_CHANGED = f"pixels with a channel that differs from it by more than {CHANGED:g} of its range"


def _of_part(name: str, part: str, what: str) -> Iterable[Measure]:
    to = f"to the source, resized to the result's size{what}"
    yield Measure(f"{name}_psnr", f"PSNR, {part}", "dB", 1, 1, f"peak signal-to-noise ratio {to}")
    yield Measure(f"{name}_ssim", f"SSIM, {part}", "", 1, 3, f"{_SSIM}, {to}")
    yield Measure(f"{name}_changed", f"changed, {part}", "% of pixels", 100, 1, f"{_CHANGED}; {to}")


MEASURES = (
    Measure("psnr", "PSNR", "dB", 1, 1, "peak signal-to-noise ratio to the unablated picture; 100 dB: equal",
            to_unablated=True),
    Measure("ssim", "SSIM", "", 1, 3, f"{_SSIM}, to the unablated picture", to_unablated=True),
    Measure("changed", "changed", "% of pixels", 100, 1, f"{_CHANGED}; to the unablated picture",
            to_unablated=True),
    *_of_part("source", "source", ""),
    *_of_part("inside", "inside", ", where the mask is white"),
    *_of_part("outside", "outside", ", where the mask is black"),
    Measure("norm_ratio", "norm ratio", "", 1, 3,
            "the norm of a token's conditional velocity over the norm of its guided velocity, mean over "
            "tokens and steps: the factor that the reference's guidance applies", "curves"),
    Measure("success", "success", "%", 100, 1,
            "by the oracle: the request is fulfilled and the rest is unchanged"),
    Measure("strict", "strict", "%", 100, 1, "success, with at least 22 dB where nothing should change"),
    Measure("preserved", "preserved", "dB", 1, 1, "PSNR to the source where the edit should change nothing"),
    Measure("encode", "encoding", "s", 1, 2, "seconds of prompts and pictures, which runs may share",
            "seconds", minor=True),
    Measure("sample", "sampling", "s", 1, 2, "seconds of an edit's steps", "seconds"),
    Measure("decode", "decoding", "s", 1, 2, "seconds of the VAE's decoder", "seconds", minor=True),
)  # fmt: skip


def measures_of(own: Iterable[str], *, masked: bool) -> tuple[Measure, ...]:
    """The measures of a sweep; `own` are the names of the caller's metrics, `masked` if it has masks."""
    built_in = [one for one in MEASURES if masked or not one.name.startswith(("inside_", "outside_"))]
    return (*built_in, *(Measure(name, name, "", 1, 3, "a metric of the spec's", "own") for name in own))
