"""Prompts and pictures -> a `Conditioning`: what the text encoder and the VAE's encoder make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwenedit import __version__
from qwenedit.ablation.pictures import reference_rows, seen_rows
from qwenedit.ablation.switches import Switches, VAEPath
from qwenedit.checkpoints import Variant
from qwenedit.conditioning import Conditioning, Prompt
from qwenedit.geometry import Size
from qwenedit.inputs import Row
from qwenedit.latents import normalise, pack
from qwenedit.processor import TEXT_TO_IMAGE, Processor, resize_rgb, vae_pixels
from qwenedit.sampler import require_finite
from qwenedit.taps import scope
from qwenedit.vae import VAE
from qwenedit.vision_language import VisionLanguage

__all__ = ["embed_prompts", "encode_pictures", "encode_rows"]


def encode_rows(
    rows: Sequence[Row],
    *,
    guided: bool,
    max_tokens: int,
    variant: Variant,
    processor: Processor,
    vision_language: VisionLanguage,
    vae: VAE,
    switches: Switches,
) -> Conditioning:
    """Everything that a batch of rows is conditioned on, where the encoders are and in their dtypes.

    Args:
        guided: with the negative prompts; each is encoded with its row's pictures.
        max_tokens: to which the prompts of text-to-image are cut.
        switches: `seen`, `vae` and another picture for the references act here.

    Raises:
        ValueError: another picture, which a switch names, cannot be read.
        NonFiniteError: NaN or infinity, naming the encoder.
    """
    prompts = [row.prompt for row in rows]
    negatives = [row.negative for row in rows if row.negative is not None] if guided else None
    parts = (variant, processor, vision_language, max_tokens)
    prompt = embed_prompts(prompts, seen_rows(rows, switches.seen), *parts, branch="cond")
    negative = None
    if negatives is not None:
        seen = seen_rows(rows, switches.seen, negative=True)
        negative = embed_prompts(negatives, seen, *parts, branch="uncond")
    return Conditioning(
        prompt=prompt,
        negative=negative,
        target_grid=rows[0].geometry.grid,
        reference_latents=encode_pictures(reference_rows(rows, switches.references), vae, switches.vae),
        reference_grids=tuple(tuple(plan.grid for plan in row.geometry.pictures) for row in rows),
        provenance={
            "qwenedit": __version__,
            "variant": variant.name,
            "prompt": json.dumps(prompts, ensure_ascii=False),
            "negative_prompt": json.dumps(negatives, ensure_ascii=False),
            "switches": json.dumps(switches.encoding.flat(), ensure_ascii=False),
        },
    )


def embed_prompts(
    prompts: list[str],
    rows: Sequence[Row],
    variant: Variant,
    processor: Processor,
    vision_language: VisionLanguage,
    max_tokens: int,
    *,
    branch: str,
) -> Prompt:
    """One prompt a row, with the row's pictures -> embeddings without the template's system part."""
    template, pictures = TEXT_TO_IMAGE, None
    if rows[0].pictures:
        template = variant.template
        pictures = [[resize_rgb(picture, *plan.vl) for picture, plan in row.planned] for row in rows]
    batch = processor(prompts, pictures, template)
    device = next(vision_language.parameters()).device
    mask = batch.attention_mask.to(device)
    pixels = None if batch.pixel_values is None else batch.pixel_values.to(device)
    with scope(branch=branch):
        embeds = vision_language(batch.input_ids.to(device), mask, pixels, batch.image_grid_thw)

    kept = [embeds[row][mask[row].bool()][batch.drop_index :] for row in range(len(rows))]
    if template is TEXT_TO_IMAGE:
        kept = [x[:max_tokens] for x in kept]
    require_finite(torch.cat(kept), f"text encoder: the embeddings of the {branch} prompt")
    lengths = torch.tensor([len(x) for x in kept], device=device)
    padded = pad_sequence(kept, batch_first=True)
    real = torch.arange(padded.shape[1], device=device) < lengths[:, None]
    return Prompt(padded, None if real.all() else real)


def encode_pictures(rows: Sequence[Row], vae: VAE, path: VAEPath) -> tuple[tuple[Tensor, ...], ...]:
    """The pictures of each row as normalised packed latents (S, 64); one that rows share is encoded once."""
    encoded: dict[tuple[int, Size], Tensor] = {}
    for row in rows:
        for picture, plan in row.planned:
            key = (id(picture), plan.vae)
            if key not in encoded:
                encoded[key] = _encode(picture, plan.vae, vae, path)
    return tuple(tuple(encoded[id(picture), plan.vae] for picture, plan in row.planned) for row in rows)


def _encode(picture: Image.Image, size: Size, vae: VAE, path: VAEPath) -> Tensor:
    """From the posterior's mode, unless a switch asks for something else."""
    like = next(vae.parameters())
    posterior = vae.encode(vae_pixels(picture, *size)[:, :, None].to(like.device, like.dtype))
    if path.posterior == "sample":
        raw = posterior.sample(torch.Generator().manual_seed(path.seed))
    else:
        raw = posterior.mode()
    require_finite(raw, "VAE encoder: the latents of a picture")
    if path.normalised:
        raw = normalise(raw, vae.config.latents_mean, vae.config.latents_std)
    return pack(raw)[0]
