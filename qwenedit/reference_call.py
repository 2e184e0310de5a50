"""The arguments of a call, as the reference pipelines take them: their order, defaults and checks."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwenedit.call import STRENGTH, Call
from qwenedit.checks import (
    check_run,
    real_number,
    require_known,
    warn,
    without_reference_options,
)
from qwenedit.encoding.conditioning import Prompt
from qwenedit.family import Variant

__all__ = ["LOAD_OPTIONS", "ReferenceCall", "given_prompt"]

_EMBEDDED = "(given as embeddings)"  # stands for a prompt's text
_TENSORS = ("latents", "prompt_embeds")  # what a callback can read and replace
_FIRST = ("prompt", "negative_prompt", "true_cfg_scale")
_MASKS = ("mask_image", "strength", "padding_mask_crop")
_CONTROL = (  # by name alone; the pipelines that take them have other places for them
    "control_image", "control_mask", "controlnet_conditioning_scale", "control_guidance_start",
    "control_guidance_end",
)  # fmt: skip
_LAST = (
    "num_inference_steps", "sigmas", "guidance_scale", "num_images_per_prompt", "generator", "latents",
    "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask",
    "output_type", "return_dict", "attention_kwargs", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "max_sequence_length",
)  # fmt: skip
# Options of the reference, as `without_reference_options` takes them.
_FOLDER = "they are read from the checkpoint's folder"
LOAD_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        ("low_cpu_mem_usage", "resume_download", "offload_state_dict", "offload_folder"), ((), "")
    ),
    "use_safetensors": ((None, True), "there is no other format"),
    "variant": ((None,), "give the folder that holds the files"),
    "cache_dir": ((None,), "set the environment variable HF_HUB_CACHE before Python starts"),
    "token": ((None, True), "run `hf auth login`, or set the environment variable HF_TOKEN"),
    "force_download": ((None, False), "files that differ from the hub's are found and fetched again"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
    "custom_pipeline": ((None,), "the pipeline is this class; change its parts after loading"),
    "max_memory": ((None,), "pass residency='stage' or 'stream'"),
    "quantization_config": ((None,), "pass storage='float8', or mmdit=FILE with a GGUF file"),
    "transformer": ((None,), "pass mmdit=FILE with its weights, or change pipe.mmdit after loading"),
    "tokenizer": ((None,), _FOLDER),
    "processor": ((None,), _FOLDER),
}
_CALL_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_en_prompt": ((), ""),  # the language of automatic captions, which we do not make
    "masked_image_latents": ((None,), "they change nothing in the reference either: leave them out"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceCall(Call):
    """A call's arguments of the reference's pipelines, their defaults; `sampler` and `switches` are ours."""

    negative_prompt: str | Sequence[str] | None = None
    layers: int = 4
    num_inference_steps: int | None = 50
    guidance_scale: float | None = None
    prompt_embeds: Tensor | None = None
    prompt_embeds_mask: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_embeds_mask: Tensor | None = None
    return_dict: bool = True
    attention_kwargs: Mapping[str, Any] | None = None
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    resolution: int = 640
    cfg_normalize: bool = False

    @classmethod
    def of(cls, variant: Variant, positional: Sequence[Any], options: dict[str, Any]) -> ReferenceCall:
        """From what the caller wrote; the order of arguments is that of the variant's pipeline.

        Raises:
            TypeError: too many arguments, one given twice, or one that this pipeline does not take.
            ValueError: values that exclude each other or cannot be used.
        """
        order = _order(variant, positional)
        ours = ("sampler",) if variant.layered else (*_MASKS, *_CONTROL, "sampler", "switches")
        if len(positional) > len(order):
            raise TypeError(f"got {len(positional)} arguments, wanted at most {len(order)}")
        if twice := [name for name in order[: len(positional)] if name in options]:
            raise TypeError(f"{twice[0]} is given twice, by its place and by its name")
        options = {**dict(zip(order, positional, strict=False)), **options}
        options = without_reference_options(options, _CALL_OPTIONS)
        require_known("__call__", options, ("image", *order, *ours))
        if not variant.takes_pictures:  # the picture that it starts from, not one that it sees
            options["source"] = options.pop("image", None)
        if options.get("mask_image") is not None and options.get("strength") is None:
            options["strength"] = STRENGTH
        call = cls(**options)
        if call.prompt is None and call.prompt_embeds is None and not variant.layered:  # which says more
            place = ": the picture comes first, then the prompt" if isinstance(call.image, str) else ""
            raise ValueError(f"prompt is None, wanted a string or a list of strings, or prompt_embeds{place}")
        call._check()
        return call

    def _check(self) -> None:
        check_run(self.output_type, self.num_images_per_prompt, self.max_sequence_length)
        for name in ("prompt", "negative_prompt"):
            if getattr(self, name) is not None and getattr(self, f"{name}_embeds") is not None:
                raise ValueError(f"{name} and {name}_embeds are both given, wanted one of them")
        if others := [name for name in self.callback_on_step_end_tensor_inputs or () if name not in _TENSORS]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(map(str, others))}, wanted "
                f"{' or '.join(_TENSORS)}; loop over pipe.steps(conditioning) to see all of a step"
            )
        if others := sorted(set(self.attention_kwargs or {}) - {"scale"}):
            raise ValueError(
                f"attention_kwargs has {', '.join(others)}, wanted scale, of the LoRAs: attach `taps` instead"
            )
        real_number("attention_kwargs['scale']", self.lora_scale)
        if self.guidance_scale not in (None, 1.0):
            warn(
                "guidance_scale has no effect: no released checkpoint is guidance-distilled; "
                "pass true_cfg_scale"
            )

    @property
    def lora_scale(self) -> float:
        """The factor on the scales of all LoRAs."""
        scale: float = (self.attention_kwargs or {}).get("scale", 1.0)
        return scale

    @property
    def embeds(self) -> tuple[Prompt | None, Prompt | None]:
        """The given embeddings of the prompts and of the negative prompts."""
        return (
            given_prompt(self.prompt_embeds, self.prompt_embeds_mask),
            given_prompt(self.negative_prompt_embeds, self.negative_prompt_embeds_mask),
        )

    @property
    def prompts(self) -> tuple[str | Sequence[str], str | Sequence[str] | None]:
        """Prompts and negative prompts as text; given embeddings are named instead."""
        prompt, negative = self.embeds
        return (
            [_EMBEDDED] * len(prompt.embeds) if prompt is not None else self.prompt or "",
            _EMBEDDED if negative is not None else self.negative_prompt,
        )


def _order(variant: Variant, positional: Sequence[Any]) -> tuple[str, ...]:
    """The order of arguments. Of the pipelines for a variant it is the one that takes what was given fourth:
    a picture there is what to start from, or a mask, and no size or scale.

    Source: `__call__` of QwenImagePipeline, its Img2Img, Inpaint, Edit, EditPlus and EditInpaint pipelines,
        and QwenImageLayeredPipeline.
    """
    fourth, fifth = (k < len(positional) and not _is_number(positional[k]) for k in (3, 4))
    size, masked = ("height", "width"), ("mask_image", "masked_image_latents")
    cropped = (*size, "padding_mask_crop", "strength")
    if variant.layered:
        return ("image", *_FIRST, "layers", *_LAST, "resolution", "cfg_normalize")
    if variant.takes_pictures:
        if fourth:
            return ("image", *_FIRST[:2], *masked, "true_cfg_scale", *cropped, *_LAST)
        return ("image", *_FIRST, *size, *_LAST)
    if fourth and fifth:
        return (*_FIRST, "image", *masked, *cropped, *_LAST)
    return (*_FIRST, "image", *size, "strength", *_LAST) if fourth else (*_FIRST, *size, *_LAST)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, numbers.Number)


def given_prompt(embeds: Tensor | None, mask: Tensor | None) -> Prompt | None:
    """The prompts of given embeddings (B, T, D), with their mask (B, T) of 0 and 1, if they are given.

    Raises:
        ValueError: no tensors, or shapes that do not fit together.
    """
    if embeds is None:
        return None
    if not isinstance(embeds, Tensor) or not (mask is None or isinstance(mask, Tensor)):
        raise ValueError(
            "prompt embeddings and their mask are wanted as tensors, as encode_prompt gives them"
        )
    real = None if mask is None else mask.bool().to(embeds.device)
    return Prompt(embeds, None if real is None or bool(real.all()) else real)
