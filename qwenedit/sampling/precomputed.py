"""The memory mode modulation="precomputed": one pass over the adaLN layers' weights serves all sigmas."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qwenedit.memory.streaming import Streamed
from qwenedit.networks.low_rank import Change
from qwenedit.networks.mmdit import MMDiT, RunCache, StepModulation
from qwenedit.taps import Fingerprint, fingerprint

__all__ = ["PrecomputedCache", "is_precomputed", "timestep_of", "without_modulation"]


def is_precomputed(mmdit: MMDiT) -> bool:
    """True if the weights of the adaLN layers are read once a run."""
    return isinstance(mmdit.blocks, Streamed) and mmdit.blocks.precomputed


def without_modulation(mmdit: MMDiT) -> AbstractContextManager[None]:
    """Leave the weights of the adaLN layers in their files, for the length of a `with` block."""
    assert isinstance(mmdit.blocks, Streamed)
    return mmdit.blocks.without_modulation()


def timestep_of(sigma: float, like: Tensor) -> Tensor:
    """Sigma as a scalar of the tensor's device and dtype. As in the reference, 1000 sigma is rounded."""
    # `full` fills on the device; `tensor` would copy from the host, which waits for the device.
    return (torch.full((), sigma, device=like.device) * 1000).to(like.dtype) / 1000


class PrecomputedCache(RunCache):
    """A `RunCache` that computes the modulation of all `sigmas` when the first of them is requested.

    It is computed again if the time embedding, a LoRA of an adaLN layer, or the config changes. `sigma` is
    that of the next step: a caller that knows it says so, since reading it off the timestep waits for the
    device. Such a caller asks for one kind of `addition_t` only.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__()
        self.sigma: float | None = None
        self._sigmas = sigmas
        self._ahead: dict[tuple[Any, ...], StepModulation] = {}
        self._made_of: Fingerprint | None = None

    def new_step(
        self, mmdit: MMDiT, timestep: Tensor, dtype: torch.dtype, addition_t: Tensor | None
    ) -> StepModulation:
        assert isinstance(mmdit.blocks, Streamed)
        layers = [
            block.get_submodule(name) for block in mmdit.blocks.children() for name in ("img_mod", "txt_mod")
        ]
        loras = [part for layer in layers for part in layer.modules() if isinstance(part, Change)]
        made_of = fingerprint((mmdit.time_embed, *loras))
        if made_of is None or made_of != self._made_of:
            self._ahead, self._made_of = {}, made_of
        batch = len(timestep)
        on_host = torch.empty((), dtype=timestep.dtype, device="cpu")

        def key(sigma: float) -> tuple[Any, ...]:
            return float(timestep_of(sigma, on_host)), batch, added, mmdit.config, dtype

        if self.sigma is not None:
            added: Any = addition_t is None
            asked = key(self.sigma)
        else:
            added = None if addition_t is None else tuple(addition_t.tolist())
            asked = float(timestep[0]), *key(0.0)[1:]
        if asked not in self._ahead:
            known = {} if made_of is None else {key(x): timestep_of(x, timestep) for x in self._sigmas}
            new = {k: t.expand(batch) for k, t in known.items() if k not in self._ahead} | {asked: timestep}
            steps = {k: RunCache.new_step(self, mmdit, t, dtype, addition_t) for k, t in new.items()}
            for number, block in enumerate(mmdit.blocks.only_modulation()):
                for step in steps.values():
                    step.of(number, block, batch)
            self._ahead |= steps
        return self._ahead[asked]
