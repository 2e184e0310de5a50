"""Conversions between raw latents, normalised latents and tokens, and the layout of the token sequence.

A token is 2x2 latent pixels. How many pixels that is follows from the VAE: 16x16 at 8 pixels a latent pixel,
as in the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Generator, Tensor

__all__ = [
    "PATCH", "Grid", "Layout", "denormalise", "generators_of", "initial_noise", "normalise", "pack",
    "standard_normal", "unpack",
]  # fmt: skip

PATCH = 2  # latent pixels along a token's side, as the reference's pipelines pack, whatever a config says

Grid = tuple[int, int, int]  # frames (1 for a picture), rows, columns of tokens


@dataclass(frozen=True)
class Layout:
    """The order of tokens: text, then the target's, then each reference picture's.

    `grids` are (frames, rows, columns) of the target and of each reference. The slices `target` and
    `references` index the image stream (B, S, ...); `in_joint` shifts a slice to the attention's order [text,
    image].
    """

    text: int
    grids: tuple[Grid, ...]

    @property
    def target(self) -> slice:
        return slice(0, math.prod(self.grids[0]))

    @property
    def references(self) -> tuple[slice, ...]:
        slices, start = [], self.target.stop
        for grid in self.grids[1:]:
            slices.append(slice(start, start + math.prod(grid)))
            start = slices[-1].stop
        return tuple(slices)

    def in_joint(self, tokens: slice) -> slice:
        return slice(tokens.start + self.text, tokens.stop + self.text)


def pack(latents: Tensor) -> Tensor:
    """(B, C, F, Y, X) latents with even Y and X -> (B, F Y/2 X/2, 4 C) tokens, row by row.

    Source: `QwenImageEditPipeline._pack_latents`; within a token the order is channel, row, column.
    """
    return rearrange(latents, "b c f (y p) (x q) -> b (f y x) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, S, 4 C) tokens of one grid (frames, rows, columns) -> (B, C, F, 2 rows, 2 columns) latents."""
    frames, rows, columns = grid
    return rearrange(
        tokens, "b (f y x) (c p q) -> b c f (y p) (x q)", f=frames, y=rows, x=columns, p=PATCH, q=PATCH
    )


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    # The reference casts the statistics to the latents' dtype before their use.
    return torch.tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)


def normalise(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Raw latents (B, C, F, Y, X) -> normalised ones, for the transformer."""
    return (latents - _per_channel(mean, latents)) / _per_channel(std, latents)


def denormalise(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised latents (B, C, F, Y, X) -> raw ones, for the VAE's decoder.

    Divides by 1/std as the reference does; multiplying by std differs in the last bit.
    """
    return latents / (1.0 / _per_channel(std, latents)) + _per_channel(mean, latents)


def initial_noise(
    batch: int,
    channels: int,
    grid: Grid,
    *,
    generator: Generator | Sequence[Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Packed noise (B, S, 4 C) for a target grid, as in the reference pipelines for the same generator state.

    It is drawn as (B, frames, C, 2 rows, 2 columns) in `dtype` on the generator's device. One generator draws
    all rows in order; with a list each row has its own, so that a row does not depend on its batch.

    Raises:
        ValueError: as `generators_of`.
    Source: `prepare_latents` of the pipelines.
    """
    frames, rows, columns = grid
    shape = (frames, channels, PATCH * rows, PATCH * columns)
    noise = standard_normal(batch, shape, generator=generator, device=device, dtype=dtype)
    return pack(noise.transpose(1, 2))


def standard_normal(
    batch: int,
    shape: tuple[int, ...],
    *,
    generator: Generator | Sequence[Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(batch, *shape) standard normal numbers: one generator draws all rows in order, a list one row each.

    Raises:
        ValueError: as `generators_of`.
    Source: diffusers' `randn_tensor`.
    """
    generators = generators_of(generator, batch, device)
    size = (batch // len(generators), *shape)
    parts = [
        torch.randn(size, generator=one, device=one.device if one else device, dtype=dtype).to(device)
        for one in generators
    ]
    return torch.cat(parts)


def generators_of(
    generator: Generator | Sequence[Generator] | None, batch: int, device: torch.device
) -> list[Generator | None]:
    """One generator for the batch, which may be None, or one for each row.

    Raises:
        ValueError: a list with another number of generators than rows, or a generator on another accelerator.
    """
    generators: list[Generator | None]
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if isinstance(generator, Sequence) and len(generators) != batch:
        raise ValueError(
            f"got {len(generators)} generators, wanted one, or a list of {batch}, one for each row"
        )
    for one in generators:
        if one is not None and not isinstance(one, Generator):
            raise ValueError(
                f"a generator is {type(one).__name__}, wanted a torch.Generator, or a list of them"
            )
        if one is not None and one.device.type not in ("cpu", device.type):
            raise ValueError(f"generator is on {one.device}, wanted cpu or {device}")
    return generators
