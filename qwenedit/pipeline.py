"""The components tied together: pictures and prompts in, pictures out.

`edit` and `generate` are `condition`, `steps` and `decode` in a row; parts.py has them one by one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from PIL import Image
from torch import Generator, Tensor

from qwenedit.assembly import add_controlnets, assemble, compare_controlnets, modes_of, other_files
from qwenedit.call import (
    MAX_TOKENS,
    Call,
    EditOptions,
    GenerateOptions,
    sources_for,
)
from qwenedit.checks import (
    check_run,
    device_of,
    dtype_of,
    hinting,
    without_reference_options,
)
from qwenedit.inputs.controls import AnyControlNet
from qwenedit.inputs.rows import rows_of
from qwenedit.layered import require_flat
from qwenedit.lora import Loras
from qwenedit.parallel.processes import meet, own_device
from qwenedit.parallel.runs import in_one_run
from qwenedit.parts import Parts, Pictures
from qwenedit.reference_call import LOAD_OPTIONS
from qwenedit.sampling.compiling import compile_blocks, require_compiler
from qwenedit.sampling.guidance import guidance_of
from qwenedit.sampling.reference_scheduler import from_reference
from qwenedit.sampling.samplers import Sampler
from qwenedit.saving import save
from qwenedit.switches import Switches, switches_of
from qwenedit.system import Result
from qwenedit.weights.checkpoints import find_local
from qwenedit.weights.controlnets import Source, sources_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["QwenImageEdit", "load"]


class QwenImageEdit(Loras, Parts):
    """The whole system: the components, which `System` lists, with editing, generation and LoRAs."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None, **options: Any) -> QwenImageEdit:
        """`load` under the name that the ecosystem expects, with that ecosystem's options where they fit.

        `torch_dtype` is `dtype`; `device_map` is a device, or "balanced" for what `load` does anyway. A
        `scheduler` is as for `pipe.scheduler = ...`. With `local_files_only=True` a hub id is only looked up
        in the cache.

        Raises:
            ValueError: as `load`, or an option with a value that is not supported here.
        """
        options = without_reference_options(options, LOAD_OPTIONS)
        scheduler = options.pop("scheduler", None)
        if scheduler is not None:
            from_reference(scheduler)  # before anything is downloaded
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        if (device_map := options.pop("device_map", None)) not in (None, "auto", "balanced"):
            options.setdefault("device", device_map)
        if options.pop("local_files_only", False) and source is not None:
            source = find_local(source, options.pop("revision", None))
        pipe = load(source, **options)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def load_controlnet(self, source: Source) -> AnyControlNet:
        """Load a ControlNet for this pipeline's transformer, and append it to `controlnets`.

        It runs in the transformer's dtype, on its device and in its memory modes: its weights are in memory
        together with the transformer's. LoRAs do not act on it.

        Args:
            source: hub id ("InstantX/Qwen-Image-ControlNet-Union"), folder or file: a net of InstantX's kind,
                with or without its config, or a blockwise net of DiffSynth, recognised by its tensors.

        Raises:
            ValueError: no such ControlNet, or one that does not fit the transformer. The pipeline is then as
                it was.
        """
        config = self.mmdit.config
        compared = compare_controlnets(sources_of([source]), config, self.variant, progress=self.progress)
        (net,) = add_controlnets(self, compared)
        return net

    @hinting
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the checkpoint to a new folder in the official layout, whole or not at all.

        The reference loads it, and so does `load`, bit by bit in the networks' dtypes. Files of weights have
        at most 5 GB; one at a time is in memory. Weights that are not in memory are read from the
        checkpoint's files. Tokenizer, processor and configs are copied from there.

        Raises:
            ValueError: LoRAs that are not fused; a pipeline without its text encoder, or that `load` did not
                make; a folder that is not empty or cannot be made; files of the checkpoint that are gone.
        Source: `DiffusionPipeline.save_pretrained` of diffusers 0.39.0, which writes into any folder.
        """
        save(self, folder)

    @overload
    def edit(
        self,
        image: Pictures,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[EditOptions],
    ) -> Result[list[Image.Image]]: ...

    @overload
    def edit(
        self,
        image: Pictures,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pt", "latent"],
        **options: Unpack[EditOptions],
    ) -> Result[Tensor]: ...

    @overload
    def edit(
        self,
        image: Pictures,
        prompt: str | Sequence[str],
        *,
        output_type: str,
        **options: Unpack[EditOptions],
    ) -> Result[Any]: ...

    @hinting
    @torch.no_grad()
    def edit(
        self,
        image: Pictures,
        prompt: str | Sequence[str],
        *,
        mask_image: Pictures | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        negative_prompt: str | Sequence[str] | None = " ",
        true_cfg_scale: float = 4.0,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        sampler: str | Sampler | None = None,
        output_type: str = "pil",
        switches: Switches | None = None,
        control_image: Any = None,
        control_mask: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> Result[Any]:
        """Change pictures as the prompt says.

        Args:
            image: one picture, used for every prompt. For the multi-picture variants a list of pictures is
                the references of every prompt; for the single-picture variant it is one picture per prompt.
                A list of lists gives each prompt its own references, which may differ in number and size.
                Pictures are turned upright by EXIF, and 16 bits of grey are scaled to 8 (`as_picture`).
            prompt: one prompt, or a list for a batch.
            mask_image: a picture, or one for each prompt, that is white where the picture may change and
                black where it is kept; grey below 128 is black. For the multi-picture variants it belongs to
                the last picture, and the others stay references. The VAE then sees that picture at the
                output's size. docs/masks.md says what is kept exactly.
            strength: the share of the steps that are run, in [0, 1], from the picture with as much noise as
                the first of them has. At 1 the official schedule starts from noise alone.
            padding_mask_crop: make only a region around the mask's white, with so many pixels about it, at
                the whole size of the output, and lay it back into the picture.
            negative_prompt: guidance steers away from it; it is encoded with the same pictures. None turns
                guidance off.
            true_cfg_scale: guidance scale; guidance runs if it is above 1 and there is a negative prompt.
            num_inference_steps: intervals of the schedule; by default 50, or as many as there are given
                sigmas. Each takes one prediction, with the sampler "heun" two.
            sigmas: unshifted sigmas in place of the evenly spaced ones, one per step; the last may be 0.
            height, width: of the output, multiples of a token's side, 16 in the official checkpoints; by
                default they follow from the picture (the last one, for the multi-picture variants) at the
                checkpoint's area.
            generator: one for the batch, or a list with one for each output.
            num_images_per_prompt: outputs for each prompt, prompt-major.
            latents: packed noise (B, S, 64) in place of the generator's, also for a run with a mask.
            sampler: "euler", "heun", "dpmpp_2m" or "unipc"; or "stochastic" or "flow_sde", which draw noise
                from the generator in every step, too; or a function of that form, such as
                functools.partial(flow_sde, eta=1.2, generator=generator). See `qwenedit.sampling.samplers`.
                None is the pipeline's own, `pipe.sampler`.
            output_type: "pil", "pt" ((B, 3, H, W) in [0, 1]), "np" (an array (B, H, W, 3) of the same) or
                "latent" (packed, normalised).
            switches: changes to the system (`qwenedit.switches`); None changes nothing.
            control_image: what the ControlNets (`pipe.controlnets`) read, resized to the output, which under
                a crop is the region. A list is for several controls: one picture for each net, or several
                for one net, whose residuals are summed. A list in the list gives each prompt its own
                (docs/controlnets.md).
            control_mask: for inpainting nets: white hides the picture from the net. Likewise a list, with
                None for nets that take no mask.
            controlnet_conditioning_scale: factor on what a net adds to the target's tokens, or a list.
            control_guidance_start, control_guidance_end: shares of the run between which a net acts, or
                lists.

        Raises:
            ValueError: bad input, before any network runs.
            NonFiniteError: NaN or infinity, naming the component and the step where it first shows.
        Source: `QwenImageEditPipeline.__call__`, `QwenImageEditPlusPipeline.__call__` and, with a mask,
            `QwenImageEditInpaintPipeline.__call__` of diffusers 0.39.0. We differ in turning pictures upright
            and scaling their levels, in batches (the reference pairs prompts with other prompts' masks and
            pictures, refuses batches for the multi-picture variants, and shows Edit's language model the
            pictures of a list at their original sizes) and in refusing sizes that it would round. With a mask
            we also differ in the default strength (0.6 there), in taking several references, a size and
            `latents`, and in refusing a mask that changes nothing.
        """
        if image is None:
            raise ValueError("image is None, wanted a PIL picture or a list of them; `generate` needs none")
        return self._run(
            Call(
                image=image, mask_image=mask_image, strength=strength, padding_mask_crop=padding_mask_crop,
                prompt=prompt, negative_prompt=negative_prompt, true_cfg_scale=true_cfg_scale,
                num_inference_steps=num_inference_steps, sigmas=sigmas, height=height, width=width,
                generator=generator, num_images_per_prompt=num_images_per_prompt, latents=latents,
                sampler=sampler, output_type=output_type, switches=switches,
                control_image=control_image, control_mask=control_mask,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                control_guidance_start=control_guidance_start, control_guidance_end=control_guidance_end,
            )
        )  # fmt: skip

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[GenerateOptions],
    ) -> Result[list[Image.Image]]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pt", "latent"],
        **options: Unpack[GenerateOptions],
    ) -> Result[Tensor]: ...

    @overload
    def generate(
        self, prompt: str | Sequence[str], *, output_type: str, **options: Unpack[GenerateOptions]
    ) -> Result[Any]: ...

    @hinting
    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        negative_prompt: str | Sequence[str] | None = " ",
        true_cfg_scale: float = 4.0,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        sampler: str | Sampler | None = None,
        output_type: str = "pil",
        switches: Switches | None = None,
        max_sequence_length: int = MAX_TOKENS,
        control_image: Any = None,
        control_mask: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> Result[Any]:
        """Make pictures from text, also from a picture to start from, with the weights of any variant.

        The arguments are those of `edit`; height and width default to 128 latent pixels (1024 pixels in the
        official checkpoints), or to a square of the area that the checkpoint's model_index.json names.
        Prompts are cut to max_sequence_length tokens (at most 1024), as in the reference.

        Args: those that are not listed here are the same as in `edit`.
            image: the picture to start from, or one for each prompt; it is stretched to the output's size.
            mask_image: what of it may change.
            strength: as in `edit`; by default 0.6 with an image.

        Source: `QwenImagePipeline.__call__` of diffusers 0.39.0; with an image
            `QwenImageImg2ImgPipeline.__call__`, with a mask `QwenImageInpaintPipeline.__call__`. We differ in
            given latents, which are the noise: the first of these starts from them, the second fails.
        """
        return self._run(
            Call(
                source=image, mask_image=mask_image, strength=strength, padding_mask_crop=padding_mask_crop,
                prompt=prompt, negative_prompt=negative_prompt, true_cfg_scale=true_cfg_scale,
                num_inference_steps=num_inference_steps, sigmas=sigmas, height=height, width=width,
                generator=generator, num_images_per_prompt=num_images_per_prompt, latents=latents,
                sampler=sampler, output_type=output_type, switches=switches,
                max_sequence_length=max_sequence_length,
                control_image=control_image, control_mask=control_mask,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                control_guidance_start=control_guidance_start, control_guidance_end=control_guidance_end,
            )
        )  # fmt: skip

    @in_one_run
    def _run(self, call: Call) -> Result[Any]:
        """`generate` if the call has no image, else `edit`."""
        require_flat(self.variant)
        check_run(call.output_type, call.num_images_per_prompt, call.max_sequence_length)
        prompts = call.prompt, call.negative_prompt
        rows = rows_of(
            *prompts, call.image, self.variant, self.areas, call.height, call.width, starts=call.starts
        )
        switches = switches_of(call.switches)
        guidance = guidance_of(call.true_cfg_scale, call.negative_prompt, switches)
        count = int(call.num_images_per_prompt)
        pictures = [len(row.pictures) for row in rows] * count
        sources = sources_for(call, rows, self.variant, self.areas)
        run = self.prepare(rows[0].geometry.grid, pictures, call, switches, guidance, sources)
        guided, most = guidance is not None, call.max_sequence_length
        conditioning = self._encode(rows, switches, guided=guided, max_tokens=most).repeat(count)
        return self._finish(self._steps(conditioning, run), run, call.output_type)


@hinting
def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    mmdit: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: bool | str | os.PathLike[str] = True,
    controlnet: Source | Sequence[Source] | None = None,
    progress: bool = True,
    compile: bool = False,
    residency: str = "auto",
    modulation: str = "live",
    storage: str | None = None,
    parallel: str | None = None,
    split_weights: bool = False,
) -> QwenImageEdit:
    """Load a checkpoint in the official layout, or parts of it from files in other layouts.

    Args:
        source: hub id ("Qwen/Qwen-Image-Edit-2511") or folder; None is the embedded model, which needs no
            download.
        device: by default the accelerator if there is one, else the CPU.
        dtype: torch dtype or its name; by default float32 on the CPU, the stored dtype elsewhere.
        revision: branch, tag or commit on the hub.
        mmdit, vae: a file (or folder) whose weights replace the checkpoint's for that network: official,
            ComfyUI's (bfloat16, fp8, fp8 with scales) or GGUF (`pip install 'qwenedit[gguf]'`), recognised by
            its tensors. The config stays the checkpoint's; a file that is marked as Edit-2511's turns
            `zero_cond_t` on.
        text_encoder: likewise a file; False omits the text encoder (16.6 GB in the official checkpoints), for
            runs from a saved `Conditioning`.
        controlnet: a ControlNet, or a list of them: see `load_controlnet`.
        progress: progress bars on stderr, if that is a terminal.
        compile: compile the transformer's blocks with torch.compile on their first run; all blocks and all
            sizes share one compilation. Last bits differ; under taps and hooks the blocks run uncompiled.
        residency: where weights are. "resident": all in memory. "stage": one network at a time in memory,
            read from the files when it runs. "stream": two blocks at a time in memory, and all that is in
            no block; the next block is read while one computes, so time depends on the disk. "auto": the
            first of these that fits. Results are bitwise equal.
        modulation: "precomputed": the transformer's adaLN layers, a third of its weights, are read once per
            run for all steps; under taps, hooks or gradients also block by block as they run. Results are
            bitwise equal.
        storage: "float8": matrices of the transformer's and the text encoder's blocks are stored in 8 bits
            with a scale per row and widened block by block. It takes half of bfloat16's memory and is an
            approximation: pixels of the embedded model's edits in 20 steps change by 0.002 of white on
            average and by up to 0.06.
        parallel: how the processes that torchrun started share a run, like "cfg=2,ulysses=4" or "tensor=2".
            All make the same calls and get the same results (docs/scale.md).
        split_weights: each of these processes reads and keeps its part of the weights, and gathers a block's
            while it runs. Results are bitwise equal.

    Raises:
        ValueError: bad arguments, no such checkpoint, one of another family, or files that do not fit; with
            `compile`, no C++ compiler, or weights that do not stay in memory; another number of processes.
    """
    device = device_of(device) if parallel is None else own_device(device)
    dtype = dtype_of(dtype, device)
    modes = modes_of(compile=compile, residency=residency, modulation=modulation, storage=storage)
    if compile:
        require_compiler()
    files, sources = other_files(mmdit=mmdit, vae=vae, text_encoder=text_encoder), sources_of(controlnet)
    processes = meet(parallel, device, compile=compile, split_weights=split_weights, modes=modes)
    splitting = None
    if processes is not None and (split_weights or processes.spec.tensor > 1):
        from qwenedit.parallel.split import split  # not in every torch

        splitting = functools.partial(split, processes=processes, weights=split_weights)
    pipe = assemble(
        QwenImageEdit, source, revision=revision, device=device, dtype=dtype, modes=modes, files=files,
        text_encoder=text_encoder not in (False, None), controlnets=sources, progress=progress,
        processes=processes, split=splitting,
    )  # fmt: skip
    if compile:
        compile_blocks(pipe.mmdit)
    return pipe
