"""The parts of a run, one by one.

condition   pictures and prompts -> Conditioning     (vision_language, vae.encode)
steps       Conditioning -> the sampler's loop       (mmdit)
decode      latents -> pixels                        (vae.decode)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from PIL import Image
from torch import Generator, Tensor

from qwenedit.call import MAX_TOKENS, Call, SampleOptions, sources_under
from qwenedit.checks import check_output_type, hinting
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.inputs.rows import rows_of
from qwenedit.layered import require_flat
from qwenedit.parallel.runs import guarded, in_one_run
from qwenedit.reference_scripts import ReferenceScripts
from qwenedit.sampling.guidance import guidance_of
from qwenedit.sampling.sampler import Step
from qwenedit.sampling.samplers import Sampler
from qwenedit.sampling.switched import require_encoded, require_pictures
from qwenedit.switches import Switches, switches_of
from qwenedit.system import Result, Run

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Parts", "Pictures"]

Pictures: TypeAlias = "Image.Image | Sequence[Any]"


class Parts(ReferenceScripts):
    """`condition`, and from its result `steps`, or `sample`, which also decodes."""

    @hinting
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
        """The conditioning of a run of `edit`, or of `generate` without an image.

        From a saved conditioning the run can be repeated without the text encoder and the VAE's encoder:
        `pipe.sample(Conditioning.load("edit.safetensors"))`. Only the switches about encoding act here
        (`switches.encoding`); give the same switches to `steps` or `sample` for the others.
        """
        require_flat(self.variant)
        rows = rows_of(prompt, negative_prompt, image, self.variant, self.areas, height, width)
        switches = switches_of(switches)
        require_pictures(switches, image is not None)
        return self._encode(rows, switches, guided=negative_prompt is not None, max_tokens=MAX_TOKENS)

    @hinting
    @in_one_run
    def steps(
        self,
        conditioning: Conditioning,
        *,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        true_cfg_scale: float = 4.0,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        sampler: str | Sampler | None = None,
        switches: Switches | None = None,
        control_image: Any = None,
        control_mask: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> Iterator[Step]:
        """The sampler's loop under a conditioning, one `Step` at a time; the result is the last's `after`.

        `image` is the picture to start from, or one for each row; it takes a mask and a strength as in
        `edit`. By default the strength is 1 if the conditioning has pictures, else 0.6.

        Unlike `edit` it leaves gradients to the caller: wrap it in `torch.no_grad()` if you want none.
        """
        call = Call(
            source=image, mask_image=mask_image, strength=strength, padding_mask_crop=padding_mask_crop,
            true_cfg_scale=true_cfg_scale, num_inference_steps=num_inference_steps, sigmas=sigmas,
            generator=generator, latents=latents, sampler=sampler, switches=switches,
            control_image=control_image, control_mask=control_mask,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start, control_guidance_end=control_guidance_end,
        )  # fmt: skip
        steps = self._steps(conditioning, self._run_under(conditioning, call))
        return guarded(self.processes, steps)

    @overload
    def sample(
        self,
        conditioning: Conditioning,
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[SampleOptions],
    ) -> Result[list[Image.Image]]: ...

    @overload
    def sample(
        self,
        conditioning: Conditioning,
        *,
        output_type: Literal["pt", "latent"],
        **options: Unpack[SampleOptions],
    ) -> Result[Tensor]: ...

    @overload
    def sample(
        self, conditioning: Conditioning, *, output_type: str, **options: Unpack[SampleOptions]
    ) -> Result[Any]: ...

    @hinting
    @torch.no_grad()
    @in_one_run
    def sample(
        self,
        conditioning: Conditioning,
        *,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        true_cfg_scale: float = 4.0,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
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
        """Run all `steps`, with the same arguments, and decode: the part of `edit` after `condition`."""
        check_output_type(output_type)
        call = Call(
            source=image, mask_image=mask_image, strength=strength, padding_mask_crop=padding_mask_crop,
            true_cfg_scale=true_cfg_scale, num_inference_steps=num_inference_steps, sigmas=sigmas,
            generator=generator, latents=latents, sampler=sampler, output_type=output_type, switches=switches,
            control_image=control_image, control_mask=control_mask,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start, control_guidance_end=control_guidance_end,
        )  # fmt: skip
        run = self._run_under(conditioning, call)
        return self._finish(self._steps(conditioning, run), run, output_type)

    def _run_under(self, conditioning: Conditioning, call: Call) -> Run:
        """The checked run of a call under a conditioning that is there already."""
        switches = switches_of(call.switches)
        # The default negative prompt " " gives no warning if the run is unguided.
        negative = None if conditioning.negative is None else " "
        guidance = guidance_of(call.true_cfg_scale, negative, switches)
        pictures = [len(row) for row in conditioning.reference_grids]
        sources = sources_under(call, conditioning, self.areas.token)
        run = self.prepare(conditioning.target_grid, pictures, call, switches, guidance, sources)
        require_encoded(switches, conditioning)
        return run
