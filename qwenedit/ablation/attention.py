"""What the target attends to while an edit is made: the text, itself, the references; block by block and step
by step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qwenedit.attention_maps import AttentionMaps
from qwenedit.conditioning import Conditioning
from qwenedit.mmdit import MMDiT

__all__ = ["GROUPS", "target_attention"]

GROUPS = ("text", "target", "references")
Shares = dict[str, list[list[float]]]  # of each group: a row a block, a column a step


@contextmanager
def target_attention(mmdit: MMDiT, conditioning: Conditioning) -> Iterator[Shares]:
    """Collect, for the length of a `with` block in which one picture is sampled, how the attention of the
    target's tokens is shared out, with the prompt; means over tokens and heads, whose sum is 1.

    The dict is filled when the block ends. Where there are no references their share is 0.

    Raises:
        ValueError: a batch, of which there would be several maps.
    """
    if conditioning.batch != 1:
        raise ValueError(f"the conditioning is of {conditioning.batch} rows, wanted 1")
    text, target = conditioning.prompt.embeds.shape[1], math.prod(conditioning.target_grid)
    maps = AttentionMaps(rows=["target"], columns="all", branch="cond", mean_heads=True)
    shares: Shares = {}
    with maps.attached(mmdit):
        yield shares
    rows: dict[str, list[Tensor]] = {}
    for key, of_tokens in maps.items():
        parts = of_tokens[0, 0].tensor_split([text, text + target])
        rows.setdefault(key.name, []).append(torch.stack([part.sum() for part in parts]))
    table = torch.stack([torch.stack(steps) for steps in rows.values()]) if rows else torch.zeros(0, 0, 3)
    for name, values in zip(GROUPS, table.unbind(-1), strict=True):
        shares[name] = [[float(f"{x:.4g}") for x in row] for row in values.tolist()]
