"""What methods that act on whole steps are made of: another way through a run, and the picture it edits.

def controlled(predict, latents, sigmas, guidance, preserve):
    source = source_latents(pipe, predict, latents, sigmas[0])
    for step in euler(predict, latents, sigmas, guidance, preserve):
        step.velocity = step.velocity + 0.1 * ((step.latents - source) / step.sigma - step.velocity)
        yield step

with sampled_by(pipe, controlled):
    pipe.edit(picture, "make the circle red")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qwenedit.latents import Layout
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import Predict, Preserve, Step
from qwenedit.sampling.samplers import Sampler, require_sampler
from qwenedit.system import System
from qwenedit.taps import Site, scope, taps

__all__ = ["sampled_by", "source_latents", "source_tokens"]


@contextmanager
def sampled_by(pipe: System, sampler: Sampler) -> Iterator[None]:
    """Runs that name no sampler take this one, for the length of a `with` block.

    A sampler may predict as often as it likes, hand on another prediction than its own, and write into its
    steps (`qwenedit.sampling.samplers` has the form). All of it runs when the run's first step is asked for.

    Raises:
        ValueError: the sampler is no function.
        RuntimeError: on a clean exit, no run has taken it: those that ran have named their own.
    """
    if not callable(sampler):
        require_sampler(sampler)
        raise ValueError(f"sampler is {sampler!r}, wanted a function")
    taken = []

    def noted(
        predict: Predict,
        latents: Tensor,
        sigmas: Sequence[float],
        guidance: TrueCFG | None = None,
        preserve: Preserve | None = None,
    ) -> Iterator[Step]:
        taken.append(True)
        yield from sampler(predict, latents, sigmas, guidance, preserve)

    before, pipe.sampler = pipe.sampler, noted
    try:
        yield
    finally:
        pipe.sampler = before
    if not taken:
        raise RuntimeError("no run has taken the sampler: wanted one that names no sampler of its own")


def source_tokens(layout: Layout) -> slice:
    """The place in the image stream of the picture that is edited: a token for each of the target's.

    It is the last reference, which sets the output's size.

    Raises:
        ValueError: there is no reference, or the last one has another grid than the target.

    >>> source_tokens(Layout(5, ((1, 2, 2), (1, 3, 3), (1, 2, 2))))
    slice(13, 17, None)
    """
    if len(layout.grids) < 2 or layout.grids[-1] != layout.grids[0]:
        got = f"has the grid {layout.grids[-1]}" if len(layout.grids) > 1 else "is missing"
        raise ValueError(
            f"the picture that is edited {got}, wanted the target's grid {layout.grids[0]}: leave height and "
            "width to the picture"
        )
    return layout.references[-1]


def source_latents(pipe: System, predict: Predict, latents: Tensor, sigma: float) -> Tensor:
    """The clean latents (B, S, C) of the pictures that a sampler's run edits, in the order of its rows.

    They are read off one more prediction, at these latents and with the label of step 0.

    Raises:
        ValueError: as `source_tokens`.
    """
    rows: dict[int, Tensor] = {}

    def note(x: Tensor, site: Site) -> None:
        rows.update(zip(site.labels["rows"], x[:, source_tokens(site.labels["layout"])], strict=True))

    with taps(pipe.mmdit, {"latents": note}), scope(step=0, sigma=sigma):
        predict(latents, sigma, guided=False)
    return torch.stack([rows[row] for row in range(len(latents))])
