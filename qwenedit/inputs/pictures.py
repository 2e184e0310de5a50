"""Pictures in and out: files, sizes, 8 bits, and pixels as the VAE takes and gives them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = [
    "denormalise_pixels", "open_picture", "resize_rgb", "rgba_pictures", "rgba_pixels", "to_pil",
    "vae_pixels",
]  # fmt: skip


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


def resize_rgb(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in RGB at another size, by Lanczos on 8 bits.

    Source: `VaeImageProcessor.resize`, which keeps RGBA and palettes.
    """
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def vae_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """A picture of any size and mode as the VAE encodes it: (1, 3, height, width) float32 in [-1, 1].

    Source: `VaeImageProcessor.preprocess`.
    """
    x = rgb_bytes(resize_rgb(picture, width, height)).float() / 255.0
    return rearrange(2.0 * x - 1.0, "y x c -> 1 c y x").contiguous()


def denormalise_pixels(decoded: Tensor) -> Tensor:
    """What the VAE decodes, about [-1, 1], as pixels in [0, 1]. Source: `VaeImageProcessor.denormalize`."""
    return (decoded * 0.5 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [0, 1] as PIL pictures, rounded halves to even.

    Raises:
        ValueError: another shape, or values outside of [0, 1] (NaN is one).
    Source: `VaeImageProcessor.pt_to_numpy` and `numpy_to_pil`.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}, wanted (B, 3, H, W)")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("pixels have values outside of [0, 1], or NaN")
    height, width = pixels.shape[2:]
    rows = (rearrange(pixels.detach().cpu().float(), "b c y x -> b (y x c)") * 255).round().to(torch.uint8)
    pictures = []
    for row in rows:
        buffer = bytearray(row.numel())  # a tensor gives up its bytes fast only into a buffer it shares
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(row)
        pictures.append(Image.frombytes("RGB", (width, height), bytes(buffer)))
    return pictures


def rgb_bytes(rgb: Image.Image) -> Tensor:
    """(height, width, 3) uint8."""
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)


def rgba_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """A picture of any size and mode as Layered's VAE encodes it: (1, 4, height, width) float32 in [-1, 1].

    Pillow resizes colours multiplied by alpha, so that what is transparent does not shine through.

    Source: `VaeImageProcessor.resize` and `preprocess`.
    """
    rgba = picture.convert("RGBA").resize((width, height), Image.Resampling.LANCZOS)
    x = torch.frombuffer(bytearray(rgba.tobytes()), dtype=torch.uint8).view(height, width, 4).float() / 255.0
    return rearrange(2.0 * x - 1.0, "y x c -> 1 c y x").contiguous()


def rgba_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels (L, 4, H, W) in [0, 1] as RGBA pictures, rounded as `to_pil` does."""
    colours = to_pil(pixels[:, :3])
    alphas = to_pil(pixels[:, 3:].expand(-1, 3, -1, -1))
    for picture, alpha in zip(colours, alphas, strict=True):
        picture.putalpha(alpha.getchannel(0))  # in place: it is RGBA from here on
    return colours
