"""Where within a stage ours begins to differ: our taps beside what the reference's modules take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwenedit.networks import mmdit, vae, vae_layers, vision_language, vision_tower
from qwenedit.parity.reference import Streams, reference_path
from qwenedit.parity.report import compared
from qwenedit.parity.stages import Stage
from qwenedit.taps import Site, named_modules, taps
from qwenedit.weights.keys import CONTROLNET, NETWORKS, ours_to_official

__all__ = ["first_difference"]

_ATTENTION = {"q": "q out", "k": "k out", "v": "v out", "heads": "out in", "attn_out": "out out"}
_BLOCK = {"mid": "norm2 in", "mlp_in": "mlp.up in"}
_GATED = {"mlp_hidden": "down in", "mlp_out": "down out"}
_ENDS = {"in": "conv_in out", "norm_out": "norm_out out", "act": "conv_out in", "out": "conv_out out"}

# tap of a class -> the submodule that takes or makes the same tensor, which the reference has too.
# Taps that are missing here have no such module in the reference, or another layout there.
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

# Modules that only the reference has: norms without weights, and each stream's norm of queries and keys.
_ONLY_THERE = tuple(
    (f"transformer_blocks.{{n}}.{there}.weight", f"blocks.{{n}}.{here}.weight")
    for there, here in (
        ("img_norm2", "img_norm2"), ("txt_norm2", "txt_norm2"),
        ("attn.norm_q", "attn.img_q_norm"), ("attn.norm_added_q", "attn.txt_q_norm"),
        ("attn.norm_k", "attn.img_k_norm"), ("attn.norm_added_k", "attn.txt_k_norm"),
    )
)  # fmt: skip


def first_difference(
    stage: Stage, ours: nn.Module, reference: nn.Module, streams: Streams, tolerance: float
) -> str | None:
    """The first tap of a stage at which the two sides, given the same streams, differ; None if none is known.

    That is the first tap that differs by more than `tolerance` (relative to the largest value), or, if there
    is none, the first that is not equal. Both networks must have the stage's weights.
    """
    places = dict(_places(stage, ours))
    got: Streams = {}
    wanted: Streams = {}

    def record(x: Tensor, site: Site) -> None:
        got[site.full] = _flat(x)

    def record_official(full: str, finish: Finish, x: Tensor) -> None:
        wanted[full] = _flat(finish(reference, x))

    with ExitStack() as attached:
        attached.enter_context(taps(ours, dict.fromkeys(places, record), strict=False))
        for full, (path, side, finish) in places.items():
            keep = partial(record_official, full, finish)
            attached.enter_context(_hooked(reference.get_submodule(path), side, keep))
        stage.ours(ours, streams)
        stage.reference(reference, streams)
    both = {full: wanted[full] for full in got if full in wanted}  # in the order in which ours computes them
    if not both:
        return None
    row = compared(stage.full, "float32", got, both, both, tolerance)
    return row.first or next((full for full, x in both.items() if not torch.equal(got[full], x)), None)


Finish = Callable[[Any, Tensor], Tensor]


def _as_it_is(_network: Any, x: Tensor) -> Tensor:
    return x


def _tokens_first(_network: Any, x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """The values alone: the sides differ in axes of size 1, and tables in dtype."""
    return x.flatten().cpu().double()


def _places(stage: Stage, ours: nn.Module) -> Iterator[tuple[str, tuple[str, str, Finish]]]:
    """Our taps within the stage -> the reference's module, "in" or "out", and what to do with that tensor."""
    for path, module in named_modules(ours):
        if not any(f"{path}.".startswith(f"{prefix}.") for prefix in stage.paths):
            continue
        table = next((_PLACES[cls] for cls in type(module).__mro__ if cls in _PLACES), {})
        for name, place in table.items():
            inner, side = place.split()
            turned = stage.heads_first and inner.endswith(("_q_norm", "_k_norm"))
            turn: Finish = _tokens_first if turned else _as_it_is
            yield f"{path}.{name}", (_official(stage.component, f"{path}.{inner}"), side, turn)
    for full, (path, finish) in stage.derived.items():
        yield full, (_official(stage.component, path), "out", finish)


def _official(component: str, path: str) -> str:
    """The path of the reference's module for one of our modules."""
    table = NETWORKS.get(component, CONTROLNET).table + _ONLY_THERE
    for leaf in (".weight", ".gamma"):
        try:
            return reference_path(component, ours_to_official(table, path + leaf)).removesuffix(leaf)
        except KeyError:
            continue
    raise KeyError(path)


def _hooked(module: nn.Module, side: str, keep: Callable[[Tensor], None]) -> Any:
    """A hook that keeps what goes into or comes out of a module; a context that removes it."""
    if side == "in":
        return module.register_forward_pre_hook(lambda _module, given: keep(given[0]))
    return module.register_forward_hook(lambda _module, _given, made: keep(made))
