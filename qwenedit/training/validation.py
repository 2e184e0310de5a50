"""What is looked at while weights train: the loss of rows that are held out, and a sheet of edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Generator

from qwenedit.files import replacing_file
from qwenedit.instruments.sheet import sheet
from qwenedit.pipeline import QwenImageEdit
from qwenedit.training.cache import Cache, Wanted
from qwenedit.training.conventions import Convention, Weighting
from qwenedit.training.data import Row, picture_of
from qwenedit.training.loss import TrainingBatch, flow_matching_loss
from qwenedit.training.spec import Validation

__all__ = ["held_out_losses", "sheet_of", "wanted_by"]

_SIDE = 256  # pixels of a picture on the sheet


def wanted_by(validation: Validation, rows: Sequence[Row]) -> list[Wanted]:
    """What is to be encoded for the rows."""
    return [Wanted(row, (_prompts(validation, row),), image=row.image is not None) for row in rows]


def _prompts(validation: Validation, row: Row) -> tuple[str, str | None]:
    """A row's caption and, for a guided edit, the negative prompt."""
    guided = validation.true_cfg_scale > 1
    return row.entry.caption, validation.negative_prompt if guided else None


@torch.no_grad()
def held_out_losses(
    pipe: QwenImageEdit, validation: Validation, cache: Cache, rows: Sequence[Row], convention: Convention
) -> dict[str, Any]:
    """The mean loss of the rows that have an image, at each noise level and over all.

    A row's noise is always the same, also at each level. The convention's weighting is left out, and the
    latents are the posterior's mode.
    """
    plain = dataclasses.replace(convention, weighting=Weighting())
    rows = [row for row in rows if row.image is not None]
    losses: dict[float, list[float]] = {sigma: [] for sigma in validation.sigmas}
    for number, row in enumerate(rows):
        conditioning = cache.conditioning(row, *_prompts(validation, row))
        latents = cache.latents(row)[0][None]
        generator = Generator().manual_seed(validation.seed + number)
        noise = torch.randn(latents.shape, generator=generator).to(latents.dtype)
        weight = None if row.weight is None else row.weight[None]
        for sigma, found in losses.items():
            batch = TrainingBatch(
                conditioning=conditioning, latents=latents, sigma=torch.tensor([sigma]), noise=noise,
                weight=weight,
            )  # fmt: skip
            found.append(float(flow_matching_loss(pipe, batch, plain)))
    if not rows:
        return {}
    means = {f"{sigma:g}": sum(found) / len(found) for sigma, found in losses.items()}
    return {"validation": sum(means.values()) / len(means), "by_sigma": means}


def sheet_of(
    pipe: QwenImageEdit, validation: Validation, cache: Cache, rows: Sequence[Row], file: Path | None
) -> None:
    """Run the rows' edits, and write a picture: for each its controls, the result and, if there is one, the
    image that was wanted.
    """
    lines = []
    for number, row in enumerate(rows):
        conditioning = cache.conditioning(row, *_prompts(validation, row))
        made = pipe.sample(
            conditioning,
            num_inference_steps=validation.steps,
            true_cfg_scale=validation.true_cfg_scale,
            generator=Generator().manual_seed(validation.seed + number),
        )
        wanted = [] if row.entry.image is None else [picture_of(row.entry.image)]
        pictures = [*map(picture_of, row.entry.controls), *made.images, *wanted]
        lines.append((row.entry.caption, [_fitted(one) for one in pictures]))
    if file is None:  # another process writes it
        return
    with replacing_file(file) as temporary:
        sheet(lines, scale=1).save(temporary)


def _fitted(picture: Image.Image) -> Image.Image:
    """In a white square; small pictures are enlarged so that every pixel stays one."""
    larger = max(picture.size) > _SIDE
    method = Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
    return ImageOps.pad(picture.convert("RGB"), (_SIDE, _SIDE), method, color="white")
