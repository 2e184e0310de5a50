"""Pictures in and out: files, sizes, 8 bits, and the VAE's pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from qwenedit.foreign import plain_file, shown

__all__ = [
    "FORMATS", "as_picture", "byte_tensor", "denormalise_pixels", "open_picture", "output_text",
    "pictures_in", "resampled", "resize_rgb", "rgba_pixels", "side_by_side", "to_pil", "vae_pixels",
]  # fmt: skip

# The formats of Pillow that hold pixels. Left out are those that Pillow hands to another program (EPS, WMF),
# those of other data (FITS, GRIB, HDF5), and rare ones whose readers see little use.
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "ICO", "ICNS", "QOI", "PSD",
    "DDS", "SGI", "PCX", "TGA",
)  # fmt: skip
_PROGRAMS = ("EPS", "WMF")
_DEEP_GREY = ("PNG", "PPM")  # formats whose 16 bits of grey Pillow may hold in 32


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a whole picture from a file, of an animation the first frame, as `as_picture` makes it.

    Raises:
        ValueError: no such file, none of `FORMATS`, or as `as_picture`.
    """
    path = plain_file(path, "picture")
    Image.init()  # registers the formats of this Pillow, which may lack some
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        picture = Image.open(path, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(
            f"not a picture that Pillow can read: {shown(path)}, wanted one of {', '.join(formats)}"
        ) from None
    except Exception as error:  # a broken file makes Pillow's readers raise errors of many kinds
        raise ValueError(f"picture {shown(path)} cannot be read: {shown(error)}") from error
    with picture:
        return as_picture(picture, f"picture {shown(path)}").copy()  # without ties to the file


def as_picture(value: Any, what: str = "the picture") -> Image.Image:
    """A picture from a caller as all code behind takes it: upright, and with 8 bits a channel.

    Every picture passes through here; a second time changes nothing. Orientation is that of EXIF, 16 bits of
    grey are scaled to 8, and an animation shows the frame where it stands. `value` itself is not changed;
    where there is nothing to do, it is returned. `what` names it in messages.

    Raises:
        ValueError: no PIL picture (for a tensor or an array the message has the line that makes one), a
            broken one, one that another program would have to draw, or one whose levels have no agreed range:
            floats and 32-bit integers.
    Source: `load_image` of diffusers' utils/loading_utils.py turns what it reads; its pipelines turn nothing,
        and PIL's conversion to RGB clips 16 bits of grey at 255.
    """
    if not isinstance(value, Image.Image):
        raise ValueError(f"{what} is {_described(value)}")
    if value.format in _PROGRAMS:
        raise ValueError(f"{what} is {value.format}, which another program draws: convert it to RGB first")
    try:
        value.load()
    except Exception as error:  # as in open_picture
        raise ValueError(f"{what} cannot be read: {shown(error)}") from error
    try:
        turned = value.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        upright = ImageOps.exif_transpose(value) if turned else value
    except Exception as error:
        raise ValueError(f"{what} has EXIF data that cannot be read: {shown(error)}") from error
    deep = value.mode.startswith("I;16") or (value.mode == "I" and value.format in _DEEP_GREY)
    _check_levels(value, what, deep=deep)
    return _in_8_bits(upright) if deep else upright


def _check_levels(picture: Image.Image, what: str, *, deep: bool) -> None:
    """Raise a ValueError unless it is known which levels are black and white; `deep` for 16 bits of grey."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF file: bits per sample, and 0 if white is the level 0
    if deep and (tags.get(258, (16,)) != (16,) or tags.get(262) == 0):
        raise ValueError(f"{what} is grey TIFF that Pillow does not scale, wanted 8 or 16 bits, black as 0")
    if not deep and picture.mode in ("I", "F"):
        levels = "floats" if picture.mode == "F" else "32-bit integers"
        raise ValueError(
            f"{what} has {levels}, whose black and white are not agreed: scale them to 0-255, then "
            'convert it to "L"'
        )
    if picture.mode in ("LAB", "La"):
        raise ValueError(
            f"{what} has mode {picture.mode}, which Pillow cannot convert to RGB: wanted another"
        )


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """16 bits of grey scaled to 8; the level that a file declares transparent becomes an alpha channel."""
    levels = picture.convert("I")
    grey = levels.point(lambda level: level * (1 / 257) + 0.5).convert("L")
    clear = grey.info.pop("transparency", None)
    if clear is not None:
        opaque = torch.frombuffer(bytearray(levels.tobytes()), dtype=torch.int32) != clear
        grey.putalpha(Image.frombytes("L", grey.size, bytes((255 * opaque).tolist())))
    return grey


def _described(value: Any) -> str:
    """What a caller gave in place of a picture, and how it becomes one."""
    kind = type(value).__name__
    if isinstance(value, Sequence) and len(value) == 0:
        return f"an empty {kind}, wanted a PIL picture"
    if isinstance(value, (str, os.PathLike)):
        return f"{kind} {shown(repr(os.fspath(value)))}, wanted a PIL picture: open it first"
    if not isinstance(value, Tensor) and not (hasattr(value, "__array_interface__") and value.shape):
        return f"{'None' if value is None else kind}, wanted a PIL picture"
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return f"{kind} of shape {shape} and {dtype}, wanted {_remedy(value, shape, dtype)}"


def _remedy(value: Any, shape: tuple[int, ...], dtype: str) -> str:
    """The line that makes pictures of a tensor or an array x; the ranges are those of the reference.

    Source: `VaeImageProcessor.preprocess` takes numbers within [0, 1], or within [-1, 1] if one is negative,
        and does not divide whole ones. The edit pipelines fail before, at the size of what is no PIL picture.
    """
    x, channels = ("x", -3) if isinstance(value, Tensor) else ("torch.as_tensor(x).movedim(-1, -3)", -1)
    if len(shape) not in (3, 4) or 0 in shape or shape[channels] not in (3, 4):
        if len(shape) in (2, 3, 4) and len([side for side in shape if side != 1]) == 2 and 0 not in shape:
            return _grey_remedy(value)
        return "a PIL picture; a tensor of one has (3, H, W), an array (H, W, 3)"
    if dtype == "uint8":
        scaled = f"{x} / 255"
    elif not dtype.startswith(("float", "bfloat")):
        return "a PIL picture; its levels would be uint8, or floats within [0, 1]"
    elif not (float(value.min()) >= -1 and float(value.max()) <= 1):
        return "a PIL picture; its levels would be within [0, 1], or within [-1, 1]"
    else:
        scaled = f"{x} / 2 + 0.5" if float(value.min()) < 0 else x
    made = f"to_pil({scaled})" if len(shape) == 4 else f"to_pil(({scaled})[None])[0]"
    return f"a PIL picture: from qwenedit.inputs.pictures import to_pil; {made} makes one in 8 bits"


def _grey_remedy(value: Any) -> str:
    """The line that makes a picture of levels x (H, W), which may have more axes of size 1: mostly a mask."""
    low, high = float(value.min()), float(value.max())
    if not 0 <= low <= high <= 255:
        return "a PIL picture; the levels of a mask would be within [0, 1], or from 0 to 255"
    x = "x" if value.ndim == 2 else "x.squeeze()"
    scaled = f"({x} * 255.0)" if high <= 1 else x
    made = f"{scaled}.round().byte().cpu().numpy()" if isinstance(value, Tensor) else f'{scaled}.astype("u1")'
    return f"a PIL picture: from PIL import Image; Image.fromarray({made}) makes a grey one, as of a mask"


def resize_rgb(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in RGB at another size, by Lanczos on 8 bits.

    Source: `VaeImageProcessor.resize`, which keeps RGBA and palettes.
    """
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def resampled(picture: Image.Image, size: tuple[int, int], how: str, mode: str = "RGB") -> Image.Image:
    """The picture in a mode, at another (width, height), by another filter than the reference's.

    Args:
        how: "lanczos", or "bicubic", both Pillow's; "area", the mean of the pixels that an output pixel
            covers or touches, rounded to 8 bits.

    At the size that it then has, `resize_rgb` returns the same pixels.

    Source: `Image.resize` without a filter is bicubic (DiffSynth-Studio); `comfy.utils.common_upscale` with
        "area", which keeps the fractions that we round, is `torch.nn.functional.interpolate`.
    """
    picture = picture.convert(mode)
    if how != "area":
        filters = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
        return picture.resize(size, filters[how])
    pixels = rearrange(byte_tensor(picture).float() / 255, "y x c -> 1 c y x")
    return to_pil(F.interpolate(pixels, size[::-1], mode="area").clamp(0, 1))[0]


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


_SHOWN, _GAP = 512, 8  # pixels a side of pictures in notebooks, at most, and between them


def pictures_in(images: Any) -> list[Image.Image]:
    """Copies in RGBA of the pictures of a run's output, whatever its `output_type`; none of latents."""
    if isinstance(images, Image.Image):
        return [images.convert("RGBA")]
    if isinstance(images, list):
        return [picture for one in images for picture in pictures_in(one)]
    pixels = images if isinstance(images, Tensor) else torch.as_tensor(images).movedim(-1, -3)
    if pixels.ndim < 4 or pixels.shape[-3] not in (3, 4):
        return []
    return [picture.convert("RGBA") for picture in to_pil(pixels.flatten(0, -4))]


def side_by_side(pictures: Sequence[Image.Image]) -> bytes | None:
    """A PNG of the pictures, which are made smaller to fit; None of none."""
    if not pictures:
        return None
    for one in pictures:
        one.thumbnail((_SHOWN, _SHOWN))
    size = sum(one.width + _GAP for one in pictures) - _GAP, max(one.height for one in pictures)
    page, left = Image.new("RGBA", size), 0
    for one in pictures:
        page.paste(one, (left, 0))
        left += one.width + _GAP
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def output_text(images: Any) -> str:
    """A run's output in words: pictures with their sizes, or a shape and a dtype."""
    if not isinstance(images, list):
        return f"shape {tuple(images.shape)}, {images.dtype}"
    found = pictures_in(images)
    sizes = ", ".join(dict.fromkeys(f"{one.width}x{one.height}" for one in found))
    return f"{len(found)} picture(s), {sizes}"
