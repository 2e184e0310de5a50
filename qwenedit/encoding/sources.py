"""The pictures that a run starts from as latents, and their masks as tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from qwenedit.encoding.conditioning import Conditioning
from qwenedit.inputs.masks import Sources
from qwenedit.latents import normalise, pack, standard_normal
from qwenedit.memory.residency import home, present
from qwenedit.networks.vae import VAE, Posterior
from qwenedit.taps import require_finite

__all__ = ["draw_masked", "mask_tokens", "source_latents", "with_source"]

Generators = Generator | Sequence[Generator] | None


@torch.no_grad()
def source_latents(
    sources: Sources, vae: VAE, generator: Generators, batch: int, *, posterior: str
) -> Tensor:
    """The pictures' normalised packed latents, one for each of `batch` outputs: (batch, S, C).

    For a posterior "sample" each picture has one, drawn by the generator of its first output; "mode" draws
    nothing.

    Source: `_encode_vae_image` and `prepare_latents` of the image-to-image pipelines.
    """
    with present(vae):
        like = next(vae.parameters())
        of_each = [
            vae.encode(row.pixels[:, :, None].to(like.device, like.dtype))
            for row in sources.rows[: sources.pictures]
        ]
    found = Posterior(torch.cat([one.mean for one in of_each]), torch.cat([one.logvar for one in of_each]))
    raw = found.mode()
    if posterior == "sample":
        firsts = _firsts(generator, batch, len(raw))
        noise = standard_normal(
            len(raw), tuple(raw.shape[1:]), generator=firsts, device=raw.device, dtype=raw.dtype
        )
        raw = found.at(noise)
    require_finite(raw, "VAE encoder: the latents of the picture to start from")
    latents = pack(normalise(raw, vae.config.latents_mean, vae.config.latents_std))
    return latents.repeat_interleave(batch // len(latents), dim=0)


def draw_masked(sources: Sources, vae: VAE, generator: Generators, batch: int) -> None:
    """Draw what the reference draws for the masked pictures, which it encodes and does not use.

    Source: `prepare_mask_latents` of the inpainting pipelines.
    """
    factor, count = vae.config.spatial_factor, max(sources.pictures, sources.masks)
    width, height = sources.rows[0].size
    standard_normal(
        count, (vae.config.z_dim, 1, height // factor, width // factor),
        generator=_firsts(generator, batch, count), device=home(vae), dtype=next(vae.parameters()).dtype,
    )  # fmt: skip


def _firsts(generator: Generators, batch: int, count: int) -> Generators:
    """Of a list with one generator for each of `batch` outputs, the one of each picture's first output."""
    return generator[:: batch // count] if isinstance(generator, Sequence) else generator


def mask_tokens(sources: Sources, batch: int, factor: int, channels: int, *, grey: bool) -> Tensor:
    """How much each value of the packed latents changes: (batch, S, 4 channels) float32 in [0, 1]."""
    shares = torch.stack([row.changes(factor, grey=grey) for row in sources.rows])
    tokens = pack(shares[:, None, None].expand(-1, channels, -1, -1, -1))
    return tokens.repeat_interleave(batch // len(tokens), dim=0)


def with_source(conditioning: Conditioning, latents: Tensor) -> Conditioning:
    """The conditioning, whose last references are the latents (B, S, C) that the run starts from.

    Source: `QwenImageEditInpaintPipeline.__call__`, which has one sample of the picture for both.
    """
    rows = zip(conditioning.reference_latents, conditioning.reference_grids, latents, strict=True)
    replaced = [
        ((*of_row[:-1], own), (*grids[:-1], conditioning.target_grid)) if of_row else (of_row, grids)
        for of_row, grids, own in rows
    ]
    return dataclasses.replace(
        conditioning,
        reference_latents=tuple(of_row for of_row, _ in replaced),
        reference_grids=tuple(grids for _, grids in replaced),
    )
