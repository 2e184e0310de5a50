"""Checks that several parts of the package need: of counts, devices, dtypes, options; warnings and bars."""

from __future__ import annotations

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from qwenedit.files import FLOATS
from qwenedit.foreign import shown

__all__ = [
    "CALL_OPTIONS", "LOAD_OPTIONS", "OUTPUT_TYPES", "ProgressBar", "check_output_type", "check_run",
    "device_of", "dtype_of", "progress_bar", "real_number", "warn", "warn_of_float16", "whole_number",
    "without_reference_options",
]  # fmt: skip

ProgressBar: TypeAlias = tqdm
OUTPUT_TYPES = ("pil", "pt", "latent")
# Options of the reference pipelines: the values that are accepted because they change nothing, and the
# alternative to other values. Without values, any value is accepted and has no effect.
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
    """The options without the reference pipelines' own, `known`.

    Raises:
        ValueError: one of those has a value that is not supported here; the message names the alternative.
    """
    for name, (harmless, instead) in known.items():
        value = options.get(name)
        if name in options and harmless and not any(value is one for one in harmless):
            got = repr(value) if isinstance(value, (bool, str)) else type(value).__name__
            raise ValueError(f"{name} is {got}, wanted {' or '.join(map(str, harmless))}: {instead}")
    return {name: value for name, value in options.items() if name not in known}


def check_output_type(output_type: str) -> None:
    """Raise a ValueError unless it is one of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}, wanted one of {', '.join(OUTPUT_TYPES)}")


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """The argument `name` as an int, from `least` to `most`; NumPy's and torch's whole numbers count.

    Raises:
        ValueError: something else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError):  # of a tensor with several elements, or of one on the meta device
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {shown(repr(value))}, wanted a whole number of at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} is {number}, wanted at most {most}")
    return number


def real_number(name: str, value: Any) -> float:
    """The argument `name` as a float; NumPy's numbers and torch's tensors of no dimension count.

    Raises:
        ValueError: something else, NaN or infinity.
    """
    is_number = isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.ndim == 0)
    number = float(value) if is_number and not isinstance(value, bool) else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(repr(value))}, wanted a finite number")
    return number


def check_run(output_type: str, num_images_per_prompt: int, max_sequence_length: int) -> None:
    """Raise a ValueError unless these arguments of a run have possible values."""
    check_output_type(output_type)
    whole_number("num_images_per_prompt", num_images_per_prompt)
    whole_number("max_sequence_length", max_sequence_length, most=1024)


def device_of(device: torch.device | str | None) -> torch.device:
    """The torch device, after a test computation; by default the accelerator, or the CPU if there is none.

    Raises:
        ValueError: there is no such device, or it cannot compute.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted).sum().item()  # its hardware may be absent; "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}, which cannot be used here: {first_line}") from error
    return wanted


def dtype_of(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | None:
    """The torch dtype; by default float32 on the CPU, and None, the stored dtype, elsewhere.

    Raises:
        ValueError: the networks do not run in this dtype.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, wanted float32, bfloat16, float16 or float64")
    return named


def warn_of_float16(dtype: torch.dtype) -> None:
    """Warn if the networks are to run in float16."""
    if dtype == torch.float16:
        warn("float16 overflows in this network: blocks are clipped as in the reference; prefer bfloat16")


def progress_bar(items: Iterable[Any] | None = None, *, progress: bool = True, **options: Any) -> ProgressBar:
    """tqdm's bar over the items, on a terminal and in Jupyter; without `progress`, or elsewhere, nothing."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if progress and shell is not None and "IPKernelApp" in shell.config:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets the bar is text
            from tqdm.auto import tqdm as notebook_bar
        return notebook_bar(items, **options)
    return tqdm(items, disable=None if progress else True, **options)


def warn(message: str) -> None:
    """Warn at the line of the caller outside of this package and torch."""
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("qwenedit", "torch"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
