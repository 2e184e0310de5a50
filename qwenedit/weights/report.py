"""Compare a component's files with its module by names, shapes and dtypes. Only headers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from qwenedit.foreign import shown
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.weights.configs import network_config
from qwenedit.weights.formats import Contents, Stored, read_weights
from qwenedit.weights.keys import NETWORKS, Component, official_to_ours, ours_to_official

__all__ = ["Compared", "Report", "compare", "compare_weights"]


@dataclass(frozen=True)
class Report:
    """The result of comparing a component's files with its module.

    Attributes:
        component: the folder's name.
        tensors, parameters, bytes: totals of the tensors that the module uses.
        dtypes: number of these tensors by the dtype that they are stored in.
        skipped: tensors that are known and not loaded (`lm_head`).
        missing, unexpected: names that only the module, or only the files, have.
        misshapen, unreadable: tensors of the wrong shape, or of a dtype that cannot be converted to floats.
        origin: the file and its layout, if the weights are not the folder's own.
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
        return not self.problems()

    def problems(self) -> str:
        """All problems in one line, with up to ten names of each kind; empty if everything fits."""
        parts = []
        for kind in ("missing", "unexpected", "misshapen", "unreadable"):
            names: list[str] = getattr(self, kind)
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(map(shown, names[:10]))}{more}")
        return "; ".join(parts)


class Compared(NamedTuple):
    """A component's module on the meta device, its tensors in the files by our names, and the report."""

    module: nn.Module
    found: dict[str, Stored]
    report: Report


def compare(folder: Path, component: str, file: Path | None = None) -> Compared:
    """Compare a component's module with the tensors of its folder, or of `file`.

    The config is always the folder's.
    """
    config = network_config(folder, component)
    weights = read_weights(file or folder / component, component)
    if weights.zero_cond_t and isinstance(config, MMDiTConfig):
        config = replace(config, zero_cond_t=True)
    origin = "" if file is None else f"{shown(file)}: {shown(weights.layout)}"
    return compare_weights(component, NETWORKS[component], config, weights, origin)


def compare_weights(
    component: str, network: Component, config: Any, weights: Contents, origin: str
) -> Compared:
    """Compare the module of a config with tensors; `component` and `origin` are as in `Report`."""
    with torch.device("meta"), _WithoutInit():
        module = network.module(config)
    state = module.state_dict()
    found: dict[str, Stored] = {}
    known: set[str] = set()  # names that the files have, whether or not the tensor fits
    skipped, unexpected, misshapen, unreadable = weights.ignored, [], [], []
    for key, stored in weights.tensors.items():
        hub_key = network.hub_key(stored.name)
        name = official_to_ours(network.table, hub_key)
        if hub_key in network.skipped:
            skipped.append(key)
            continue
        if name is None or name not in state or name in known:
            unexpected.append(key)
            continue
        known.add(name)
        if stored.shape != (wanted := tuple(state[name].shape)):
            misshapen.append(f"{key} {list(stored.shape)}, wanted {list(wanted)}")
        elif not stored.readable:
            unreadable.append(f"{key} ({stored.dtype})")
        else:
            found[name] = stored
    report = Report(
        component=component,
        tensors=len(found),
        parameters=sum(state[name].numel() for name in found),
        bytes=sum(stored.bytes for stored in found.values()),
        dtypes=dict(Counter(stored.dtype for stored in found.values())),
        skipped=skipped,
        missing=[ours_to_official(network.table, name) for name in state if name not in known],
        unexpected=unexpected,
        misshapen=misshapen,
        unreadable=unreadable,
        origin=origin,
    )
    return Compared(module, found, report)


class _WithoutInit(TorchFunctionMode):
    """Skip the initialisers of new layers: on the meta device there is nothing to initialise.

    torch would import its compiler for `normal_` on the meta device, which takes longer than loading a small
    model.
    """

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
