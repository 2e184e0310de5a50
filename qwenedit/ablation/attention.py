"""What the target attends to while an edit is made: the text, itself, the references; block by block and step
by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwenedit.encoding.conditioning import Conditioning
from qwenedit.instruments.attention_maps import AttentionMaps
from qwenedit.networks.mmdit import MMDiT

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
    pictures = [f"reference {k + 1}" for k in range(len(conditioning.reference_grids[0]))]
    maps = AttentionMaps(["target"], ["text", "target", *pictures], branch="cond", mean_heads=True)
    shares: Shares = {}
    with maps.attached(mmdit):
        yield shares
    rows: dict[str, list[list[float]]] = {}
    for key, of_groups in maps.items():
        text, target, *references = of_groups[0, 0].tolist()
        rows.setdefault(key.name, []).append([text, target, sum(references)])
    for k, name in enumerate(GROUPS):
        shares[name] = [[float(f"{step[k]:.4g}") for step in steps] for steps in rows.values()]
