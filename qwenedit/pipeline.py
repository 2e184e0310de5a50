"""The components tied together: pictures and prompts in, pictures out.

    condition   pictures and prompts -> Conditioning     (vision_language, vae.encode)
    steps       Conditioning -> the Euler loop           (mmdit)
    decode      latents -> pixels                        (vae.decode)

`edit` and `generate` are these three in a row; each can be called alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from qwenedit.encoding.cache import ConditioningCache
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.encoding.encode import encode_rows
from qwenedit.inputs import processor
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.processor import Processor
from qwenedit.inputs.rows import (
    CALL_OPTIONS,
    LOAD_OPTIONS,
    Row,
    check_count,
    check_output_type,
    guidance_of,
    rows_of,
    warn,
    warn_of_float16,
    without_reference_options,
)
from qwenedit.latents import denormalise, initial_noise, unpack
from qwenedit.layered import Layers, layers_of, require_flat
from qwenedit.lora import Loras
from qwenedit.memory import residency
from qwenedit.networks.mmdit import Grid, MMDiT
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.sampling import switched as running
from qwenedit.sampling.guidance import TrueCFG
from qwenedit.sampling.sampler import Step, euler, require_finite
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.switches import Switches
from qwenedit.taps import cache_context
from qwenedit.weights.checkpoints import Variant, find_local

__all__ = ["QwenImageEdit", "Result"]

MAX_TOKENS = 512  # of a text-to-image prompt, unless the caller wants another number


@dataclass(frozen=True, eq=False)
class Result:
    """What a run made: a list of PIL pictures, (B, 3, H, W) pixels in [0, 1], or packed latents (B, S, 64);
    of `decompose` the likes of these, which it describes.
    """

    images: list[Any] | Tensor


class QwenImageEdit(Loras, Layers):
    """The whole system. Its components are plain attributes, each of which works without the others.

    Attributes:
        vision_language: prompt and pictures to embeddings; None if it was left out on loading.
        vae: pixels to raw latents and back.
        mmdit: noisy latents to velocity.
        scheduler: number of steps to sigmas.
        processor: prompts and pictures to token ids and patches.
        variant: which checkpoint of the family this is, from its model_index.json.
        areas: the areas in pixels that pictures are brought to.
        progress: whether progress bars are shown, on a terminal.
        share_prefix: run the text encoder once over what a prompt and its negative prompt have in common,
            the pictures among it: about half the time, and other last bits. False, as the reference runs.
        micro_batch: the most rows of a batch that run through a network at a time; None: all. At 1, and with
            a generator a row, each row is its single run bit by bit.
        conditioning_cache: what the encoders made, kept for runs that ask for the same (not by `decompose`);
            None: nothing is.
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
        self.share_prefix = False
        self.micro_batch: int | None = None
        self.conditioning_cache: ConditioningCache | None = None

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None, **options: Any) -> QwenImageEdit:
        """`load` under the name that the ecosystem expects, with that ecosystem's options where they fit.

        `torch_dtype` is `dtype`; `local_files_only=True` finds a hub id in the cache or not at all.

        Raises:
            ValueError: as `load`; an option that asks for something else than what happens here.
        """
        options = without_reference_options(options, LOAD_OPTIONS)
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        if options.pop("local_files_only", False) and source is not None:
            source = find_local(source, options.pop("revision", None))
        from qwenedit.assembly import load  # which knows this class

        return load(source, **options)

    @staticmethod
    def cache_context(name: str) -> AbstractContextManager[None]:
        """Name the CFG branch of what runs in a `with` block by hand; `edit` and `steps` do so themselves.

        State that a hook keeps between steps is kept apart for each branch (`taps.BranchState`).
        """
        return cache_context(name)

    @property
    def device(self) -> torch.device:
        return residency.home(self.mmdit)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mmdit.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> QwenImageEdit:
        """Move the three networks, with the arguments of `torch.nn.Module.to`."""
        networks = (self.vision_language, self.vae, self.mmdit)
        residency.move([network for network in networks if network is not None], *args, **kwargs)
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
        max_sequence_length: int = MAX_TOKENS,
        **options: Any,
    ) -> Result:
        """`edit`, `generate` where no image is given, or `decompose` where the checkpoint is for that: for
        scripts written for the reference pipelines.

        `guidance_scale` is for distilled models: ignored, with a warning. `max_sequence_length` has no effect
        on editing, as in the reference.

        Raises:
            ValueError: as `edit`; an option that asks for something else than what happens here.
        """
        options = without_reference_options(options, CALL_OPTIONS)
        if guidance_scale not in (None, 1.0):
            warn(
                "guidance_scale has no effect: no released checkpoint is guidance-distilled; "
                "pass true_cfg_scale"
            )
        if self.variant.layered:
            options.pop("use_en_prompt", None)  # the language of a caption, which is not made here
            return self.decompose(image, prompt or "", max_sequence_length=max_sequence_length, **options)
        if prompt is None:
            raise ValueError("prompt is None, wanted a string or a list of strings")
        if image is None:
            return self.generate(prompt, max_sequence_length=max_sequence_length, **options)
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
        switches: Switches | None = None,
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
            switches: what to change about the system (`qwenedit.ablation`); None changes nothing.

        Raises:
            ValueError: bad input, before any network runs.
            NonFiniteError: NaN or infinity, naming the component and the step where it first shows.
        Source: `QwenImageEditPipeline.__call__`, `QwenImageEditPlusPipeline.__call__` of diffusers 0.39.0. We
            differ in batches (the reference pairs prompts with other prompts' masks and pictures, refuses
            batches for the multi-picture variants, and shows pictures in a list to Edit's language model at
            their own size) and in refusing sizes that it would round.
        """
        if image is None:
            raise ValueError("image is None, wanted a PIL picture or a list of them; `generate` needs none")
        return self._run(
            image, prompt, negative_prompt, true_cfg_scale, num_inference_steps, sigmas, height, width,
            generator, num_images_per_prompt, latents, output_type, switches,
        )  # fmt: skip

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
        switches: Switches | None = None,
        max_sequence_length: int = MAX_TOKENS,
    ) -> Result:
        """Make pictures from text alone: the original Qwen-Image flow, with the weights of any variant.

        The arguments are those of `edit`; height and width default to a square of the checkpoint's area.
        Prompts are cut to max_sequence_length tokens (at most 1024), as in the reference.

        Source: `QwenImagePipeline.__call__` of diffusers 0.39.0.
        """
        return self._run(
            None, prompt, negative_prompt, true_cfg_scale, num_inference_steps, sigmas, height, width,
            generator, num_images_per_prompt, latents, output_type, switches, max_sequence_length,
        )  # fmt: skip

    @torch.no_grad()
    def condition(
        self,
        image: Image.Image | Sequence[Any] | None,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = " ",
        height: int | None = None,
        width: int | None = None,
        switches: Switches | None = None,
    ) -> Conditioning:
        """Everything that a run of `edit` (or of `generate`, without an image) is conditioned on.

        Save it, and the run can be repeated without the text encoder and the VAE's encoder:
        `pipe.sample(Conditioning.load("edit.safetensors"))`. Of the switches those act that are about
        encoding (`switches.encoding`); give the same to `steps` or `sample` for the others.
        """
        require_flat(self.variant)
        rows = rows_of(prompt, negative_prompt, image, self.variant, self.areas, height, width)
        running.require_pictures(switches or Switches(), image is not None)
        return self._condition(rows, switches or Switches(), guided=negative_prompt is not None)

    def steps(
        self,
        conditioning: Conditioning,
        *,
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        switches: Switches | None = None,
    ) -> Iterator[Step]:
        """The Euler loop under a conditioning, one `Step` at a time; `step.after` of the last is the result.

        Unlike `edit` it leaves gradients to the caller: wrap it in `torch.no_grad()` where none are wanted.
        """
        switches = switches or Switches()
        pictures = [len(row) for row in conditioning.reference_grids]
        run = self.prepare(
            conditioning.target_grid, pictures, num_inference_steps, sigmas, generator, latents, switches
        )
        running.require_encoded(switches, conditioning)
        # " " is what a negative prompt is by default: unguided, it needs no warning
        negative = None if conditioning.negative is None else " "
        guidance = guidance_of(true_cfg_scale, negative, switches.guidance)
        return self._steps(conditioning, run, guidance, switches)

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
        switches: Switches | None = None,
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
            switches=switches,
        )
        return self._finish(steps, num_inference_steps, conditioning.target_grid, output_type)

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed normalised latents (B, S, 64) of a token grid -> pixels (B, 3, H, W) in [0, 1]."""
        if grid[0] != 1:
            raise ValueError(f"the grid {grid} has {grid[0]} frames, wanted 1: decode_layers takes several")
        raw = unpack(latents, grid).to(next(self.vae.parameters()).dtype)
        config = self.vae.config
        parts = denormalise(raw, config.latents_mean, config.latents_std).split(self.micro_batch or len(raw))
        with residency.present(self.vae):
            pixels = torch.cat([self.vae.decode(part)[:, :, 0] for part in parts])
        require_finite(pixels, "VAE decoder: the picture")
        return processor.denormalise_pixels(pixels)

    def _run(
        self,
        image: Any,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        true_cfg_scale: float,
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
        height: int | None,
        width: int | None,
        generator: Generator | Sequence[Generator] | None,
        num_images_per_prompt: int,
        latents: Tensor | None,
        output_type: str,
        switches: Switches | None,
        max_tokens: int = MAX_TOKENS,
    ) -> Result:
        """What `edit` and, with None for an image, `generate` do."""
        require_flat(self.variant)
        check_output_type(output_type)
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_count("max_sequence_length", max_tokens, most=1024)
        rows = rows_of(prompt, negative_prompt, image, self.variant, self.areas, height, width)
        switches = switches or Switches()
        grid, pictures = rows[0].geometry.grid, [len(row.pictures) for row in rows] * num_images_per_prompt
        run = self.prepare(grid, pictures, num_inference_steps, sigmas, generator, latents, switches)
        guidance = guidance_of(true_cfg_scale, negative_prompt, switches.guidance)
        conditioning = self._condition(rows, switches, guided=guidance is not None, max_tokens=max_tokens)
        steps = self._steps(conditioning.repeat(num_images_per_prompt), run, guidance, switches)
        return self._finish(steps, num_inference_steps, grid, output_type)

    def prepare(
        self,
        grid: Grid,
        pictures: list[int],
        steps: int,
        sigmas: Sequence[float] | None,
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        switches: Switches,
    ) -> tuple[Tensor, list[float]]:
        """Latents to start from and sigmas, for a row each of `pictures` (how many pictures it has): cheap,
        so that bad input shows before any network runs.
        """
        frames, rows, columns = grid
        batch, tokens = len(pictures), rows * columns
        check_count("num_inference_steps", steps)
        if self.micro_batch is not None:
            check_count("micro_batch", self.micro_batch)
        running.require_fitting(switches, pictures=pictures, blocks=self.mmdit.config.num_layers, steps=steps)
        visited = running.schedule(self.scheduler, switches.time, steps, tokens, sigmas)
        channels = self.mmdit.config.out_channels
        if latents is None:
            noise = initial_noise(
                batch, channels, grid, generator=generator, device=self.device, dtype=self.dtype
            )
        else:
            wanted = (batch, frames * tokens, self.mmdit.config.in_channels)
            if not isinstance(latents, Tensor) or tuple(latents.shape) != wanted:
                got = (
                    f"shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
                )
                raise ValueError(f"latents are {got}, wanted a tensor of shape {wanted}")
            noise = latents.to(self.device, self.dtype)
        return noise, visited

    def _condition(
        self, rows: list[Row], switches: Switches, *, guided: bool, max_tokens: int = MAX_TOKENS
    ) -> Conditioning:
        if self.vision_language is None:
            raise ValueError("this pipeline was loaded without its text encoder: it can only sample")
        encode = encode_rows if self.conditioning_cache is None else self.conditioning_cache.encode_rows
        conditioning = encode(
            rows,
            guided=guided,
            max_tokens=max_tokens,
            variant=self.variant,
            processor=self.processor,
            vision_language=self.vision_language,
            vae=self.vae,
            switches=switches,
            share_prefix=self.share_prefix,
            micro_batch=self.micro_batch,
        )
        return conditioning.to(self.device, self.dtype)

    def _steps(
        self,
        conditioning: Conditioning,
        run: tuple[Tensor, list[float]],
        guidance: TrueCFG | None,
        switches: Switches,
    ) -> Iterator[Step]:
        conditioning = conditioning.to(self.device, self.dtype)
        predict = running.switched_predictor(
            self.mmdit, conditioning, switches, guided=guidance is not None, micro_batch=self.micro_batch,
            sigmas=run[1][:-1],
        )  # fmt: skip
        return residency.while_present(self.mmdit, euler(predict, *run, guidance))

    def _finish(self, steps: Iterator[Step], count: int, grid: Grid, output_type: str) -> Result:
        """Take all steps, under a progress bar, and make the result."""
        bar = tqdm(steps, total=count, desc="sampling", disable=None if self.progress else True)
        (last,) = deque(bar, maxlen=1)
        latents = last.after
        require_finite(latents, "sampler: the final latents")
        if output_type == "latent":
            return Result(latents)
        if self.variant.layered:
            return Result(layers_of(self.decode_layers(latents, grid), output_type))
        pixels = self.decode(latents, grid)
        return Result(processor.to_pil(pixels) if output_type == "pil" else pixels)
