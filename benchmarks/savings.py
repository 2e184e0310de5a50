"""What a step could still save: `python -m benchmarks.savings [--out docs]`.

At the official size, counted: the share of a guided step's matrix products that the first block's image
queries, keys and values are. They could be computed once for both CFG branches, which have the same image
tokens before the first attention; and those of the references once a run under `zero_cond_t`, where no step
changes them. Measured: both branches as one batch of two rows, against one after the other.

Prints Markdown; --out replaces the tables of limits.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import qwenedit
from benchmarks.files import OFFICIAL
from benchmarks.report import out_folder, renew, table
from benchmarks.transformer import DEPTH, TEXT_LENGTH, grids_of
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig, RunCache

TARGET = 64 * 64  # tokens of 1024 x 1024 pixels
ROUNDS = 5


def counted(references: int) -> list[str]:
    """The shares of a guided step: once for both branches, references once a run, both."""
    config = MMDiTConfig(**{**OFFICIAL, "num_layers": DEPTH, "zero_cond_t": True})
    with torch.device("meta"):
        network = MMDiT(config)
        img, txt = torch.empty(1, (1 + references) * TARGET, 64), torch.empty(1, TEXT_LENGTH, 3584)
        timestep = torch.empty(1)
    grid, _ = grids_of(TARGET)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(img, txt, timestep, [grid] * (1 + references), cache=RunCache(), target_only=True)
    counts = counter.get_flop_counts()
    first = sum(sum(counts[f"MMDiT.blocks.0.attn.img_{name}"].values()) for name in "qkv")
    step = 2 * sum(counts["Global"].values())
    of_references = first * references / (1 + references)
    once_for_both, once_a_run = first / step, 2 * of_references / step
    both = (first + of_references) / step  # the references' share of the first is not saved twice
    return [str(references), *(f"{share:.2%}" for share in (once_for_both, once_a_run, both))]


def in_turn(one: Callable[[], object], other: Callable[[], object]) -> str:
    """The median ratio of the two times, and its range, from rounds in turn."""
    ratios = []
    for _ in range(ROUNDS + 1):
        seconds = []
        for call in (one, other):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    ratios = ratios[1:]  # the first round is for warming up
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def batched(network: MMDiT, side: int) -> str:
    """Two passes of one row over one pass of two rows: a reference of the target's size, no padding."""
    grid, generator = (1, side, side), torch.Generator().manual_seed(0)
    img, txt = (
        torch.randn(2, length, width, generator=generator)
        for length, width in (
            (2 * side * side, network.config.in_channels),
            (TEXT_LENGTH if network.config.width > 1000 else 40, network.config.joint_attention_dim),
        )
    )
    inputs = [(img[:1], txt[:1]), (img[1:], txt[1:]), (img, txt)]
    caches = [RunCache() for _ in inputs]

    def run(*numbers: int) -> None:
        for number in numbers:
            x, y = inputs[number]
            timestep = torch.full((x.shape[0],), 0.5)
            with torch.inference_mode():
                network(x, y, timestep, [grid, grid], cache=caches[number], target_only=True)

    return in_turn(lambda: run(0, 1), lambda: run(2))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.savings", description=__doc__.split(":")[0])
    parser.add_argument(
        "--out", type=partial(out_folder, renews="limits.md"), metavar="FOLDER",
        help="replace the tables of limits.md",
    )  # fmt: skip
    options = parser.parse_args()
    shares = table(
        ["references of the target's size", "once for both branches", "references once a run", "both"],
        [counted(references) for references in (1, 2, 3)],
    )
    config = MMDiTConfig(**{**OFFICIAL, "num_layers": 1})
    torch.manual_seed(0)
    wide, mini = MMDiT(config).eval(), qwenedit.load(device="cpu", progress=False).mmdit
    rows = [["the embedded model, 16 + 16 image tokens", batched(mini, 4)]]
    rows += [
        [f"one block at full width, {side * side} + {side * side} image tokens", batched(wide, side)]
        for side in (16, 32)
    ]
    ratios = table(["", "two passes / one batch, time"], rows)
    print(f"{shares}\n\n{ratios}")
    if options.out is not None:
        renew(options.out / "limits.md", {"shares": shares, "batch": ratios})


if __name__ == "__main__":
    main()
