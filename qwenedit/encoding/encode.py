"""Prompts and pictures -> a `Conditioning`, by the text encoder and the VAE's encoder."""

from __future__ import annotations

import dataclasses
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
from qwenedit.inputs.pictures import resampled, resize_rgb, rgba_pixels, vae_pixels
from qwenedit.inputs.processor import Processor, ProcessorOutput
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import normalise, pack
from qwenedit.memory.residency import present
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.switches import Switches, VAEPath, own_generator
from qwenedit.taps import observed, require_finite, scope
from qwenedit.version import __version__

__all__ = ["Encoder", "encode_pictures"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
    """Rows of a batch -> their `Conditioning`, on the encoders' devices and in their dtypes.

    Attributes:
        max_tokens: prompts without pictures are cut to this many tokens.
        share_prefix: run the common prefix of prompt and negative prompt once (see prefix.py).
        micro_batch: the most rows that run through the text encoder at a time; None for all.
    """

    variant: Variant
    processor: Processor
    vision_language: VisionLanguage
    vae: VAE
    max_tokens: int
    share_prefix: bool = False
    micro_batch: int | None = None

    def __call__(
        self, rows: Sequence[BatchRow], switches: Switches, *, guided: bool, frames: int = 1
    ) -> Conditioning:
        """Encode prompts and pictures.

        Args:
            switches: `seen`, `vae` and another picture for the references act here.
            guided: also encode the negative prompts, each with its row's pictures.
            frames: of the target grid.

        Raises:
            ValueError: another picture, which a switch names, cannot be read.
            NonFiniteError: NaN or infinity, naming the encoder.
        """
        pictured = reference_rows(rows, switches.references)  # before any network runs: it may fail
        prompt, negative = self.encode_prompts(seen_rows(rows, switches.seen), guided, switches.seen.negative)
        negatives = [row.negative for row in rows] if guided else None
        return Conditioning(
            prompt=prompt,
            negative=negative,
            target_grid=(frames, *rows[0].geometry.grid[1:]),
            reference_latents=encode_pictures(pictured, self.vae, switches.vae),
            reference_grids=tuple(tuple(plan.grid for plan in row.geometry.pictures) for row in rows),
            provenance={
                "qwenedit": __version__,
                "variant": self.variant.name,
                "prompt": json.dumps([row.prompt for row in rows], ensure_ascii=False),
                "negative_prompt": json.dumps(negatives, ensure_ascii=False),
                "switches": json.dumps(switches.encoding.flat(), ensure_ascii=False),
            },
        )

    def encode_prompts(
        self, rows: list[BatchRow], guided: bool, negative_sees: bool
    ) -> tuple[Prompt, Prompt | None]:
        """The prompts and, if `guided`, the negative prompts, without the template's system part.

        Pictures are prepared and the vision tower runs once for both, under the label branch="cond". Without
        `negative_sees` the negative prompts are encoded as in text-to-image.
        """
        embeds: list[Tensor] = []
        negative_embeds: list[Tensor] = []
        at_once = self.micro_batch or len(rows)
        with present(self.vision_language):
            for start in range(0, len(rows), at_once):
                of_part = self._encode_part(rows[start : start + at_once], guided, negative_sees)
                embeds += of_part[0]
                negative_embeds += of_part[1]
            prompt = self._padded(embeds, "cond")
            return prompt, self._padded(negative_embeds, "uncond") if guided else None

    def _encode_part(
        self, rows: list[BatchRow], guided: bool, negative_sees: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(T, D) of each prompt, and of each negative prompt."""
        resized = None
        if rows[0].pictures:
            resized = [[resize_rgb(picture, *plan.vl) for picture, plan in row.planned] for row in rows]
        batch = self._tokens([row.prompt for row in rows], resized)
        with scope(branch="cond"):
            pictures = self._look(batch)
        if not guided:
            return self._unpadded(batch, self._run(batch, pictures, "cond")), []
        negatives = [row.negative for row in rows if row.negative is not None]
        other = self._tokens(negatives, resized if negative_sees else None)
        if negative_sees and self.share_prefix and not observed(self.vision_language):
            hidden = encode_together(self.vision_language, batch, other, pictures)
        else:
            others = pictures if negative_sees else None
            hidden = self._run(batch, pictures, "cond"), self._run(other, others, "uncond")
        return self._unpadded(batch, hidden[0]), self._unpadded(other, hidden[1])

    @property
    def device(self) -> torch.device:
        return next(self.vision_language.parameters()).device

    def _tokens(self, prompts: list[str], pictures: list[list[Image.Image]] | None) -> ProcessorOutput:
        if pictures:
            return self.processor(prompts, pictures, self.variant.template)
        tokens = max(self.max_tokens, TEXT_TO_IMAGE.max_tokens or 0)  # the processor cuts before the encoder
        return self.processor(prompts, None, dataclasses.replace(TEXT_TO_IMAGE, max_tokens=tokens))

    def _look(self, batch: ProcessorOutput) -> Tensor | None:
        if batch.pixel_values is None or batch.image_grid_thw is None:
            return None
        return self.vision_language.vision(batch.pixel_values.to(self.device), batch.image_grid_thw)

    def _run(self, batch: ProcessorOutput, pictures: Tensor | None, branch: str) -> Tensor:
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        with scope(branch=branch, text_lengths=tuple(batch.attention_mask.sum(dim=1).tolist())):
            return self.vision_language(ids, mask, None, batch.image_grid_thw, pictures)

    def _unpadded(self, batch: ProcessorOutput, hidden: Tensor) -> list[Tensor]:
        """Each row without padding and without the template's system part."""
        mask = batch.attention_mask.to(self.device).bool()
        kept = [x[real][batch.drop_index :] for x, real in zip(hidden, mask, strict=True)]
        return kept if batch.image_grid_thw is not None else [x[: self.max_tokens] for x in kept]

    def _padded(self, kept: list[Tensor], branch: str) -> Prompt:
        require_finite(torch.cat(kept), f"text encoder: the embeddings of the {branch} prompt")
        lengths = torch.tensor([len(x) for x in kept], device=self.device)
        padded = pad_sequence(kept, batch_first=True)
        real = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        return Prompt(padded, None if real.all() else real)


def encode_pictures(
    rows: Sequence[BatchRow], vae: VAE, path: VAEPath | None = None
) -> tuple[tuple[Tensor, ...], ...]:
    """The pictures of each row as normalised packed latents (S, 64); shared pictures are encoded once.

    A VAE with four input channels gets RGBA.
    """
    path = path or VAEPath()
    encoded: dict[tuple[int, Size, int], Tensor] = {}

    def latents(picture: Image.Image, size: Size, k: int) -> Tensor:
        key = (id(picture), size, k if path.posterior == "sample" else 0)  # each k has its own sample
        if key not in encoded:
            encoded[key] = _encode(picture, size, vae, path, k)
        return encoded[key]

    with present(*([vae] if any(row.pictures for row in rows) else [])):
        return tuple(
            tuple(latents(picture, plan.vae, k) for k, (picture, plan) in enumerate(row.planned))
            for row in rows
        )


def _encode(picture: Image.Image, size: Size, vae: VAE, path: VAEPath, k: int) -> Tensor:
    like = next(vae.parameters())
    rgba = vae.config.input_channels == 4
    if path.resize != "lanczos":
        picture = resampled(picture, size, path.resize, "RGBA" if rgba else "RGB")
    pixels = (rgba_pixels if rgba else vae_pixels)(picture, *size)
    posterior = vae.encode(pixels[:, :, None].to(like.device, like.dtype))
    if path.posterior == "sample":
        raw = posterior.sample(own_generator(path.seed, "vae", k))
    else:
        raw = posterior.mode()
    require_finite(raw, "VAE encoder: the latents of a picture")
    if path.normalised:
        raw = normalise(raw, vae.config.latents_mean, vae.config.latents_std)
    return pack(raw)[0]
