"""The share of the target's attention that goes to text, target and references, in every block and step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwenedit.encoding.conditioning import Conditioning
from qwenedit.instruments.attention_maps import AttentionMaps
from qwenedit.networks.mmdit import MMDiT

__all__ = ["GROUPS", "target_attention"]

GROUPS = ("text", "target", "references")
Shares = dict[str, list[list[float]]]  # for each group: a row for each block, a column for each step


@contextmanager
def target_attention(mmdit: MMDiT, conditioning: Conditioning) -> Iterator[Shares]:
    """Record how the target's attention is divided among the groups while one picture is sampled.

    Shares are means over tokens and heads in the branch with the prompt, and sum to 1; without references
    their share is 0. The dict is filled when the `with` block ends.

    Raises:
        ValueError: the conditioning has several rows.
    """
    if conditioning.batch != 1:
        raise ValueError(f"the conditioning is of {conditioning.batch} rows, wanted 1")
    pictures = [f"reference {k + 1}" for k in range(len(conditioning.reference_grids[0]))]
    maps = AttentionMaps(["target"], ["text", "target", *pictures], branch="cond", mean_heads=True)
    shares: Shares = {}
    with maps.attached(mmdit):
        yield shares
    blocks: dict[str, list[list[float]]] = {}
    for key, of_groups in maps.items():
        text, target, *references = of_groups[0, 0].tolist()
        blocks.setdefault(key.name, []).append([text, target, sum(references)])
    for k, name in enumerate(GROUPS):
        shares[name] = [[float(f"{step[k]:.4g}") for step in steps] for steps in blocks.values()]
