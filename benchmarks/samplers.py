"""The samplers and schedules at few predictions: `python -m benchmarks.samplers [--count 60] [--out docs]`.

The embedded model's edits under every sampler, at the same numbers of predictions: how many the oracle
accepts, and how far they are from the same edits in 100 steps of Euler's. Prints Markdown tables; --out also
replaces those of samplers.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import qwenedit
from benchmarks.mini_cases import BATCH, SCALE, Case, cases, verdicts_of
from benchmarks.report import out_folder, renew, table
from qwenedit.ablation.metrics import psnr
from qwenedit.mini.scenes import DETERMINED
from qwenedit.mini.shapes import draw
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.samplers import SAMPLERS
from qwenedit.switches import Switches

PREDICTIONS = (4, 8, 16, 32)
EXACT = 100  # steps of the edits that are compared with
ONCE_A_STEP = ("euler", "dpmpp_2m", "unipc")  # predictions; these draw nothing anew
SCHEDULES = ("official", "lightning", "karras", "exponential", "beta")


def edits(pipe: QwenImageEdit, todo: list[Case], steps: int, **options: Any) -> Tensor:
    """The edited pictures (N, 3, 64, 64); each case has its own noise, the same in every setting."""
    pictures = []
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        pictures.append(
            pipe.edit(
                [draw(case.scene) for case in part], [case.prompt for case in part], generator=generators,
                num_inference_steps=steps, true_cfg_scale=SCALE, output_type="pt", **options,
            ).images
        )  # fmt: skip
    return torch.cat(pictures)


def measured(todo: list[Case], pictures: Tensor, exact: Tensor) -> str:
    """The share of successes, and the median distance from the exact edits in dB."""
    success = statistics.fmean(verdict.success for verdict in verdicts_of(todo, pictures))
    distance = statistics.median(psnr(x, y) for x, y in zip(pictures, exact, strict=True))
    return f"{success:.0%}, {distance:.1f} dB"


def compared(names: tuple[str, ...], cell: Callable[[str, int], str]) -> str:
    rows = [[name, *(cell(name, count) for count in PREDICTIONS)] for name in names]
    return table(["", *(f"{count} predictions" for count in PREDICTIONS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="number of edits (default: 60)")
    parser.add_argument(
        "--out", type=partial(out_folder, renews="samplers.md"), metavar="FOLDER",
        help="replace the tables of samplers.md",
    )  # fmt: skip
    options = parser.parse_args()
    pipe = qwenedit.load(device="cpu", progress=False)
    todo = cases(options.count, DETERMINED, seed="samplers")
    exact = edits(pipe, todo, EXACT)
    said = f"{options.count} edits; {EXACT} steps of Euler's: {measured(todo, exact, exact).split(',')[0]}."

    @cache  # tables share rows
    def cell(sampler: str, count: int, schedule: str = "official") -> str:
        steps = count // 2 if sampler == "heun" else count
        switches = Switches.from_flat({"time.sigmas": schedule})
        return measured(todo, edits(pipe, todo, steps, sampler=sampler, switches=switches), exact)

    tables = {
        "count": said,
        "samplers": compared(tuple(SAMPLERS), cell),
        "lightning": compared(ONCE_A_STEP, partial(cell, schedule="lightning")),
        "schedules": compared(SCHEDULES, lambda name, count: cell("euler", count, schedule=name)),
    }
    print("\n\n".join(tables.values()))
    if options.out is not None:
        renew(options.out / "samplers.md", tables)


if __name__ == "__main__":
    main()
