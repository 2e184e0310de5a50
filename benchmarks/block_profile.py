"""The time of one inner block by kinds of operation: `python -m benchmarks.block_profile [--out docs]`.

Our block as a step runs it, then the reference's, at full width. Times are torch's profiler's, medians over
rounds. --out replaces the table of limits.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.__main__ import setting_of
from benchmarks.files import write_transformer
from benchmarks.report import machine_of, out_folder, renew, table
from benchmarks.transformer import block_ours, block_reference

# An operation is of the first kind with a word that is in its name, or else elementwise.
KINDS = {
    "attention": ("scaled_dot_product", "attention", "softmax"),
    "matrix products": ("mm", "linear", "matmul", "gemm"),
    "GELU": ("gelu",),
    "norms": ("layer_norm", "rms_norm", "rsqrt", "mean", "pow"),
    "copies": ("copy", "cat", "clone", "contiguous", "stack", "fill", "zero", "empty"),
}
ELEMENTWISE = "elementwise"
SIDES = {"ours": block_ours, "reference": block_reference}


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), ELEMENTWISE)


def profiled(call: Callable[[], object], device: str) -> Counter[str]:
    """Milliseconds of one call by kind; an operation's time excludes the operations that it calls."""
    on_device = device != "cpu"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    with profile(activities=activities) as profiler:
        call()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        time = event.self_device_time_total if on_device else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            spent[kind_of(event.key)] += time / 1000
    return spent


def rounds_of(call: Callable[[], object], device: str, rounds: int) -> list[Counter[str]]:
    call()
    return [profiled(call, device) for _ in range(rounds)]


def table_of(sides: dict[str, list[Counter[str]]]) -> str:
    """Milliseconds and shares of each side."""
    head, rows = ["kind"], {kind: [kind] for kind in (*KINDS, ELEMENTWISE, "all")}
    for side, rounds in sides.items():
        head += [f"{side}, ms", f"{side}, %"]
        middle = {kind: median(one[kind] for one in rounds) for kind in (*KINDS, ELEMENTWISE)}
        middle["all"] = sum(middle.values())
        for kind, ms in middle.items():
            rows[kind] += [f"{ms:.1f}", f"{ms / middle['all']:.1%}"]
    return table(head, list(rows.values()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block_profile", description=__doc__.split(":")[0]
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, help="of the target and of the reference picture each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument(
        "--out", type=partial(out_folder, renews="limits.md"), metavar="FOLDER",
        help="replace the table of limits.md",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if min(options.tokens, options.rounds, options.threads) < 1:
        parser.error("--tokens, --rounds and --threads: wanted at least 1")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options.threads, Path(folder))
        write_transformer(setting.folder)
        spent = {
            name: rounds_of(side(setting)(options.tokens), setting.device, options.rounds)
            for name, side in SIDES.items()
        }
        machine = machine_of(setting)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + ".\n")
    print(f"{options.tokens} tokens of the target and as many of the reference picture.\n")
    text = table_of(spent)
    print(text)
    if options.out is not None:
        renew(options.out / "limits.md", {"block": text})


if __name__ == "__main__":
    main()
