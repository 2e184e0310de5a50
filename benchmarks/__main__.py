"""Ours and the reference side by side: `python -m benchmarks [--only NAME] [--rounds N] [--out FOLDER]`.

On the accelerator if there is one, or on --device; on CUDA with a table of the memory modes (modes.py).

Both sides get the same weights and inputs and run in turn, each in its own process; outputs that disagree are
an error. Prints a table of ratios with device, versions and threads; --out also writes speed.md, speed.json,
speed.png and growth.png. Needs the test extras.

The sides' processes import this file again, so imports that they must not pay for stand inside functions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.frame import Comparison, Setting
from benchmarks.report import document, growth_plot, machine_of, markdown, out_folder, plot
from benchmarks.sides import compare


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(":")[0])
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--device", help="default: the accelerator if there is one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after so many")
    parser.add_argument("--out", type=out_folder, metavar="FOLDER", help="write the table and plots there")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads: wanted at least 1")
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # of the sides
    comparisons: list[Comparison] = []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            setting = setting_of(options.threads, Path(folder), options.device)
        except ValueError as error:
            parser.error(str(error))
        written: set[str] = set()
        for name in options.only or CASES:
            if not setting.device.startswith(CASES[name].needs):
                print(f"{name}: skipped, it needs {CASES[name].needs}", file=sys.stderr, flush=True)
                continue
            start = time.perf_counter()
            if start - begun > 60 * options.minutes:
                print(
                    f"{name}: skipped, the {options.minutes:g} minutes are over", file=sys.stderr, flush=True
                )
                continue
            write_files(name, setting.folder, written)
            comparisons += compare(CASES[name], setting, options.rounds)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        machine = machine_of(setting)
        text = markdown(CASES, comparisons, machine, options.rounds)
        if setting.device == "cuda" and time.perf_counter() - begun < 60 * options.minutes:
            text += "\n" + memory_modes(setting)
    print(text, end="")
    if options.out:
        (options.out / "speed.md").write_text(text)
        rows = document(comparisons, machine, options.rounds)
        (options.out / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")
        plot(comparisons).save(options.out / "speed.png")
        if growth := growth_plot(CASES, comparisons):
            growth.save(options.out / "growth.png")


def setting_of(threads: int, folder: Path, device: str | None = None) -> Setting:
    """The setting of a run: float32 on the CPU, bfloat16 on an accelerator.

    Raises:
        ValueError: there is no such device.
    """
    from qwenedit.checks import device_of

    device = device_of(device).type
    return Setting(device, "float32" if device == "cpu" else "bfloat16", threads, folder)


def memory_modes(setting: Setting) -> str:
    """The table of the memory modes."""
    from benchmarks import modes
    from tests.sparse import write_sparse

    folder = write_sparse(setting.folder / "modes", blocks=modes.BLOCKS)
    return modes.markdown(modes.measured(folder, setting.device))


def write_files(name: str, folder: Path, written: set[str]) -> None:
    """Write the checkpoints that a case reads, except those written before."""
    from benchmarks.files import WRITERS

    for file in CASES[name].files:
        if file not in written:
            written.add(file)
            WRITERS[file](folder)


if __name__ == "__main__":
    main()
