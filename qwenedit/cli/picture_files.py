"""Picture files of the command line: checked before any work, and each written whole or not at all."""

from __future__ import annotations

import io
import stat
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from PIL import Image

from qwenedit.files import replacing_file

__all__ = ["check_alpha", "output_files", "save_pictures"]


def output_files(output: Path, count: int) -> list[Path]:
    """The files to write: OUT.png, or OUT-1.png, OUT-2.png, ... if there are several.

    Raises:
        ValueError: they cannot be written there, or not in the format of their suffix.
    """
    if not output.parent.is_dir():
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}")
    outputs = [output]
    if count > 1:
        outputs = [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
    try:
        for path in outputs:
            if _is_folder(path):
                raise ValueError(f"cannot write {path}: it is a folder, wanted a file name like out.png")
        _check_format(output)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error
    return outputs


def _is_folder(path: Path) -> bool:
    """As `Path.is_dir`, but a name that the file system refuses is an OSError."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _check_format(output: Path) -> None:
    """Write a pixel to find out: Pillow also knows formats that it only reads, or that have no colours."""
    Image.init()
    name = Image.registered_extensions().get(output.suffix.lower(), "none")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=name)
    except Exception:
        what = output.suffix or "no suffix"
        raise ValueError(
            f"cannot write {output}: {what!r} is no format for a picture in colour (try .png)"
        ) from None


def check_alpha(output: Path) -> None:
    """Raise a ValueError if a file's format refuses an alpha channel, drops it, or reduces it to one bit."""
    file, suffix = io.BytesIO(), output.suffix.lower()
    with suppress(OSError, KeyError):
        Image.new("RGBA", (1, 1)).save(file, format=Image.registered_extensions()[suffix])
        with Image.open(file) as picture:
            if picture.mode == "RGBA":
                return
    raise ValueError(f"cannot write {output}: {suffix!r} has no alpha channel (try .png)")


def save_pictures(images: Iterable[Image.Image], outputs: list[Path]) -> None:
    """Write all files under temporary names, then rename one after the other: each file is whole.

    If one cannot be written, none is renamed. A process that is killed while it renames leaves some of them.

    Raises:
        ValueError: one of them could not be written.
    """
    try:
        with ExitStack() as files:
            for image, path in zip(images, outputs, strict=True):
                image.save(files.enter_context(replacing_file(path)))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
