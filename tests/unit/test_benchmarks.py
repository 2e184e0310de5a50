"""The benchmarks' own arithmetic and tables; and the smallest comparison, run for real."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import benchmarks.__main__ as program
from benchmarks import cases, frame, report
from benchmarks.cases import CASES, call_of
from benchmarks.files import mini_folder, write_component
from benchmarks.frame import Case, Comparison, Reading, Setting
from qwenedit.loading import load_network
from tests.properties.test_vae import config

MACHINE = {"device": "a CPU", "threads": 1}


def comparison(ours, reference, *, case="edit", point=1.0, peaks=(0, 0), difference=None):
    row = CASES[case].row(point)
    readings = Reading(tuple(ours), peaks[0]), Reading(tuple(reference), peaks[1])
    return Comparison(case, row, point, *readings, difference)


def test_the_ratio_is_taken_round_by_round():
    slow_spell = comparison((1.0, 10.0, 1.0), (2.0, 30.0, 4.0))
    ratio = report.time_ratio(slow_spell)
    assert (ratio.middle, ratio.least, ratio.most) == (3.0, 2.0, 4.0)
    assert str(ratio) == "3.00 (2.00–4.00)"


def test_memory_has_a_ratio_where_both_sides_use_some():
    assert report.memory_ratio(comparison([1], [1], peaks=(100 << 20, 250 << 20))) == 2.5
    assert report.memory_ratio(comparison([1], [1], peaks=(1 << 20, 250 << 20))) is None
    assert report.memory_ratio(comparison([1], [1], peaks=(100 << 20, 0))) is None


@pytest.mark.parametrize("k", [-0.5, 0.0, 1.0, 1.7])
def test_the_exponent_of_a_power_law(k):
    points = [4, 8, 16, 64]
    assert report.exponent(points, [3.0 * x**k for x in points]) == pytest.approx(k, abs=1e-12)


def test_the_exponent_is_of_least_squares_on_logarithms():
    points, seconds = [1.0, 2.0, 4.0], [1.0, 3.0, 5.0]
    logs = torch.tensor([[math.log(x), 1.0] for x in points], dtype=torch.float64)
    wanted = torch.linalg.lstsq(logs, torch.tensor(seconds, dtype=torch.float64).log()[:, None]).solution[0]
    assert report.exponent(points, seconds) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize(
    ("points", "seconds"), [([1], [1]), ([2, 2], [1, 2]), ([1, 2], [0, 1]), ([0, 1], [1, 1]), ([1, 2], [1])]
)
def test_an_exponent_needs_two_points_with_logarithms(points, seconds):
    with pytest.raises(ValueError, match="wanted positive ones, two or more"):
        report.exponent(points, seconds)


def measured():
    return [
        comparison([1, 1.1], [2, 2.2], case="decode", point=512, peaks=(64 << 20, 1 << 28), difference=1e-6),
        comparison([1.0], [1.5], case="guidance", point=1),
        comparison([2.0], [2.0], case="guidance", point=4),
        *(comparison([n / 8], [n / 4 + 1], case="steps", point=n) for n in (4.0, 8.0)),
    ]  # fmt: skip


def test_the_table_has_a_row_a_comparison_and_the_growth():
    text = report.markdown(CASES, measured(), MACHINE, 5)
    assert text.startswith("device a CPU, threads 1.\n")
    assert (
        "| VAE decode, full size, 512 px | 2.00 (2.00–2.00) | 1.05 | 2.1 | 4.00 | 64 | 256 | 1.0e-06 |"
        in text
    )
    assert "| whole edit at guidance, 4 (1 is off) | 1.00 (1.00–1.00) | 2 | 2 |  | 0 | 0 |  |" in text
    assert "| guidance on / off, time | 2.00 | 1.33 |" in text
    assert "| whole edit: time ~ steps^k | 1.00 | 0.58 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 + 2 + 2
    assert "growth" not in report.markdown(CASES, measured()[:1], MACHINE, 5)


def test_the_document_holds_every_reading():
    rows = json.loads(json.dumps(report.document(measured(), MACHINE, 5)))
    assert rows["machine"] == MACHINE and len(rows["comparisons"]) == 5
    assert rows["comparisons"][0]["ours"] == {"seconds": [1, 1.1], "peak": 64 << 20}


def test_the_plot_draws_the_ratios():
    page = report.plot(measured())
    bars = {colour: [x for x in range(page.width) if page.getpixel((x, report.MARGIN + y)) == colour]
            for colour, y in ((report.TIME, 4), (report.MEMORY, 14))}  # fmt: skip
    lengths = {colour: len(columns) for colour, columns in bars.items()}
    assert lengths[report.MEMORY] == pytest.approx(
        2 * lengths[report.TIME], abs=3
    )  # of 4 and of 2, in octaves
    assert min(bars[report.TIME]) == min(bars[report.MEMORY]) > report.LABEL


def test_every_case_finds_its_files_and_has_a_tolerance():
    assert set(CASES) >= {"import", "load", "encode", "decode", "text", "block", "edit", "guidance"}
    for name, case in CASES.items():
        assert case.name == name and set(case.tolerance) == {"float32", "bfloat16"}
        assert case.points == tuple(sorted(case.points)) and (case.unit or len(case.points) == 1)


def test_the_files_are_read_by_both_sides(tmp_path):
    from diffusers import AutoencoderKLQwenImage

    sizes = dataclasses.asdict(config())
    write_component(tmp_path, "vae", {"_class_name": "AutoencoderKLQwenImage", **sizes})
    ours = load_network(tmp_path, "vae", device=torch.device("cpu"), dtype=torch.float32, progress=False)
    reference = AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    z = torch.randn((1, 2, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = ours.decode(z), reference.decode(z).sample
    assert torch.allclose(got, wanted, atol=1e-5) and wanted.std() > 0.01


def test_the_embedded_model_at_other_areas(tmp_path):
    folder = mini_folder(tmp_path, 128**2, plus=True)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImageEditPlusPipeline" and index["_qwenedit"]["vae_area"] == 128**2
    assert (folder / "vae" / "config.json").is_file()
    assert mini_folder(tmp_path, 128**2, plus=True) == folder


def test_the_call_that_a_block_gets_can_be_made_again():
    inner, after = nn.Linear(3, 3), nn.Linear(3, 3)
    after.register_forward_pre_hook(lambda *_: pytest.fail("the rest ran"))
    x = torch.randn(2, 3)
    call = call_of(inner, lambda: after(inner(2 * x)))
    assert torch.equal(call(), inner(2 * x))


def test_outputs_that_disagree_are_an_error(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, _case, side, _setting):
            self.value = 1.0 if side == "ours" else 1.5

        def run(self, _point, save=None):
            if save is not None:
                torch.save(torch.full((2, 2), self.value), save)
            return 0.5, 7

        def close(self):
            pass

    monkeypatch.setattr(frame, "Side", Fake)
    setting = Setting("cpu", "float32", 1, tmp_path)

    def case(tolerance):
        return Case("edit", "x", cases.load_ours, cases.load_ours, tolerance={"float32": tolerance})

    with pytest.raises(
        RuntimeError, match=r"x: the outputs differ by 0.33 of the largest value, wanted at most 0.1"
    ):
        frame.compare(case(0.1), setting, 2)
    (seen,) = frame.compare(case(0.4), setting, 3)
    assert seen.difference == pytest.approx(1 / 3) and seen.ours == Reading((0.5,) * 3, 7)


def test_bad_options_are_refused(capsys):
    for options in (["--only", "nothing"], ["--rounds", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit) as error:
            program.main(options)
        assert error.value.code == 2
    assert "wanted at least 1" in capsys.readouterr().err


def test_a_small_comparison_runs(tmp_path, capsys):
    program.main(["--only", "edit", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| whole edit with the embedded model, 8 steps |" in printed and "torch" in printed
    assert Path(tmp_path / "speed.md").read_text() == printed
    (row,) = json.loads((tmp_path / "speed.json").read_text())["comparisons"]
    assert len(row["ours"]["seconds"]) == len(row["reference"]["seconds"]) == 2
    assert 0 < row["difference"] <= 1e-4
    assert Image.open(tmp_path / "speed.png").width > 500
