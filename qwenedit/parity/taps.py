"""Where within a stage ours begins to differ: our taps beside what the reference's modules take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qwenedit.networks import mmdit, vae, vae_layers, vision_language, vision_tower
from qwenedit.parity.reference import Streams, reference_path
from qwenedit.parity.stages import Stage
from qwenedit.taps import Site, named_modules, taps
from qwenedit.weights.keys import NETWORKS, ours_to_official

__all__ = ["first_difference"]

_ATTENTION = {"q": "q out", "k": "k out", "v": "v out", "heads": "out in", "attn_out": "out out"}
_BLOCK = {"mid": "norm2 in", "mlp_in": "mlp.up in"}
_GATED = {"mlp_hidden": "down in", "mlp_out": "down out"}
_ENDS = {"in": "conv_in out", "norm_out": "norm_out out", "act": "conv_out in", "out": "conv_out out"}

# A tap of a class is what goes into, or comes out of, one of its submodules, which the reference has too.
# Taps that are not here have no module there, or another layout.
_PLACES: dict[type[nn.Module], dict[str, str]] = {
    mmdit.Block: {
        "img_mod": "img_mod.linear out", "txt_mod": "txt_mod.linear out",
        "img_attn_in": "attn.img_q in", "txt_attn_in": "attn.txt_q in",
        "img_mid": "img_norm2 in", "txt_mid": "txt_norm2 in",
        "img_mlp_in": "img_mlp.up in", "txt_mlp_in": "txt_mlp.up in",
    },
    mmdit.JointAttention: {
        "img_q": "img_q_norm out", "img_k": "img_k_norm out", "img_v": "img_v out",
        "txt_q": "txt_q_norm out", "txt_k": "txt_k_norm out", "txt_v": "txt_v out",
        "img_heads": "img_out in", "txt_heads": "txt_out in",
        "img_attn_out": "img_out out", "txt_attn_out": "txt_out out",
    },
    mmdit.MLP: {"mlp_hidden": "down in"},
    mmdit.TimeEmbedding: {"sinusoids": "linear_1 in"},
    vision_language.Block: {"attn_in": "attn.q in", **_BLOCK},
    vision_language.Attention: _ATTENTION,
    vision_language.MLP: _GATED,
    vision_tower.VisionBlock: {"attn_in": "attn.qkv in", **_BLOCK},
    vision_tower.VisionAttention: {"heads": "out in", "attn_out": "out out"},
    vision_tower.VisionMLP: _GATED,
    vision_tower.Merger: {"mlp_in": "up in", "mlp_hidden": "down in"},
    vae.Encoder: _ENDS,
    vae.Decoder: _ENDS,
    vae_layers.ResidualBlock: {
        "norm1": "norm1 out", "act1": "conv1 in", "mid": "conv1 out",
        "norm2": "norm2 out", "act2": "conv2 in", "add": "conv2 out",
    },
    vae_layers.FrameAttention: {"attn_in": "qkv in", "attn_add": "proj out"},
    vae_layers.Downsample: {"mid": "conv out"},
    vae_layers.Upsample: {"out": "conv out"},
}  # fmt: skip

# The norms before the transformer's MLPs have no weights, and so no place in its key table.
_WEIGHTLESS = tuple(
    (f"transformer_blocks.{{n}}.{norm}.weight", f"blocks.{{n}}.{norm}.weight")
    for norm in ("img_norm2", "txt_norm2")
)


def first_difference(
    stage: Stage, ours: nn.Module, reference: nn.Module, streams: Streams, tolerance: float
) -> str | None:
    """The first tap of a stage at which both sides, given the same streams, differ; None if none is known to.

    Both have their weights. That is the first tap beyond the tolerance, relative to the largest value; if
    there is none, the first that is not equal.
    """
    places = dict(_places(stage, ours))
    got: Streams = {}
    wanted: Streams = {}

    def record(x: Tensor, site: Site) -> None:
        got[site.full] = x

    with ExitStack() as attached:
        if places:
            attached.enter_context(taps(ours, dict.fromkeys(places, record), strict=False))
        for full, (path, side, finish) in places.items():
            module = reference.get_submodule(path)
            attached.enter_context(_hooked(module, side, full, wanted, finish, reference))
        stage.ours(ours, streams)
        stage.reference(reference, streams)
    differing = []
    for full, x in got.items():  # in the order in which ours computes them
        if full in wanted:
            own, other = (y.flatten().cpu().double() for y in (x, wanted[full]))
            if own.shape != other.shape:
                return full
            if not torch.equal(own, other):
                error = float((own - other).abs().max() / other.abs().max())
                differing.append((full, error))
    beyond = [full for full, error in differing if not error <= tolerance]
    return next(iter(beyond + [full for full, _ in differing]), None)


Finish = Callable[[Any, Tensor], Tensor]


def _places(stage: Stage, ours: nn.Module) -> Iterator[tuple[str, tuple[str, str, Finish]]]:
    """Our taps within the stage -> the reference's module, "in" or "out", and what to do with that tensor."""
    for path, module in named_modules(ours):
        if not any(f"{path}.".startswith(f"{prefix}.") for prefix in stage.paths):
            continue
        table = next((_PLACES[cls] for cls in type(module).__mro__ if cls in _PLACES), {})
        for name, place in table.items():
            inner, side = place.split()
            yield f"{path}.{name}", (_official(stage.component, f"{path}.{inner}"), side, lambda _, x: x)
    for full, (path, finish) in stage.derived.items():
        yield full, (_official(stage.component, path), "out", finish)


def _official(component: str, path: str) -> str:
    """The path of the reference's module for one of our modules."""
    table = NETWORKS[component].table + _WEIGHTLESS
    for leaf in (".weight", ".gamma"):
        try:
            return reference_path(component, ours_to_official(table, path + leaf)).removesuffix(leaf)
        except KeyError:
            continue
    raise KeyError(path)


def _hooked(
    module: nn.Module, side: str, full: str, into: Streams, finish: Finish, reference: nn.Module
) -> Any:
    """A hook that keeps what goes into or comes out of a module; a context that removes it."""
    if side == "in":
        return module.register_forward_pre_hook(
            lambda _module, given: into.__setitem__(full, finish(reference, given[0]))
        )
    return module.register_forward_hook(
        lambda _module, _given, made: into.__setitem__(full, finish(reference, made))
    )
