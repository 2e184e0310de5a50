"""What a run is, in short, so that processes can compare what they are about to do."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from qwenedit.switches import Switches
from qwenedit.taps import named_modules
from qwenedit.version import __version__

__all__ = ["about_run", "described"]

_SHOWN = 80  # characters of a text; of a longer one its hash tells the rest


def described(value: Any) -> Any:
    """A value as JSON: short, and different where the value is. Large ones are hashed."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}... ({_hash(value.encode())})"
    if isinstance(value, Image.Image):
        return f"picture {value.mode} {value.size} {_hash(value.tobytes() + bytes(value.getpalette() or ()))}"
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        data = ctypes.string_at(flat.data_ptr(), flat.nbytes)
        return f"{value.dtype} {tuple(value.shape)} {_hash(data)}"
    if isinstance(value, Generator):
        return f"generator on {value.device.type} {_hash(bytes(value.get_state().tolist()))}"
    if isinstance(value, Switches):
        return described(value.flat())
    if isinstance(value, Mapping):
        return {str(name): described(one) for name, one in value.items()}
    if isinstance(value, Sequence):
        return [described(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: described(getattr(value, field.name)) for field in fields}
    return getattr(value, "__qualname__", type(value).__qualname__)


def about_run(call: Any, run: Any, networks: Sequence[nn.Module]) -> dict[str, Any]:
    """What must be equal in all processes before a run: its arguments and what they became, what observes
    the networks that exchange tensors, their weights, and the versions."""
    fields = {field.name: described(getattr(call, field.name)) for field in dataclasses.fields(call)}
    return {
        **fields,
        **{name: described(getattr(run, name)) for name in ("sampler", "sigmas", "guidance", "switches")},
        **_observers_of(networks),
        "weights": _weights_of(networks),
        "versions": {"qwenedit": __version__, "torch": torch.__version__},
    }


def _observers_of(networks: Sequence[nn.Module]) -> dict[str, list[str]]:
    """The taps with functions and the modules with hooks, by their names; of ControlNets with a number."""
    taps, hooks = [], []
    for number, network in enumerate(networks):
        start = f"control {number - 1}: " if number else ""
        for path, module in named_modules(network):
            attached = getattr(module, "_taps", None) or {}
            full = f"{start}{path}." if path else start
            taps += [f"{full}{name}" for name, functions in attached.items() for _ in functions]
            if module._forward_hooks or module._forward_pre_hooks:
                hooks.append(f"{start}{path}")
    return {"taps": taps, "hooks": hooks}


def _weights_of(networks: Sequence[nn.Module]) -> str:
    """A hash of the weights' names, shapes and dtypes, and of the first values of those that are in memory.

    Weights that processes share have other values in each, and those that are read when they are needed have
    none. Numbers that modules hold, such as a LoRA's scale, are part of it.
    """
    told: list[Any] = []
    values = []
    for network in networks:
        for path, module in network.named_modules():
            told.append((path, {k: v for k, v in vars(module).items() if type(v) in (int, float, bool)}))
        for name, weight in network.named_parameters():
            told.append((name, tuple(weight.shape), weight.dtype))
            if type(weight) is nn.Parameter and not weight.is_meta:
                values.append(weight.detach().flatten()[:4].double())
    first = torch.cat(values).cpu().tolist() if values else []
    return _hash(repr((told, first)).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
