"""What a caller gives, in its many forms, checked and brought to one: a list of rows."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from qwenedit.files import FLOATS
from qwenedit.inputs import geometry
from qwenedit.inputs.geometry import Areas, Geometry, Picture
from qwenedit.inputs.processor import check_prompt
from qwenedit.sampling.guidance import Guidance, TrueCFG
from qwenedit.weights.checkpoints import Variant

__all__ = [
    "CALL_OPTIONS", "LOAD_OPTIONS", "Row", "check_count", "check_output_type", "device_of", "dtype_of",
    "guidance_of", "open_picture", "rows_of", "warn", "warn_of_float16", "without_reference_options",
]  # fmt: skip

OUTPUT_TYPES = ("pil", "pt", "latent")

# What scripts written for the reference pipelines may also pass: the values that ask for nothing but what
# happens anyway, and what to do for others. No values: whatever it is, it has no effect here.
_SAMPLE = ((None,), "make a `Conditioning` and `sample` from it")
LOAD_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "low_cpu_mem_usage": ((), ""),
    "use_safetensors": ((None, True), "there is no other format"),
    "variant": ((None,), "give the folder that holds the files"),
    "device_map": ((None,), "pass device"),
}
CALL_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "return_dict": ((True,), "the pictures are the result's `images`"),
    "callback_on_step_end": ((None,), "loop over `steps`, which shows every step and takes changes"),
    "callback_on_step_end_tensor_inputs": ((), ""),
    "attention_kwargs": ((None,), "attach `taps`"),
    **dict.fromkeys(("prompt_embeds", "prompt_embeds_mask"), _SAMPLE),
    **dict.fromkeys(("negative_prompt_embeds", "negative_prompt_embeds_mask"), _SAMPLE),
}


def without_reference_options(
    options: dict[str, Any], known: dict[str, tuple[tuple[Any, ...], str]]
) -> dict[str, Any]:
    """The options that are ours.

    Raises:
        ValueError: one of the reference's asks for what is done in another way here.
    """
    for name, (harmless, instead) in known.items():
        value = options.get(name)
        if name in options and harmless and not any(value is one for one in harmless):
            got = repr(value) if isinstance(value, (bool, str)) else type(value).__name__
            raise ValueError(f"{name} is {got}, wanted {' or '.join(map(str, harmless))}: {instead}")
    return {name: value for name, value in options.items() if name not in known}


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt with its negative prompt, its pictures and all their sizes."""

    prompt: str
    negative: str | None
    pictures: list[Image.Image]
    geometry: Geometry

    @property
    def planned(self) -> list[tuple[Image.Image, Picture]]:
        """Each picture with its sizes."""
        return list(zip(self.pictures, self.geometry.pictures, strict=True))


def rows_of(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    image: Any,
    variant: Variant,
    areas: Areas,
    height: int | None,
    width: int | None,
) -> list[Row]:
    """What each prompt is run with; without an image the rows have no pictures.

    All checks of prompts, pictures and sizes are here, and they need no network.

    Raises:
        ValueError: bad input; what, got, wanted.
    """
    prompts = _prompts("prompt", prompt, illustrated=image is not None)
    negatives: list[str] | list[None] = [None] * len(prompts)
    if negative_prompt is not None:
        negatives = _negatives(negative_prompt, len(prompts), illustrated=image is not None)
    if image is None:
        pictures: list[list[Image.Image]] = [[] for _ in prompts]
    else:
        pictures = _pictures(image, len(prompts), variant)
    rows = []
    for text, negative, of_row in zip(prompts, negatives, pictures, strict=True):
        sizes = [picture.size for picture in of_row]
        plan = geometry.plan(sizes, areas=areas, height=height, width=width)
        rows.append(Row(text, negative, of_row, plan))
    for row in rows:
        plan = row.geometry
        if plan.follows is not None and not plan.aligned:
            warn(
                f"the output's token grid {plan.grid[1:]} is not that of the picture it follows, "
                f"{plan.pictures[plan.follows].grid[1:]}: positions are centred, so expect a shift or a zoom"
            )
    outputs = sorted({row.geometry.size for row in rows})
    if len(outputs) > 1:
        raise ValueError(
            f"the pictures of this batch ask for outputs of different sizes {outputs}: pass height and "
            "width, or run them one by one"
        )
    return rows


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a whole picture, upright.

    Raises:
        ValueError: no such file, or not a picture that Pillow can read.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such picture: {path}")
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(_in_8_bits(picture))
    except UnidentifiedImageError:
        raise ValueError(f"not a picture that Pillow can read: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read picture {path}: {error}") from error


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would clip at 255, in 8; everything else as it is."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return picture.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
    return picture


def check_output_type(output_type: str) -> None:
    """Is it a form that results have?

    Raises:
        ValueError: no.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}, wanted one of {', '.join(OUTPUT_TYPES)}")


def check_count(name: str, value: object, *, most: int | None = None) -> None:
    """Is the argument `name` a whole number from 1 to `most`, where there is one?

    Raises:
        ValueError: no.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, wanted a whole number of at least 1")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}, wanted at most {most}")


def _prompts(name: str, value: str | Sequence[str], *, illustrated: bool) -> list[str]:
    if not isinstance(value, Sequence) or not (isinstance(value, str) or value):
        raise ValueError(f"{name} is {_describe(value)}, wanted a string or a list of at least one")
    prompts = [value] if isinstance(value, str) else list(value)
    for one in prompts:
        check_prompt(one, illustrated=illustrated)
    return prompts


def _negatives(value: str | Sequence[str], batch: int, *, illustrated: bool) -> list[str]:
    negatives = _prompts("negative_prompt", value, illustrated=illustrated)
    if len(negatives) == 1:
        return negatives * batch
    if len(negatives) != batch:
        raise ValueError(
            f"got {len(negatives)} negative prompts, wanted one, or {batch}, one for each prompt"
        )
    return negatives


def _pictures(image: Any, batch: int, variant: Variant) -> list[list[Image.Image]]:
    """The references of each prompt; see `QwenImageEdit.edit` for the forms of `image`."""
    if variant.max_pictures == 0:
        raise ValueError(f"{variant.name} makes pictures from text only: it cannot edit one; use generate")
    if isinstance(image, Image.Image):
        pictures = [[image]] * batch
    elif not isinstance(image, Sequence) or isinstance(image, str) or not image:
        raise ValueError(f"image is {_describe(image)}, wanted a PIL picture or a list of them")
    elif all(isinstance(one, Image.Image) for one in image):
        if variant.max_pictures > 1:
            pictures = [list(image)] * batch
        elif len(image) in (1, batch):
            pictures = [[image[row % len(image)]] for row in range(batch)]
        else:
            raise ValueError(
                f"got {len(image)} pictures for {batch} prompt(s), but {variant.name} takes one a prompt"
            )
    else:
        pictures = [list(one) if isinstance(one, (list, tuple)) else [one] for one in image]
        if len(pictures) != batch:
            raise ValueError(f"got {len(pictures)} lists of pictures, wanted {batch}, one for each prompt")
    for of_row in pictures:
        if not 1 <= len(of_row) <= variant.max_pictures:
            raise ValueError(
                f"got {len(of_row)} pictures for a prompt, but {variant.name} takes 1"
                + (f" to {variant.max_pictures}" if variant.max_pictures > 1 else "")
            )
        for picture in of_row:
            if not isinstance(picture, Image.Image):
                raise ValueError(f"a picture is {_describe(picture)}, wanted a PIL picture")
    return pictures


def _describe(value: Any) -> str:
    return (
        f"an empty {type(value).__name__}"
        if isinstance(value, Sequence) and not value
        else type(value).__name__
    )


def guidance_of(scale: float, negative_prompt: object, rule: Guidance | None = None) -> TrueCFG | None:
    """Guidance needs both a scale above 1 and a negative prompt; one without the other is probably a slip.

    Raises:
        ValueError: the scale is no finite number.
    """
    guidance = TrueCFG(scale, rule or Guidance())
    if scale > 1 and negative_prompt is not None:
        return guidance
    if guidance.rule != Guidance():
        warn(f"{guidance.rule} has no effect: the run is unguided")
    if scale > 1:
        warn(f"true_cfg_scale is {scale}, but without a negative_prompt the run is unguided")
    elif negative_prompt not in (None, " "):
        warn(f"a negative_prompt is given, but at true_cfg_scale {scale} the run is unguided")
    return None


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that is meant, tried out; None is the accelerator, or the CPU where there is none.

    Raises:
        ValueError: there is no such device, or it cannot compute.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted).sum().item()  # it may have a name and no hardware, or hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}, which cannot be used here: {first_line}") from error
    return wanted


def dtype_of(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | None:
    """The dtype that is meant; None, for none, is float32 on the CPU, and elsewhere None: as it is stored.

    Raises:
        ValueError: it is no dtype that the networks run in.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, wanted float32, bfloat16, float16 or float64")
    return named


def warn_of_float16(dtype: torch.dtype) -> None:
    """Warn where the networks are to run in float16."""
    if dtype == torch.float16:
        warn("float16 overflows in this network: blocks are clipped as in the reference; prefer bfloat16")


def warn(message: str) -> None:
    """Warn at the caller's own line: however deep in this package and torch's wrappers we are."""
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("qwenedit", "torch"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
