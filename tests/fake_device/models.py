"""The official checkpoints on the fake device: what a user's call does, stage by stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

import qwenedit
import qwenedit.encoding.encode as encoding
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.latents import Grid
from qwenedit.memory.plan import STAGES
from qwenedit.memory.train_plan import Training
from qwenedit.training.loop import Weights, adamw
from qwenedit.training.loss import TrainingBatch, flow_matching_loss, freeze_unreached
from tests.fake_device.device import FakeDevice, fake_device

# By the folders of tests/data/official_configs.json: the most input pictures that its model card shows.
PICTURES = {
    "Qwen-Image": 0, "Qwen-Image-Edit": 1, "Qwen-Image-Edit-2509": 3, "Qwen-Image-Edit-2511": 2,
    "Qwen-Image-Layered": 1,
}  # fmt: skip
PROMPT = (
    "把圆形变成红色, and put the small blue square between both of them, on a field of grass in the evening"
)
STEPS = 2


@dataclass
class Seen:
    """One stage: the peak in bytes, the results by place, device and dtype, and the waits."""

    peak: int
    placed: Counter[tuple[str, str, torch.dtype]]
    waits: list[str]


@dataclass
class Ran:
    """A whole call: its stages, the waits up to each step, and what came out."""

    stages: dict[str, Seen] = field(default_factory=dict)
    waits: list[int] = field(default_factory=list)
    images: Any = None


def load(folder: Path, kind: str = "cuda", **options: Any) -> qwenedit.QwenImageEdit:
    """`qwenedit.load` on the fake device, which must be there."""
    return qwenedit.load(folder, device=kind, progress=False, **{"residency": "resident", **options})


def picture(variant: str) -> Image.Image:
    side = 640 if "Layered" in variant else 1024
    return Image.new("RGB", (side, side), "white")


def conditioning(
    grids: tuple[tuple[Grid, ...], ...] = (((1, 64, 64),),),
    lengths: tuple[int, int] = (240, 225),
    dtype: torch.dtype = torch.bfloat16,
    target: Grid = (1, 64, 64),
    kind: str = "cuda",
) -> Conditioning:
    """That of a run on the fake device: a row for each tuple of its references' grids.

    `lengths` are the tokens of the prompts and of the negative prompts; those of later rows are shorter.
    """

    def prompt(length: int) -> Prompt:
        embeds = torch.empty(len(grids), length, 3584, dtype=dtype, device=kind)
        ends = torch.arange(length, length - len(grids), -1, device=kind)
        mask = torch.arange(length, device=kind) < ends[:, None]
        return Prompt(embeds, mask if len(grids) > 1 else None)

    return Conditioning(
        prompt=prompt(lengths[0]),
        negative=prompt(lengths[1]),
        target_grid=target,
        reference_latents=tuple(
            tuple(torch.empty(math.prod(grid), 64, dtype=dtype, device=kind) for grid in row) for row in grids
        ),
        reference_grids=grids,
    )


def run(pipe: qwenedit.QwenImageEdit, device: FakeDevice, variant: str, **options: Any) -> Ran:
    """Generate, edit or decompose with as many pictures as the variant takes, noting every stage."""
    ran, given = Ran(), {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "pt", **options}
    pictures = [picture(variant)] * given.pop("pictures", PICTURES[variant])
    with noted(pipe, device, ran):
        if pipe.variant.layered:
            ran.images = pipe.decompose(pictures[0], **given).images
        elif not pictures:
            ran.images = pipe.generate(**given).images
        else:
            several = pipe.variant.max_pictures != 1
            ran.images = pipe.edit(pictures if several else pictures[0], **given).images
        end(ran, device, STAGES[3])
    return ran


@contextmanager
def noted(pipe: qwenedit.QwenImageEdit, device: FakeDevice, ran: Ran) -> Iterator[None]:
    """Note where one stage of a call ends and the next begins."""
    encode_pictures, decode, sampled = encoding.encode_pictures, type(pipe).decode, type(pipe)._sampled

    def encoded(*args: Any) -> Any:
        end(ran, device, STAGES[0])
        latents = encode_pictures(*args)
        end(ran, device, STAGES[1])
        return latents

    def stepped(*args: Any) -> Any:
        for step in sampled(*args):
            ran.waits.append(len(device.waits))
            yield step

    def decoded(*args: Any) -> Any:
        end(ran, device, STAGES[2])
        return decode(*args)

    device.fresh()
    with (
        mock.patch.object(encoding, "encode_pictures", encoded),
        mock.patch.object(type(pipe), "_sampled", stepped),
        mock.patch.object(type(pipe), "decode", decoded),
    ):
        yield


def end(ran: Ran, device: FakeDevice, stage: str) -> None:
    ran.stages[stage] = Seen(device.peak, device.placed.copy(), device.waits.copy())
    device.fresh()


def training_batch(
    grids: tuple[tuple[Grid, ...], ...], dtype: torch.dtype = torch.bfloat16, weighted: bool = False
) -> TrainingBatch:
    """Of 1024 x 1024 pixels, on the device that "meta" stands for; a row for each tuple of references."""
    latents = torch.empty(len(grids), 4096, 64, dtype=dtype, device="meta")
    return TrainingBatch(
        conditioning=conditioning(grids, dtype=dtype, kind="meta"),
        latents=latents,
        sigma=torch.full((len(grids),), 0.5, device="meta"),
        noise=torch.empty_like(latents),
        weight=torch.ones(len(grids), 4096, device="meta") if weighted else None,
    )


def training_peak(
    folder: Path, training: Training, checkpointing: bool, dtype: torch.dtype | None = None
) -> int:
    """The most bytes in a training step of edits with one picture, the second, when all moments are there."""
    with fake_device("meta") as device:
        pipe = load(folder, "meta", text_encoder=False, dtype=dtype)
        if training.lora:
            pipe.add_lora(rank=training.rank, targets=training.targets)
        else:
            pipe.mmdit.requires_grad_(True)
        freeze_unreached(pipe.mmdit)
        pipe.mmdit.train().checkpointing = checkpointing
        live = {name: x for name, x in pipe.mmdit.named_parameters() if x.requires_grad}
        weights = Weights(live, adamw(1e-4), 0.99 if training.ema else None)
        batch = training_batch((((1, 64, 64),),) * training.batch, pipe.dtype)
        for step in range(2):
            device.fresh()
            flow_matching_loss(pipe, batch).backward()
            weights.collect()
            weights.step(1.0, step, 1.0)
        return device.peak
