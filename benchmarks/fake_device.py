"""Planned peaks of memory beside those of a device that is not there: `python -m benchmarks.fake_device`.

Whole edits and training steps at the official size with all blocks, in every mode that is planned, on
tests/fake_device, whose storages are real and data are not. Prints the tables of docs/memory.md; --write puts
them there. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import table
from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from qwenedit.memory.train_plan import Training, train_plan
from tests.fake_device import models
from tests.fake_device.device import fake_device
from tests.sparse import write_sparse

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MARKS = "<!-- peaks: python -m benchmarks.fake_device --write -->\n", "<!-- end of peaks -->\n"
MODES_OF = "Qwen-Image-Edit-2511"  # the variant that is run in every mode, the others are resident
PICTURES = {**models.PICTURES, MODES_OF: 1}
STEPS = 1  # all steps have the same peak
TRAININGS = (
    Training(lora=True),
    Training(lora=True, batch=4),
    Training(lora=True, targets="musubi"),
    Training(lora=False),
    Training(lora=False, batch=4, ema=True),
)
TRAINING_MARKS = MARKS[0].replace("peaks", "training"), MARKS[1].replace("peaks", "training")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fake_device", description=__doc__.split(":")[0]
    )
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    for marks, text in ((MARKS, markdown(list(rows()))), (TRAINING_MARKS, training_table())):
        print(text)
        if options.write:
            PAGE.write_text(replaced(PAGE.read_text(), text, marks))


def rows() -> Iterator[list[str]]:
    for variant in PICTURES:
        with tempfile.TemporaryDirectory() as name:
            folder = write_sparse(name, variant)
            planned = planned_peaks(folder, variant)
            for mode in planned if variant == MODES_OF else [Modes("resident")]:
                print(f"{variant}, {mode}", file=sys.stderr, flush=True)
                yield row(variant, mode, planned[mode], peaks(folder, variant, mode))


def planned_peaks(folder: Path, variant: str) -> dict[Modes, dict[str, int]]:
    pictures, side = PICTURES[variant], 640 if "Layered" in variant else 1024
    made = plan(folder, device_memory="200GiB", pictures=pictures, steps=STEPS, height=side, width=side)
    return made.peaks


def peaks(folder: Path, variant: str, mode: Modes) -> dict[str, int]:
    with fake_device() as device:
        pipe = models.load(folder, residency=mode.residency, modulation=mode.modulation, storage=mode.storage)
        ran = models.run(pipe, device, variant, pictures=PICTURES[variant], num_inference_steps=STEPS)
    return {stage: seen.peak for stage, seen in ran.stages.items()}


def row(variant: str, mode: Modes, planned: dict[str, int], got: dict[str, int]) -> list[str]:
    pictures = PICTURES[variant]
    what = f"{variant}, {pictures} picture{'s' * (pictures != 1)}" if pictures else variant
    return [what, str(mode), *(f"{planned[x] / 2**30:.2f} / {got[x] / 2**30:.2f}" for x in STAGES)]


def markdown(found: list[list[str]]) -> str:
    return table(["checkpoint", "mode", *STAGES], found) + "\n"


def training_table() -> str:
    """Of `MODES_OF`: the columns are without and with activation checkpointing."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_sparse(name, MODES_OF)
        found = []
        for training in TRAININGS:
            print(training, file=sys.stderr, flush=True)
            got = {way: models.training_peak(folder, training, way) for way in (False, True)}
            found.append(training_row(folder, training, got))
    return table(["what trains", "all activations kept", "activation checkpointing"], found) + "\n"


def training_row(folder: Path, training: Training, got: dict[bool, int]) -> list[str]:
    peaks = train_plan(folder, training, device_memory="200GiB").peaks
    cells = (f"{peaks[way]['training step'] / 2**30:.2f} / {got[way] / 2**30:.2f}" for way in peaks)
    return [str(training), *cells]


def replaced(page: str, text: str, marks: tuple[str, str] = MARKS) -> str:
    """The page with the text between the marks."""
    start, end = map(re.escape, marks)
    return re.sub(f"({start}).*({end})", lambda found: found[1] + text + found[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    main()
