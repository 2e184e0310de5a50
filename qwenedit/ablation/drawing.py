"""Line drawings as SVG, for the page or as a file, and as PDF, for a paper; both are vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import NamedTuple

__all__ = ["Drawing", "Stroke", "Text", "text_width"]

Point = tuple[float, float]


class Look(NamedTuple):
    """Of a stroke: colours from 0 to 255 (None: none), width and dashes in pixels, opacity of the fill."""

    stroke: tuple[int, int, int] | None = None
    width: float = 1.0
    dashes: tuple[float, ...] = ()
    fill: tuple[int, int, int] | None = None
    opacity: float = 1.0


_INK, _SOFT, _RULE, _ACCENT = (29, 31, 33), (106, 111, 117), (223, 225, 227), (11, 98, 168)
LOOKS = {  # by style; the page has its own colours, light and dark, under the same names
    "rule": Look(_RULE),
    "zero": Look(_SOFT, 0.8),
    "line": Look(_ACCENT, 1.6),
    "ghost": Look(_SOFT, 1.2, (3, 2.5)),
    "band": Look(fill=_ACCENT, opacity=0.16),
    "floor": Look(fill=_SOFT, opacity=0.18),
    "dot": Look(fill=_ACCENT),
}
SIZES = {"": (9.0, _SOFT), "name": (10.0, _INK), "label": (9.0, _INK)}  # of texts, by style
ANCHORS = {"start": 0.0, "middle": 0.5, "end": 1.0}

# Helvetica's widths of the characters from space to tilde, in thousandths of the font's size.
_WIDTHS = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, *[556] * 10, 278, 278,
    584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778, 667,
    778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556, 333, 556, 556, 500, 556, 556,
    278, 556, 556, 222, 222, 500, 222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500,
    334, 260, 334, 584,
)  # fmt: skip


_SYMBOLS = {"σ": "s"}  # what the font Symbol has in place of a letter


class Stroke(NamedTuple):
    """A line through points, or, in a style with a fill, the area that it encloses."""

    points: Sequence[Point]
    style: str


class Text(NamedTuple):
    """A text at its baseline; `anchor` is the part of it that is at x."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    style: str = ""


def text_width(text: str, size: float = 9.0) -> float:
    """The width of a text in Helvetica; characters that it lacks are square."""
    return sum(_advance(character) for character in text) * size / 1000


def _advance(character: str) -> int:
    code = ord(character) - 32
    if 0 <= code < len(_WIDTHS):
        return _WIDTHS[code]
    return {"F1": 556, "F2": 1000, "F3": 603}[_font(character)]


def _font(character: str) -> str:
    """The first of Helvetica, Symbol and a Chinese font that has it."""
    try:
        return "F1" if character.encode("cp1252") else "F2"
    except UnicodeEncodeError:
        return "F3" if character in _SYMBOLS else "F2"


def _encoded(text: str, font: str) -> bytes:
    if font == "F3":
        return "".join(_SYMBOLS[character] for character in text).encode()
    return text.encode("cp1252" if font == "F1" else "utf-16-be", errors="replace")


@dataclass
class Drawing:
    """Strokes and texts, in pixels from the upper left, painted in order."""

    name: str
    width: float
    height: float
    marks: list[Stroke | Text] = field(default_factory=list)

    def add(self, other: Drawing, x: float, y: float) -> None:
        """Put another drawing at a place in this one."""
        for mark in other.marks:
            if isinstance(mark, Stroke):
                self.marks.append(Stroke([(a + x, b + y) for a, b in mark.points], mark.style))
            else:
                self.marks.append(mark._replace(x=mark.x + x, y=mark.y + y))

    def svg(self, style: str = "") -> str:
        """For the page, whose style sheet has the colours, or with a `<style>` that may have further ones."""
        space = ' xmlns="http://www.w3.org/2000/svg"' if style else ""
        size = f' width="{self.width:g}" height="{self.height:g}"' if style else ""
        parts = [
            f'<svg{space} viewBox="0 0 {self.width:g} {self.height:g}"{size} role="img" '
            f'aria-label="{escape(self.name)}">{style}'
        ]
        for mark in self.marks:
            if isinstance(mark, Text):
                kind = f' class="{mark.style}"' if mark.style else ""
                anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
                parts.append(
                    f'<text{kind} x="{mark.x:.1f}" y="{mark.y:.1f}"{anchor}>{escape(mark.text)}</text>'
                )
            else:
                tag = "polyline" if LOOKS.get(mark.style, Look()).fill is None else "polygon"
                points = " ".join(f"{a:.1f},{b:.1f}" for a, b in mark.points)
                parts.append(f'<{tag} class="{mark.style}" points="{points}"/>')
        return "".join([*parts, "</svg>"])

    def svg_file(self) -> str:
        """With its own colours."""
        rules = [
            "svg{background:#fff}text{font-family:Helvetica,Arial,sans-serif}polyline{fill:none}",
            *(
                f"text{'.' * bool(s)}{s}{{font-size:{size:g}px;fill:{_css(c)}}}"
                for s, (size, c) in SIZES.items()
            ),
        ]
        for style, look in LOOKS.items():
            dashes = f"stroke-dasharray:{' '.join(f'{x:g}' for x in look.dashes)};" if look.dashes else ""
            rules.append(
                f".{style}{{fill:{_css(look.fill)};fill-opacity:{look.opacity:g};stroke:{_css(look.stroke)};"
                f"stroke-width:{look.width:g};{dashes}}}"
            )
        return self.svg(f"<style>{''.join(rules)}</style>") + "\n"

    def pdf(self) -> bytes:
        """One page of the drawing's size. Latin text is in Helvetica, σ in Symbol and all other in a Chinese
        font, which the viewer must have: no font is embedded.

        Source: ISO 32000-1, 8.4 and 8.5 for strokes, 9.6.2.2 and 9.7.5.2 for the fonts.
        """
        fills = [(k, look.opacity) for k, look in enumerate(LOOKS.values()) if look.fill is not None]
        states = " ".join(f"/G{k} << /ca {opacity:g} >>" for k, opacity in fills)
        content = "\n".join(part for mark in self.marks for part in self._painted(mark)).encode("latin-1")
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {self.width:g} {self.height:g}] /Contents 4 0 R "
            "/Resources << /Font << /F1 5 0 R /F2 6 0 R /F3 9 0 R >> "
            f"/ExtGState << {states} >> >> >>".encode(),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
            b"<< /Type /Font /Subtype /Type0 /BaseFont /STSong-Light-UniGB-UTF16-H /Encoding /UniGB-UTF16-H "
            b"/DescendantFonts [7 0 R] >>",
            b"<< /Type /Font /Subtype /CIDFontType0 /BaseFont /STSong-Light /FontDescriptor 8 0 R "
            b"/CIDSystemInfo << /Registry (Adobe) /Ordering (GB1) /Supplement 4 >> >>",
            b"<< /Type /FontDescriptor /FontName /STSong-Light /Flags 6 /FontBBox [-25 -254 1000 880] "
            b"/ItalicAngle 0 /Ascent 880 /Descent -120 /CapHeight 880 /StemV 93 >>",
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Symbol >>",
        ]
        return _pdf_file(objects)

    def _painted(self, mark: Stroke | Text) -> Iterable[str]:
        """The operators that paint a mark; y goes up in PDF."""
        if isinstance(mark, Text):
            size, colour = SIZES[mark.style]
            x = mark.x - ANCHORS[mark.anchor] * text_width(mark.text, size)
            for font, characters in groupby(mark.text, _font):
                run = "".join(characters)
                yield (
                    f"BT {_rgb(colour)} rg /{font} {size:g} Tf {x:.2f} {self.height - mark.y:.2f} Td "
                    f"<{_encoded(run, font).hex()}> Tj ET"
                )
                x += text_width(run, size)
            return
        look = LOOKS[mark.style]
        path = " ".join(
            f"{a:.2f} {self.height - b:.2f} {'l' if k else 'm'}" for k, (a, b) in enumerate(mark.points)
        )
        if look.fill is not None:
            yield f"q /G{list(LOOKS).index(mark.style)} gs {_rgb(look.fill)} rg {path} h f Q"
        elif look.stroke is not None:
            dashes = " ".join(f"{x:g}" for x in look.dashes)
            yield f"q {_rgb(look.stroke)} RG {look.width:g} w 1 j [{dashes}] 0 d {path} S Q"


def _rgb(colour: tuple[int, int, int]) -> str:
    return " ".join(f"{value / 255:.3g}" for value in colour)


def _css(colour: tuple[int, int, int] | None) -> str:
    return "none" if colour is None else "#" + bytes(colour).hex()


def _pdf_file(objects: Sequence[bytes]) -> bytes:
    """The objects, numbered from 1 on, with the table of their places."""
    parts, places, end = [b"%PDF-1.5\n"], [], 9
    for number, content in enumerate(objects, 1):
        places.append(end)
        parts.append(b"%d 0 obj\n%s\nendobj\n" % (number, content))
        end += len(parts[-1])
    rows = b"".join(b"%010d 00000 n \n" % place for place in places)
    count = len(objects) + 1
    parts.append(b"xref\n0 %d\n0000000000 65535 f \n%s" % (count, rows))
    parts.append(b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (count, end))
    return b"".join(parts)
