"""The vision tower's own stage: it learns to name the shapes and colours in each cell of a picture.

In the stage that follows, the tower sees too few pictures to learn to tell a star from a triangle; here it
sees some thousand a second.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenedit.inputs.processor import Processor
from qwenedit.mini.pairs import BLOCK, CELLS, contents, patches
from qwenedit.mini.scenes import scenes
from qwenedit.mini.shapes import COLOURS, KINDS, paint
from qwenedit.mini.train_edit import Networks, networks
from qwenedit.mini.training import Stage, averaged, begin, unfused_attention

__all__ = ["train_tower"]


def block(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """(BLOCK, 3, 64, 64) uint8 pictures and what lies in their cells, (BLOCK, 16, kinds + colours)."""
    rng = Random(f"{seed} tower {number}")
    drawn = list(islice(scenes(rng), BLOCK))
    pixels = (torch.stack([paint(scene) for scene in drawn]).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels, torch.tensor([contents(scene) for scene in drawn])


def train_tower(
    folder: Path,
    stage: Stage,
    tokens: Processor,
    *,
    make: Callable[[Processor], Networks] = networks,
    blocks: int = 128,
) -> dict[str, Tensor]:
    """Train the tower of the networks in `folder`, or resume there; returns its averaged weights.

    Args:
        make: makes the networks.
        blocks: of pictures, held at a time; at each step one comes and one goes.
    """
    torch.manual_seed(stage.seed)
    tower = make(tokens)[0].vision.to(stage.device)
    head = nn.Linear(tower.config.out_hidden_size, len(KINDS) + len(COLOURS)).to(stage.device)
    run = begin(folder, {"tower": tower, "head": head}, stage)
    held: dict[int, tuple[Tensor, Tensor]] = {}
    grids = [(1, 2 * CELLS, 2 * CELLS)] * stage.batch
    for step, generator in run:
        held = {n: held.get(n) or block(stage.seed, n) for n in range(step, step + blocks)}
        chosen = torch.randint(blocks * BLOCK, (stage.batch,), generator=generator).tolist()
        pixels, labels = (
            torch.stack([held[step + i // BLOCK][part][i % BLOCK] for i in chosen]) for part in (0, 1)
        )
        # Half of the pictures are mirrored: each kind is its own mirror image.
        mirrored = (torch.rand(stage.batch, generator=generator) < 0.5)[:, None, None, None]
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
        rows = labels.unflatten(1, (CELLS, CELLS))
        labels = torch.where(mirrored, rows.flip(2), rows).flatten(1, 2).to(stage.device)
        with unfused_attention(tower):
            x = tower(patches(pixels, tokens.config).to(stage.device), grids)
        answers = head(x).float().view(labels.shape)
        right = (answers[..., : len(KINDS)] > 0).eq(labels[..., : len(KINDS)] > 0.5).all(dim=-1)
        loss = F.binary_cross_entropy_with_logits(answers, labels)
        run.add(loss, right=right.float().mean())
        run.update()
    return averaged(run, "tower", tower)
