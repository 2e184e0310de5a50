"""Qwen-Image-Layered: a picture taken apart into RGBA layers.

    pipe = qwenedit.load("Qwen/Qwen-Image-Layered")
    layers = pipe.decompose(picture, "a red fox on a white field", layers=4).images

The target is layers + 1 frames of the picture's size: frame 0 is the whole picture again and is dropped, the
others are the layers. The prompt describes the picture, which only the VAE sees, not the text encoder. The
VAE has four channels, and decodes each layer alone.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Generator, Tensor

from qwenedit.checks import check_count, check_output_type
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.encoding.encode import PromptEncoder
from qwenedit.family import Variant
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.pictures import rgba_pixels, to_pil
from qwenedit.inputs.rows import BatchRow, rows_of
from qwenedit.latents import Grid, normalise, pack
from qwenedit.memory.residency import home, present
from qwenedit.networks.vae import VAE
from qwenedit.sampling.guidance import TrueCFG, guidance_of
from qwenedit.sampling.sampler import Step
from qwenedit.switches import Guidance, Switches
from qwenedit.system import Result, System
from qwenedit.taps import require_finite
from qwenedit.version import __version__

__all__ = ["Layers", "check_alpha", "layer_rows", "layers_of", "require_flat"]


class Layers(System):
    """The part of a pipeline that takes pictures apart; for checkpoints of Qwen-Image-Layered."""

    @torch.no_grad()
    def decompose(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = " ",
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        layers: int = 4,
        resolution: int = 640,
        cfg_normalize: bool = False,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
        max_sequence_length: int = 512,
    ) -> Result:
        """Take a picture apart into RGBA layers.

        `images` of the result are the layers of the one output in the model's order: RGBA pictures. Several
        outputs are a list of such lists. As "pt" they are (B, layers, 4, H, W) in [0, 1], as "latent" (B, S,
        64), packed, the whole picture's frame first (`decode_layers` makes the former of the latter).

        Args:
            image: one picture, used for every prompt, or one a prompt; without alpha it is opaque.
            prompt: what the picture shows, as a whole: one, or a list for a batch.
            negative_prompt: what guidance steers away from; None turns guidance off.
            true_cfg_scale: guidance scale; guidance runs where it is above 1 and there is a negative prompt.
            num_inference_steps: Euler steps.
            sigmas: unshifted sigmas in place of the even ones, as many as steps.
            layers: how many layers.
            resolution: side of the square whose area the layers have, in the picture's proportions and in
                multiples of 32. The official checkpoint was made for 640 and 1024.
            cfg_normalize: rescale each token of the guided prediction to the conditional one's norm.
            generator: one for the batch, or a list with one for each output.
            num_images_per_prompt: outputs for each prompt, prompt-major.
            latents: packed noise (B, S, 64), for layers + 1 frames, in place of the generator's.
            output_type: "pil", "pt" or "latent".
            max_sequence_length: prompts are cut to so many tokens, at most 1024.

        Raises:
            ValueError: another variant's checkpoint; bad input, before any network runs. An empty prompt is:
                the reference captions the picture then, we do not.
            NonFiniteError: NaN or infinity, naming the component and the step where it first shows.
        Source: `QwenImageLayeredPipeline.__call__` of diffusers 0.39.0. We differ in batches (the reference
            deals out too many layers to all outputs but the last), in the negative prompt's default (None
            there), in adding an alpha channel to pictures without, and in other resolutions, which it
            refuses.
        """
        check_output_type(output_type)
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_count("max_sequence_length", max_sequence_length, most=1024)
        rows = layer_rows(image, prompt, negative_prompt, self.variant, layers, resolution)
        grid: Grid = (layers + 1, *rows[0].geometry.grid[1:])
        pictures = [1] * len(rows) * num_images_per_prompt
        plain = Switches()
        run = self.prepare(grid, pictures, num_inference_steps, sigmas, generator, latents, plain)
        guidance = guidance_of(true_cfg_scale, negative_prompt)
        if guidance is not None and not cfg_normalize:
            guidance = TrueCFG(true_cfg_scale, Guidance(norm="none"))
        conditioning = _condition(self, rows, grid, guided=guidance is not None, most=max_sequence_length)
        steps = self._steps(conditioning.repeat(num_images_per_prompt), run, guidance, plain)
        return self._finish_layers(steps, num_inference_steps, grid, output_type)

    @torch.no_grad()
    def decode_layers(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed normalised latents (B, S, 64) of a grid of 1 + L frames -> pixels (B, L, 4, H, W) in [0, 1].

        The first frame, the whole picture, is dropped.
        """
        frames, rows, columns = grid
        of_layers = rearrange(latents, "b (f s) d -> b f s d", f=frames)[:, 1:].flatten(0, 1)
        pixels = self.decode(of_layers, (1, rows, columns))
        return pixels.unflatten(0, (-1, frames - 1))

    def _finish_layers(self, steps: Iterator[Step], count: int, grid: Grid, output_type: str) -> Result:
        """Take all steps and make the result."""
        latents = self._last(steps, count)
        if output_type == "latent":
            return Result(latents)
        return Result(layers_of(self.decode_layers(latents, grid), output_type))


def layer_rows(
    image: Any,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    variant: Variant,
    layers: int,
    resolution: int,
) -> list[BatchRow]:
    """What each prompt is run with. All checks of prompts, pictures and sizes are here; they need no network.

    Raises:
        ValueError: a variant that makes no layers, or bad input; what, got, wanted.
    """
    if not variant.layered:
        raise ValueError(f"{variant.name} makes no layers: decompose wants a Qwen-Image-Layered checkpoint")
    check_count("layers", layers)
    check_count("resolution", resolution)
    if image is None:
        raise ValueError("image is None, wanted a PIL picture, or a list with one for each prompt")
    prompts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    if any(one is None or (isinstance(one, str) and not one.strip()) for one in prompts):
        raise ValueError(
            "the prompt is empty, wanted a description of the picture: nothing captions it here, unlike in "
            "the reference"
        )
    areas = Areas(vae=resolution * resolution, vl=None)
    return rows_of(prompt, negative_prompt, image, variant, areas, None, None)


def require_flat(variant: Variant) -> None:
    """Raise a ValueError where the checkpoint makes layers: it neither edits nor generates."""
    if variant.layered:
        raise ValueError(f"{variant.name} only takes pictures apart into layers: use decompose")


def _condition(
    system: System, rows: Sequence[BatchRow], grid: Grid, *, guided: bool, most: int
) -> Conditioning:
    """The prompts, of up to `most` tokens, as in text-to-image, and the pictures' latents."""
    if system.vision_language is None:
        raise ValueError("this pipeline was loaded without its text encoder: it can only sample")
    prompts = [row.prompt for row in rows]
    negatives = [row.negative for row in rows if row.negative is not None] if guided else None
    encoder = PromptEncoder(
        system.variant,
        system.processor,
        system.vision_language,
        most,
        system.share_prefix,
        negative_sees=True,
    )
    unseen = [dataclasses.replace(row, pictures=[]) for row in rows]
    with present(system.vision_language):
        prompt, negative = encoder(unseen, prompts, negatives, at_once=system.micro_batch or len(rows))
    encoded: dict[int, Tensor] = {}  # a picture that rows share is encoded once
    with present(system.vae):
        for row in rows:
            ((picture, plan),) = row.planned
            if id(picture) not in encoded:
                encoded[id(picture)] = _encode(rgba_pixels(picture, *plan.vae), system.vae)
    return Conditioning(
        prompt=prompt,
        negative=negative,
        target_grid=grid,
        reference_latents=tuple((encoded[id(row.pictures[0])],) for row in rows),
        reference_grids=tuple((row.geometry.pictures[0].grid,) for row in rows),
        provenance={
            "qwenedit": __version__,
            "variant": system.variant.name,
            "prompt": json.dumps(prompts, ensure_ascii=False),
            "negative_prompt": json.dumps(negatives, ensure_ascii=False),
        },
    ).to(system.device, system.dtype)


def _encode(pixels: Tensor, vae: VAE) -> Tensor:
    """(1, 4, H, W) pixels -> normalised packed latents (S, 64)."""
    like = next(vae.parameters())
    raw = vae.encode(pixels[:, :, None].to(home(vae), like.dtype)).mode()
    require_finite(raw, "VAE encoder: the latents of the picture")
    return pack(normalise(raw, vae.config.latents_mean, vae.config.latents_std))[0]


def check_alpha(output: Path) -> None:
    """Raise a ValueError where a file's format refuses an alpha channel, drops it, or makes it one bit."""
    file, suffix = io.BytesIO(), output.suffix.lower()
    with suppress(OSError, KeyError):
        Image.new("RGBA", (1, 1)).save(file, format=Image.registered_extensions()[suffix])
        with Image.open(file) as picture:
            if picture.mode == "RGBA":
                return
    raise ValueError(f"cannot write {output}: {suffix!r} has no alpha channel (try .png)")


def layers_of(pixels: Tensor, output_type: str) -> list[Any] | Tensor:
    """Decoded layers (B, L, 4, H, W) as `decompose` returns them, as "pil" or "pt"."""
    if output_type == "pt":
        return pixels
    outputs = [to_pil(layers) for layers in pixels]
    return outputs[0] if len(outputs) == 1 else outputs
