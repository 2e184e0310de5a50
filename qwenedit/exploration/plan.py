"""What the page keeps of a run: which steps, blocks and heads, and how finely patches are told apart.

The page has at most 20 MB, whatever the size of the edit. Attention maps take most of it: a map from every
cell of target and text to every cell of target, text and references, in 8 bits. A cell is a patch, or p x p
patches; in the text a token, or some in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwenedit.exploration.words import Word
from qwenedit.latents import Grid, Layout

__all__ = ["MAPS", "SHOWN", "SIDE", "Cells", "Plan", "evenly", "plan_of"]

MAPS = 9_000_000  # bytes of all attention maps, before base64
SHOWN = 20  # steps whose pictures are shown, at most
SIDE = 384  # pixels along the longer side of a picture, at most
STEPS, BLOCKS = 6, 8  # steps and blocks that have maps in any case, before heads or patches are kept apart


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to count - 1, evenly spread, with the first and the last.

    >>> evenly(5, 9), evenly(40, 4), evenly(3, 1)
    ([0, 1, 2, 3, 4], [0, 13, 26, 39], [0])
    """
    if most >= count:
        return list(range(count))
    return [0] if most == 1 else [round(k * (count - 1) / (most - 1)) for k in range(most)]


@dataclass(frozen=True)
class Cells:
    """A picture's patches in cells of `pool` x `pool`; those at the right and below may be smaller."""

    grid: tuple[int, int]  # rows and columns of patches
    pool: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        rows, columns = self.grid
        return math.ceil(rows / self.pool), math.ceil(columns / self.pool)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def of_patches(self) -> Tensor:
        """(rows * columns,) the number of each patch's cell."""
        rows, columns = (torch.arange(side) // self.pool for side in self.grid)
        return (rows[:, None] * self.shape[1] + columns).flatten()


@dataclass(frozen=True)
class Plan:
    """What is kept of a run's maps.

    Attributes:
        pictures: the cells of the target, then of each reference.
        steps, blocks: those that have maps.
        heads: how many are kept apart; 1: their mean.
        of_heads: how many there are.
    """

    pictures: tuple[Cells, ...]
    steps: list[int]
    blocks: list[int]
    heads: int
    of_heads: int

    def places(self, layout: Layout, words: Sequence[Word]) -> Tensor:
        """(J,) the number of the cell of each token of the joint sequence.

        Cells are counted in the order target, words, references. The layout may lack references that the
        plan has.
        """
        cells = torch.zeros(layout.text + sum(math.prod(grid) for grid in layout.grids), dtype=torch.int64)
        start = self.pictures[0].count
        for number, word in enumerate(words):
            cells[word.start : word.stop] = start + number
        start += len(words)
        cells[layout.in_joint(layout.target)] = self.pictures[0].of_patches()
        for tokens, picture in zip(layout.references, self.pictures[1:], strict=False):
            cells[layout.in_joint(tokens)] = start + picture.of_patches()
            start += picture.count
        return cells

    def size(self, words: int) -> tuple[int, int]:
        """Rows and columns of a map for so many words."""
        rows = self.pictures[0].count + words
        return rows, rows + sum(picture.count for picture in self.pictures[1:])


def plan_of(
    grids: Sequence[Grid],
    words: Sequence[int],
    *,
    steps: Sequence[int],
    blocks: int,
    heads: int,
    budget: int = MAPS,
) -> Plan:
    """What fits into `budget` bytes.

    Args:
        grids: of the target, then of each reference.
        words: how many cells the text of each branch has.
        steps: those to choose from.

    Patches are pooled as little as lets `STEPS` steps and `BLOCKS` blocks have maps. The heads are kept apart
    if that many maps of each of them fit. Then as many steps and blocks are kept as fit.
    """
    few = min(len(steps), STEPS), min(blocks, BLOCKS)
    least = few[0] * few[1]
    pool = 1
    while True:
        pictures = tuple(Cells(grid[1:], pool) for grid in grids)
        plan = Plan(pictures, list(steps), list(range(blocks)), heads, heads)
        step = sum(math.prod(plan.size(count)) for count in words)  # bytes of a block's maps, of each head
        if least * step <= budget or all(picture.count == 1 for picture in pictures):
            break
        pool += 1
    kept = heads if least * step * heads <= budget else 1
    most = max(1, budget // (step * kept))
    some, those = len(steps), blocks
    while some * those > most and some * those > 1:
        if those == 1 or (some > 1 and some * few[1] >= those * few[0]):
            some -= 1
        else:
            those -= 1
    chosen = [steps[k] for k in evenly(len(steps), some)]
    return replace(plan, steps=chosen, blocks=evenly(blocks, those), heads=kept)
