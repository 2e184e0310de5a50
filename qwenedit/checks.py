"""Checks that several parts of the package need: of counts, devices, dtypes, options; warnings and bars."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from tqdm import tqdm

from qwenedit.files import FLOATS
from qwenedit.foreign import shown

__all__ = [
    "OUTPUT_TYPES", "ProgressBar", "check_output_type", "check_run", "device_of", "dtype_of", "hinting",
    "progress_bar", "real_number", "require_known", "require_numbers", "warn", "warn_of_float16",
    "whole_number", "without_reference_options",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")

ProgressBar: TypeAlias = tqdm
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
# What arguments are called elsewhere.
_NAMES = {
    "seed": "generator=torch.Generator().manual_seed(SEED)",
    **dict.fromkeys(("steps", "num_steps", "n_steps", "inference_steps"), "num_inference_steps"),
    **dict.fromkeys(("guidance_scale", "guidance", "cfg", "cfg_scale"), "true_cfg_scale"),
    **dict.fromkeys(("n", "num_images", "batch_size"), "num_images_per_prompt"),
    **dict.fromkeys(("images", "picture", "pictures"), "image"),
    **dict.fromkeys(("negative", "neg_prompt"), "negative_prompt"),
    "mask": "mask_image",
    "mask_crop": "padding_mask_crop",
    **dict.fromkeys(("denoise", "denoising_strength"), "strength"),
    "size": "height and width",
    "torch_dtype": "dtype",
    "transformer": "mmdit=FILE",
    "device_map": "device",
    "quantization_config": "storage='float8'",
    "callback": "callback_on_step_end",
}


def require_known(function: str, options: Iterable[str], known: Collection[str]) -> None:
    """Check that the function takes the options.

    Raises:
        TypeError: it does not; the message names the argument that is probably meant.
    """
    for name in options:
        if name in known:
            continue
        meant = _NAMES.get(name, name)
        if meant.split("=")[0].split(" ")[0] not in known:
            meant = next(iter(difflib.get_close_matches(name, known, 1)), "")
        hint = f": did you mean {meant}?" if meant else f"; it takes {', '.join(known)}"
        raise TypeError(f"{function}() got an unexpected keyword argument {shown(repr(name))}{hint}")


def hinting(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose error for an unknown argument names the one that is probably meant."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        require_known(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return checked


def without_reference_options(
    options: dict[str, Any], known: dict[str, tuple[tuple[Any, ...], str]]
) -> dict[str, Any]:
    """The options without the reference pipelines' own, `known`.

    `known` has, by name, the values that are accepted because they change nothing, and the alternative to
    other values. Without values, any value is accepted and has no effect.

    Raises:
        ValueError: one of those has a value that is not supported here; the message names the alternative.
    """
    for name, (harmless, instead) in known.items():
        value = options.get(name)
        if name in options and harmless and not any(value is one for one in harmless):
            shows = isinstance(value, (bool, str)) and name != "token"  # which is a secret
            got = shown(repr(value)) if shows else type(value).__name__
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


def require_numbers(name: str, numbers: Collection[int] | None) -> None:
    """Raise a ValueError unless it is None, or a collection of whole numbers of at least 0."""
    if numbers is None or isinstance(numbers, range):
        return
    if not isinstance(numbers, Collection) or isinstance(numbers, str):
        raise ValueError(f"{name} are {numbers!r}, wanted a collection of them, like range(0, 10)")
    for number in numbers:
        whole_number(f"one of {name}", number, least=0)


def real_number(name: str, value: Any) -> float:
    """The argument `name` as a float; NumPy's numbers and torch's tensors of no dimension count.

    Raises:
        ValueError: something else, NaN or infinity.
    """
    is_number = isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.ndim == 0)
    try:
        number = float(value) if is_number and not isinstance(value, bool) else math.nan
    except (OverflowError, RuntimeError):  # a whole number beyond floats; a tensor on the meta device
        number = math.nan
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
