"""The components tied together: pictures and prompts in, pictures out.

    condition   pictures and prompts -> Conditioning     (vision_language, vae.encode)
    steps       Conditioning -> the Euler loop           (mmdit)
    decode      latents -> pixels                        (vae.decode)

`edit` and `generate` are these three in a row; each can be called alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from qwenedit import __version__, mini, processor
from qwenedit.checkpoints import Variant, read_areas, read_variant, resolve
from qwenedit.conditioning import Conditioning, Prompt
from qwenedit.geometry import Areas
from qwenedit.guidance import TrueCFG
from qwenedit.inputs import (
    Row,
    check_output_type,
    device_of,
    dtype_of,
    guidance_of,
    negative_prompts,
    rows_of,
    warn,
    warn_of_float16,
)
from qwenedit.latents import denormalise, initial_noise, normalise, pack, unpack
from qwenedit.loading import check_together, load_network, load_scheduler
from qwenedit.mmdit import Grid, MMDiT
from qwenedit.processor import TEXT_TO_IMAGE, Processor, Template
from qwenedit.sampler import NonFiniteError, Step, euler, predictor
from qwenedit.scheduler import FlowMatchScheduler
from qwenedit.taps import scope
from qwenedit.vae import VAE
from qwenedit.vision_language import VisionLanguage

__all__ = ["QwenImageEdit", "Result", "load"]

Size = tuple[int, int]  # width, height, as in PIL
MAX_SEQUENCE_LENGTH = 512  # tokens of a text-to-image prompt


@dataclass(frozen=True, eq=False)
class Result:
    """What a run made: a list of PIL pictures, (B, 3, H, W) pixels in [0, 1], or packed latents (B, S,
    64).
    """

    images: list[Image.Image] | Tensor


class QwenImageEdit:
    """The whole system. Its components are plain attributes, each of which works without the others.

    Attributes:
        vision_language: prompt and pictures to embeddings; None if it was left out on loading.
        vae: pixels to raw latents and back.
        mmdit: noisy latents to velocity.
        scheduler: number of steps to sigmas.
        processor: prompts and pictures to token ids and patches.
        variant: which checkpoint of the family this is, from its model_index.json.
        areas: the areas in pixels that pictures are brought to.
    """

    def __init__(
        self,
        *,
        vision_language: VisionLanguage | None,
        vae: VAE,
        mmdit: MMDiT,
        scheduler: FlowMatchScheduler,
        processor: Processor,
        variant: Variant,
        areas: Areas,
    ) -> None:
        self.vision_language = vision_language
        self.vae = vae
        self.mmdit = mmdit
        self.scheduler = scheduler
        self.processor = processor
        self.variant = variant
        self.areas = areas
        self.progress = True

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None, **options: Any) -> QwenImageEdit:
        """`load` under the name that the ecosystem expects; `torch_dtype` is taken for `dtype`."""
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        return load(source, **options)

    @property
    def device(self) -> torch.device:
        return next(self.mmdit.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mmdit.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> QwenImageEdit:
        """Move the three networks, with the arguments of `torch.nn.Module.to`."""
        for network in (self.vision_language, self.vae, self.mmdit):
            if network is not None:
                network.to(*args, **kwargs)
        warn_of_float16(self.dtype)
        return self

    def set_progress_bar_config(self, *, disable: bool | None = None, **_others: Any) -> None:
        """For scripts written for the reference pipelines; `disable=True` silences the progress bar."""
        self.progress = not disable

    def __call__(
        self,
        image: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Result:
        """`edit`, or `generate` where no image is given. `guidance_scale` is for distilled models:
        ignored.
        """
        if prompt is None:
            raise ValueError("prompt is None, wanted a string or a list of strings")
        if guidance_scale not in (None, 1.0):
            warn(
                "guidance_scale has no effect: no released checkpoint is guidance-distilled; "
                "pass true_cfg_scale"
            )
        if image is None:
            return self.generate(prompt, **options)
        return self.edit(image, prompt, **options)

    @torch.no_grad()
    def edit(
        self,
        image: Image.Image | Sequence[Any],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = " ",
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Result:
        """Change pictures as the prompt says.

        Args:
            image: one picture, used for every prompt. For the multi-picture variants a list of pictures is
                the references of every prompt; for the single-picture variant it is one picture a prompt. A
                list of lists gives each prompt its own references, which may differ in number and size.
            prompt: one prompt, or a list for a batch.
            negative_prompt: what guidance steers away from; it is encoded with the same pictures. None turns
                guidance off.
            true_cfg_scale: guidance scale; guidance runs where it is above 1 and there is a negative prompt.
            num_inference_steps: Euler steps.
            sigmas: unshifted sigmas in place of the even ones, as many as steps.
            height, width: of the output, multiples of 16; left out, they follow from the picture (the last
                one, for the multi-picture variants) at the checkpoint's area.
            generator: one for the batch, or a list with one for each output.
            num_images_per_prompt: outputs for each prompt, prompt-major.
            latents: packed noise (B, S, 64) in place of the generator's.
            output_type: "pil", "pt" ((B, 3, H, W) in [0, 1]) or "latent" (packed, normalised).

        Raises:
            ValueError: bad input, before any network runs.
            NonFiniteError: NaN or infinity, naming the component and the step where it first shows.
        Source: `QwenImageEditPipeline.__call__`, `QwenImageEditPlusPipeline.__call__` of diffusers 0.39.0. We
            differ in batches (the reference pairs prompts with other prompts' masks and pictures, refuses
            batches for the multi-picture variants, and shows pictures in a list to Edit's language model at
            their own size) and in refusing sizes that it would round.
        """
        check_output_type(output_type)
        rows = rows_of(prompt, image, self.variant, self.areas, height, width)
        run = self._prepare(
            rows[0].geometry.grid,
            len(rows) * num_images_per_prompt,
            num_inference_steps,
            sigmas,
            generator,
            latents,
        )
        guidance = guidance_of(true_cfg_scale, negative_prompt)
        negative_prompt = negative_prompt if guidance else None
        conditioning = self._condition(rows, self.variant.template, negative_prompt).repeat(
            num_images_per_prompt
        )
        steps = self._steps(conditioning, run, guidance)
        return self._finish(steps, num_inference_steps, conditioning.target_grid, output_type)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = " ",
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Result:
        """Make pictures from text alone: the original Qwen-Image flow, with the weights of any variant.

        The arguments are those of `edit`; height and width default to a square of the checkpoint's area.
        Prompts are cut after 512 tokens, as in the reference.

        Source: `QwenImagePipeline.__call__` of diffusers 0.39.0.
        """
        check_output_type(output_type)
        rows = rows_of(prompt, None, self.variant, self.areas, height, width)
        run = self._prepare(
            rows[0].geometry.grid,
            len(rows) * num_images_per_prompt,
            num_inference_steps,
            sigmas,
            generator,
            latents,
        )
        guidance = guidance_of(true_cfg_scale, negative_prompt)
        negative_prompt = negative_prompt if guidance else None
        conditioning = self._condition(rows, TEXT_TO_IMAGE, negative_prompt).repeat(num_images_per_prompt)
        steps = self._steps(conditioning, run, guidance)
        return self._finish(steps, num_inference_steps, conditioning.target_grid, output_type)

    @torch.no_grad()
    def condition(
        self,
        image: Image.Image | Sequence[Any] | None,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = " ",
        height: int | None = None,
        width: int | None = None,
    ) -> Conditioning:
        """Everything that a run of `edit` (or of `generate`, without an image) is conditioned on.

        Save it, and the run can be repeated without the text encoder and the VAE's encoder:
        `pipe.sample(Conditioning.load("edit.safetensors"))`.
        """
        template = TEXT_TO_IMAGE if image is None else self.variant.template
        return self._condition(
            rows_of(prompt, image, self.variant, self.areas, height, width), template, negative_prompt
        )

    def steps(
        self,
        conditioning: Conditioning,
        *,
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Iterator[Step]:
        """The Euler loop under a conditioning, one `Step` at a time; `step.after` of the last is the result.

        Unlike `edit` it leaves gradients to the caller: wrap it in `torch.no_grad()` where none are wanted.
        """
        run = self._prepare(
            conditioning.target_grid, conditioning.batch, num_inference_steps, sigmas, generator, latents
        )
        guidance = (
            TrueCFG(true_cfg_scale) if true_cfg_scale > 1 and conditioning.negative is not None else None
        )
        return self._steps(conditioning, run, guidance)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        *,
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Result:
        """Run all `steps` (the same arguments) and decode: the rest of an `edit` after `condition`."""
        check_output_type(output_type)
        steps = self.steps(
            conditioning,
            true_cfg_scale=true_cfg_scale,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            generator=generator,
            latents=latents,
        )
        return self._finish(steps, num_inference_steps, conditioning.target_grid, output_type)

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed normalised latents (B, S, 64) of a token grid -> pixels (B, 3, H, W) in [0, 1]."""
        raw = unpack(latents, grid).to(_dtype(self.vae))
        config = self.vae.config
        pixels = self.vae.decode(denormalise(raw, config.latents_mean, config.latents_std))[:, :, 0]
        _require_finite(pixels, "VAE decoder: the picture")
        return processor.denormalise_pixels(pixels)

    def _prepare(
        self,
        grid: Grid,
        batch: int,
        steps: int,
        sigmas: Sequence[float] | None,
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, list[float]]:
        """Noise and schedule of a run: cheap, so bad input shows before any network runs."""
        if batch < 1:
            raise ValueError(f"num_images_per_prompt makes a batch of {batch}, wanted at least 1")
        tokens = grid[1] * grid[2]
        schedule = self.scheduler.sigmas(steps, tokens, sigmas)
        channels = self.mmdit.config.out_channels
        if latents is None:
            noise = initial_noise(
                batch, channels, grid, generator=generator, device=self.device, dtype=self.dtype
            )
        else:
            wanted = (batch, tokens, self.mmdit.config.in_channels)
            if tuple(latents.shape) != wanted:
                raise ValueError(f"latents have shape {tuple(latents.shape)}, wanted {wanted}")
            noise = latents.to(self.device, self.dtype)
        return noise, schedule

    def _condition(
        self, rows: list[Row], template: Template, negative_prompt: str | Sequence[str] | None
    ) -> Conditioning:
        prompts = [row.prompt for row in rows]
        negatives = None if negative_prompt is None else negative_prompts(negative_prompt, len(rows))
        prompt = self._embed(rows, prompts, template, "cond")
        negative = None if negatives is None else self._embed(rows, negatives, template, "uncond")
        encoded: dict[tuple[int, Size], Tensor] = {}  # a picture that several rows share is encoded once
        latents = []
        for row in rows:
            for picture, plan in zip(row.pictures, row.geometry.pictures, strict=True):
                key = (id(picture), plan.vae)
                if key not in encoded:
                    encoded[key] = self._encode(picture, plan.vae)
            latents.append(
                tuple(
                    encoded[id(picture), plan.vae]
                    for picture, plan in zip(row.pictures, row.geometry.pictures, strict=True)
                )
            )
        return Conditioning(
            prompt=prompt,
            negative=negative,
            target_grid=rows[0].geometry.grid,
            reference_latents=tuple(latents),
            reference_grids=tuple(tuple(plan.grid for plan in row.geometry.pictures) for row in rows),
            provenance={
                "qwenedit": __version__,
                "variant": self.variant.name,
                "prompt": json.dumps(prompts, ensure_ascii=False),
                "negative_prompt": json.dumps(negatives, ensure_ascii=False),
            },
        )

    def _embed(self, rows: list[Row], prompts: list[str], template: Template, branch: str) -> Prompt:
        """Prompts with their rows' pictures -> embeddings without the template's system part."""
        if self.vision_language is None:
            raise ValueError("this pipeline was loaded without its text encoder: it can only sample")
        pictures = None
        if rows[0].pictures:
            pictures = [
                [
                    processor.resize_rgb(picture, *plan.vl)
                    for picture, plan in zip(row.pictures, row.geometry.pictures, strict=True)
                ]
                for row in rows
            ]
        batch = self.processor(prompts, pictures, template)
        device = next(self.vision_language.parameters()).device
        mask = batch.attention_mask.to(device)
        pixels = None if batch.pixel_values is None else batch.pixel_values.to(device)
        with scope(branch=branch):
            embeds = self.vision_language(batch.input_ids.to(device), mask, pixels, batch.image_grid_thw)
        kept = [embeds[row][mask[row].bool()][batch.drop_index :] for row in range(len(rows))]
        if template is TEXT_TO_IMAGE:
            kept = [x[:MAX_SEQUENCE_LENGTH] for x in kept]
        _require_finite(torch.cat(kept), f"text encoder: the embeddings of the {branch} prompt")
        lengths = torch.tensor([len(x) for x in kept], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).to(self.device, self.dtype)
        real = torch.arange(padded.shape[1], device=device) < lengths[:, None]
        return Prompt(padded, None if real.all() else real.to(self.device))

    def _encode(self, picture: Image.Image, size: Size) -> Tensor:
        """A picture -> normalised packed latents (S, 64), from the posterior's mode."""
        vae = next(self.vae.parameters())
        pixels = processor.vae_pixels(picture, *size)[:, :, None].to(vae.device, vae.dtype)
        raw = self.vae.encode(pixels).mode()
        _require_finite(raw, "VAE encoder: the latents of a picture")
        latents = normalise(raw, self.vae.config.latents_mean, self.vae.config.latents_std)
        return pack(latents)[0].to(self.device, self.dtype)

    def _steps(
        self, conditioning: Conditioning, run: tuple[Tensor, list[float]], guidance: TrueCFG | None
    ) -> Iterator[Step]:
        conditioning = conditioning.to(self.device, self.dtype)
        predict = predictor(self.mmdit, conditioning, guided=guidance is not None)
        return euler(predict, *run, guidance)

    def _finish(self, steps: Iterator[Step], count: int, grid: Grid, output_type: str) -> Result:
        """Take all steps, under a progress bar, and make the result."""
        for step in tqdm(steps, total=count, desc="sampling", disable=None if self.progress else True):
            latents = step.after
        _require_finite(latents, "sampler: the final latents")
        if output_type == "latent":
            return Result(latents)
        pixels = self.decode(latents, grid)
        return Result(processor.to_pil(pixels) if output_type == "pil" else pixels)


def _require_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise NonFiniteError(f"{what} has NaN or infinity; look for it in the component's weights")


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    text_encoder: bool = True,
    progress: bool = True,
) -> QwenImageEdit:
    """Load a checkpoint in the official layout.

    Args:
        source: hub id ("Qwen/Qwen-Image-Edit-2511") or folder; None is the embedded model, without a
            download.
        device: where to; the accelerator if there is one, else the CPU.
        dtype: torch dtype or its name; by default what the files store, on the CPU float32.
        revision: branch, tag or commit on the hub.
        text_encoder: False leaves out the text encoder (16.6 GB in the official checkpoints), for runs from a
            saved `Conditioning`.
        progress: progress bars on stderr, if that is a terminal.

    Raises:
        ValueError: bad arguments, no such checkpoint, one of another family, or files that do not fit.
    """
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    folder = mini.CHECKPOINT if source is None else resolve(source, revision)
    variant = read_variant(folder)
    scheduler, areas = load_scheduler(folder), read_areas(folder, variant)
    tokens_and_patches = Processor.from_folder(folder)
    check_together(folder, tokens_and_patches, pictures=variant.max_pictures > 0)
    if dtype is not None:
        warn_of_float16(dtype)

    def network(component: str) -> Any:
        return load_network(folder, component, device=device, dtype=dtype, progress=progress)

    pipe = QwenImageEdit(
        vision_language=network("text_encoder") if text_encoder else None,
        vae=network("vae"),
        mmdit=network("transformer"),
        scheduler=scheduler,
        processor=tokens_and_patches,
        variant=variant,
        areas=areas,
    )
    pipe.progress = progress
    return pipe
