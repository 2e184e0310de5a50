"""A linear layer with changes of its weight (LoRA, DoRA, LoKr) beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Change", "Delta", "Kronecker", "LowRank", "LowRankLinear", "fused"]


@dataclass(frozen=True, eq=False)
class Delta:
    """The change of one linear layer: factor * up @ down, or factor * kron(up, down).

    Shapes: `down` (R, in) and `up` (out, R); with `kronecker` (out2, in2) and (out1, in1), whose products are
    out and in. `bias` (out,) belongs to `up`. `magnitude` (out,) is DoRA's: the norms of the changed weight's
    rows. `factor` is alpha / rank.
    """

    down: Tensor
    up: Tensor
    factor: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    kronecker: bool = False


class Change(nn.Module):
    """The change that one LoRA makes to one layer. The user sets `scale`, `active` and `disabled`.

    Its matrices may have another dtype than the layer: those that train are float32 beside any. `dropout` is
    the share of inputs that are dropped while it trains.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    magnitude: Tensor | None

    def __init__(
        self, name: str, delta: Delta, like: Tensor, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.name, self.factor, self.scale, self.dropout = name, delta.factor, scale, dropout
        self.active, self.disabled = True, False
        for part in ("down", "up", "bias", "magnitude"):
            value = getattr(delta, part)
            if value is not None:  # a copy: not the file's or the caller's
                value = nn.Parameter(value.to(like, copy=True), requires_grad=False)
            self.register_parameter(part, value)

    @property
    def acts(self) -> bool:
        """Whether it changes anything. At scale 0 a DoRA's magnitudes still do, as in peft."""
        return self.active and not self.disabled and (self.scale != 0 or self.magnitude is not None)

    def matrix(self, scale: float) -> Tensor:
        """The change of the weight at a scale, in float32: (out, in)."""
        raise NotImplementedError

    def gain(self, weight: Tensor, scale: float) -> Tensor:
        """DoRA's factor of each row of the changed weight, in float32: (out,). Gradients do not pass."""
        assert self.magnitude is not None
        with torch.no_grad():
            return self.magnitude.float() / (weight.float() + self.matrix(scale)).norm(dim=1)


class LowRank(Change):
    """A product of two matrices: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        return F.linear(F.linear(x, self.down), self.up, self.bias) * (self.scale * self.factor)

    def matrix(self, scale: float) -> Tensor:
        return scale * self.factor * (self.up.float() @ self.down.float())


class Kronecker(Change):
    """A Kronecker product of two matrices (LoKr): (..., in) -> (..., out).

    Source: `lokr.py` of LyCORIS, which forms the whole product. Here x is a matrix of (in1, in2).
    """

    def forward(self, x: Tensor) -> Tensor:
        split = x.to(self.down.dtype).unflatten(-1, (self.up.shape[1], self.down.shape[1]))
        return (self.up @ F.linear(split, self.down)).flatten(-2) * (self.scale * self.factor)

    def matrix(self, scale: float) -> Tensor:
        return scale * self.factor * torch.kron(self.up.float(), self.down.float())


class LowRankLinear(nn.Module):
    """A linear layer with changes beside it: (..., in) -> (..., out).

    Source: peft's `Linear.forward` and `DoraLinearLayer.forward`. A DoRA scales what the layer and the
    changes before it add up to, without the bias; its norms are computed in float32. Changes at scale 0 are
    not computed. Each sum is rounded to the layer's dtype; peft rounds once, after the last.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.held = nn.ModuleList()

    @property
    def changes(self) -> list[Change]:
        return [one for one in self.held if isinstance(one, Change)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for change in self.changes:
            if change.acts:
                y = (y + change(x)).to(y.dtype)
                if change.magnitude is not None:
                    gain = change.gain(self.base.weight, change.scale).to(y.dtype)
                    y = self.base.bias + gain * (y - self.base.bias)
        return y


def fused(
    weight: Tensor, bias: Tensor, changes: Sequence[Change], factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A layer's weight and bias with these changes, their scales times `factor`, in float32."""
    own = bias.float()
    new, moved = weight.float(), own
    for change in changes:
        scale = factor * change.scale
        new = new + change.matrix(scale)
        if change.bias is not None:
            moved = moved + scale * change.factor * change.bias.float()
        if change.magnitude is not None:
            gain = change.gain(weight, scale)
            new, moved = gain[:, None] * new, own + gain * (moved - own)
    return new, moved
