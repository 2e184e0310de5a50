"""Sweeps by the embedded model: results are those of single edits, work is shared, a stopped one goes on."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

import qwenedit
from qwenedit import mini
from qwenedit.ablation import runs
from qwenedit.ablation import sweep as module
from qwenedit.ablation.metrics import distances, source_distances
from qwenedit.ablation.runs import runs_of
from qwenedit.ablation.spec import read_spec
from qwenedit.ablation.statistics import estimates
from qwenedit.ablation.sweep import ablate
from qwenedit.cli import options as cli
from qwenedit.inputs.pictures import to_pil
from qwenedit.mini.oracle import judge
from qwenedit.pipeline import QwenImageEdit
from qwenedit.shards import only_one
from qwenedit.switches import Switches
from qwenedit.taps import taps
from qwenedit.weights.checkpoints import fingerprint
from tests.tiny import checkpoint, embedded_plus

ROOT = Path(__file__).parents[2]
PROMPT = "make the circle red"
SPEC = {
    "pictures": ["mini:0", str(mini.EXAMPLE)],
    "prompts": [PROMPT],
    "seeds": [0, 1],
    "steps": 2,
    "grid": {"references.latents": ["concatenated", "left_out"], "true_cfg_scale": [1, 4]},
}
SMALL = {"pictures": ["mini:0"], "steps": 1, "grid": {"true_cfg_scale": [1, 2]}}  # 3 edits


def run(spec, folder, **options):
    return ablate(spec, folder, device="cpu", progress=False, **options)


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def same(picture, other):
    return ImageChops.difference(picture, other).getbbox() is None


@contextlib.contextmanager
def edits_counted(monkeypatch, *, fail=lambda step_options: None):
    """The calls of `steps`; `fail` may raise in them."""
    calls, steps = [], QwenImageEdit.steps

    def counted(self, conditioning, **options):
        calls.append(options)
        fail(options)
        return steps(self, conditioning, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QwenImageEdit, "steps", counted)
        yield calls


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return run(SPEC, tmp_path_factory.mktemp("sweep") / "new" / "folder")


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def test_only_who_asks_for_sweeps_imports_them():
    code = """
import sys, qwenedit
assert not [name for name in sys.modules if name.startswith(("qwenedit.ablation.sweep", "qwenedit.mini."))]
assert qwenedit.ablate is sys.modules["qwenedit.ablation.sweep"].ablate
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert qwenedit.ablate is ablate
    with pytest.raises(AttributeError, match="has no attribute 'ablte'"):
        _ = qwenedit.ablte


def test_every_picture_is_that_of_a_single_edit(swept, pipe):
    picture, pipe.progress = Image.open(mini.EXAMPLE), False
    for (case, j, k), record in swept.records.items():
        if case == 0:
            continue
        cell, got = swept.spec.cells[k], Image.open(swept.folder / record["file"])
        options = {"num_inference_steps": 2, "true_cfg_scale": cell.true_cfg_scale}
        seed = torch.Generator().manual_seed(swept.spec.seeds[j])
        conditioning = pipe.condition(picture, PROMPT, switches=cell.switches)
        with torch.no_grad():
            *_, last = pipe.steps(conditioning, generator=seed, switches=cell.switches, **options)
        assert same(got, to_pil(pipe.decode(last.after, conditioning.target_grid))[0])
        if cell.switches == Switches():
            seed.manual_seed(swept.spec.seeds[j])
            assert same(got, pipe.edit(picture, PROMPT, generator=seed, **options).images[0])
    assert len({(swept.folder / record["file"]).read_bytes() for record in swept.records.values()}) == 16


def test_a_line_has_everything_that_a_run_was(swept):
    found = lines(swept.folder)
    assert len(found) == 16 == len({record["key"] for record in found}) and not swept.failed
    assert found == list(swept.records.values())
    record = swept.records[1, 1, 2]
    assert swept.spec.cells[2].values == {"references.latents": "left_out", "true_cfg_scale": 1.0}
    wanted = {
        "status": "done", "model": "the embedded model", "fingerprint": fingerprint(mini.CHECKPOINT),
        "picture": str(mini.EXAMPLE), "prompt": PROMPT, "negative_prompt": " ", "seed": 1, "steps": 2,
        "true_cfg_scale": 1.0, "switches": {"references.latents": "left_out"}, "height": None, "width": None,
        "qwenedit": qwenedit.__version__, "torch": torch.__version__, "dtype": "float32", "device": "cpu",
        "threads": torch.get_num_threads(), "baseline": swept.records[1, 1, 0]["key"],
    }  # fmt: skip
    assert {name: record[name] for name in wanted} == wanted
    assert record["commit"] is None or len(record["commit"].removesuffix("-dirty")) == 40
    assert set(record["seconds"]) == {"encode", "sample", "decode"} and min(record["seconds"].values()) >= 0
    assert len(record["curves"]["sigma"]) == len(record["curves"]["velocity"]) == 2
    assert record["curves"]["norm_ratio"]["mean"] == [None, None]
    assert all(x > 0 for x in swept.records[1, 1, 0]["curves"]["norm_ratio"]["min"])


def test_metrics_are_those_of_the_files(swept):
    for (case, j, k), record in swept.records.items():
        picture = Image.open(swept.folder / record["file"])
        plain = Image.open(swept.folder / swept.records[case, j, 0]["file"])
        wanted = source_distances(picture, swept.spec.cases[case].pictures[0])
        wanted |= distances(picture, plain) if k else {"psnr": None, "ssim": None, "changed": None}
        if case == 0:
            verdict = judge(swept.spec.cases[0].scene, swept.spec.cases[0].request, picture)
            wanted |= {name: getattr(verdict, name) for name in ("success", "strict", "preserved", "reason")}
        assert record["metrics"] == wanted
    assert swept.records[0, 0, 0]["baseline"] is None and swept.records[0, 0, 1]["metrics"]["psnr"] < 100
    for case in range(2):  # two seeds are one pair
        first, second = (swept.records[case, j, 0] for j in range(2))
        between = distances(*(Image.open(swept.folder / one["file"]) for one in (first, second)))
        assert first["floor"] == {"key": second["key"], **between} and "floor" not in second


def test_the_table_has_every_run(swept):
    with (swept.folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    for row, ((_, _, k), record) in zip(rows, swept.records.items(), strict=True):
        assert row["key"] == record["key"] and row["psnr"] == (
            "" if k == 0 else str(record["metrics"]["psnr"])
        )
        assert float(row["source_psnr"]) == record["metrics"]["source_psnr"]
        assert row["references.latents"] == swept.spec.cells[k].values["references.latents"]
        assert float(row["true_cfg_scale"]) == record["true_cfg_scale"]
        success = record["metrics"].get("success")
        assert row["success"] == ("" if success is None else str(int(success)))


def test_what_is_encoded_alike_is_encoded_once(tmp_path, monkeypatch):
    encoded, condition = [], QwenImageEdit.condition

    def counted(self, image, prompt, *, negative_prompt=" ", **options):
        encoded.append((image.tobytes(), prompt, negative_prompt))
        return condition(self, image, prompt, negative_prompt=negative_prompt, **options)

    monkeypatch.setattr(QwenImageEdit, "condition", counted)
    grid = {"negative_prompt": [" ", "red"], "guidance.norm": ["reference", "none"]}
    swept = run({"pictures": ["mini:0", "mini:1"], "seeds": [0, 1], "steps": 1, "grid": grid}, tmp_path)
    assert len(swept.records) == 16 and len(encoded) == 4 == len(set(encoded))


def test_nothing_is_run_twice(swept, monkeypatch):
    before = (swept.folder / "results.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))
        again = run(SPEC, swept.folder)
    assert again.records == swept.records and (swept.folder / "results.jsonl").read_bytes() == before


def test_a_lost_picture_and_a_line_that_was_cut_off_are_made_again(tmp_path, monkeypatch):
    first = run(SMALL, tmp_path)
    results = tmp_path / "results.jsonl"
    (tmp_path / first.records[0, 0, 1]["file"]).unlink()
    results.write_bytes(results.read_bytes()[:-40])  # of the third
    with edits_counted(monkeypatch) as calls:
        second = run(SMALL, tmp_path)
    assert len(calls) == 2 and len(lines(tmp_path)) == 3
    untimed = [
        [{**record, "seconds": 0, "at": 0} for record in one.records.values()] for one in (first, second)
    ]
    assert untimed[0] == untimed[1]


def test_a_stopped_sweep_loses_at_most_the_edit_that_it_was_at(tmp_path, monkeypatch):
    def stop(_options, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with edits_counted(monkeypatch, fail=stop), pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path)
    assert len(lines(tmp_path)) == 2 and all("psnr" in record["metrics"] for record in lines(tmp_path))
    with edits_counted(monkeypatch) as calls:
        assert len(run(SMALL, tmp_path).records) == 3
    assert len(calls) == 1 and len(lines(tmp_path)) == 3


def test_a_grown_spec_runs_what_is_new_and_compares_with_its_own_unablated_run(tmp_path, monkeypatch):
    run(SMALL, tmp_path)
    with edits_counted(monkeypatch) as calls:
        grown = run({**SMALL, "seeds": [0, 5]}, tmp_path)
    assert len(calls) == 3 and len(lines(tmp_path)) == 6 == len(grown.records)
    with edits_counted(monkeypatch) as calls:
        other = run({**SMALL, "true_cfg_scale": 2}, tmp_path)  # both of its runs are there
    assert not calls and len(other.records) == 2 and len(lines(tmp_path)) == 6
    record = other.records[0, 0, 1]
    assert record["true_cfg_scale"] == 1 and record["baseline"] == other.records[0, 0, 0]["key"]
    files = [Image.open(tmp_path / other.records[0, 0, k]["file"]) for k in (1, 0)]
    assert record["metrics"]["psnr"] == distances(*files)["psnr"]
    assert record in lines(tmp_path)


def test_the_key_is_of_everything_that_makes_a_difference(tmp_path, monkeypatch):
    base = {"pictures": [str(mini.EXAMPLE)], "prompts": ["x"], "steps": 1}
    turned = tmp_path / "turned.png"
    Image.open(mini.EXAMPLE).rotate(90).save(turned)

    def key(changes, *, model="m", device="cpu", dtype=None):
        (one,) = runs_of(read_spec({**base, **changes}), model, torch.device(device), dtype)
        return one.key

    keys = [
        key({}), key({"prompts": ["y"]}), key({"steps": 2}), key({"seeds": [1]}), key({"height": 32}),
        key({"width": 32}), key({"true_cfg_scale": 2}), key({"negative_prompt": "red"}), key({}, model="n"),
        key({"pictures": [str(turned)]}), key({}, device="meta"), key({}, dtype=torch.float64),
    ]  # fmt: skip
    monkeypatch.setattr(runs, "__version__", "0.0.0")
    keys.append(key({}))
    assert len(set(keys)) == len(keys) and key({}) == keys[-1]


def test_a_fingerprint_is_of_weights_and_configs(tmp_path):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "copy")
    found = [fingerprint(mini.CHECKPOINT)]
    assert fingerprint(folder) == found[0]
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    found.append(fingerprint(folder))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    found.append(fingerprint(folder))
    assert len(set(found)) == 3


def test_a_failed_edit_is_recorded_and_tried_again_next_time(tmp_path, monkeypatch):
    def fail(options):
        if options["true_cfg_scale"] == 1:
            raise RuntimeError("out of <memory>")

    with edits_counted(monkeypatch, fail=fail):
        swept = run(SMALL, tmp_path)
    (record,) = swept.failed
    assert record["error"] == "RuntimeError: out of <memory>" and record["true_cfg_scale"] == 1
    assert [record["status"] for record in lines(tmp_path)] == ["done", "failed", "done"]
    assert "RuntimeError: out of &lt;memory&gt;" in (tmp_path / "report.html").read_text()
    assert estimates(swept, 1)["psnr"].n == 0 and estimates(swept, 2)["psnr"].value < 100
    with edits_counted(monkeypatch) as calls:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run(SMALL, tmp_path)
        assert [record["status"] for record in lines(tmp_path)] == ["done"] * 3  # still a line a run
        assert not run(SMALL, tmp_path).failed
    assert len(calls) == 1 and [record["status"] for record in lines(tmp_path)] == ["done"] * 3


def test_without_its_unablated_run_a_run_is_compared_later(tmp_path, monkeypatch):
    def fail(options):
        if options["true_cfg_scale"] == 4:
            raise RuntimeError

    with edits_counted(monkeypatch, fail=fail):
        swept = run(SMALL, tmp_path)
    assert [record["status"] for record in lines(tmp_path)] == ["failed", "done", "done"]
    assert swept.records[0, 0, 1]["metrics"]["psnr"] is None
    with edits_counted(monkeypatch) as calls:
        swept = run(SMALL, tmp_path)
    assert len(calls) == 1 and swept.records[0, 0, 1]["metrics"]["psnr"] < 100


def test_a_picture_that_cannot_be_encoded_fails_alone(tmp_path, monkeypatch):
    condition = QwenImageEdit.condition

    def fail(self, image, prompt, **options):
        if prompt == "y":
            raise RuntimeError("no")
        return condition(self, image, prompt, **options)

    monkeypatch.setattr(QwenImageEdit, "condition", fail)
    spec = {"pictures": [str(mini.EXAMPLE)], "prompts": ["y", "x"], "pairing": "all", "steps": 1}
    swept = run(spec, tmp_path)
    assert [record["status"] for record in swept.records.values()] == ["failed", "done"]


def test_settings_that_come_to_the_same_are_run_once(tmp_path, monkeypatch):
    """Two names of a value, or a switch that is off either way."""
    flat = Switches.from_flat

    def alike(values):
        return flat({name: "none" if value == "also none" else value for name, value in values.items()})

    monkeypatch.setattr(Switches, "from_flat", alike)
    spec = {**SMALL, "grid": {"guidance.norm": ["none", "also none"]}}
    with edits_counted(monkeypatch) as calls:
        swept = run(spec, tmp_path)
    assert len(calls) == len(swept.records) == len(lines(tmp_path)) == 2


def test_attention_is_mapped_once_for_each_cell(tmp_path, pipe, monkeypatch):
    """Asked for afterwards, it is made of those runs alone; the pictures stay the same."""
    spec = {**SPEC, "grid": {"references.latents": ["concatenated", "left_out"]}}
    without = run(spec, tmp_path)
    pictures = {at: (tmp_path / record["file"]).read_bytes() for at, record in without.records.items()}
    with edits_counted(monkeypatch) as calls:
        swept = run({**spec, "attention": True}, tmp_path)
    assert len(calls) == 2
    mapped = {at: record["attention"] for at, record in swept.records.items() if "attention" in record}
    assert list(mapped) == [(0, 0, 0), (0, 0, 1)]
    assert pictures == {at: (tmp_path / record["file"]).read_bytes() for at, record in swept.records.items()}
    for at, shares in mapped.items():
        table = torch.tensor([shares[name] for name in ("text", "target", "references")])
        assert table.shape == (3, 6, 2)  # groups, blocks, steps
        assert (table.sum(0) - 1).abs().max() < 1e-3
        assert bool((table[2] == 0).all()) == (at[2] == 1)
    assert "to references" in (tmp_path / "report.html").read_text()

    case, seen = swept.spec.cases[0], []
    with (
        torch.no_grad(),
        taps(pipe.mmdit, {"blocks.4.attn.probs": lambda p, site: seen.append((site.labels, p))}),
    ):
        conditioning = pipe.condition(case.pictures[0], case.prompt)
        noise = torch.Generator().manual_seed(0)
        list(pipe.steps(conditioning, num_inference_steps=2, generator=noise))
    probs = [p for labels, p in seen if labels["branch"] == "cond"][1]
    length = conditioning.prompt.embeds.shape[1]
    wanted = float(probs[0, :, length : length + 16, length + 16 :].sum(-1).mean())
    assert mapped[0, 0, 0]["references"][4][1] == pytest.approx(wanted, abs=1e-3)


def test_asking_for_maps_and_stopping_loses_nothing(tmp_path, monkeypatch):
    spec = {**SMALL, "grid": {"references.latents": ["concatenated", "left_out"]}}
    run(spec, tmp_path)
    before = lines(tmp_path)
    monkeypatch.setattr(module, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run({**spec, "attention": True}, tmp_path)
    assert lines(tmp_path) == before


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with only_one(tmp_path, "sweep"):
        with pytest.raises(ValueError, match="another sweep runs in"):
            run(SMALL, tmp_path)
    run(SMALL, tmp_path)


def test_a_picture_that_is_cut_off_is_made_again(tmp_path, monkeypatch):
    swept = run(SMALL, tmp_path)
    path = tmp_path / swept.records[0, 0, 1]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with edits_counted(monkeypatch) as calls:
        run(SMALL, tmp_path)
    assert len(calls) == 1 and path.read_bytes() == whole


def test_unguided_runs_that_differ_in_guidance_alone_are_run_once(tmp_path, monkeypatch):
    spec = {**SMALL, "grid": {"guidance.norm": ["reference", "none"], "true_cfg_scale": [1, 2]}}
    with edits_counted(monkeypatch) as calls:
        swept = run(spec, tmp_path)
    assert len(swept.spec.cells) == len(calls) == 4  # unablated at 4; 2 of each norm; 1 of both


def test_an_edit_of_several_pictures(tmp_path):
    Image.open(mini.EXAMPLE).rotate(90).save(tmp_path / "turned.png")
    spec = {
        "model": str(embedded_plus()),
        "pictures": [[str(mini.EXAMPLE), str(tmp_path / "turned.png")]],
        "prompts": [PROMPT],
        "steps": 1,
        "grid": {"references.order": [[0, 1], [1, 0]]},
    }
    swept = run(spec, tmp_path / "out")
    assert not swept.failed and swept.records[0, 0, 2]["metrics"]["psnr"] < 99.9
    assert swept.records[0, 0, 1]["metrics"]["psnr"] > 99.9  # the order that it has


def test_a_deterministic_sweep_says_so_and_is_another_one(tmp_path):
    plain = run(SMALL, tmp_path)
    pinned = run({**SMALL, "deterministic": True}, tmp_path)
    assert plain.records[0, 0, 0]["deterministic"] is None
    assert pinned.records[0, 0, 0]["deterministic"]["attention"] == "MATH"
    assert plain.records[0, 0, 0]["key"] != pinned.records[0, 0, 0]["key"]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.usefixtures("no_loading")
def test_many_edits_must_be_meant(tmp_path):
    spec = {"pictures": ["mini:0", "mini:1"], "seeds": list(range(101)), "steps": 1}
    with pytest.raises(ValueError, match=r"asks for 202 edits, more than 200: pass --yes \(yes=True\)"):
        run(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        run(spec, tmp_path / "out", yes=True)


def test_edits_that_are_done_do_not_count(tmp_path, monkeypatch):
    run(SMALL, tmp_path)
    monkeypatch.setattr(module, "MOST_EDITS", 1)
    run(SMALL, tmp_path)
    with pytest.raises(ValueError, match="asks for 3 edits, more than 1"):
        run({**SMALL, "seeds": [0, 1]}, tmp_path)
    run({**SMALL, "grid": {"true_cfg_scale": [1, 2, 3]}}, tmp_path)
    assert len(lines(tmp_path)) == 4


@pytest.mark.usefixtures("no_loading")
def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/out"):
        with pytest.raises(ValueError, match=r"cannot write into .*: .*file is no folder"):
            run(SMALL, tmp_path / folder)

    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot write into .*out: \[Errno 13\] Permission denied"):
        run(SMALL, tmp_path / "deep" / "out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.usefixtures("no_loading")
def test_specs_that_do_not_fit_the_model(tmp_path):
    def refused(match, **changes):
        spec = {"pictures": [str(mini.EXAMPLE)], "prompts": ["x"], **changes}
        with pytest.raises(ValueError, match=match):
            run(spec, tmp_path / "out")

    refused("example.png: .*<|image_pad|>", prompts=["<|image_pad|>"])
    refused("<|video_pad|>", grid={"negative_prompt": ["<|video_pad|>"]})
    refused("height is 50, wanted a positive multiple of 16", height=50)
    refused("neither a local folder nor", model="nobody/nothing")
    text = shutil.copytree(mini.CHECKPOINT, tmp_path / "t2i")
    index = json.loads((text / "model_index.json").read_text())
    index["_class_name"] = "QwenImagePipeline"
    (text / "model_index.json").write_text(json.dumps(index))
    refused("makes pictures from text only", model=str(text))
    refused("only takes pictures apart into layers", model=str(checkpoint("layered")))
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        run(SMALL, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "grid, message",
    [
        ({"references.steps": [[0, 30]]}, "there are 1"),
        ({"references.blocks": [[0, 30]]}, "there are 6"),
        ({"references.order": [[1, 0]]}, r"rows have \[1\] pictures"),
        ({"time.sigmas": [[1.0, 0.5]]}, "got 2 sigmas for 1 steps"),
    ],
)
def test_switches_that_do_not_fit_the_model_or_the_run(tmp_path, grid, message):
    with pytest.raises(ValueError, match=message):
        run({**SMALL, "grid": grid}, tmp_path)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", ["report.html", "results.jsonl", "grid.png"])
def test_a_folder_in_a_files_place(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        run(SMALL, tmp_path)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"key": "x"}', '"text"'])
def test_a_results_file_of_something_else_is_left_alone(tmp_path, line):
    results = tmp_path / "results.jsonl"
    results.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"line 1 of .*results.jsonl is no result of a sweep"):
        run(SMALL, tmp_path)
    assert results.read_text() == f"{line}\n"


def test_another_model_and_dtype(tmp_path):
    folder = shutil.copytree(mini.CHECKPOINT, tmp_path / "mine")
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: x * 1.01 for name, x in tensors.items()}, file)
    ours = run({**SMALL, "grid": {}}, tmp_path / "out")
    theirs = run({**SMALL, "grid": {}, "model": str(folder)}, tmp_path / "out")
    precise = run({**SMALL, "grid": {}}, tmp_path / "out", dtype="float64")
    (a,), (b,), (c,) = (list(one.records.values()) for one in (ours, theirs, precise))
    assert a["fingerprint"] != b["fingerprint"] and b["model"] == str(folder)
    assert (a["dtype"], c["dtype"]) == ("float32", "float64") and len({x["key"] for x in (a, b, c)}) == 3


def command(*arguments):
    return cli.main([str(x) for x in ("ablate", *arguments, "--device", "cpu", "--quiet")])


@pytest.fixture
def toml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "what_if.toml").write_text(
        'pictures = ["mini:0"]\nsteps = 1\n[grid]\ntrue_cfg_scale = [1, 2]\n'
    )
    return tmp_path / "what_if.toml"


def test_the_command(toml, capsys):
    assert command(toml) == 0
    printed = capsys.readouterr()
    assert printed.out == "what_if/report.html\n" and printed.err == ""
    assert sorted(os.listdir("what_if")) == [
        "figures", "grid.png", "pictures", "pictures.tex", "report.html", "results.csv", "results.jsonl",
        "summary.csv", "summary.tex",
    ]  # fmt: skip
    assert command(toml, "-o", "elsewhere/deep") == 0
    assert capsys.readouterr().out == "elsewhere/deep/report.html\n"


def test_the_command_says_what_failed(toml, monkeypatch, capsys):
    def fail(options):
        if options["true_cfg_scale"] == 1:
            raise RuntimeError("no luck")

    with edits_counted(monkeypatch, fail=fail):
        assert command(toml) == 2
    printed = capsys.readouterr()
    assert printed.out == "what_if/report.html\n"
    assert (
        printed.err == "qwenedit: 1 of 3 edits failed, the first with RuntimeError: no luck: see the report\n"
    )


def test_the_command_when_it_is_interrupted(toml, monkeypatch, capsys):
    def stop(options):
        if options["true_cfg_scale"] == 1:
            raise KeyboardInterrupt

    with edits_counted(monkeypatch, fail=stop):
        assert command(toml) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "qwenedit: interrupted; edits that are done are kept: run it again to go on\n"
    assert command(toml) == 0


@pytest.mark.usefixtures("no_loading")
def test_the_command_refuses_in_one_line(toml, capsys):
    toml.write_text('pictures = ["mini:0"]\nstep = 1\n')
    assert command(toml) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"qwenedit: {toml}: there is no 'step'; did you mean steps?"
    toml.write_text(f'pictures = ["mini:0"]\nseeds = {list(range(201))}\n')
    assert command(toml) == 2 and "pass --yes" in capsys.readouterr().err
    assert not Path("what_if").exists()


def test_the_example_is_120_edits():
    """Of 24 settings 20 are different: without guidance its norms come to the same."""
    spec = read_spec(ROOT / "examples" / "concat_and_cfg.toml")
    assert sum(len(cell.combinations) for cell in spec.cells) == 24
    assert spec.edits == 120 and len(spec.cells) == 20 and spec.cells[0].settings["switches"] == {}
    assert spec.cells[0].values["guidance.norm"] == "reference"
