"""What serves scripts written for the reference pipelines; a run needs nothing of it.

    from qwenedit import QwenImageEdit as QwenImageEditPipeline

    pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit-2511", torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    image = pipe(image=picture, prompt="...", negative_prompt=" ", num_inference_steps=40).images[0]

A call takes the reference's arguments, in its order and with its defaults, and gives its forms of results.
What cannot work here is an error that says what to write.

Source: `__call__` and `encode_prompt` of diffusers 0.39.0's QwenImagePipeline, QwenImageEditPipeline,
QwenImageEditPlusPipeline and QwenImageLayeredPipeline; `__call__` of QwenImageImg2ImgPipeline,
QwenImageInpaintPipeline and QwenImageEditInpaintPipeline.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from qwenedit.call import sources_for
from qwenedit.checks import check_run, device_of, warn, whole_number
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.encoding.encode import encode_pictures
from qwenedit.encoding.picture_switches import reference_rows, seen_rows
from qwenedit.inputs import rows as inputs
from qwenedit.inputs.geometry import Geometry
from qwenedit.inputs.rows import BatchRow
from qwenedit.latents import Grid
from qwenedit.layered import Layers, layer_guidance, layer_rows
from qwenedit.memory.residency import present, read_when_needed
from qwenedit.networks.low_rank import Change
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.parallel.runs import in_one_run
from qwenedit.reference_call import ReferenceCall, given_prompt
from qwenedit.sampling.guidance import guidance_of
from qwenedit.sampling.reference_scheduler import from_reference
from qwenedit.sampling.sampler import Step
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.switches import Seen, Switches, switches_of
from qwenedit.system import Result, Run
from qwenedit.taps import cache_context
from qwenedit.version import __version__
from qwenedit.weights.configs import config_from

__all__ = ["ReferenceScripts"]

_ALIASES = {"transformer": "mmdit", "text_encoder": "vision_language"}
# What the reference's attributes are here.
_ATTENTION = "attention is torch's own, which needs little memory: leave the line out"
_SLICING = "set pipe.micro_batch = 1 to decode one picture at a time"
_TILING = "decoding needs little memory: leave the line out"
_LEFT_OUT = "there is nothing to undo: leave the line out"
_REMEDIES = {
    "components": "the parts are pipe.mmdit, vae, vision_language, processor and scheduler",
    "image_processor": "pictures are prepared within pipe.edit; see qwenedit.inputs.pictures",
    "enable_group_offload": "load(residency='stream')",
    "enable_layerwise_casting": "load(storage='float8')",
    "enable_vae_slicing": _SLICING,
    "enable_vae_tiling": _TILING,
    **dict.fromkeys(("disable_vae_slicing", "disable_vae_tiling", "maybe_free_model_hooks"), _LEFT_OUT),
    **dict.fromkeys(("remove_all_hooks", "reset_device_map"), _LEFT_OUT),
    **dict.fromkeys(("enable_attention_slicing", "disable_attention_slicing"), _ATTENTION),
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "disable_xformers_memory_efficient_attention": _ATTENTION,
    "fuse_qkv_projections": "leave the line out",
}


class ReferenceScripts(Layers):
    """The methods and attributes of a pipeline that only scripts for the reference pipelines use."""

    _interrupt = False  # a callback sets it to end the run after its step
    _num_timesteps = 0  # of the last call
    _sampler_is_the_schedulers = False  # a scheduler of the reference chose it, and the next one replaces it

    @overload
    def __call__(self, *positional: Any, return_dict: Literal[False], **options: Any) -> tuple[Any]: ...

    @overload
    def __call__(self, *positional: Any, **options: Any) -> Result[Any]: ...

    @torch.no_grad()
    @in_one_run
    def __call__(self, *positional: Any, **options: Any) -> Result[Any] | tuple[Any]:
        """Edit, generate without an image, or decompose with a Layered checkpoint, as in the reference.

        Arguments, their order and their defaults are the reference's: without a negative prompt the run is
        unguided, unlike `edit`'s. With text-to-image checkpoints the prompt comes first, and an image is what
        the run starts from. With a mask the defaults and the order are those of the inpainting pipelines.

        We differ in this: `guidance_scale` is ignored with a warning; `max_sequence_length` has no effect on
        editing, as there; `image` may be left out with an editing checkpoint, which then generates; batches
        are as in `edit`; Layered's outputs are a list of layers for each, never too many.

        Raises:
            TypeError: arguments that the variant's pipeline does not take.
            ValueError: as `edit`, or a value that is not supported here.
        """
        call = ReferenceCall.of(self.variant, positional, options)
        rows, frames = self._rows_of(call)
        switches = Switches(seen=Seen(picture="unseen")) if frames > 1 else switches_of(call.switches)
        grid: Grid = (frames, *rows[0].geometry.grid[1:])
        count = int(call.num_images_per_prompt)
        pictures = [len(row.pictures) for row in rows] * count
        if call.sigmas is not None:  # given sigmas win, as there
            call = dataclasses.replace(call, num_inference_steps=None)
        negative = call.prompts[1]
        if self.variant.layered:
            guidance = layer_guidance(call.true_cfg_scale, negative, cfg_normalize=call.cfg_normalize)
        else:
            guidance = guidance_of(call.true_cfg_scale, negative, switches)
        sources = None if self.variant.layered else sources_for(call, rows, self.variant, self.areas)
        run = self.prepare(grid, pictures, call, switches, guidance, sources)
        conditioning = self._conditioning_of(call, rows, switches, frames, guided=guidance is not None)
        conditioning = conditioning.repeat(count)
        self._interrupt, self._num_timesteps = False, run.predictions
        with _lora_scale(self.mmdit, call.lora_scale):
            images = self._finish(self._called_back(call, conditioning, run), run, call.output_type).images
        if self.variant.layered and call.output_type != "latent":
            single = call.output_type == "pil" and len(conditioning.reference_grids) == 1
            images = [images] if single else list(images)
        return Result(images) if call.return_dict else (images,)

    def _rows_of(self, call: ReferenceCall) -> tuple[list[BatchRow], int]:
        """The rows of a call, and the frames of its target."""
        prompts = call.prompts
        if self.variant.layered:
            rows = layer_rows(call.image, *prompts, self.variant, self.areas, call.layers, call.resolution)
            return rows, 1 + int(call.layers)
        multiple, sides = self.areas.token, (call.height, call.width)
        if call.image is not None and call.starts and any(sides):
            warn("height and width have no effect with a mask: the output follows its picture, as there")
            sides = (None, None)
        height, width = (
            _rounded(name, side, multiple) for name, side in zip(("height", "width"), sides, strict=True)
        )
        return inputs.rows_of(
            *prompts, call.image, self.variant, self.areas, height, width, starts=call.starts
        ), 1

    def _conditioning_of(
        self, call: ReferenceCall, rows: list[BatchRow], switches: Switches, frames: int, *, guided: bool
    ) -> Conditioning:
        """The conditioning of a call; embeddings that it gives are not computed."""
        prompt, negative = call.embeds
        if prompt is None and (negative is None or not guided):
            return self._encode(
                rows, switches, guided=guided, max_tokens=call.max_sequence_length, frames=frames
            )

        def encoded(texts: Sequence[str]) -> Prompt:
            seen = seen_rows(rows, switches.seen)
            of_texts = [
                dataclasses.replace(row, prompt=text, negative=None)
                for row, text in zip(seen, texts, strict=True)
            ]
            tokens = switches.prompt.max_tokens or call.max_sequence_length
            return self._encoder(tokens).encode_prompts(of_texts, False, True)[0]

        if guided and negative is None:
            negative = encoded([row.negative or "" for row in rows])
        return Conditioning(
            prompt=encoded([row.prompt for row in rows]) if prompt is None else prompt,
            negative=negative if guided else None,
            target_grid=(frames, *rows[0].geometry.grid[1:]),
            reference_latents=encode_pictures(
                reference_rows(rows, switches.references), self.vae, switches.vae
            ),
            reference_grids=tuple(tuple(plan.grid for plan in row.geometry.pictures) for row in rows),
            provenance={
                "qwenedit": __version__,
                "variant": self.variant.name,
                "switches": json.dumps(switches.encoding.flat(), ensure_ascii=False),
            },
        ).to(self.device, self.dtype)

    def _called_back(self, call: ReferenceCall, conditioning: Conditioning, run: Run) -> Iterator[Step]:
        """The steps of a call; after each the callback sees and replaces the latents and the embeddings."""
        if call.callback_on_step_end is None:
            yield from self._steps(conditioning, run)
            return
        start = self.begin(run)
        conditioning = self._started(conditioning, run, start)
        predict = self._predictor(conditioning, run, start)

        def current(*args: Any, **only: Any) -> tuple[Tensor, Tensor | None]:
            return predict(*args, **only)

        embeds = conditioning.to(self.device, self.dtype).prompt.embeds
        with present(*self._sampling_networks(start)):
            for step in self._sampled(current, run, start):
                tensors = {"latents": step.after, "prompt_embeds": embeds}
                got = {name: tensors[name] for name in call.callback_on_step_end_tensor_inputs or ()}
                time = torch.tensor(step.sigma, device=self.device) * 1000
                replaced = call.callback_on_step_end(self, step.index, time, got)
                if not isinstance(replaced, Mapping):
                    raise ValueError(
                        f"callback_on_step_end returned {type(replaced).__name__}, wanted a dict of the "
                        "tensors to go on with, such as its last argument"
                    )
                after = replaced.get("latents", tensors["latents"])
                if not isinstance(after, Tensor) or after.shape != tensors["latents"].shape:
                    shape = tuple(tensors["latents"].shape)
                    raise ValueError(
                        f"callback_on_step_end returned latents of another shape, wanted {shape}"
                    )
                step.after = after
                if (changed := replaced.get("prompt_embeds", embeds)) is not embeds:
                    embeds = changed
                    prompt = Prompt(embeds, conditioning.prompt.mask)
                    conditioning = dataclasses.replace(conditioning, prompt=prompt)
                    predict = self._predictor(conditioning, run, start)
                yield step
                if self._interrupt:
                    return

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 1024,
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings (B, T, D) of prompts, with their mask (B, T) of 0 and 1, or None without padding.

        A call takes them as prompt_embeds and prompt_embeds_mask, or under negative_ of the same names. Of
        editing checkpoints the prompts come with their pictures, which are not resized here, as there; our
        own form of this is `condition`.
        """
        check_run("pil", num_images_per_prompt, max_sequence_length)
        given = given_prompt(prompt_embeds, prompt_embeds_mask)
        if given is None:
            illustrated = self.variant.takes_pictures and not self.variant.layered
            if illustrated and image is None:
                raise ValueError(
                    f"image is None, wanted the pictures that {self.variant.name}'s prompt is about"
                )
            rows = inputs.rows_of(
                prompt, None, image if illustrated else None, self.variant, self.areas, None, None
            )
            encoder = self._encoder(max_sequence_length)
            given, _ = encoder.encode_prompts([_as_given(row) for row in rows], False, True)
        count = torch.arange(len(given.embeds)).repeat_interleave(num_images_per_prompt)
        repeated = given.rows(count)
        mask = None if repeated.mask is None else repeated.mask.long().to(device or self.device)
        return repeated.embeds.to(device or self.device), mask

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Keep one network's weights at a time in memory: residency="stage", which `load` may have chosen.

        Raises:
            ValueError: weights that were changed, or that memory modes keep: pass the residency to `load`.
        """
        self._read_when_needed("stage", gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Keep two blocks' weights at a time in memory: residency="stream", which `load` may have chosen.

        Raises:
            ValueError: as `enable_model_cpu_offload`.
        """
        self._read_when_needed("stream", gpu_id, device)

    def _read_when_needed(self, residency: str, gpu_id: int | None, device: Any) -> None:
        if gpu_id is not None and device is None:
            device = f"{self.device.type}:{gpu_id}"
        if device is not None:
            device = device_of(device)
        networks = (self.vision_language, self.vae, self.mmdit, *self.controlnets)
        read_when_needed([one for one in networks if one is not None], residency, self.progress)
        if device is not None:
            self.to(device)

    def set_progress_bar_config(self, *, disable: bool | None = None, **_others: Any) -> None:
        """For scripts written for the reference pipelines; `disable=True` silences the progress bar."""
        self.progress = not disable

    @staticmethod
    def cache_context(name: str) -> AbstractContextManager[None]:
        """Name the CFG branch of networks that you run in a `with` block; `edit` and `steps` name theirs.

        Hooks that keep state between steps keep it per branch (`ablation.first_block_cache.BranchState`).
        """
        return cache_context(name)

    @property
    def transformer(self) -> MMDiT:
        return self.mmdit

    @property
    def text_encoder(self) -> VisionLanguage | None:
        return self.vision_language

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of the `tokenizers` library: `pipe.tokenizer.encode(text).ids`."""
        return self.processor.tokenizer

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    if not TYPE_CHECKING:  # type checkers would take any name for an attribute

        def __setattr__(self, name: str, value: Any) -> None:
            """A scheduler of the reference is a schedule and a sampler; its names of networks are ours."""
            if name == "scheduler":
                config, sampler = from_reference(value)
                foreign = not isinstance(value, FlowMatchScheduler)
                if foreign:
                    config = {**self.scheduler.config, **config}
                    value = config_from(type(self.scheduler), config, "the scheduler")
                if foreign or self._sampler_is_the_schedulers:
                    super().__setattr__("sampler", sampler)
                super().__setattr__("_sampler_is_the_schedulers", foreign)
            if name == "sampler":
                super().__setattr__("_sampler_is_the_schedulers", False)
            if name in _ALIASES:
                if not isinstance(value, (MMDiT, VisionLanguage, type(None))):
                    raise ValueError(
                        f"{name} is {type(value).__name__}, wanted the network of this package: load("
                        f"{_ALIASES[name] if name == 'transformer' else name}=FILE) reads other weights, "
                        "load(compile=True) compiles"
                    )
                name = _ALIASES[name]
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            remedy = f": {_REMEDIES[name]}" if name in _REMEDIES else ""
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}{remedy}", name=name, obj=self
            )


def _rounded(name: str, side: int | None, multiple: int) -> int | None:
    """A side of the output as the reference takes it: rounded down to a multiple; 0 is the default."""
    if not side:
        return None
    side = whole_number(name, side, least=multiple)
    if side % multiple:
        warn(f"{name} is {side}, taken as {side // multiple * multiple}: a multiple of {multiple} is wanted")
    return side // multiple * multiple


def _as_given(row: BatchRow) -> BatchRow:
    """The row, its pictures at their own sizes."""
    pictures = tuple(dataclasses.replace(one, vl=one.size) for one in row.geometry.pictures)
    geometry: Geometry = dataclasses.replace(row.geometry, pictures=pictures)
    return dataclasses.replace(row, geometry=geometry)


@contextmanager
def _lora_scale(mmdit: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the scales of all LoRAs for the length of a `with` block."""
    changes = [one for one in mmdit.modules() if isinstance(one, Change)]
    before = [one.scale for one in changes]
    for one in changes:
        one.scale *= scale
    try:
        yield
    finally:
        for one, own in zip(changes, before, strict=True):
            one.scale = own
