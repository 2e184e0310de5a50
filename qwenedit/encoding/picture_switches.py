"""The switches that replace or resize pictures before the encoders: rows in, rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from qwenedit.inputs.pictures import as_picture, open_picture
from qwenedit.inputs.rows import BatchRow
from qwenedit.switches import AnyPicture, References, Seen

__all__ = ["reference_rows", "seen_rows"]

GREY = (128, 128, 128)  # of a blank picture


def seen_rows(rows: Sequence[BatchRow], seen: Seen) -> list[BatchRow]:
    """The rows for the text encoder.

    Raises:
        ValueError: the other picture cannot be read.
    """
    if seen.picture == "unseen":
        return [dataclasses.replace(row, pictures=[]) for row in rows]
    if seen.picture == "other":
        assert seen.other is not None
        rows = _replaced(rows, _opened("seen.other", seen.other))
    elif seen.picture == "blank":
        blanks = [[Image.new("RGB", picture.size, GREY) for picture in row.pictures] for row in rows]
        rows = [dataclasses.replace(row, pictures=of_row) for row, of_row in zip(rows, blanks, strict=True)]
    if seen.size is None:
        return list(rows)
    resized = []
    for row in rows:
        plans = tuple(dataclasses.replace(plan, vl=seen.size) for plan in row.geometry.pictures)
        resized.append(dataclasses.replace(row, geometry=dataclasses.replace(row.geometry, pictures=plans)))
    return resized


def reference_rows(rows: Sequence[BatchRow], references: References) -> list[BatchRow]:
    """The rows for the VAE.

    Raises:
        ValueError: the other picture cannot be read.
    """
    if references.latents != "other":
        return list(rows)
    assert references.picture is not None
    return _replaced(rows, _opened("references.picture", references.picture))


def _replaced(rows: Sequence[BatchRow], picture: Image.Image) -> list[BatchRow]:
    """The rows with this picture in place of every picture, at unchanged sizes and token layout."""
    return [dataclasses.replace(row, pictures=[picture] * len(row.pictures)) for row in rows]


def _opened(name: str, picture: AnyPicture) -> Image.Image:
    return open_picture(picture) if isinstance(picture, (str, Path)) else as_picture(picture, name)
