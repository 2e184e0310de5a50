"""The files that the command line writes: whole or not at all, and checked before any work."""

from __future__ import annotations

import io
import stat
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["check_outputs", "save_pictures"]


def check_outputs(output: Path, count: int) -> list[Path]:
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
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _check_format(output: Path) -> None:
    """Pillow also knows suffixes of formats that it only reads, or that hold no colours: so try."""
    from PIL import Image

    Image.init()
    name = Image.registered_extensions().get(output.suffix.lower())
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=name or "none")
    except Exception:
        what = output.suffix or "no suffix"
        raise ValueError(
            f"cannot write {output}: {what!r} is no format for a picture in colour (try .png)"
        ) from None


def save_pictures(images: Iterable[Image.Image], outputs: list[Path]) -> None:
    """Write all files, then give all of them their names: they appear together or not at all.

    Raises:
        ValueError: one of them could not be written.
    """
    from qwenedit.files import replacing_file

    try:
        with ExitStack() as files:
            for image, path in zip(images, outputs, strict=True):
                image.save(files.enter_context(replacing_file(path)))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
