"""Differences between two pictures, and curves over the steps of a run: what a sweep records of every edit.

Pictures are (3, H, W) in [0, 1]. `pixels` makes them from the files that are written, so that every number
can be computed again from the files alone. A part of a picture is given as (H, W) bool, True where pixels
count; `mask_pixels` makes it from a mask picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qwenedit.inputs.pictures import byte_tensor, vae_pixels
from qwenedit.sampling.sampler import Step

__all__ = [
    "CHANGED", "changed_area", "curves", "distances", "mask_pixels", "pixels", "psnr", "source_distances",
    "ssim",
]  # fmt: skip

CHANGED = 0.1  # difference of a channel, in [0, 1], above which a pixel counts as changed
LEAST_ERROR = 1e-10  # of the mean squared error in PSNR: identical pictures have 100 dB, as in the oracle
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian: pixels a side, standard deviation in pixels
K1, K2 = 0.01, 0.03  # SSIM's constants, for a data range of 1


def pixels(picture: Image.Image) -> Tensor:
    """(3, H, W) float64 in [0, 1]."""
    return vae_pixels(picture, *picture.size)[0].double() / 2 + 0.5


def mask_pixels(mask: Image.Image, width: int, height: int) -> Tensor:
    """(height, width) bool, True where the mask is at least half white.

    Source: `VaeImageProcessor` with do_binarize, as the inpainting pipelines have it for masks.
    """
    grey = mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return byte_tensor(grey)[..., 0] >= 128


def psnr(picture: Tensor, reference: Tensor, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared error over pixels and channels.

    It is capped at 100 dB, so that means over several pictures stay finite.

    Raises:
        ValueError: pictures of different shapes, or no pixel that counts.
    """
    _require_alike(picture, reference, where)
    error = (picture.double() - reference.double()).pow(2)
    mean = float((error if where is None else error[:, where]).mean())
    return -10 * math.log10(max(mean, LEAST_ERROR))


def ssim(picture: Tensor, reference: Tensor, where: Tensor | None = None) -> float:
    """Structural similarity (1 for identical pictures): the mean over windows and channels of

        (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2)),  C1 = K1^2, C2 = K2^2

    with means m, variances s^2 and covariance sxy under a Gaussian window of 11x11 pixels and sigma 1.5. Only
    windows inside the picture count; with `where`, only those around a pixel that counts.

    Raises:
        ValueError: pictures of different shapes, or smaller than a window; no pixel that counts.
    Source: Wang, Bovik, Sheikh, Simoncelli, 2004, for each channel; equal to scikit-image's
        `structural_similarity` with gaussian_weights=True, use_sample_covariance=False, data_range=1,
        channel_axis=0.
    """
    _require_alike(picture, reference, where)
    if min(picture.shape[-2:]) < WINDOW:
        raise ValueError(f"pictures are {tuple(picture.shape)}, wanted at least {WINDOW} pixels a side")
    x, y = picture.double()[:, None], reference.double()[:, None]  # channels are a batch
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    line = torch.exp(-offsets.pow(2) / (2 * SIGMA**2))
    line = line / line.sum()

    def weighted(values: Tensor) -> Tensor:  # the window is separable: rows, then columns
        return F.conv2d(F.conv2d(values, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = weighted(x), weighted(y)
    variance_x = weighted(x * x) - mean_x * mean_x
    variance_y = weighted(y * y) - mean_y * mean_y
    covariance = weighted(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x.pow(2) + mean_y.pow(2) + c1) * (variance_x + variance_y + c2)
    of_windows = (above / below)[:, 0]
    if where is not None:
        of_windows = of_windows[:, _centres(where)]
    if not of_windows.numel():
        raise ValueError("where has no pixel with a whole window around it, wanted at least one")
    return float(of_windows.mean())


def _centres(where: Tensor) -> Tensor:
    """The part of a picture's pixels that have a whole window around them."""
    edge = WINDOW // 2
    return where[edge:-edge, edge:-edge]


def changed_area(
    picture: Tensor, reference: Tensor, threshold: float = CHANGED, where: Tensor | None = None
) -> float:
    """The share of pixels with a channel that differs by more than `threshold`.

    Raises:
        ValueError: pictures of different shapes, or no pixel that counts.
    """
    _require_alike(picture, reference, where)
    changed = (picture - reference).abs().amax(dim=0) > threshold
    return float((changed if where is None else changed[where]).double().mean())


def distances(picture: Image.Image, reference: Image.Image) -> dict[str, float]:
    """PSNR, SSIM and changed area of a picture against another."""
    x, y = pixels(picture), pixels(reference)
    return {"psnr": psnr(x, y), "ssim": ssim(x, y), "changed": changed_area(x, y)}


def source_distances(
    picture: Image.Image, source: Image.Image, mask: Image.Image | None = None
) -> dict[str, float | None]:
    """The distances of an edited picture to its source, which is resized to the picture's size.

    `source_psnr`, `source_ssim`, `source_changed`; with a mask also `inside_...`, where it is white, and
    `outside_...`, None where no pixel (for SSIM: no window) is there.
    """
    x = pixels(picture)
    y = vae_pixels(source, *picture.size)[0].double() / 2 + 0.5
    found: dict[str, float | None] = {
        "source_psnr": psnr(x, y), "source_ssim": ssim(x, y), "source_changed": changed_area(x, y)
    }  # fmt: skip
    if mask is None:
        return found
    white = mask_pixels(mask, *picture.size)
    for name, where in (("inside", white), ("outside", ~white)):
        some, windows = bool(where.any()), bool(_centres(where).any())
        found[f"{name}_psnr"] = psnr(x, y, where) if some else None
        found[f"{name}_ssim"] = ssim(x, y, where) if windows else None
        found[f"{name}_changed"] = changed_area(x, y, where=where) if some else None
    return found


def curves(steps: Iterable[Step]) -> tuple[Tensor, dict[str, Any]]:
    """Take all steps of a batch of one; the final latents, and curves with one number per step.

    `sigma`; `velocity`, the norm of the guided velocity, mean over tokens; and `mean`, `min` and `max` over
    tokens of `norm_ratio` (`Step.norm_ratio`), None at steps without guidance and at those of `not_finite`,
    where a token has an infinite ratio or none: its guided velocity is 0.

    Raises:
        ValueError: there are no steps.
    """
    sigma, velocity, not_finite = [], [], []
    ratio: dict[str, list[float | None]] = {"mean": [], "min": [], "max": []}
    step = None
    for step in steps:
        sigma.append(_short(step.sigma))
        velocity.append(_short(step.velocity.float().norm(dim=-1).mean()))
        of_tokens = None if step.norm_ratio is None else step.norm_ratio.float()
        if of_tokens is not None and not of_tokens.isfinite().all():
            of_tokens = None
            not_finite.append(step.index)
        for name, values in ratio.items():
            values.append(None if of_tokens is None else _short(getattr(of_tokens, name)()))
    if step is None:
        raise ValueError("there are no steps, wanted at least one")
    return step.after, {
        "sigma": sigma,
        "velocity": velocity,
        "norm_ratio": ratio,
        **({"not_finite": not_finite} if not_finite else {}),
    }


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.6g}")


def _require_alike(picture: Tensor, reference: Tensor, where: Tensor | None) -> None:
    if picture.ndim != 3 or picture.shape != reference.shape:
        raise ValueError(
            f"pictures have shapes {tuple(picture.shape)} and {tuple(reference.shape)}, wanted one shape "
            "(C, H, W)"
        )
    if where is not None and (where.shape != picture.shape[-2:] or not where.any()):
        raise ValueError(
            f"where is {tuple(where.shape)} with {int(where.sum())} pixels that count, wanted one or more of "
            f"{tuple(picture.shape[-2:])}"
        )
