"""Means over runs with bootstrap intervals, paired differences to the unablated run, and the noise floor.

A run is one edit (pictures and a prompt) from one seed under one setting. Runs of one edit from several seeds
are no independent samples, so whole edits are resampled, each with all of its seeds; if there is only one
edit, its seeds are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from qwenedit.ablation.labels import values_text
from qwenedit.ablation.measures import Measure
from qwenedit.ablation.results import Sweep

__all__ = [
    "LEVEL", "RESAMPLES", "Estimate", "Place", "compared", "differences", "estimate", "estimates",
    "noise_floor", "values",
]  # fmt: skip

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0  # of the resampling: the same results have the same intervals

Place = tuple[int, int]  # of a run under its setting: edit, seed


class Estimate(NamedTuple):
    """A mean with its interval, of `n` runs (or pairs of runs) of so many edits.

    `value` is None if nothing was measured, `low` and `high` if there is nothing to resample: one run.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    edits: int


def estimate(of_runs: Mapping[Place, float]) -> Estimate:
    """The mean of all runs, with the percentile bootstrap interval at `LEVEL`.

    Each of `RESAMPLES` resamples draws as many edits as there are, with replacement, and takes the mean of
    all of their runs; with one edit, runs are drawn. The interval goes from the quantile (1 - LEVEL) / 2 of
    these means to 1 - (1 - LEVEL) / 2, between neighbours by linear interpolation. Of few edits (below about
    ten) it is too narrow, as all bootstrap intervals are.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 (clusters) and 13.

    >>> estimate({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 6.0})
    Estimate(value=3.0, low=1.5, high=6.0, n=3, edits=2)
    """
    if not of_runs:
        return Estimate(None, None, None, 0, 0)
    edits = len({edit for edit, _ in of_runs})
    groups: dict[int, list[float]] = {}
    for place, value in of_runs.items():
        groups.setdefault(place[0 if edits > 1 else 1], []).append(value)
    mean = fmean(of_runs.values())
    if len(groups) < 2:
        return Estimate(mean, None, None, len(of_runs), edits)
    drawn = _drawn(len(groups))
    sums = torch.tensor([sum(group) for group in groups.values()], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in groups.values()], dtype=torch.float64)
    tail = (1 - LEVEL) / 2
    means = (drawn @ sums) / (drawn @ counts)
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high, len(of_runs), edits)


@functools.lru_cache(maxsize=2)
def _drawn(groups: int) -> Tensor:
    """(RESAMPLES, groups): how often each group is drawn."""
    drawn = torch.randint(groups, (RESAMPLES, groups), generator=torch.Generator().manual_seed(SEED))
    ones = torch.ones(RESAMPLES, groups, dtype=torch.float64)
    return torch.zeros(RESAMPLES, groups, dtype=torch.float64).scatter_add_(1, drawn, ones)


def values(sweep: Sweep, cell: int, measure: Measure) -> dict[Place, float]:
    """The numbers of a setting's runs that have one."""
    found = {
        (edit, seed): measure.of(record)
        for (edit, seed, at), record in sweep.records.items()
        if at == cell and record["status"] == "done"
    }
    return {place: value for place, value in found.items() if value is not None}


def estimates(sweep: Sweep, cell: int) -> dict[str, Estimate]:
    """The mean of each measure over a setting's runs."""
    return {one.name: estimate(values(sweep, cell, one)) for one in sweep.measures}


def differences(sweep: Sweep, cell: int) -> dict[str, Estimate]:
    """The mean difference of each measure to the unablated run of the same edit and seed.

    It has those measures alone that are a run's own: a distance to the unablated run is a comparison already.
    """
    found = {}
    for one in sweep.measures:
        if not one.to_unablated:
            plain, of_cell = values(sweep, 0, one), values(sweep, cell, one)
            pairs = {place: x - plain[place] for place, x in of_cell.items() if cell and place in plain}
            found[one.name] = estimate(pairs)
    return found


def noise_floor(sweep: Sweep) -> dict[str, Estimate]:
    """The unablated run against itself at another seed, of the same edit: each seed and the next one.

    The mean distance; for a run's own measures the mean of the absolute difference. An effect that is not
    above it may be luck of the seed.
    """
    last = len(sweep.spec.seeds) - 1
    found = {}
    for one in sweep.measures:
        if one.to_unablated:
            pairs = {
                (edit, seed): record["floor"][one.name]
                for (edit, seed, cell), record in sweep.records.items()
                if cell == 0 and record["status"] == "done" and record.get("floor")
            }
        else:
            plain = values(sweep, 0, one)
            after = {(edit, seed): (edit, seed + 1 if seed < last else 0) for edit, seed in plain}
            if last == 1:  # two seeds are one pair
                after = {place: other for place, other in after.items() if place[1] == 0}
            pairs = {
                place: abs(plain[other] - plain[place])
                for place, other in after.items()
                if other in plain and other != place
            }
        found[one.name] = estimate(pairs)
    return found


def compared(sweep: Sweep, cell: int) -> str:
    """A sentence for a setting's row of the summary: what it is of, and what it was compared with."""
    spec = sweep.spec
    done = [place[:2] for place, x in sweep.records.items() if place[2] == cell and x["status"] == "done"]
    runs = f"{_count(len(done), 'run')} of {_count(len({edit for edit, _ in done}), 'edit')}"
    if cell == 0:
        pairs = noise_floor(sweep)["psnr"]
        floor = (
            f"; the noise floor is that of {_count(pairs.n, 'pair')} of seeds of one edit"
            if pairs.n
            else "; there is no noise floor, which takes two seeds"
        )
        return f"The unablated run: {runs}{floor}."
    plain = {place[:2] for place, x in sweep.records.items() if place[2] == 0 and x["status"] == "done"}
    paired = len(plain & set(done))
    values = values_text(spec, 0)
    which = "all" if paired == len(done) else paired
    return (
        f"{runs}, {which} compared with the unablated run of the same edit and seed"
        f"{f' ({values})' if values else ''}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
