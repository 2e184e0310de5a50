"""The page in a browser: what a person clicks, types and sees."""

import math
import re

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from tests.exploration.browser import BROWSER, Browser
from tests.exploration.test_explore import cells_of, data_of, numbers, without_attention

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; $CHROME may name one"),
    pytest.mark.filterwarnings("ignore:the output's token grid"),
]
PROMPT = "make the circle 红色"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, edit):
    """Pages of two runs, of one without guidance and pictures, and of two that have little in common."""
    folder = tmp_path_factory.mktemp("pages")
    picture = Image.open(mini.EXAMPLE).convert("RGB")
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    second = {"intervention": without_attention, "prompt": "make the star 红色"}
    qwenedit.explore(edit, picture, PROMPT, folder / "two.html", second=second, **options)
    text = {"height": 48, "width": 80, "true_cfg_scale": 1.0, **options}
    qwenedit.explore(edit, None, "a red circle", folder / "one.html", **text)
    other = {"height": 48, "width": 96, "num_inference_steps": 7, "true_cfg_scale": 1.0, "prompt": "绿"}
    options["generator"].manual_seed(0)
    qwenedit.explore(edit, picture, PROMPT, folder / "unlike.html", second=other, **options)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def two(browser, folder):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(folder / "two.html")
    yield browser
    assert browser.errors == []
    assert not [url for url in browser.requests if not url.startswith(("file:", "data:"))]


def shares(page, k, branch, step, block, head=None):
    """A map of the page's data: (rows, columns), of one head or their mean."""
    run = data_of(page)["runs"][k]
    _, rows, columns = cells_of(run, branch)
    stored = run["maps"][branch][step][block]
    codes = numbers(stored["codes"], torch.uint8, (-1, rows, columns)).double()
    tops = numbers(stored["tops"], torch.float32, (-1, rows)).double()[..., None]
    heads = tops * (codes / 255) ** 2
    return heads.mean(0) if head is None else heads[head]


def caption(browser, k, picture):
    return browser.js(f"document.querySelectorAll('#attention figcaption')[{2 * k + picture}].textContent")


def in_caption(text):
    return [float(x) / 100 for x in re.findall(r"([\d.e-]+) %", text)]


def canvas(k, picture):
    return f"#attention .run:nth-child({k + 1}) canvas[data-picture='{picture}']"


def test_a_patch_and_where_it_looks(two, folder):
    """Numbers under the pictures are those of the data, for both runs at once."""
    page = folder / "two.html"
    two.choose("#step", "1")
    two.choose("#block", "4")
    two.click(canvas(0, 0), x=0.9, y=0.3)  # of 4x4: row 1, column 3
    for k in (0, 1):
        row = shares(page, k, "cond", 1, 4)[1 * 4 + 3]
        (sum_own, top_own), (sum_other, top_other) = (
            in_caption(caption(two, k, picture)) for picture in (0, 1)
        )
        own, other = row[:16], row[-16:]
        wanted = [own.sum(), own.max(), other.sum(), other.max()]
        assert [sum_own, top_own, sum_other, top_other] == pytest.approx([float(x) for x in wanted], rel=0.06)
    said = two.text("#said")
    assert "row 1, column 3" in said and "block 4, mean of the heads" in said
    before = two.js("document.querySelector('#attention canvas').toDataURL()")
    two.choose("#head", "2")
    assert "head 2" in two.text("#said")
    row = shares(page, 0, "cond", 1, 4, head=2)[7]
    assert in_caption(caption(two, 0, 1)) == pytest.approx(
        [float(row[-16:].sum()), float(row[-16:].max())], rel=0.06
    )
    assert two.js("document.querySelector('#attention canvas').toDataURL()") != before


def test_the_brightest_cell_is_the_largest(two, folder):
    two.click("#bare")
    two.click(canvas(0, 0), x=0.1, y=0.1)
    place = int(shares(folder / "two.html", 0, "cond", 1, 3)[0][-16:].argmax())
    two.choose("#step", "1")
    pixel = two.js(
        f"[...document.querySelector({canvas(0, 1)!r}).getContext('2d').getImageData("
        f"{place % 4 * 128 + 64}, {place // 4 * 128 + 64}, 1, 1).data]"
    )
    assert pixel == [253, 231, 37, 255]
    before = [two.js(f"document.querySelector({canvas(0, k)!r}).toDataURL()") for k in (0, 1)]
    two.click("#same")  # one scale for all pictures: that of the picture with the largest cell
    after = [two.js(f"document.querySelector({canvas(0, k)!r}).toDataURL()") for k in (0, 1)]
    row = shares(folder / "two.html", 0, "cond", 1, 3)[0]
    smaller = int(row[:16].max() > row[-16:].max())
    assert before[smaller] != after[smaller]
    assert before[1 - smaller] == after[1 - smaller]


def test_the_other_direction(two, folder):
    """A reference's patch, then a word: who looks at it."""
    two.choose("#step", "2")
    two.click(canvas(0, 1), x=0.3, y=0.6)  # row 2, column 1
    assert two.js("document.getElementById('direction').value") == "by"
    matrix = shares(folder / "two.html", 0, "cond", 2, 3)
    column = matrix[:, matrix.shape[1] - 16 + 2 * 4 + 1]
    assert in_caption(caption(two, 0, 0)) == pytest.approx([float(column[:16].max())], rel=0.06)
    assert "not kept" in caption(two, 0, 1)
    assert "Who looks at the reference's cell in row 2, column 1" in two.text("#said")
    words = two.js("[...document.querySelectorAll('#attention .words')[0].children].map(x => x.textContent)")
    assert words[3:8] == ["make", " the", " circle", "␣", "红"] and words[1].startswith("picture 1")
    two.click("#attention .words button:nth-child(8)")
    column = matrix[:, 16 + 7]
    assert in_caption(caption(two, 0, 0)) == pytest.approx([float(column[:16].max())], rel=0.06)
    assert "Who looks at “红”" in two.text("#said")
    assert two.js("document.querySelectorAll('.words button[aria-pressed=true]').length") == 2  # in both runs
    two.choose("#direction", "to")
    assert "Where “红” looks" in two.text("#said")
    two.click("#attention .words button:nth-child(6)")  # " circle", which the second prompt does not have
    assert "no word “ circle”" in two.js("document.querySelectorAll('#attention .readout')[1].textContent")


def test_steps_branches_and_both_runs_in_step(two, folder):
    data = data_of(folder / "two.html")["runs"]
    for step in (3, 0):
        two.choose("#step", f"{step}")
        shown = two.js("[...document.querySelectorAll('#steps img')].map(image => image.getAttribute('src'))")
        wanted = [[*run["steps"][step]["pictures"].values(), run["result"]] for run in data]
        assert shown == [*wanted[0], *wanted[1]]
        sigma = data[0]["steps"][step]["sigma"]
        assert two.text("#sigma") == f"{step} of 0 to 3, σ {sigma:.3f}"
    before = caption(two, 0, 0)
    two.choose("#branch", "uncond")
    row = shares(folder / "two.html", 0, "uncond", 0, 3)[2 * 4 + 2]
    assert in_caption(caption(two, 0, 0)) == pytest.approx(
        [float(row[:16].sum()), float(row[:16].max())], rel=0.06
    )
    assert caption(two, 0, 0) != before
    assert "circle" not in two.text("#attention .words")


def test_sizes_of_writes(two, folder):
    first, second = (run["writes"]["cond"][1] for run in data_of(folder / "two.html")["runs"])
    two.choose("#step", "1")
    two.choose("#block", "2")
    said = two.js("[...document.querySelectorAll('#writes .readout')].map(one => one.textContent)")
    for text, sizes in zip(said, (first[2], second[2]), strict=True):
        assert text.startswith("Step 1, block 2: ")
        got = [float(x) for x in re.findall(r"(?:stream|and|,) (\d+\.?\d*)", text.partition(":")[2])]
        assert got == pytest.approx(sizes, rel=0.006)
    assert second[2][0] == 0 < first[2][0]
    two.click("#writes svg", x=(40 + 350 * 5 / 5) / 400, y=0.5)  # the last block, at the right
    assert two.js("document.getElementById('block').value") == "5"
    assert "block 5" in two.text("#said") and "block 5" in two.text("#writes .readout")


def test_guidance(two, folder):
    run = data_of(folder / "two.html")["runs"][0]
    two.choose("#step", "2")
    ratio = run["steps"][2]["ratio"]
    values = ratio["low"] + (ratio["high"] - ratio["low"]) * numbers(ratio["codes"], torch.uint8, -1) / 255
    two.click(canvas(0, 0), x=0.1, y=0.6)  # row 2, column 0
    text = two.text("#ratio figcaption")
    got = [float(x) for x in re.findall(r"\d+\.?\d*", text)]
    assert got[:4] == pytest.approx(
        [ratio["low"], ratio["high"], float(values.mean()), float(values[8])], rel=0.006
    )


def test_the_keyboard_alone(two):
    two.js("document.activeElement.blur()")
    start = two.text("#sigma")
    two.key("ArrowRight")
    assert two.text("#sigma") != start
    two.key("ArrowLeft")
    assert two.text("#sigma") == start
    two.key("]")
    assert two.js("document.getElementById('block').value") == "4"
    two.key("b")
    assert two.js("document.getElementById('branch').value") == "uncond"
    two.key("h")
    assert two.js("document.getElementById('head').value") == "0"
    two.key("d")
    assert two.text("#said").startswith("Who looks at the target's cell in row 2, column 2")
    two.js(f"document.querySelector({canvas(0, 0)!r}).focus()")
    two.key("ArrowUp")
    two.key("ArrowRight")
    assert "row 1, column 3" in two.text("#said") and two.text("#sigma") == start
    for _ in range(5):
        two.key("ArrowUp")
    assert "row 0, column 3" in two.text("#said")
    two.js("document.getElementById('theme').focus()")
    seen = []
    for _ in range(12):
        two.key("Tab")
        seen.append(
            two.js(
                "(() => { const e = document.activeElement; return [e.id, getComputedStyle(e).outlineStyle, "
                "e.getAttribute('aria-label') || (e.closest('label') || e).textContent]; })()"
            )
        )
    assert [name for name, _, _ in seen][:5] == ["step", "branch", "block", "head", "direction"]
    assert all(outline != "none" and label.strip() for _, outline, label in seen)


def test_light_and_dark(browser, folder):
    def colours():
        return browser.js(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )

    browser.open(folder / "one.html", dark=False)
    light = colours()
    browser.click("#theme")
    dark = colours()
    browser.open(folder / "one.html", dark=True)
    assert colours() == dark != light
    browser.key("t")
    assert colours() == light
    for background, ink in (light, dark):
        levels = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (background, ink)]
        assert abs(levels[0] - levels[1]) > 0.7


@pytest.mark.parametrize("width", [360, 800, 1800])
def test_windows_of_every_width(browser, folder, width):
    """Nothing is cut off or needs scrolling sideways."""
    for name in ("one.html", "two.html"):
        browser.open(folder / name, width=width)
        assert browser.js("document.documentElement.scrollWidth") <= width
        beyond = browser.js(
            "[...document.querySelectorAll('main *, header *, #bar *')].filter(e => "
            f"e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert beyond == []


def test_two_runs_that_have_little_in_common(browser, folder):
    """They are compared at the same sigma, and at the same place of the picture."""
    browser.errors.clear()
    browser.open(folder / "unlike.html")
    data = data_of(folder / "unlike.html")["runs"]
    for step in range(4):
        browser.choose("#step", f"{step}")
        sigmas = [abs(one["sigma"] - data[0]["steps"][step]["sigma"]) for one in data[1]["steps"]]
        wanted = data[1]["steps"][sigmas.index(min(sigmas))]["pictures"]["x0"]
        assert browser.js("document.querySelectorAll('#steps .other img')[1].getAttribute('src')") == wanted
    browser.click(canvas(0, 0), x=0.9, y=0.9)
    said = browser.js("[...document.querySelectorAll('#attention .readout')].map(one => one.textContent)")
    assert "row 3, column 3" in said[0] and "row 2, column 5" in said[1]
    browser.choose("#branch", "uncond")
    said = browser.js("[...document.querySelectorAll('#attention .readout')].map(one => one.textContent)")
    assert "row 3, column 3" in said[0] and said[1] == "This run has no prediction of this branch."
    assert "unguided" in browser.js("document.querySelector('#ratio .other').textContent")
    assert browser.errors == []


def test_a_run_from_text_alone(browser, folder):
    browser.errors.clear()
    browser.open(folder / "one.html")
    assert browser.js("document.querySelectorAll('#attention canvas').length") == 1
    assert browser.js("document.querySelectorAll('#steps img').length") == 3  # latents, x0, the result
    assert browser.js("document.getElementById('guidance')") is None
    assert browser.js("document.getElementById('branch').disabled")
    ratio = browser.js(
        "(() => { const c = document.querySelector('#attention canvas'); return c.height / c.width; })()"
    )
    assert math.isclose(ratio, 48 / 80, rel_tol=0.01)
    assert browser.errors == []
