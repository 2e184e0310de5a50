"""grid.png, the contact sheet of a sweep: pictures and seeds down, settings across."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qwenedit.ablation.labels import axis_text, bands
from qwenedit.ablation.measures import Record
from qwenedit.ablation.results import Sweep
from qwenedit.inputs.pictures import open_picture

__all__ = ["MOST", "SMALL", "distance", "picture_grid"]

SMALL = 128  # pixels: up to this size pixels are shown as squares
MOST = 8  # settings beside each other


def distance(record: Record, cell: int) -> str:
    """The PSNR to the unablated picture."""
    measured = record["metrics"]["psnr"]
    return "unablated" if cell == 0 else "–" if measured is None else f"{measured:.1f} dB"


def picture_grid(sweep: Sweep) -> Image.Image:
    """The contact sheet: a row for each picture and seed, a column for each setting, the sources on the left.

    Settings that do not fit beside each other follow below, the unablated run again on the left.
    """
    parts = [_Part(sweep, cells).paint() for cells in bands(len(sweep.spec.cells), MOST)]
    page = Image.new("RGB", (max(one.width for one in parts), sum(one.height for one in parts)), "white")
    for k, part in enumerate(parts):
        page.paste(part, (0, sum(before.height for before in parts[:k])))
    return page


class _Part:
    """Some settings beside each other."""

    side, gap, line, margin = 144, 6, 17, 210

    def __init__(self, sweep: Sweep, cells: list[int]) -> None:
        self.sweep, self.cells = sweep, cells
        self.font, self.small = ImageFont.load_default(13), ImageFont.load_default(12)
        rows = len(sweep.spec.cases) * len(sweep.spec.seeds)
        self.top = (len(sweep.spec.axes) + 1) * self.line + 2 * self.gap
        width = self.margin + (len(cells) + 1) * (self.side + self.gap) + self.gap
        self.page = Image.new("RGB", (width, self.top + rows * (self.side + self.line + self.gap)), "white")
        self.ink = ImageDraw.Draw(self.page)

    def paint(self) -> Image.Image:
        self._heads()
        spec = self.sweep.spec
        for i in range(len(spec.cases)):
            for j in range(len(spec.seeds)):
                row = i * len(spec.seeds) + j
                self._row(i, j, self.top + row * (self.side + self.line + self.gap))
        return self.page

    def _heads(self) -> None:
        spec, gap = self.sweep.spec, self.gap
        for depth, axis in enumerate(spec.axes):
            self._write(gap, gap + depth * self.line, axis, room=self.margin - 2 * gap, fill="#666")
        self._write(self.margin, gap, "source", room=self.side)
        for place, k in enumerate(self.cells):
            x = self._column(place)
            for depth, axis in enumerate(spec.axes if spec.cells[k].combinations else ()):
                self._write(x, gap + depth * self.line, axis_text(spec, k, axis), room=self.side)
            if k == 0:
                self._write(x, gap + len(spec.axes) * self.line, "unablated", room=self.side, fill="#0b62a8")

    def _row(self, i: int, j: int, y: int) -> None:
        spec, case, room = self.sweep.spec, self.sweep.spec.cases[i], self.margin - 2 * self.gap
        self._write(self.gap, y, f"{Path(case.name).name}, seed {spec.seeds[j]}", room=room)
        for at, text in enumerate(textwrap.wrap(case.prompt, 28)[:6]):
            self._write(self.gap, y + (at + 1) * self.line, text, room=room, font=self.small, fill="#666")
        self._show(self.margin, y, case.shown)
        for place, k in enumerate(self.cells):
            x, record = self._column(place), self.sweep.records[i, j, k]
            if record["status"] == "failed":
                self._write(x, y, "failed", room=self.side, fill="#b3261e")
                continue
            self._show(x, y, open_picture(self.sweep.folder / record["file"]))
            text = distance(record, k)
            if "success" in record["metrics"]:
                text += ", success" if record["metrics"]["success"] else ", fails"
            self._write(x, y + self.side, text, room=self.side, font=self.small, fill="#666")

    def _column(self, place: int) -> int:
        return self.margin + (place + 1) * (self.side + self.gap)

    def _write(self, x: float, y: float, text: str, *, room: int, font: Any = None, **options: Any) -> None:
        font = font or self.font
        text = re.sub(r"[^\x00-\xff]+", "…", text)  # Pillow's own font has Latin letters only
        while self.ink.textlength(text, font) > room and len(text) > 1:
            text = text[:-2] + "…"
        self.ink.text((x, y), text, font=font, **{"fill": "black", **options})

    def _show(self, x: int, y: int, picture: Image.Image) -> None:
        ratio = self.side / max(picture.size)
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        how = Image.Resampling.NEAREST if max(picture.size) <= SMALL else Image.Resampling.LANCZOS
        self.page.paste(picture.convert("RGB").resize(size, how), (x, y))
        self.ink.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline="#ddd")
