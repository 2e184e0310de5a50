"""Prompts and pictures -> a `Conditioning`: what the text encoder and the VAE's encoder make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.encoding.picture_switches import reference_rows, seen_rows
from qwenedit.encoding.prefix import encode_together
from qwenedit.family import TEXT_TO_IMAGE, Variant
from qwenedit.inputs.geometry import Size
from qwenedit.inputs.pictures import resize_rgb, vae_pixels
from qwenedit.inputs.processor import Processor, ProcessorOutput
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import normalise, pack
from qwenedit.memory.residency import present
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.switches import Switches, VAEPath, own_generator
from qwenedit.taps import observed, require_finite, scope
from qwenedit.version import __version__

__all__ = ["PromptEncoder", "encode_pictures", "encode_rows"]


def encode_rows(
    rows: Sequence[BatchRow],
    *,
    guided: bool,
    max_tokens: int,
    variant: Variant,
    processor: Processor,
    vision_language: VisionLanguage,
    vae: VAE,
    switches: Switches,
    share_prefix: bool = False,
    micro_batch: int | None = None,
) -> Conditioning:
    """Everything that a batch of rows is conditioned on, where the encoders are and in their dtypes.

    Args:
        guided: with the negative prompts; each is encoded with its row's pictures.
        max_tokens: to which the prompts of text-to-image are cut.
        switches: `seen`, `vae` and another picture for the references act here.
        share_prefix: run what prompt and negative prompt begin with once (see prefix.py).
        micro_batch: the most rows that run through the text encoder at a time.

    Raises:
        ValueError: another picture, which a switch names, cannot be read.
        NonFiniteError: NaN or infinity, naming the encoder.
    """
    prompts = [row.prompt for row in rows]
    negatives = [row.negative for row in rows if row.negative is not None] if guided else None
    pictured = reference_rows(rows, switches.references)  # first, so that no network has run if it fails
    encoder = PromptEncoder(
        variant, processor, vision_language, max_tokens, share_prefix, negative_sees=switches.seen.negative
    )
    with present(vision_language):
        prompt, negative = encoder(
            seen_rows(rows, switches.seen), prompts, negatives, at_once=micro_batch or len(rows)
        )
    return Conditioning(
        prompt=prompt,
        negative=negative,
        target_grid=rows[0].geometry.grid,
        reference_latents=encode_pictures(pictured, vae, switches.vae),
        reference_grids=tuple(tuple(plan.grid for plan in row.geometry.pictures) for row in rows),
        provenance={
            "qwenedit": __version__,
            "variant": variant.name,
            "prompt": json.dumps(prompts, ensure_ascii=False),
            "negative_prompt": json.dumps(negatives, ensure_ascii=False),
            "switches": json.dumps(switches.encoding.flat(), ensure_ascii=False),
        },
    )


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Prompts with their rows' pictures -> embeddings without the template's system part.

    Pictures are prepared and the vision tower runs once for the prompts and the negative prompts, under the
    label branch="cond"; without `negative_sees` the negative prompts are encoded as in text-to-image.
    """

    variant: Variant
    processor: Processor
    vision_language: VisionLanguage
    max_tokens: int
    share_prefix: bool
    negative_sees: bool

    def __call__(
        self, rows: Sequence[BatchRow], prompts: list[str], negatives: list[str] | None, *, at_once: int
    ) -> tuple[Prompt, Prompt | None]:
        """Encode `at_once` rows at a time."""
        kept: list[Tensor] = []
        others: list[Tensor] = []
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            ours = None if negatives is None else negatives[part]
            embeds, negative_embeds = self._encode(rows[part], prompts[part], ours)
            kept += embeds
            others += negative_embeds
        return self._prompt(kept, "cond"), self._prompt(others, "uncond") if others else None

    def _encode(
        self, rows: Sequence[BatchRow], prompts: list[str], negatives: list[str] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(T, D) of each prompt, and of each negative prompt."""
        resized = None
        if rows[0].pictures:
            resized = [[resize_rgb(picture, *plan.vl) for picture, plan in row.planned] for row in rows]
        batch = self._tokens(prompts, resized)
        with scope(branch="cond"):
            pictures = self._look(batch)
        if negatives is None:
            return self._kept(batch, self._run(batch, pictures, "cond")), []
        other = self._tokens(negatives, resized if self.negative_sees else None)
        if self.negative_sees and self.share_prefix and not observed(self.vision_language):
            hidden = encode_together(self.vision_language, batch, other, pictures)
        else:
            others = pictures if self.negative_sees else None
            hidden = self._run(batch, pictures, "cond"), self._run(other, others, "uncond")
        return self._kept(batch, hidden[0]), self._kept(other, hidden[1])

    @property
    def device(self) -> torch.device:
        return next(self.vision_language.parameters()).device

    def _tokens(self, prompts: list[str], pictures: list[list[Image.Image]] | None) -> ProcessorOutput:
        return self.processor(prompts, pictures, self.variant.template if pictures else TEXT_TO_IMAGE)

    def _look(self, batch: ProcessorOutput) -> Tensor | None:
        if batch.pixel_values is None or batch.image_grid_thw is None:
            return None
        return self.vision_language.vision(batch.pixel_values.to(self.device), batch.image_grid_thw)

    def _run(self, batch: ProcessorOutput, pictures: Tensor | None, branch: str) -> Tensor:
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        with scope(branch=branch):
            return self.vision_language(ids, mask, None, batch.image_grid_thw, pictures)

    def _kept(self, batch: ProcessorOutput, hidden: Tensor) -> list[Tensor]:
        """Each row without padding and without the template's system part."""
        mask = batch.attention_mask.to(self.device).bool()
        kept = [x[real][batch.drop_index :] for x, real in zip(hidden, mask, strict=True)]
        return kept if batch.image_grid_thw is not None else [x[: self.max_tokens] for x in kept]

    def _prompt(self, kept: list[Tensor], branch: str) -> Prompt:
        require_finite(torch.cat(kept), f"text encoder: the embeddings of the {branch} prompt")
        lengths = torch.tensor([len(x) for x in kept], device=self.device)
        padded = pad_sequence(kept, batch_first=True)
        real = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        return Prompt(padded, None if real.all() else real)


def encode_pictures(
    rows: Sequence[BatchRow], vae: VAE, path: VAEPath | None = None
) -> tuple[tuple[Tensor, ...], ...]:
    """The pictures of each row as normalised packed latents (S, 64); one that rows share is encoded once."""
    path = path or VAEPath()
    encoded: dict[tuple[int, Size, int], Tensor] = {}

    def latents(picture: Image.Image, size: Size, k: int) -> Tensor:
        key = (id(picture), size, k if path.posterior == "sample" else 0)  # the k-th sample is its own
        if key not in encoded:
            encoded[key] = _encode(picture, size, vae, path, k)
        return encoded[key]

    with present(*([vae] if any(row.pictures for row in rows) else [])):
        return tuple(
            tuple(latents(picture, plan.vae, k) for k, (picture, plan) in enumerate(row.planned))
            for row in rows
        )


def _encode(picture: Image.Image, size: Size, vae: VAE, path: VAEPath, k: int) -> Tensor:
    """From the posterior's mode, unless a switch asks for something else."""
    like = next(vae.parameters())
    posterior = vae.encode(vae_pixels(picture, *size)[:, :, None].to(like.device, like.dtype))
    if path.posterior == "sample":
        raw = posterior.sample(own_generator(path.seed, "vae", k))
    else:
        raw = posterior.mode()
    require_finite(raw, "VAE encoder: the latents of a picture")
    if path.normalised:
        raw = normalise(raw, vae.config.latents_mean, vae.config.latents_std)
    return pack(raw)[0]
