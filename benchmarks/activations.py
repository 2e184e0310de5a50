"""A data set of activations: `python -m benchmarks.activations [--edits 200] [--out docs]`.

Held-out edits of the embedded model, recorded into a folder of rows: time beside the plain run, memory, size
on disk, and what a probe and a sparse autoencoder find in them. --out renews docs/activations.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import qwenedit
from benchmarks.masks import LOCAL, mask_of
from benchmarks.mini_cases import Case, cases
from benchmarks.report import out_folder, table
from qwenedit.ablation.metrics import pixels
from qwenedit.files import replacing_file
from qwenedit.instruments.activations import Activations
from qwenedit.instruments.records import Recorder
from qwenedit.mini.pairs import CELLS
from qwenedit.mini.shapes import SIDE, draw
from qwenedit.pipeline import QwenImageEdit
from qwenedit.taps import taps

BLOCKS, STEPS = range(1, 6), 20
START = "## Measured"  # the page's section that is made here
PARTS = 4  # in which the edits are run, in turns with the plain run


def record(pipe: QwenImageEdit, todo: list[Case], folder: Path) -> None:
    recorder = Recorder(to=folder, tokens="all", dtype=torch.bfloat16, sample=20)
    with recorder, taps(pipe.mmdit, {"blocks.{1..5}.img_out": recorder}):
        for number, case in enumerate(todo):
            if (name := f"edit {number}") not in recorder.edits:
                with recorder.edit(name):
                    generator = torch.Generator().manual_seed(number)
                    pipe.edit(draw(case.scene), case.prompt, num_inference_steps=20, generator=generator)


def autoencoder(data: Activations, features: int = 512) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    up, down = torch.nn.Linear(data.width, features), torch.nn.Linear(features, data.width)
    optimiser = torch.optim.Adam([*up.parameters(), *down.parameters()], lr=3e-3)
    batches = BatchSampler(RandomSampler(data), batch_size=256, drop_last=True)
    for rows in DataLoader(data, batch_size=None, sampler=batches):
        x, active = rows.x.float(), torch.relu(up(rows.x.float()))
        loss = (down(active) - x).pow(2).sum(1).mean() + 3 * active.abs().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return up, down


def probe(data: Activations, labels: Tensor) -> float:
    rows = data[:]  # labels (edits, positions): 1.0 or 0.0
    x, y = rows.x.float(), labels[rows.edit, rows.position]
    x, held_out = (x - x.mean(0)) / x.std(0), rows.edit % 4 == 0
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x[~held_out] @ weight[1:] + weight[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[~held_out])
        value = value + 1e-3 * weight.pow(2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    right = (x[held_out] @ weight[1:] + weight[0] > 0) == (y[held_out] > 0.5)
    return float(right.float().mean())


def changed(todo: list[Case]) -> Tensor:
    """(edits, tokens of the target): 1 where the right picture differs from the given one."""
    cell = SIDE // CELLS
    masks = torch.stack([pixels(mask_of(case))[0] for case in todo]).float()
    return masks[:, cell // 2 :: cell, cell // 2 :: cell].flatten(1)


def plain_run(pipe: QwenImageEdit, todo: list[Case]) -> None:
    for case in todo:
        pipe.edit(draw(case.scene), case.prompt, num_inference_steps=STEPS)


def seconds_of(run: object, *arguments: object) -> float:
    start = time.process_time()
    run(*arguments)  # type: ignore[operator]
    return time.process_time() - start


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edits", type=int, default=200, help="edits (default: 200)")
    parser.add_argument(
        "--out", type=partial(out_folder, renews="activations.md"), metavar="FOLDER",
        help="renew activations.md there",
    )  # fmt: skip
    options = parser.parse_args()
    torch.manual_seed(0)
    pipe = qwenedit.load(device="cpu", progress=False)
    pipe.progress = False
    todo = cases(options.edits, LOCAL, seed="activations")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "activations"
        text = measured(pipe, todo, home)
    print(text)
    if options.out is not None:
        page = options.out / "activations.md"
        head = page.read_text(encoding="utf-8").partition(START)[0]
        with replacing_file(page) as temporary:
            temporary.write_text(head + START + "\n\n" + text + "\n", encoding="utf-8")


def measured(pipe: QwenImageEdit, todo: list[Case], folder: Path) -> str:
    """The page's last section."""
    plain_run(pipe, todo[:2])
    with taps(pipe.mmdit, {"velocity": lambda *_: None}):  # imports what taps need
        plain_run(pipe, todo[:1])
    part = len(todo) // PARTS
    plain, recorded, peaks = 0.0, 0.0, []
    for stop in range(part, len(todo) + 1, part):
        plain += seconds_of(plain_run, pipe, todo[stop - part : stop])
        recorded += seconds_of(record, pipe, todo[:stop], folder)
        peaks.append(peak())
    data = Activations(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    values = len(data) * data.width * data.dtype.itemsize / 2**20
    rows = [
        ["rows", f"{len(data):,} of {data.width}, {str(data.dtype).removeprefix('torch.')}"],
        ["on disk", f"{size:.0f} MiB, of which the index {size - values:.0f}"],
        ["CPU seconds an edit, plain", f"{plain / len(todo):.3f}"],
        ["recorded", f"{recorded / len(todo):.3f}: {recorded / plain:.2f} times"],
        [f"peak of memory after {part} edits, after {len(todo)}", f"{peaks[0]:.0f} MiB, {peaks[-1]:.0f} MiB"],
    ]
    target, labels = data.where(group="target", branch="cond"), changed(todo)
    accuracies = [
        [f"step {step}", *(f"{probe(target.where(block=k, step=step), labels):.2f}" for k in BLOCKS)]
        for step in (0, STEPS // 2, STEPS - 1)
    ]
    deep = data.where(block=3)
    up, down = autoencoder(deep)
    with torch.no_grad():
        x = deep[:].x.float()
        active = torch.relu(up(x))
        left = float((down(active) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
        used = float((active > 0).float().sum(1).mean())
    parts = [
        f"Made by `python -m benchmarks.activations --out docs`: {len(todo)} held-out edits of the embedded "
        f"model, {STEPS} steps with guidance, five blocks; torch {torch.__version__}, {platform.machine()}.",
        table(["", ""], rows),
        "`probe`: does a target token lie where the right picture differs from the given one? Accuracy on a "
        f"quarter of the edits, which the probe did not see; {labels.mean():.0%} of the tokens do.",
        table(["", *(f"block {k}" for k in BLOCKS)], accuracies),
        f"`autoencoder`, block 3, {len(deep):,} rows once: of {active.shape[1]} features {used:.0f} are "
        f"active in a token, and {1 - left:.0%} of the variance is explained.",
    ]
    return "\n\n".join(part if part.startswith("|") else textwrap.fill(part, 120) for part in parts)


if __name__ == "__main__":
    main()
