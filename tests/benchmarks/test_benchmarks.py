"""The benchmarks' own arithmetic and tables; and the smallest comparison, run for real."""

import argparse
import dataclasses
import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import nn

import benchmarks.__main__ as program
from benchmarks import block_profile, cases, report, sides, transformer
from benchmarks.cases import CASES
from benchmarks.files import OFFICIAL, mini_folder, write_component
from benchmarks.frame import Case, Comparison, Reading, Setting
from benchmarks.products import floor_of, products_of
from benchmarks.transformer import call_of
from qwenedit.weights.loading import load_network
from tests.properties.test_vae import config
from tests.support import assert_close

MACHINE = {"device": "a CPU", "threads": 1}


def comparison(ours, reference, *, case="edit", point=1.0, peaks=(0, 0), difference=None, floors=((), ())):
    row = CASES[case].row(point)
    sides = zip((ours, reference), peaks, floors, strict=True)
    readings = [Reading(tuple(seconds), peak, tuple(floor)) for seconds, peak, floor in sides]
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
    goals = "time ≥ 3: **not reached**; memory ≥ 2: reached"
    assert (
        f"| VAE decode, full size, 512 px | 2.00 (2.00–2.00) | {goals} | 1.05 | 2.1 | 4.00 | 64 | 256 |  "
        "| 1.0e-06 |" in text
    )
    assert "| whole edit at guidance, 4 (1 is off) | 1.00 (1.00–1.00) |  | 2 | 2 |  | 0 | 0 |  |  |" in text
    assert "1 of 2 goals are reached. Not reached: VAE decode, full size, 512 px (time ≥ 3)." in text
    assert "| guidance on / off, time | 2.00 | 1.33 |" in text
    assert "| whole edit: time ~ steps^k | 1.00 | 0.58 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 + 2 + 2
    assert "growth" not in report.markdown(CASES, measured()[:1], MACHINE, 5)


def test_goals_are_of_points_and_need_figures():
    def goals(**options):
        return report.goals_of(CASES, comparison([1.0], [1.06], **options))

    assert goals(case="block", point=1024) == [("time ≥ 1.05", True)]
    assert goals(case="decode", point=256) == goals(case="steps", point=4) == []
    sizes = (100 << 20, 149 << 20)
    assert goals(case="load", peaks=sizes) == [("time ≥ 1", True), ("memory ≥ 1.5", False)]
    assert goals(case="load")[1] == ("memory ≥ 1.5", False)  # nobody can tell
    text = report.markdown(CASES, [comparison([1.0], [2.5])], MACHINE, 1)
    assert "1 of 1 goals are reached.\n" in text


def test_the_share_of_the_matrix_products_is_the_median_over_rounds():
    floors = ((1.0, 1.0, 9.0), (1.5, 1.5, 1.5))
    one = comparison((2.0, 4.0, 10.0), (2.0, 3.0, 4.0), case="block", point=256, floors=floors)
    assert report.share(one.ours) == 0.5 and report.share(comparison([1], [1]).ours) is None
    assert "| 50%, 50% |" in report.markdown(CASES, [one], MACHINE, 3)


def test_the_document_holds_every_reading():
    rows = json.loads(json.dumps(report.document(measured(), MACHINE, 5)))
    assert rows["machine"] == MACHINE and len(rows["comparisons"]) == 5
    assert rows["comparisons"][0]["ours"] == {"seconds": [1, 1.1], "peak": 64 << 20, "floors": []}


def test_the_plot_draws_the_ratios():
    page = report.plot(measured())
    bars = {colour: [x for x in range(page.width) if page.getpixel((x, report.MARGIN + y)) == colour]
            for colour, y in ((report.TIME, 4), (report.MEMORY, 14))}  # fmt: skip
    lengths = {colour: len(columns) for colour, columns in bars.items()}
    assert lengths[report.MEMORY] == pytest.approx(
        2 * lengths[report.TIME], abs=3
    )  # of 4 and of 2, in octaves
    assert min(bars[report.TIME]) == min(bars[report.MEMORY]) > report.LABEL


def test_growth_is_drawn_for_the_cases_that_grow():
    assert report.growth_plot(CASES, measured()[:3]) is None
    areas = [comparison([n], [2.0 * n**1.5], case="area", point=n) for n in (4096.0, 16384.0)]
    page = report.growth_plot(CASES, measured() + areas)
    assert page.size == (2 * report.PANEL[0], report.PANEL[1])
    for panel in range(2):
        box = (panel * report.PANEL[0], 60, (panel + 1) * report.PANEL[0], report.PANEL[1])
        colours = {colour for _, colour in page.crop(box).getcolors(1 << 20)}
        assert {report.TIME, report.REFERENCE} <= colours


def test_every_case_finds_its_files_and_has_a_tolerance():
    assert set(CASES) >= {"import", "load", "encode", "decode", "text", "block", "edit", "guidance"}
    for name, case in CASES.items():
        dtypes = {"bfloat16"} if case.needs else {"float32", "bfloat16"}
        assert case.name == name and set(case.tolerance) == dtypes
        assert set(case.goals) <= {*case.points, *case.accelerator_points}
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


# 2 heads of 24 in place of 24 of 128
NARROW = dict(attention_head_dim=24, num_attention_heads=2, axes_dims_rope=(4, 8, 12))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    config = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2, **OFFICIAL, **NARROW}
    write_component(folder, "transformer", config)
    return Setting("cpu", "float32", 1, folder)


@pytest.mark.parametrize("name", ["block", "last-block"])
@torch.no_grad()
def test_both_sides_of_a_block_compute_the_same(narrow, name):
    ours, reference = CASES[name].ours(narrow)(9), CASES[name].reference(narrow)(9)
    got, wanted = ours(), reference()
    assert got.shape == (1, 9 if name == "last-block" else 18, 48)
    assert_close(got, wanted, 1e-5)
    assert torch.equal(ours(), got)
    products, theirs = products_of(ours), products_of(reference)
    J = 18 + transformer.TEXT_LENGTH
    assert products[(J, 24, J)] == (0 if name == "last-block" else 2) and theirs[(J, 24, J)] == 2
    assert products[(9, 24, J)] == (2 if name == "last-block" else 0)
    modulation = {(1, 48, 6 * 48): 2}
    if name == "block":  # once a step, not in the block
        assert products == theirs - Counter(modulation)


@torch.no_grad()
def test_a_step_of_all_blocks_is_the_same_on_both_sides(tmp_path):
    setting = Setting("cpu", "float32", 1, tmp_path)
    sizes = {"num_layers": 3, "joint_attention_dim": 20, **NARROW}
    ours, reference = (make(False, **sizes) for make in (transformer.step_ours, transformer.step_reference))
    got, wanted = ours(setting)(16)(), reference(setting)(16)()
    assert got.shape == (2, 16, 64) and got.std() > 0.1
    assert_close(got, wanted, 1e-5)


def test_the_products_of_a_call_and_their_time():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    layer = nn.Linear(5, 7)
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 11, 8)

    @torch.no_grad()
    def call():
        return a @ b, layer(a), nn.functional.scaled_dot_product_attention(q, k, k), a * 2

    wanted = Counter({(4, 5, 6): 3, (12, 5, 7): 1, (9, 8, 11): 4, (9, 11, 8): 4})
    assert products_of(call) == wanted
    assert floor_of(call, "cpu", torch.float32)() > 0


def test_the_kinds_of_a_blocks_operations():
    call = torch.no_grad()(lambda: nn.functional.gelu(torch.cat([x @ x, x]) + 1, approximate="tanh"))
    x = torch.randn(50, 50)
    spent = block_profile.profiled(call, "cpu")
    assert {kind for kind, ms in spent.items() if ms > 0} == {
        "matrix products", "GELU", "elementwise", "copies"
    }  # fmt: skip
    names = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::addmm": "matrix products",
        "aten::gelu": "GELU", "aten::native_layer_norm": "norms", "aten::mul": "elementwise",
    }  # fmt: skip
    assert {name: block_profile.kind_of(name) for name in names} == names
    text = block_profile.table_of(
        {"ours": [Counter({"GELU": 1.0, "norms": 3.0})], "reference": [Counter(GELU=2.0)]}
    )
    assert "| GELU | 1.0 | 25.0% | 2.0 | 100.0% |" in text and "| all | 4.0 | 100.0% | 2.0 | 100.0% |" in text


class Fake:
    """A side that takes no time."""

    alive: ClassVar[list[str]] = []

    def __init__(self, _case, side, _setting):
        self.side, self.value = side, 1.0 if side == "ours" else 1.5
        self.alive.append(side)

    def peak(self, _point, save):
        torch.save(torch.full((2, 2), self.value), save)
        return 7

    def time(self, _point):
        return 0.5

    def floor(self, _point):
        return 0.25 if self.side == "ours" else 0.125

    def close(self):
        self.alive.remove(self.side)


def test_outputs_that_disagree_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sides, "Side", Fake)
    setting = Setting("cpu", "float32", 1, tmp_path)

    def case(tolerance, **options):
        return Case(
            "edit", "x", cases.load_ours, cases.load_ours, tolerance={"float32": tolerance}, **options
        )

    with pytest.raises(
        RuntimeError, match=r"x: the outputs differ by 0.33 of the largest value, wanted at most 0.1"
    ):
        sides.compare(case(0.1), setting, 2)
    (seen,) = sides.compare(case(0.4), setting, 3)
    assert seen.difference == pytest.approx(1 / 3) and seen.ours == Reading((0.5,) * 3, 7)
    assert Fake.alive == []
    (again,) = sides.compare(case(0.4, products=True), setting, 2)
    assert (again.ours.floors, again.reference.floors) == ((0.25,) * 2, (0.125,) * 2)


def test_a_fresh_case_has_new_processes_in_every_round(monkeypatch, tmp_path):
    first: list[str] = []

    class Timed(Fake):
        started = 0

        def __init__(self, *options):
            super().__init__(*options)
            Timed.started += 1
            self.number = Timed.started

        def time(self, point):
            first.append(self.side)
            return point * self.number

    monkeypatch.setattr(sides, "Side", Timed)
    setting = Setting("cpu", "float32", 1, tmp_path)
    case = Case(
        "edit", "x", cases.load_ours, cases.load_ours, points=(1, 10), tolerance={"float32": 0.4},
        products=True, fresh=True,
    )  # fmt: skip
    one, ten = sides.compare(case, setting, 3)
    assert (one.point, one.ours.seconds, one.reference.seconds) == (1, (1, 3, 5), (2, 4, 6))
    assert (ten.point, ten.ours.seconds, ten.reference.seconds) == (10, (10, 30, 50), (20, 40, 60))
    assert one.ours == Reading((1, 3, 5), 7, (0.25,) * 3) and ten.difference == pytest.approx(1 / 3)
    assert first[::4] == ["reference", "ours", "reference"] and Fake.alive == []


def test_sides_that_are_too_large_together_run_one_after_the_other(monkeypatch, tmp_path):
    class Alone(Fake):
        def time(self, _point):
            assert self.alive == [self.side]
            return 0.5

    monkeypatch.setattr(sides, "Side", Alone)
    setting = Setting("cpu", "float32", 1, tmp_path)
    apart = Case("edit", "x", cases.load_ours, cases.load_ours, tolerance={"float32": 0.4}, apart=True)
    (seen,) = sides.compare(apart, setting, 2)
    assert seen.difference == pytest.approx(1 / 3) and seen.reference == Reading((0.5,) * 2, 7)
    with pytest.raises(RuntimeError, match=r"differ by 0\.33"):
        sides.compare(dataclasses.replace(apart, tolerance={"float32": 0.1}), setting, 2)


def test_a_case_without_its_device_is_skipped_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(program, "compare", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(
        program, "setting_of", lambda threads, folder, _device: Setting("cpu", "float32", threads, folder)
    )
    program.main(["--only", "full", "--only", "full-compiled"])
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "full: skipped, it needs cuda", "full-compiled: skipped, it needs cuda"
    ]  # fmt: skip


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
    assert 0 <= row["difference"] <= 1e-4
    assert Image.open(tmp_path / "speed.png").width > 500
    assert not (tmp_path / "growth.png").exists()  # one point does not grow


@pytest.mark.parametrize(
    "name",
    [
        "activations", "block_profile", "dialects", "inversion", "masks", "methods", "mini", "samplers",
        "savings", "__main__",
    ],
)  # fmt: skip
def test_a_wrong_out_is_told_before_the_work(name, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", [name, "--out", str(file)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stopped.value.code == 2 and str(file) in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_for_results_is_made_and_one_of_a_page_has_to_have_it(tmp_path):
    made = report.out_folder(str(tmp_path / "a" / "b"))
    assert made.is_dir()
    with pytest.raises(argparse.ArgumentTypeError, match=r"no methods\.md"):
        report.out_folder(str(made), renews="methods.md")
    (made / "methods.md").touch()
    assert report.out_folder(str(made), renews="methods.md") == made


def test_parts_of_a_page_are_renewed_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\nc\n")
    report.renew(page, {"two": r"\1 | x", "one": "new"})
    assert page.read_text() == (
        "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\n\\1 | x\n<!-- end -->\nc\n"
    )
    before = page.read_text()
    with pytest.raises(ValueError, match="<!-- three -->"):
        report.renew(page, {"one": "newer", "three": "x"})
    assert page.read_text() == before
