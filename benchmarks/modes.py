"""Every memory mode of one edit: its peak beside the plan's, and its step beside the bound of its transfers.

The checkpoint has the official widths and weights of zeros; a cut depth keeps it short, and counts for all
modes alike. A streamed step cannot be faster than the copies of its blocks from pinned memory.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import qwenedit
from benchmarks.frame import wait, watched
from benchmarks.report import table
from qwenedit.memory.plan import plan
from qwenedit.memory.residency import Modes
from qwenedit.memory.sizes import NetworkSize, network_sizes
from qwenedit.weights.loading import compare_networks

BLOCKS = {"transformer": 12, "language": 8, "vision": 8}
STEPS = 4
COPY = 1 << 28  # bytes of a copy whose rate is measured
HEAD = ("mode", "planned peak, GiB", "peak, GiB", "step, s", "transfers of a step, s", "share")


@dataclass(frozen=True)
class Measured:
    """One mode: bytes planned and taken, seconds of a step, and of its copies alone (None: none)."""

    mode: Modes
    planned: int
    peak: int
    step: float
    copies: float | None


def measured(folder: Path, device: str, side: int = 1024, dtype: str | None = None) -> list[Measured]:
    """All planned modes of a checkpoint, at a size in pixels."""
    on_host = {"device": device} if device == "cpu" else {"device_memory": "200GiB"}
    planned = plan(folder, **on_host, dtype=dtype, height=side, width=side, pictures=1, steps=STEPS).peaks
    (compared,) = compare_networks(folder, ["transformer"])
    named = None if dtype is None else getattr(torch, dtype)
    size = network_sizes({"transformer": compared.found}, named)["transformer"]
    rate = None if device == "cpu" else copy_rate(device)
    return [one_of(folder, device, side, dtype, mode, peaks, size, rate) for mode, peaks in planned.items()]


def one_of(
    folder: Path,
    device: str,
    side: int,
    dtype: str | None,
    mode: Modes,
    planned: dict[str, int],
    size: NetworkSize,
    rate: float | None,
) -> Measured:
    picture = Image.new("RGB", (side, side), "grey")
    with watched(device) as grown, torch.no_grad():
        pipe = qwenedit.load(
            folder, device=device, dtype=dtype, residency=mode.residency, modulation=mode.modulation,
            storage=mode.storage, progress=False,
        )  # fmt: skip
        pipe.check_finite = False  # weights of zeros make guidance 0 / 0
        conditioning = pipe.condition(picture, "make it blue", height=side, width=side)
        seconds = []
        wait(device)
        start = time.perf_counter()
        for step in pipe.steps(conditioning, num_inference_steps=STEPS):
            latents = step.after
            wait(device)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        pipe.decode(latents, conditioning.target_grid)
        wait(device)
        peak = grown()
    del pipe, conditioning, step, latents
    gc.collect()
    return Measured(mode, max(planned.values()), peak, min(seconds[1:]), copies_of(mode, size, rate))


def copies_of(mode: Modes, size: NetworkSize, rate: float | None) -> float | None:
    """Seconds that the copies of a guided step's blocks take at the rate of pinned memory."""
    if mode.residency != "stream" or rate is None:
        return None
    gone = mode.modulation == "precomputed"
    return 2 * sum(block.all - block.modulation * gone for block in size.blocks.values()) / rate


def copy_rate(device: str) -> float:
    """Bytes a second from pinned memory to the device: the best of five copies."""
    there = torch.empty(COPY, dtype=torch.uint8, device=device)
    here = torch.zeros(COPY, dtype=torch.uint8, pin_memory=True)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        there.copy_(here, non_blocking=True)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return COPY / min(seconds[1:])


def markdown(found: list[Measured]) -> str:
    rows = []
    for one in found:
        copies = ["", ""] if one.copies is None else [f"{one.copies:.3g}", f"{one.copies / one.step:.0%}"]
        sizes = [f"{x / 2**30:.2f}" for x in (one.planned, one.peak)]
        rows.append([str(one.mode), *sizes, f"{one.step:.3g}", *copies])
    cut = ", ".join(f"{count} {what} blocks" for what, count in BLOCKS.items())
    return (
        f"Memory modes at 1024 pixels with one picture, official widths cut to {cut}, weights of zeros. A "
        "streamed step's share is that of its copies from pinned memory alone, at the rate measured in the "
        f"same run.\n\n{table(HEAD, rows)}\n"
    )
