"""Qwen-Image-Layered: a picture taken apart into RGBA layers.

    pipe = qwenedit.load("Qwen/Qwen-Image-Layered")
    layers = pipe.decompose(picture, "a red fox on a white field", layers=4).images

The target is layers + 1 frames of the picture's size: frame 0 repeats the whole picture and is dropped, the
others are the layers. The prompt describes the picture; only the VAE sees it, the text encoder does not. The
VAE has four channels and decodes each layer separately.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import rearrange
from PIL import Image
from torch import Generator, Tensor

from qwenedit.call import Call, RunOptions
from qwenedit.checks import check_run, hinting, whole_number
from qwenedit.family import Variant
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.pictures import to_pil
from qwenedit.inputs.rows import BatchRow, rows_of
from qwenedit.latents import Grid
from qwenedit.parallel.runs import in_one_run
from qwenedit.sampling.guidance import TrueCFG, guidance_of
from qwenedit.sampling.samplers import Sampler
from qwenedit.switches import Guidance, Seen, Switches
from qwenedit.system import Result, System, as_array

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Layers", "layer_guidance", "layer_rows", "require_flat"]


class LayerOptions(RunOptions, total=False):
    """What `decompose` takes besides, for type checkers."""

    negative_prompt: str | Sequence[str] | None
    layers: int
    resolution: int
    cfg_normalize: bool
    num_images_per_prompt: int
    max_sequence_length: int


class Layers(System):
    """The methods of a pipeline that take pictures apart, for checkpoints of Qwen-Image-Layered."""

    @overload
    def decompose(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[LayerOptions],
    ) -> Result[list[Any]]: ...

    @overload
    def decompose(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pt", "latent"],
        **options: Unpack[LayerOptions],
    ) -> Result[Tensor]: ...

    @overload
    def decompose(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        *,
        output_type: str,
        **options: Unpack[LayerOptions],
    ) -> Result[Any]: ...

    @hinting
    @torch.no_grad()
    @in_one_run
    def decompose(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = " ",
        true_cfg_scale: float = 4.0,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        layers: int = 4,
        resolution: int = 640,
        cfg_normalize: bool = False,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        sampler: str | Sampler | None = None,
        output_type: str = "pil",
        max_sequence_length: int = 512,
    ) -> Result[Any]:
        """Take a picture apart into RGBA layers.

        `images` of the result are the layers of the one output, RGBA pictures in the model's order. Several
        outputs are a list of such lists. As "pt" they are (B, layers, 4, H, W) in [0, 1], as "np" an array
        (B, layers, H, W, 4) of them; as "latent" packed (B, S, 64), with the whole picture's frame first
        (`decode_layers` decodes them).

        Args: those that are not listed here are the same as in `edit`.
            image: one picture, used for every prompt, or one per prompt; without alpha it is opaque.
            prompt: a description of the whole picture, or a list of them for a batch.
            layers: the number of layers.
            resolution: side of the square whose area the layers have, in the picture's proportions and in
                multiples of 32. The official checkpoint was made for 640 and 1024.
            cfg_normalize: rescale each token of the guided prediction to the conditional one's norm.
            latents: packed noise (B, S, 64), for layers + 1 frames, in place of the generator's.
            max_sequence_length: prompts are cut to this many tokens, at most 1024.

        Raises:
            ValueError: another variant's checkpoint, or bad input, before any network runs. The
                prompts None, "" and " " are bad input: the reference captions the picture then, we do not.
            NonFiniteError: NaN or infinity, naming the component and the step where it first shows.
        Source: `QwenImageLayeredPipeline.__call__` of diffusers 0.39.0. We differ in batches (the reference
            gives too many layers to all outputs but the last), in the negative prompt's default (None
            there), in adding an alpha channel to pictures without one, and in accepting other resolutions.
        """
        check_run(output_type, num_images_per_prompt, max_sequence_length)
        rows = layer_rows(image, prompt, negative_prompt, self.variant, self.areas, layers, resolution)
        switches = Switches(seen=Seen(picture="unseen"))
        frames = 1 + int(layers)
        grid: Grid = (frames, *rows[0].geometry.grid[1:])
        pictures = [1] * len(rows) * int(num_images_per_prompt)
        call = Call(
            num_inference_steps=num_inference_steps, sigmas=sigmas, generator=generator, latents=latents,
            sampler=sampler,
        )  # fmt: skip
        guidance = layer_guidance(true_cfg_scale, negative_prompt, cfg_normalize=cfg_normalize)
        run = self.prepare(grid, pictures, call, switches, guidance)
        conditioning = self._encode(
            rows, switches, guided=guidance is not None, max_tokens=max_sequence_length, frames=frames
        )
        steps = self._steps(conditioning.repeat(int(num_images_per_prompt)), run)
        return self._finish(steps, run, output_type)

    @torch.no_grad()
    def decode_layers(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed normalised latents (B, S, 64) of a grid of 1 + L frames -> pixels (B, L, 4, H, W) in [0, 1].

        The first frame, the whole picture, is dropped.
        """
        frames, rows, columns = grid
        of_layers = rearrange(latents, "b (f s) d -> b f s d", f=frames)[:, 1:].flatten(0, 1)
        pixels = self.decode(of_layers, (1, rows, columns))
        return pixels.unflatten(0, (-1, frames - 1))

    def _images(self, latents: Tensor, grid: Grid, output_type: str) -> Any:
        """Decoded latents, as "pil", "pt" or "np"; the forms of layers are those of `decompose`."""
        if not self.variant.layered:
            return super()._images(latents, grid, output_type)
        pixels = self.decode_layers(latents, grid)
        if output_type != "pil":
            return as_array(pixels, output_type)
        outputs = [to_pil(layers) for layers in pixels]
        return outputs[0] if len(outputs) == 1 else outputs


def layer_rows(
    image: Any,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    variant: Variant,
    areas: Areas,
    layers: int,
    resolution: int,
) -> list[BatchRow]:
    """The rows of a `decompose`, with all checks of prompts, pictures and sizes; no network is needed.

    Raises:
        ValueError: a variant that makes no layers, or bad input.
    """
    if not variant.layered:
        raise ValueError(f"{variant.name} makes no layers: decompose wants a Qwen-Image-Layered checkpoint")
    whole_number("layers", layers)
    resolution = whole_number("resolution", resolution)
    if image is None:
        raise ValueError("image is None, wanted a PIL picture, or a list with one for each prompt")
    if prompt is None or prompt in ("", " "):  # what the reference replaces; any other text it takes as it is
        raise ValueError(
            "the prompt is empty, wanted a description of the picture: nothing captions it here, unlike in "
            "the reference"
        )
    areas = dataclasses.replace(areas, vae=resolution * resolution, vl=None)
    return rows_of(prompt, negative_prompt, image, variant, areas, None, None)


def layer_guidance(scale: float, negative_prompt: object, *, cfg_normalize: bool) -> TrueCFG | None:
    """The guidance of a `decompose`, as `guidance_of`."""
    guidance = guidance_of(scale, negative_prompt)
    if guidance is None or cfg_normalize:
        return guidance
    return TrueCFG(scale, Guidance(norm="none"))


def require_flat(variant: Variant) -> None:
    """Raise a ValueError if the checkpoint makes layers: it neither edits nor generates."""
    if variant.layered:
        raise ValueError(f"{variant.name} only takes pictures apart into layers: use decompose")
