"""Which entry of a dialect removes a difference: each that acts in the transformer is tried, alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qwenedit.dialects import DIALECTS
from qwenedit.latents import Layout
from qwenedit.networks.mmdit import MMDiT
from qwenedit.parity.reference import Streams
from qwenedit.parity.report import FLOAT32, compared
from qwenedit.parity.stages import Stage
from qwenedit.sampling.transformer_switches import switched_transformer
from qwenedit.switches import Switches
from qwenedit.taps import scope

__all__ = ["Trial", "removing"]


@dataclass(frozen=True)
class Trial:
    """The labels under which a transformer's switches act."""

    layout: Layout
    sigma: float
    rows: Sequence[int]


def removing(
    stage: Stage, ours: nn.Module, reference: nn.Module, streams: Streams, trial: Trial
) -> str | None:
    """The entry under which a stage of the transformer equals the reference's in float32, with its tool."""
    if not isinstance(ours, MMDiT):
        return None
    wanted = stage.reference(reference, streams)
    for tool, entries in DIALECTS.items():
        for entry in entries:
            if not entry.switch.startswith(("transformer.", "time.rounding")):
                continue
            switches = Switches.from_flat({entry.switch: entry.value})
            with scope(**vars(trial)), switched_transformer(ours, switches, strict=False):
                got = stage.ours(ours, streams)
            if compared(stage.full, "float32", got, wanted, wanted, FLOAT32).ok:
                return f"{entry.switch} = {entry.value!r} of {tool}"
    return None
