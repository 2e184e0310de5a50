"""A linear layer with low-rank changes (LoRA) beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Delta", "LowRank", "LowRankLinear"]


@dataclass(frozen=True, eq=False)
class Delta:
    """The low-rank change of one linear layer: factor * up @ down.

    Shapes: `down` (R, in), `up` (out, R). `factor` is alpha / rank.
    """

    down: Tensor
    up: Tensor
    factor: float


class LowRank(nn.Module):
    """The change that one LoRA makes to one layer. `scale` is set by the user."""

    down: Tensor
    up: Tensor

    def __init__(self, name: str, delta: Delta, like: Tensor, scale: float) -> None:
        super().__init__()
        self.name, self.factor, self.scale = name, delta.factor, scale
        self.register_buffer("down", delta.down.to(like), persistent=False)
        self.register_buffer("up", delta.up.to(like), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * (self.scale * self.factor)


class LowRankLinear(nn.Module):
    """A linear layer with low-rank changes beside it: (..., in) -> (..., out).

    Source: peft's `Linear.forward`; changes at scale 0 are not computed.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.held = nn.ModuleList()

    @property
    def changes(self) -> list[LowRank]:
        return [one for one in self.held if isinstance(one, LowRank)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for change in self.changes:
            if change.scale != 0:
                y = y + change(x)
        return y
