"""First-block caching: reuse the other blocks' output while the first block's output changes little.

with first_block_cache(pipe.mmdit, threshold=0.1) as cache:
    pipe.edit(picture, "make the circle red")
print(cache.skipped, cache.computed)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from qwenedit.networks.mmdit import MMDiT
from qwenedit.taps import current_labels, swapped

__all__ = ["BranchState", "FirstBlockCache", "first_block_cache"]

State = TypeVar("State")


class BranchState(Generic[State]):
    """State that is kept from step to step, separately for each CFG branch and each group of rows.

    `new` makes a fresh state. Use a fresh `BranchState` for each run: it cannot tell two runs apart.

    >>> from qwenedit.taps import cache_context
    >>> seen = BranchState(list)
    >>> for step in range(2):
    ...     for branch in ("cond", "uncond"):
    ...         with cache_context(branch):
    ...             seen.current().append((branch, step))
    >>> with cache_context("uncond"):
    ...     seen.current()
    [('uncond', 0), ('uncond', 1)]
    """

    def __init__(self, new: Callable[[], State]) -> None:
        self._new = new
        self._states: dict[tuple[str, tuple[int, ...] | None], State] = {}

    def current(self) -> State:
        """The state of the current branch.

        Raises:
            ValueError: no label `branch` is in force.
        """
        labels = current_labels()
        if "branch" not in labels:
            raise ValueError("no label branch is in force, wanted cache_context(name) around the forward")
        rows = labels.get("rows")
        key = (labels["branch"], None if rows is None else tuple(rows))
        if key not in self._states:
            self._states[key] = self._new()
        return self._states[key]


class FirstBlockCache(nn.Module):
    """All blocks as one module that decides after the first block whether to run the others.

    They are skipped, and the residual of the last full step is added again, if mean |change of the first
    block's residual| / mean |residual| is below the threshold. The means are over all rows that run together,
    so that a row's result may depend on its batch. A step is never skipped if it does not directly follow the
    branch's last one, or if the number of tokens changed.

    Attributes:
        computed, skipped: forwards with and without the other blocks.
    """

    def __init__(self, blocks: nn.ModuleList, threshold: float) -> None:
        super().__init__()
        self.blocks = blocks
        self.threshold = threshold
        self.state: BranchState[dict[str, Any]] = BranchState(dict)  # of the last full step
        self.computed = 0
        self.skipped = 0

    def forward(self, img: Tensor, txt: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        blocks = iter(self.blocks)  # one by one: streamed blocks have weights only in their turn
        first_block = next(blocks)
        last = self.state.current()
        img_1, txt_1 = first_block(img, txt, *others)
        first = img_1 - img
        step = current_labels().get("step")
        follows = "first" in last and step == last["next"] and last["first"].shape == first.shape
        last["next"] = None if step is None else step + 1
        if follows:
            change = (first - last["first"]).abs().mean() / last["first"].abs().mean()
            if change.item() < self.threshold:
                self.skipped += 1
                return img_1 + last["rest"], txt_1  # the text stream is not read after the blocks
        img_n, txt_n = img_1, txt_1
        for block in blocks:
            img_n, txt_n = block(img_n, txt_n, *others)
        last.update(first=first, rest=img_n - img_1)
        self.computed += 1
        return img_n, txt_n


@contextmanager
def first_block_cache(mmdit: MMDiT, threshold: float) -> Iterator[FirstBlockCache]:
    """Cache for the length of a `with` block: an approximation. A threshold of 0 never skips.

    Raises:
        ValueError: a negative threshold; a transformer whose tokens processes share; while running, no label
            `branch` is in force.
    Source: ParaAttention's first block cache; diffusers 0.39.0, hooks/first_block_cache.py, which also skips
        where the change equals the threshold.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}, wanted 0 or more")
    if mmdit.shards is not None and mmdit.shards.splits_tokens:
        raise ValueError(
            "first_block_cache decides by all tokens, of which each process has a share: load without "
            "ulysses (cfg=2 goes with it)"
        )
    cache = FirstBlockCache(mmdit.blocks, threshold)
    with swapped(mmdit, "blocks", lambda _blocks: nn.ModuleList([cache])):
        yield cache
