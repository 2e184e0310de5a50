"""The networks of both sides, loaded from the setting's folder; and seeded inputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from benchmarks.frame import Setting

if TYPE_CHECKING:
    from torch import Tensor


def seeded(setting: Setting, *shape: int, seed: int = 0) -> Tensor:
    import torch

    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(setting.device, getattr(torch, setting.dtype))


def loaded(setting: Setting, component: str) -> Any:
    """Our network of a component."""
    import torch

    from qwenedit.weights.loading import load_network

    return load_network(
        setting.folder,
        component,
        device=torch.device(setting.device),
        dtype=getattr(torch, setting.dtype),
        progress=False,
    )


def loaded_reference(setting: Setting, component: str, name: str, package: str = "diffusers") -> Any:
    """The reference's network of a component."""
    import torch

    kind = getattr(importlib.import_module(package), name)
    network = kind.from_pretrained(
        setting.folder / component,
        **{"torch_dtype" if package == "diffusers" else "dtype": getattr(torch, setting.dtype)},
    )
    return network.to(setting.device).eval()
