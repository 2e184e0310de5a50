"""Pictures in and out: files, sizes, 8 bits, and the VAE's pixels."""

from __future__ import annotations

import os

import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from qwenedit.foreign import plain_file

__all__ = [
    "byte_tensor", "denormalise_pixels", "open_picture", "resize_rgb", "rgba_pixels", "to_pil", "vae_pixels",
]  # fmt: skip


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a whole picture, upright.

    Raises:
        ValueError: no such file, or not a picture that Pillow can read.
    """
    path = plain_file(path, "picture")
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(_in_8_bits(picture))
    except UnidentifiedImageError:
        raise ValueError(f"not a picture that Pillow can read: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read picture {path}: {error}") from error


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip at 255; other modes unchanged."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return picture.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
    return picture


def resize_rgb(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in RGB at another size, by Lanczos on 8 bits.

    Source: `VaeImageProcessor.resize`, which keeps RGBA and palettes.
    """
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def vae_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """A picture of any size and mode for the VAE's encoder: (1, 3, height, width) float32 in [-1, 1].

    Source: `VaeImageProcessor.preprocess`.
    """
    return _signed(resize_rgb(picture, width, height))


def rgba_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """`vae_pixels` with alpha, for Layered's VAE: (1, 4, height, width) float32 in [-1, 1].

    Pillow resizes colours premultiplied by alpha, so transparent colours do not bleed into visible pixels.

    Source: `VaeImageProcessor.resize` and `preprocess`.
    """
    return _signed(picture.convert("RGBA").resize((width, height), Image.Resampling.LANCZOS))


def _signed(picture: Image.Image) -> Tensor:
    x = byte_tensor(picture).float() / 255.0
    return rearrange(2.0 * x - 1.0, "y x c -> 1 c y x").contiguous()


def byte_tensor(picture: Image.Image) -> Tensor:
    """(height, width, C) uint8, of an RGB or RGBA picture."""
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], -1)


def denormalise_pixels(decoded: Tensor) -> Tensor:
    """The VAE's output, about [-1, 1], as pixels in [0, 1]. Source: `VaeImageProcessor.denormalize`."""
    return (decoded * 0.5 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) or (B, 4, H, W) in [0, 1] as RGB or RGBA pictures, rounded halves to even.

    Raises:
        ValueError: another shape, or values outside of [0, 1] or NaN.
    Source: `VaeImageProcessor.pt_to_numpy` and `numpy_to_pil`.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (3, 4):
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}, wanted (B, 3, H, W) or (B, 4, H, W)")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("pixels have values outside of [0, 1], or NaN")
    _, channels, height, width = pixels.shape
    rows = (rearrange(pixels.detach().cpu().float(), "b c y x -> b (y x c)") * 255).round().to(torch.uint8)
    pictures = []
    for row in rows:
        buffer = bytearray(row.numel())  # copying a tensor's bytes is fast only into a shared buffer
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(row)
        mode = "RGB" if channels == 3 else "RGBA"
        pictures.append(Image.frombytes(mode, (width, height), bytes(buffer)))
    return pictures
