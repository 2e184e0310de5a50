"""A stage of its own for the vision tower: name the shapes and colours in each cell of a picture.

Within the second stage the tower sees too few pictures to learn what tells a star from a triangle; by itself
it sees some thousand a second.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenedit.inputs.processor import Processor
from qwenedit.mini.pairs import BLOCK, CELLS, contents, patches
from qwenedit.mini.scenes import COLOURS, KINDS, paint, scenes
from qwenedit.mini.training import Run, Weights, learning_rate
from qwenedit.networks.vision_tower import VisionTower
from qwenedit.taps import taps

__all__ = ["train_tower"]

BLOCKS = 128  # of pictures, held at a time; one comes and one goes each step


def block(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """(BLOCK, 3, 64, 64) uint8 pictures and what lies in their cells, (BLOCK, 16, kinds + colours)."""
    rng = Random(f"{seed} tower {number}")
    drawn = list(islice(scenes(rng), BLOCK))
    pixels = (torch.stack([paint(scene) for scene in drawn]).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels, torch.tensor([contents(scene) for scene in drawn])


def train_tower(
    folder: Path,
    tower: VisionTower,
    tokens: Processor,
    *,
    steps: int = 600,
    batch: int = 256,
    rate: float = 2e-3,
    matrix_rate: float = 4e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    report_every: int = 50,
    save_every: float = 45.0,
) -> dict[str, Tensor]:
    """Train a tower in `folder`, or go on there; returns its averaged weights."""
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    head = nn.Linear(tower.config.out_hidden_size, len(KINDS) + len(COLOURS)).to(device)
    weights = Weights(
        {"tower": tower.to(device), "head": head}, dtype=dtype, rate=rate, matrix_rate=matrix_rate
    )
    run = Run(folder, weights, steps=steps, every=save_every)
    held: dict[int, tuple[Tensor, Tensor]] = {}
    grids = [(1, 2 * CELLS, 2 * CELLS)] * batch
    for step in run:
        held = {n: held.get(n) or block(seed, n) for n in range(step, step + BLOCKS)}
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(BLOCKS * BLOCK, (batch,), generator=generator).tolist()
        pixels, labels = (
            torch.stack([held[step + i // BLOCK][part][i % BLOCK] for i in chosen]) for part in (0, 1)
        )
        mirrored = torch.rand(batch, generator=generator) < 0.5  # the kinds are their own mirror images
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        rows = labels.unflatten(1, (CELLS, CELLS))
        labels = torch.where(mirrored[:, None, None, None], rows.flip(2), rows).flatten(1, 2)
        with taps(tower, {"*.probs": lambda _x, _site: None}):
            x = tower(patches(pixels, tokens.config).to(device), grids)
        answers = head(x).float().view(batch, CELLS**2, -1)
        loss = F.binary_cross_entropy_with_logits(answers, labels.to(device))
        loss.backward()
        weights.step(learning_rate(step, steps, warmup=min(100, steps // 10)), step)
        right = (answers[..., : len(KINDS)] > 0).eq(labels[..., : len(KINDS)].to(device) > 0.5)
        run.note(loss=loss, right=right.all(dim=-1).float().mean())
        if (step + 1) % report_every == 0 or step + 1 == steps:
            run.report()
    return weights.averaged("tower")
