"""A component's files against its module: names, shapes and dtypes, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.weights.configs import network_config
from qwenedit.weights.formats import Stored, read_weights
from qwenedit.weights.keys import NETWORKS, official_to_ours, ours_to_official

__all__ = ["Found", "Report", "compare"]


@dataclass(frozen=True)
class Report:
    """A component's files against its module, from headers and names alone.

    Attributes:
        component: the folder's name.
        tensors, parameters, bytes: of what the module uses.
        dtypes: how many of its tensors are stored in each dtype.
        skipped: tensors that are known and not read (`lm_head`).
        missing, unexpected: names that only the module, or only the files, have.
        misshapen, unreadable: tensors of the wrong shape, and of a dtype that cannot become plain floats.
        origin: the file, if it is not the folder's own, and what it was recognised as.
    """

    component: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    skipped: list[str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    unreadable: list[str]
    origin: str = ""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.unreadable)

    def problems(self) -> str:
        """What is wrong in one line: up to ten names of each kind, and how many more."""
        parts = []
        for kind in ("missing", "unexpected", "misshapen", "unreadable"):
            names: list[str] = getattr(self, kind)
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:10])}{more}")
        return "; ".join(parts)


Found = dict[str, Stored]  # our name -> what the files have


def compare(folder: Path, component: str, file: Path | None = None) -> tuple[nn.Module, Found, Report]:
    """The module on the meta device, its tensors in the files, and what does not fit.

    The config is the folder's, whatever file the weights are in.
    """
    network = NETWORKS[component]
    config = network_config(folder, component)
    weights = read_weights(file or folder / component, component)
    if weights.zero_cond_t and isinstance(config, MMDiTConfig):
        config = replace(config, zero_cond_t=True)
    with torch.device("meta"):
        module = network.module(config)
    wanted = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found: Found = {}
    known: set[str] = set()  # names that the files have, fitting or not
    skipped, unexpected, misshapen, unreadable = weights.ignored, [], [], []
    for key, stored in weights.tensors.items():
        hub_key = network.hub_key(stored.name)
        name = official_to_ours(network.table, hub_key)
        if hub_key in network.skipped:
            skipped.append(key)
            continue
        if name is None or name not in wanted or name in known:
            unexpected.append(key)
            continue
        known.add(name)
        if stored.shape != wanted[name]:
            misshapen.append(f"{key} {list(stored.shape)}, wanted {list(wanted[name])}")
        elif not stored.readable:
            unreadable.append(f"{key} ({stored.dtype})")
        else:
            found[name] = stored
    dtypes: dict[str, int] = {}
    for stored in found.values():
        dtypes[stored.dtype] = dtypes.get(stored.dtype, 0) + 1
    report = Report(
        component=component,
        tensors=len(found),
        parameters=sum(x.numel() for name, x in module.state_dict().items() if name in found),
        bytes=sum(stored.bytes for stored in found.values()),
        dtypes=dtypes,
        skipped=skipped,
        missing=[ours_to_official(network.table, name) for name in wanted if name not in known],
        unexpected=unexpected,
        misshapen=misshapen,
        unreadable=unreadable,
        origin="" if file is None else f"{file}: {weights.layout}",
    )
    return module, found, report
