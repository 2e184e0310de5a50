"""The order in which a step's predictions are made: by default one after the other, by this process."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Branches", "one_after_the_other"]

# a function of a branch's name, and whether the step is guided -> cond, uncond (None in an unguided step)
Branches = Callable[[Callable[[str], Tensor], bool], "tuple[Tensor, Tensor | None]"]


def one_after_the_other(branch: Callable[[str], Tensor], guided: bool) -> tuple[Tensor, Tensor | None]:
    """Both predictions of a step, the one with the prompt first."""
    cond = branch("cond")
    return cond, branch("uncond") if guided else None
