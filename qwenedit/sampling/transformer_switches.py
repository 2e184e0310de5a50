"""The switches that change the transformer's arithmetic, for the length of a `with` block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qwenedit.networks.controlnet import ControlNet
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.mmdit_layers import (
    MLP,
    Gelu,
    Grid,
    Rope,
    picture_positions,
    rope_table,
    sinusoids,
    text_positions,
)
from qwenedit.sampling.precomputed import timestep_of
from qwenedit.switches import Switches
from qwenedit.taps import Site, TapFunction, named_modules, taps

__all__ = ["switched_transformer"]


@contextmanager
def switched_transformer(
    mmdit: MMDiT | ControlNet, switches: Switches, *, strict: bool = True
) -> Iterator[None]:
    """Run the transformer, or a ControlNet, under `transformer.*`, `time.rounding` and `references.frame`.

    The tap functions read the labels `layout`, `sigma` and `rows`, which `predictor` sets. If a part of the
    transformer runs that does not reach them, `strict` must be False.

    Raises:
        ValueError: another GELU under checkpointing, whose backward pass would compute the own one.
    """
    with (
        taps(mmdit, _functions(switches, mmdit), first=True, strict=strict),
        _gelu(mmdit, switches.transformer.gelu),
    ):
        yield


@contextmanager
def _gelu(mmdit: MMDiT | ControlNet, form: Gelu) -> Iterator[None]:
    if form == "tanh":
        yield
        return
    if isinstance(mmdit, MMDiT) and mmdit.checkpointing and torch.is_grad_enabled():
        raise ValueError("transformer.gelu does not work with checkpointing: set mmdit.checkpointing = False")
    before = [(mlp, mlp.gelu) for _, mlp in named_modules(mmdit) if isinstance(mlp, MLP)]
    try:
        for mlp, _ in before:
            mlp.gelu = form
        yield
    finally:
        for mlp, own in before:
            mlp.gelu = own


def _functions(switches: Switches, mmdit: MMDiT | ControlNet) -> dict[str, TapFunction]:
    """The functions at the tables of RoPE and at the sinusoids; none under the default switches."""
    transformer, rounding = switches.transformer, switches.time.rounding
    in_the_targets_frame = switches.references.frame == "target"
    shifted, rounded = transformer.odd_grids == "positive", transformer.rope == "rounded"
    dtype = next(mmdit.parameters()).dtype

    def img(table: Tensor, site: Site) -> Tensor:
        if in_the_targets_frame or shifted:
            assert isinstance(site.module, Rope)
            rope, grids = site.module, site.labels["layout"].grids
            if len(table) == math.prod(grids[0]):  # a ControlNet has the target alone
                grids = grids[:1]
            frames = [0 if in_the_targets_frame else rope.frame(k) for k in range(len(grids))]
            table = rope_table(_img_positions(grids, frames, shifted, table.device), rope.axes)
        return table.to(dtype).to(table.dtype) if rounded else table

    def txt(table: Tensor, site: Site) -> Tensor:
        if transformer.text_start == "target":
            assert isinstance(site.module, Rope)
            start = site.module.text_start(site.labels["layout"].grids[:1])
            table = rope_table(text_positions(start, len(table), table.device), site.module.axes)
        return table.to(dtype).to(table.dtype) if rounded else table

    functions: dict[str, TapFunction] = {}
    if in_the_targets_frame or shifted or rounded:
        functions["rope.img"] = img
    if transformer.text_start == "target" or rounded:
        functions["rope.txt"] = txt
    if rounding == "exact":
        functions["time_embed.sinusoids"] = _of_exact_sigma
    elif rounding == "bfloat16":
        functions["time_embed.sinusoids"] = _of_rounded_sigma
    return functions


def _img_positions(grids: Sequence[Grid], frames: list[int], shifted: bool, device: torch.device) -> Tensor:
    positions = []
    for frame, grid in zip(frames, grids, strict=True):
        own = picture_positions(frame, grid, device)
        if shifted:
            own[:, 1] += grid[1] % 2
            own[:, 2] += grid[2] % 2
        positions.append(own)
    return torch.cat(positions)


def _of_exact_sigma(rounded: Tensor, site: Site) -> Tensor:
    return _sinusoids_of(torch.full((), site.labels["sigma"], device=rounded.device), rounded, site)


def _of_rounded_sigma(rounded: Tensor, site: Site) -> Tensor:
    like = torch.empty((), dtype=torch.bfloat16, device=rounded.device)
    return _sinusoids_of(timestep_of(site.labels["sigma"], like), rounded, site)


def _sinusoids_of(sigma: Tensor, rounded: Tensor, site: Site) -> Tensor:
    """The rows that `zero_cond_t` adds after the batch keep sigma 0. `sigma` is on the device already."""
    sigmas = torch.zeros(rounded.shape[0], device=rounded.device)
    sigmas[: len(site.labels["rows"])] = sigma.float()
    return sinusoids(sigmas)
