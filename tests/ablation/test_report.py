"""The report page, the contact sheet and the charts, of a sweep that is made up here: no model runs."""

import base64
import io
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from qwenedit.ablation.charts import HEIGHT, WIDTH, Line, chart, nice_range
from qwenedit.ablation.report import write_report
from qwenedit.ablation.results import Sweep
from qwenedit.ablation.sheet import picture_grid
from qwenedit.ablation.spec import read_spec
from qwenedit.ablation.statistics import estimates

HOSTILE = "<script>document.title = 'bad'</script> & \"quotes\" <!--TITLE--> 中文 🔴"
GRID = {"references.latents": ["concatenated", "left_out", "noise"], "true_cfg_scale": [1, 4]}
PSNR = [None, 31.5, 8.25, 100.0, 19.0, 19.5]  # of the cells, the unablated one first


def made_up(folder, *, failed=(), side=64, grid=GRID, success=True, seeds=(3, 4)):
    """Two pictures, one of them the oracle's, from two seeds; numbers follow from a run's place."""
    Image.new("RGB", (side, side), "teal").save(folder / "cat.png")
    given = {"pictures": [str(folder / "cat.png"), "mini:1"], "prompts": [HOSTILE], "seeds": list(seeds)}
    spec = read_spec({**given, "steps": 2, "grid": grid})
    (folder / "pictures").mkdir()
    records = {}
    for i, case in enumerate(spec.cases):
        for j, seed in enumerate(spec.seeds):
            for k, cell in enumerate(spec.cells):
                key = f"{i}{j}{k}"
                common = {
                    "key": key, "model": "m", "picture": case.name, "prompt": case.prompt, "seed": seed,
                    "fingerprint": "abc", "qwenedit": "0", "torch": "2", "python": "3", "commit": None,
                    "dtype": "float32", "device": "cpu", "threads": 1, "at": f"2026-01-0{1 + j}",
                    **cell.settings,
                }  # fmt: skip
                if (i, j, k) in failed:
                    records[i, j, k] = {**common, "status": "failed", "error": HOSTILE, "file": None}
                    continue
                file = f"pictures/{key}.png"
                Image.new("RGB", (side, side), (40 * k, 100 * i, 100 * j)).save(folder / file)
                metrics = {"psnr": None, "ssim": None, "changed": None}
                if k:
                    metrics = {"psnr": PSNR[min(k, 5)], "ssim": 1 - k / 10, "changed": k / 100}
                metrics |= {"source_psnr": 20.0 + k * (1 + i) + j, "source_ssim": 0.5, "source_changed": 0.25}
                if i == 1 and success:
                    metrics |= {"success": j == 0, "strict": False, "preserved": None, "reason": "<b>"}
                guided = cell.true_cfg_scale > 1
                ratio = {name: [value if guided else None] * 2 for name, value in (
                    ("mean", 0.5 + k / 10), ("min", 0.25), ("max", 1.5 + j))}  # fmt: skip
                records[i, j, k] = {
                    **common, "status": "done", "file": file, "metrics": metrics,
                    "seconds": {"encode": 1.0, "sample": 2.0 + i, "decode": 0.5},
                    "curves": {"sigma": [1.0, 0.5], "velocity": [10.0 + k, 9.0], "norm_ratio": ratio},
                }  # fmt: skip
        if len(seeds) == 2 and all((i, j, 0) not in failed for j in range(2)):
            records[i, 0, 0]["floor"] = {"key": f"{i}10", "psnr": 30.0 + i, "ssim": 0.9, "changed": 0.01}
    return Sweep(folder, spec, records)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, the text of each cell, scripts apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text, self.scripts, self.inside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link", "input"):
            self.inside.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append([dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag  # all tags are closed, in order

    def handle_data(self, data):
        if "script" in self.inside or "style" in self.inside:
            self.scripts.append(data)
            return
        self.text.append(data)
        if "td" in self.inside or "th" in self.inside:
            self.cells[-1][-1][1] += data

    def rows(self, kind):
        """The table's rows of texts; `kind` is its class."""
        start = next(i for i, (tag, at) in enumerate(self.tags) if tag == "table" and at["class"] == kind)
        before = sum(tag == "tr" for tag, _ in self.tags[:start])
        rest = [tag for tag, _ in self.tags[start:]]
        end = rest.index("table", 1) if "table" in rest[1:] else len(rest)
        return self.cells[before : before + rest[:end].count("tr")]


def page(sweep):
    write_report(sweep, sweep.folder / "report.html")
    found = Page((sweep.folder / "report.html").read_text(encoding="utf-8"))
    assert found.inside == []
    return found


def test_the_summary_has_a_row_for_each_cell(tmp_path):
    """Means, below them intervals or differences, and the edits that have a number where not all do."""
    sweep = made_up(tmp_path)
    head, *rows, foot = page(sweep).rows("sortable")
    names = [at["data-name"] for at, _ in head]
    assert names == [
        "references.latents", "true_cfg_scale", "psnr", "ssim", "changed", "source_psnr", "source_ssim",
        "source_changed", "norm_ratio", "success", "strict", "sample", "runs", "compared",
    ]  # fmt: skip
    none, half, zero, same = "", "50.0 of 2", "0.0 of 2", "0.000 [0.000, 0.000]"
    unguided, seconds = "–", "0.00 [0.00, 0.00]"
    assert [[text for _, text in row][:-1] for row in rows[:3]] == [
        ["concatenated", "4", "–", "–", "–", "20.5", "0.500", "25.0", "0.500", half, zero, "2.50", "4"],
        ["concatenated", "1", "31.5[31.5, 31.5]", "0.900[0.900, 0.900]", "1.0[1.0, 1.0]",
         "22.0+1.5 [+1.0, +2.0]", f"0.500{same}", "25.00.0 [0.0, 0.0]", unguided,
         f"{half}0.0 [0.0, 0.0]", f"{zero}0.0 [0.0, 0.0]", f"2.50{seconds}", "4"],
        ["left_out", "1", "8.2[8.2, 8.2]", "0.800[0.800, 0.800]", "2.0[2.0, 2.0]",
         "23.5+3.0 [+2.0, +4.0]", f"0.500{same}", "25.00.0 [0.0, 0.0]", unguided,
         f"{half}0.0 [0.0, 0.0]", f"{zero}0.0 [0.0, 0.0]", f"2.50{seconds}", "4"],
    ]  # fmt: skip
    assert len(rows) == 6 and none == rows[0][2][0]["data-v"]
    assert [text for _, text in foot] == [
        "noise floor", "30.5", "0.900", "1.0", "1.0", "0.000", "0.0", "0.000", "100.0", "0.0", "0.00",
        "2 pairs", "",
    ]  # fmt: skip
    for k, row in enumerate(rows):
        shown = dict(zip(names, (at["data-v"] for at, _ in row), strict=True))
        for name, mean in estimates(sweep, k).items():
            if name in shown:
                assert shown[name] == ("" if mean.value is None else repr(mean.value))
    assert [row[-1][1] for row in rows[:2]] == [
        "The unablated run: 4 runs of 2 edits; the noise floor is that of 2 pairs of seeds of one edit.",
        "4 runs of 2 edits, all compared with the unablated run of the same edit and seed "
        "(references.latents concatenated, true_cfg_scale 4).",
    ]


def test_settings_that_come_to_the_same_are_one_row(tmp_path):
    grid = {"guidance.norm": ["reference", "none", "global"], "true_cfg_scale": [1, 4]}
    sweep = made_up(tmp_path, grid=grid)
    found = page(sweep)
    _, *rows, _ = found.rows("sortable")
    assert [[text for _, text in row][:2] for row in rows] == [
        ["reference", "4"], ["reference, none, global", "1"], ["none", "4"], ["global", "4"],
    ]  # fmt: skip
    assert "2 that come to the same as another are shown with it" in "".join(found.text)
    heads = found.rows("pictures")[0]
    assert [text for _, text in heads][3:] == ["reference", "reference, none, global", "none", "global"]


def test_pictures_that_do_not_fit_beside_each_other_follow_below(tmp_path):
    grid = {"time.sigmas": [[1.0, 0.5 + k / 100] for k in range(9)]}
    found = page(made_up(tmp_path, grid=grid))
    assert [at["class"] for tag, at in found.tags if tag == "table"] == ["sortable", "pictures", "pictures"]
    sources = [at["src"] for tag, at in found.tags if tag == "img"]
    assert len(sources) == 2 * 2 + 4 * (8 + 3)  # ten settings, the unablated one twice
    (tmp_path / "more").mkdir()
    sheet = picture_grid(made_up(tmp_path / "more", grid=grid))
    assert sheet.size == (1566, 2 * (46 + 4 * 167))


def test_columns_without_any_number_are_left_out(tmp_path):
    sweep = made_up(tmp_path, success=False)
    head = page(sweep).rows("sortable")[0]
    assert not {"success", "strict", "preserved"} & {at["data-name"] for at, _ in head}


def test_pictures_are_within_the_page_in_the_order_of_the_cells(tmp_path):
    sweep = made_up(tmp_path)
    found = page(sweep)
    sources = [at["src"] for tag, at in found.tags if tag == "img"]
    assert len(sources) == 2 + 24
    pixel = []
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        pixel.append(Image.open(io.BytesIO(base64.b64decode(data))).getpixel((5, 5)))
    assert pixel[0] == (0, 128, 128)  # teal: the source
    assert pixel[1:13] == [(40 * k, 0, 100 * j) for j in range(2) for k in range(6)]
    assert pixel[14:] == [(40 * k, 100, 100 * j) for j in range(2) for k in range(6)]
    heads = found.rows("pictures")[:2]
    assert [(text, at.get("colspan")) for at, text in heads[0]][3:] == [
        ("concatenated", None), ("concatenated", "1"), ("left_out", "2"), ("noise", "2"),
    ]  # fmt: skip
    assert [text for _, text in heads[1]] == ["true_cfg_scale", "4", "1", "1", "4", "1", "4"]


def test_large_pictures_are_embedded_small_and_lead_to_the_file(tmp_path):
    found = page(made_up(tmp_path, side=600))
    uri = [at["src"] for tag, at in found.tags if tag == "img"][1]
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (256, 256)
    assert next(at["href"] for tag, at in found.tags if tag == "a") == "pictures/000.png"


def test_all_text_is_text_and_nothing_comes_from_elsewhere(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    found = page(sweep)
    text = "".join(found.text)
    assert text.count(HOSTILE) == 2  # the prompt, the error
    assert [tag for tag, _ in found.tags].count("script") == 1 and "document.title" not in "".join(
        found.scripts
    )
    assert [tag for tag, _ in found.tags].count("title") == 1
    for _, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        "http:" not in source and "https:" not in source and "url(" not in source and "@import" not in source
    )
    assert "<!--" not in re.sub(r"&lt;!--", "", source)


def test_failed_runs_are_listed_and_shown(tmp_path):
    found = page(made_up(tmp_path, failed=[(1, 1, 0), (1, 1, 2)]))
    texts = "".join(found.text)
    assert "mini:1, seed 4, unablated (references.latents concatenated, true_cfg_scale 4)" in texts
    assert "mini:1, seed 4, references.latents left_out, true_cfg_scale 1" in texts
    assert [text for _, text in found.rows("pictures")[-1]].count("failed") == 2


def test_nothing_done_and_nothing_to_compare(tmp_path):
    sweep = made_up(tmp_path, grid={}, failed=[(i, j, 0) for i in range(2) for j in range(2)])
    rows = page(sweep).rows("sortable")
    assert [[text for _, text in row] for row in rows] == [
        ["settings", "runsdone", "compared"],
        ["unablated", "0 of 4",
         "The unablated run: 0 runs of 0 edits; there is no noise floor, which takes two seeds."],
    ]  # fmt: skip
    assert picture_grid(sweep).width > 100


def test_text_that_is_not_unicode_does_not_stop_the_report(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    sweep.records[0, 0, 1]["error"] = "\ud800"
    page(sweep)


def svgs(text):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_there_are_charts_for_every_cell(tmp_path):
    sweep = made_up(tmp_path)
    page(sweep)
    found = svgs((tmp_path / "report.html").read_text(encoding="utf-8"))
    names = [svg.get("aria-label") for svg in found][10:]
    guided, unguided = ["|velocity|", "norm ratio"], ["|velocity|"]
    assert names == ["σ", *guided, *unguided, *unguided, *guided, *unguided, *guided]
    ghosts = [sum(line.get("class") == "ghost" for line in svg.iter("polyline")) for svg in found[10:]]
    assert ghosts[:3] == [0, 0, 0] and set(ghosts[3:]) == {1}


def points(svg, kind="line"):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter()
        if line.get("class") == kind and line.get("points")
    ]


def test_a_chart_puts_points_where_they_belong():
    (svg,) = svgs(chart("a<b", [Line([1, 0.5, 0], [0, 5, 20])], x=(1, 0), y=(0, 10), along="σ").svg())
    ((first, middle, last),) = points(svg)
    assert svg.get("aria-label") == "a<b"
    assert first[0] < middle[0] < last[0] < WIDTH and middle[0] == pytest.approx((first[0] + last[0]) / 2)
    assert HEIGHT > first[1] > middle[1] > last[1] > 0
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.06)  # 20 is cut off at 10
    ticks = [text.text for text in svg.iter("text")]
    assert ticks == ["a<b", "0", "2.5", "5", "7.5", "10", "1", "0", "σ"]


def test_a_chart_has_gaps_where_there_are_no_numbers():
    y, band = [1, None, 2, 3], ([0, None, 1, 1], [2, None, 3, 4])
    (svg,) = svgs(chart("x", [Line([0, 1, 2, 3], y, band=band)], x=(0, 3), y=(0, 4), along="step").svg())
    assert [len(piece) for piece in points(svg)] == [1, 2]
    assert [len(piece) for piece in points(svg, "band")] == [2, 4]


@pytest.mark.parametrize(
    "values, wanted",
    [
        ([0.3, 8.9], (0, 10)),
        ([0.41, 0.43], (0.41, 0.43)),
        ([5, 5], (4.5, 5.5)),
        ([None], (0, 1)),
        ([], (0, 1)),
    ],
)
def test_ranges_are_round(values, wanted):
    assert nice_range(values) == pytest.approx(wanted)


def test_attention_maps_are_heatmaps(tmp_path):
    sweep = made_up(tmp_path)
    assert "Attention" not in page(sweep).text
    shares = [[0.0, 0.25, 0.5], [0.75, 1.0, 0.1]]
    sweep.records[0, 0, 1]["attention"] = {"text": [[0.0] * 3] * 2, "references": shares}
    found = page(sweep)
    assert "to references" in found.text and "0.00 to 1.00" in found.text
    uri = next(at["src"] for tag, at in found.tags if tag == "img" and "to references" in at["alt"])
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == (3, 2)
    grey = [picture.convert("L").getpixel((i % 3, i // 3)) for i in range(6)]
    assert sorted(range(6), key=grey.__getitem__) == torch.tensor(shares).flatten().argsort().tolist()
    assert picture.getpixel((0, 0)) == (68, 1, 84) and picture.getpixel((1, 1)) == (253, 231, 37)
    assert picture.getpixel((2, 0)) == (33, 145, 140)


def test_the_contact_sheet(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    grid = picture_grid(sweep)
    colours = [{grid.getpixel((x, y)) for x in range(0, grid.width, 8)} for y in range(120, grid.height, 167)]
    for line, (i, j) in zip(colours, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        wanted = {(40 * k, 100 * i, 100 * j) for k in range(6) if (i, j, k) != (0, 0, 1)}
        assert wanted <= line and ((40, 0, 0) not in line or (i, j) != (0, 0))
        assert ((0, 128, 128) in line) == (i == 0)


BROWSER = os.environ.get("CHROME") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; $CHROME may name one")
@pytest.mark.parametrize("hash, order", [
    ("", [0, 1, 2, 3, 4, 5]),
    ("#sort=psnr", [2, 4, 5, 1, 3, 0]),
    ("#sort=-psnr", [3, 1, 5, 4, 2, 0]),
    ("#sort=norm_ratio", [0, 3, 5, 1, 2, 4]),  # without a number, the last, in the order that they had
    ("#sort=-norm_ratio", [5, 3, 0, 1, 2, 4]),
    ("#sort=-references.latents", [4, 5, 2, 3, 0, 1]),
    ("#sort=nothing", [0, 1, 2, 3, 4, 5]),
])  # fmt: skip
def test_a_browser_shows_the_table_and_sorts_it(tmp_path, hash, order):
    """The address presses the heading's button, so this is the way of a click."""
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    page(sweep)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/report.html{hash}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True, encoding="utf-8")
    shown = Page(done.stdout)
    head, *rows, foot = shown.rows("sortable")
    assert foot[0][1] == "noise floor"
    cells = [(text[0][1], float(text[1][1])) for text in rows]
    places = [tuple(cell.values.values()) for cell in sweep.spec.cells]
    assert [places.index(cell) for cell in cells] == order
    assert sum(at["aria-sort"] != "none" for at, _ in head) == (hash not in ("", "#sort=nothing"))
    assert "".join(shown.text).count(HOSTILE) == 2 and "Ablation: " in "".join(shown.text)
