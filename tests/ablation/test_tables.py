"""The tables as a spreadsheet and as LaTeX would read them."""

import csv
import re

import pytest

from qwenedit.ablation.statistics import compared, differences, estimates, noise_floor
from qwenedit.ablation.tables import tex, write_csv, write_picture_tex, write_summary_csv, write_summary_tex
from tests.ablation.test_report import HOSTILE, made_up


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_summary_has_every_number_with_its_n(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 1, 3)])
    write_summary_csv(sweep, tmp_path / "summary.csv")
    rows = rows_of(tmp_path / "summary.csv")
    floor = noise_floor(sweep)
    places = [(k, one) for k in range(6) for one in sweep.measures]
    seen = iter(rows)
    for k, one in places:
        mean, paired = estimates(sweep, k)[one.name], differences(sweep, k).get(one.name)
        if not mean.n and not floor[one.name].n:
            continue
        row = next(seen)
        assert (row["measure"], row["unit"], row["unablated"]) == (one.name, one.unit, str(int(k == 0)))
        assert row["compared"] == compared(sweep, k)
        for kind, wanted in (("mean", mean), ("difference", paired), ("floor", floor[one.name])):
            assert int(row[f"{kind}_n"]) == (wanted.n if wanted else 0)
            for end, value in (("", 0), ("_low", 1), ("_high", 2)):
                text = row[kind + end]
                number = wanted[value] if wanted else None
                assert (
                    text == "" if number is None else float(text) == pytest.approx(one.factor * number, 1e-5)
                )
    assert next(seen, None) is None


def test_runs_that_come_to_the_same_are_there_once(tmp_path):
    grid = {"guidance.norm": ["reference", "none", "global"], "true_cfg_scale": [1, 4]}
    sweep = made_up(tmp_path, grid=grid)
    write_csv(sweep, tmp_path / "results.csv")
    rows = rows_of(tmp_path / "results.csv")
    assert len(rows) == 4 * 4 == len({row["key"] for row in rows})
    assert [row["guidance.norm"] for row in rows[:4]] == [
        "reference",
        "reference, none, global",
        "none",
        "global",
    ]
    assert [row["psnr"] for row in rows[:2]] == ["", "31.5"] and rows[0]["source_psnr"] == "20.0"
    assert "inside_psnr" not in rows[0] and "outside_psnr" not in rows[0]  # there are no masks


class Table:
    """A LaTeX table as TeX would see it: comments cut, braces balanced, rows and cells apart."""

    def __init__(self, text):
        text = re.sub(r"(?<!\\)%.*", "", text)
        depth = 0
        for at, sign in re.findall(r"(\\.)|([{}])", text):
            depth += {"{": 1, "}": -1}.get(sign, 0)
            assert depth >= 0 and (at or sign)
        assert depth == 0
        assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
        opened = re.findall(r"\\(begin|end)\{tabular\}", text)
        assert opened == ["begin", "end"]
        self.columns = re.search(r"\\begin\{tabular\}\{([lrc]+)\}", text)[1]
        body = text[text.index("\\toprule") : text.index("\\bottomrule")]
        parts = re.sub(r"\\(toprule|midrule)", "", body).split("\\\\")
        self.rows = [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in parts if row.strip()]
        assert {len(row) for row in self.rows} == {len(self.columns)}
        unknown = set(re.findall(r"\\([a-zA-Z]+)", text)) - KNOWN
        assert not unknown, unknown


KNOWN = {
    "begin", "end", "toprule", "midrule", "bottomrule", "footnotesize", "scriptsize", "setlength",
    "tabcolsep", "parbox", "centering", "linewidth", "includegraphics", "textbackslash", "textasciicircum",
    "textless", "textgreater", "textbar", "textasciitilde",
}  # fmt: skip


def tables(path):
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"\n\n", text)
    assert all(line.startswith("%") for line in parts[0].splitlines())
    return [Table(part) for part in parts[1:]]


def test_the_summary_as_latex(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 1, 3)])
    write_summary_tex(sweep, tmp_path / "summary.tex")
    first, second = tables(tmp_path / "summary.tex")
    assert first.columns == "llrrrrrrr" and second.columns == "llrrrrr"[: len(second.columns)]
    assert first.rows[0] == [
        "references.latents", "true\\_cfg\\_scale", "PSNR", "SSIM", "changed", "PSNR, source",
        "SSIM, source", "changed, source", "$n$",
    ]  # fmt: skip
    assert first.rows[1][2:6] == ["dB", "", "\\% of pixels", "dB"]
    assert first.rows[2][:6] == ["concatenated", "4", "--", "--", "--", "20.5"]
    assert first.rows[3][:6] == ["concatenated", "1", "31.5", "0.900", "1.0", "22.0 {\\scriptsize $+1.5$}"]
    assert first.rows[4][2:6] == [
        "{\\scriptsize $[31.5, 31.5]$}", "{\\scriptsize $[0.900, 0.900]$}", "{\\scriptsize $[1.0, 1.0]$}",
        "{\\scriptsize $[+1.0, +2.0]$}",
    ]  # fmt: skip
    assert [row[-1] for row in first.rows if row[0] not in ("", "references.latents")] == [
        "4", "4", "4", "3", "4", "4", "2",
    ]  # fmt: skip
    assert first.rows[-1][0] == "noise floor"
    success = second.rows[0].index("success")
    assert second.rows[2][success] == "50.0$_{n=2}$"  # only one of the edits is judged
    text = (tmp_path / "summary.tex").read_text(encoding="utf-8")
    for k in range(6):
        assert f"% {compared(sweep, k)}\n" in text


def test_hostile_texts_stay_texts_in_latex(tmp_path):
    evil = r"\input{x} $ & % _ ^ ~ # { } \\" + "\n" + HOSTILE
    sweep = made_up(tmp_path, grid={"negative_prompt": [" ", evil]})
    for write in (write_summary_tex, write_picture_tex):
        write(sweep, tmp_path / "x.tex")
        for table in tables(tmp_path / "x.tex"):
            assert len(table.rows) > 3
    assert tex("a\nb") == "a\\textbackslash{}nb"


def test_the_pictures_as_latex(tmp_path):
    sweep = made_up(tmp_path, failed=[(0, 0, 1)])
    write_picture_tex(sweep, tmp_path / "pictures.tex")
    first, second = tables(tmp_path / "pictures.tex")
    assert (len(first.columns), len(second.columns)) == (6, 3)
    for table, cells in ((first, (0, 1, 2, 3, 4)), (second, (0, 5))):
        for row, (edit, seed) in zip(table.rows[2:], [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
            source, *files = (re.search(r"\{([^{}]*)\}$", cell) for cell in row)
            assert source[1] == f"figures/source-{edit + 1}.png"
            assert [None if one is None else one[1] for one in files] == [
                None if (edit, seed, k) == (0, 0, 1) else f"pictures/{edit}{seed}{k}.png" for k in cells
            ]
    width = float(re.search(r"width=([\d.]+)\\linewidth", (tmp_path / "pictures.tex").read_text())[1])
    assert 0.85 < 6 * width < 1  # all of the page's width
