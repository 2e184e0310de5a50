"""The switches that replace or resize pictures before the encoders: rows in, rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from qwenedit.inputs.geometry import Size
from qwenedit.inputs.pictures import as_picture, open_picture, resampled
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
    if seen.size is not None:
        rows = [_seen_at(row, seen.size) for row in rows]
    return [_resampled(row, seen) for row in rows] if seen.resize != "lanczos" or seen.twice else list(rows)


def _seen_at(row: BatchRow, size: Size) -> BatchRow:
    plans = tuple(dataclasses.replace(plan, vl=size) for plan in row.geometry.pictures)
    return dataclasses.replace(row, geometry=dataclasses.replace(row.geometry, pictures=plans))


def _resampled(row: BatchRow, seen: Seen) -> BatchRow:
    """The row with its pictures at the language model's size, where the encoder's own resize keeps them."""
    pictures = []
    for picture, plan in row.planned:
        if seen.twice:
            picture = resampled(picture, plan.vae, seen.resize)
        pictures.append(resampled(picture, plan.vl, seen.resize))
    return dataclasses.replace(row, pictures=pictures)


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
