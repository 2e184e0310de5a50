"""Drawings as SVG and PDF: the same marks at the same places, in files that other programs can read."""

import re
from xml.etree import ElementTree

import pytest

from qwenedit.ablation.charts import Row, intervals
from qwenedit.ablation.drawing import LOOKS, Drawing, Stroke, Text, text_width
from qwenedit.ablation.figures import effects, step_charts, write_figures
from qwenedit.ablation.statistics import differences, estimates, noise_floor
from tests.ablation.test_report import made_up

SVG = "{http://www.w3.org/2000/svg}"


class PDF:
    """The objects of a file, found by its table of places, and what its page paints."""

    def __init__(self, data):
        assert data.startswith(b"%PDF-1.") and data.endswith(b"%%EOF\n")
        start = int(re.search(rb"startxref\n(\d+)\n", data)[1])
        assert data[start:].startswith(b"xref\n")
        places = [int(x) for x in re.findall(rb"(\d{10}) \d{5} n ", data[start:])]
        self.objects = {}
        for number, place in enumerate(places, 1):
            assert data[place:].startswith(b"%d 0 obj\n" % number)
            self.objects[number] = data[place : data.index(b"\nendobj", place)]
        assert all(int(n) in self.objects for n in re.findall(rb"(\d+) 0 R", data))
        assert re.search(rb"/Size (\d+)", data[start:])[1] == b"%d" % (len(places) + 1)
        stream = next(x for x in self.objects.values() if b"stream" in x)
        self.content = stream[stream.index(b"stream\n") + 7 : stream.index(b"\nendstream")].decode("latin-1")
        assert int(re.search(rb"/Length (\d+)", stream)[1]) == len(self.content)
        page = next(x for x in self.objects.values() if b"/Type /Page " in x)
        self.size = tuple(map(float, re.search(rb"MediaBox \[0 0 (\S+) (\S+)\]", page).groups()))

    @property
    def texts(self):
        """Font, x, y and text of each run."""
        found = re.findall(r"/(F\d) \S+ Tf (\S+) (\S+) Td <(\w*)> Tj", self.content)
        codes = {"F1": "cp1252", "F2": "utf-16-be", "F3": "ascii"}
        return [
            (font, float(x), float(y), bytes.fromhex(text).decode(codes[font])) for font, x, y, text in found
        ]

    @property
    def paths(self):
        """The points of each path, and the operator that paints it."""
        found = re.findall(r"((?:\S+ \S+ [ml] ?)+)(?:h )?([fS])", self.content)
        return [
            ([(float(x), float(y)) for x, y in re.findall(r"(\S+) (\S+) [ml]", points)], operator)
            for points, operator in found
        ]


def drawing():
    made = Drawing("a<b", 200, 100)
    made.marks += [
        Stroke([(10, 20), (30, 40)], "line"),
        Stroke([(0, 0), (50, 0), (50, 10)], "band"),
        Text(100, 50, "1.5", "middle"),
        Text(10, 90, "σ 一只猫 (x) \\", style="label"),
    ]
    return made


def test_pdf_and_svg_have_the_same_marks():
    made = drawing()
    pdf, svg = PDF(made.pdf()), ElementTree.fromstring(made.svg_file())
    assert pdf.size == (200, 100) and svg.get("viewBox") == "0 0 200 100" and svg.get("aria-label") == "a<b"
    assert pdf.paths == [([(10, 80), (30, 60)], "S"), ([(0, 100), (50, 100), (50, 90)], "f")]
    assert svg.find(f"{SVG}polyline").get("points") == "10.0,20.0 30.0,40.0"
    assert svg.find(f"{SVG}polygon").get("points") == "0.0,0.0 50.0,0.0 50.0,10.0"
    assert [text.text for text in svg.iter(f"{SVG}text")] == ["1.5", "σ 一只猫 (x) \\"]
    number, *label = pdf.texts
    assert number[0] == "F1" and number[1:] == (
        pytest.approx(100 - text_width("1.5") / 2, abs=0.01),
        50,
        "1.5",
    )
    assert [(font, text) for font, _, _, text in label] == [
        ("F3", "s"), ("F1", " "), ("F2", "一只猫"), ("F1", " (x) \\"),
    ]  # fmt: skip
    places = [x for _, x, _, _ in label]
    assert places == sorted(places) and places[2] - places[1] == pytest.approx(text_width(" "), abs=0.02)


def test_every_style_has_its_look_in_both():
    style = ElementTree.fromstring(drawing().svg_file()).find(f"{SVG}style").text
    for name, look in LOOKS.items():
        made = Drawing(name, 10, 10, [Stroke([(0, 0), (5, 5), (5, 0)], name)])
        content = PDF(made.pdf()).content
        assert f".{name}{{" in style
        assert content.endswith("f Q" if look.fill else "S Q") and (" gs " in content) == bool(look.fill)


def test_intervals_are_where_their_numbers_are():
    rows = [
        Row(("a", "1"), 1.0, -1.0, 2.0),
        Row(("b", "22"), None, None, None),
        Row(("c", "3"), 4.0, None, None),
    ]
    heads = ("axis", "scale")
    made = intervals("name", heads, rows, floor=0.5, differences=True, across="unit")
    strokes = {
        name: [x.points for x in made.marks if isinstance(x, Stroke) and x.style == name] for name in LOOKS
    }
    ticks = {x.text: x.x for x in made.marks if isinstance(x, Text) and x.anchor == "middle"}
    (bar,), (zero,), (floor,) = strokes["line"], strokes["zero"], strokes["floor"]

    def at(value):
        return ticks["0"] + (ticks["2"] - ticks["0"]) * value / 2

    assert [x for x, _ in bar] == pytest.approx([at(-1), at(2)]) and bar[0][1] == bar[1][1]
    assert zero[0][0] == pytest.approx(at(0)) and sorted({x for x, _ in floor}) == pytest.approx(
        [at(-0.5), at(0.5)]
    )
    centres = [sum(x for x, _ in dot) / 4 for dot in strokes["dot"]]
    assert centres == pytest.approx([at(1), at(4)])
    texts = [x for x in made.marks if isinstance(x, Text)]
    column = {x.text: x.x for x in texts}
    assert column["a"] == column["b"] == column["axis"] < column["1"] == column["22"] < ticks["0"]
    assert strokes["dot"][1][0][1] - strokes["dot"][0][0][1] == 32  # a row each
    means = intervals("name", heads, rows, floor=0.5, differences=False, across="unit")
    assert [x.style for x in means.marks if isinstance(x, Stroke)].count("ghost") == 1


def test_the_figures_of_a_sweep(tmp_path):
    sweep = made_up(tmp_path)
    write_figures(sweep, tmp_path / "figures")
    names = {
        "psnr", "ssim", "changed", "source_psnr", "source_ssim", "source_changed", "norm_ratio", "success",
        "strict", "sample", "steps",
    }  # fmt: skip
    wanted = {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == wanted | {
        "source-1.png",
        "source-2.png",
    }
    for name in names:
        pdf = PDF((tmp_path / "figures" / f"{name}.pdf").read_bytes())
        svg = ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot()
        shown = "".join(text.replace("s", "σ") if font == "F3" else text for font, _, _, text in pdf.texts)
        assert shown == "".join(text.text for text in svg.iter(f"{SVG}text"))
        drawn = sum(one.tag in (f"{SVG}polyline", f"{SVG}polygon") for one in svg)
        assert len(pdf.paths) == drawn > 5
    texts = [text for _, _, _, text in PDF((tmp_path / "figures" / "psnr.pdf").read_bytes()).texts]
    assert "left_out" in texts and "PSNR (dB), to the unablated run" in texts
    assert len(step_charts(sweep)) == 1 + 6


def test_effects_are_those_of_the_summary(tmp_path):
    sweep = made_up(tmp_path)
    found = effects(sweep)
    for name, of_cell in (("psnr", estimates), ("source_psnr", differences)):
        dots = [x.points for x in found[name].marks if isinstance(x, Stroke) and x.style == "dot"]
        places = [sum(x for x, _ in dot) / 4 for dot in dots]
        numbers = [of_cell(sweep, k)[name].value for k in range(1, 6)]
        for (x, a), (y, b) in zip(
            zip(places, numbers, strict=True), [*zip(places, numbers, strict=True)][1:], strict=False
        ):
            assert (x < y) == (a < b)
    assert noise_floor(sweep)["psnr"].value == 30.5
    (ghost,) = (x for x in found["psnr"].marks if isinstance(x, Stroke) and x.style == "ghost")
    assert min(x for x, _ in ghost.points) == max(x for x, _ in ghost.points)
