"""Contact sheets: rows of small pictures, enlarged so that every pixel stays a square."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

__all__ = ["sheet"]

_LINE, _GAP = 14, 4  # pixels: height of a caption, gap between pictures


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], *, scale: int = 4, columns: int = 1
) -> Image.Image:
    """Rows of pictures of one size, each row under its caption; `columns` rows stand side by side."""
    width, height = rows[0][1][0].size
    widest = max(len(pictures) for _, pictures in rows)
    cell_width = widest * (width * scale + _GAP) + 2 * _GAP
    cell_height = _LINE + height * scale + 2 * _GAP
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (cell_width * columns, cell_height * lines), (255, 255, 255))
    ink = ImageDraw.Draw(page)
    for i, (caption, pictures) in enumerate(rows):
        left, top = i % columns * cell_width + _GAP, i // columns * cell_height + _GAP
        ink.text((left, top), caption, fill=(0, 0, 0))
        for k, picture in enumerate(pictures):
            enlarged = picture.convert("RGB").resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            page.paste(enlarged, (left + k * (width * scale + _GAP), top + _LINE))
    return page
