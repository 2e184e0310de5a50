"""`qwenedit parity --against`: another tool's networks, and the entry that removes a difference."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.dialects import DIALECTS
from qwenedit.latents import Layout
from qwenedit.networks import mmdit_layers
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.parity import compare
from qwenedit.parity import oracles as parity_oracles
from qwenedit.parity.entries import Trial, removing
from qwenedit.parity.stages import Stage
from qwenedit.sampling.transformer_switches import switched_transformer
from qwenedit.switches import Switches
from qwenedit.taps import scope
from tests import oracles
from tests.parity.test_command import tiny
from tests.parity.test_mmdit import inputs
from tests.support import randomise_


@pytest.fixture
def run(tmp_path, capsys):
    def command(*arguments):
        output = tmp_path / "parity.json"
        status = cli.main([*map(str, arguments), "-o", str(output), "--device", "cpu", "--quiet"])
        printed = capsys.readouterr()
        report = None if status == 2 else json.loads(output.read_text())
        return status, printed, report

    return lambda *arguments: command("parity", *arguments)


def modules(report):
    return {row["module"].partition(".")[0].partition(" ")[0] for row in report["rows"]}


@pytest.fixture
def diffsynth():
    oracles.diffsynth("models.qwen_image_dit")


@pytest.fixture
def engine():
    oracles.diffsynth_engine("models.qwen_image.qwen2_5_vl")


@pytest.mark.usefixtures("diffsynth")
def test_the_gelu_is_named_and_the_entry_that_removes_it(run):
    status, printed, report = run("--against", "diffsynth")
    assert status == 1 and report["against"] == "diffsynth" and modules(report) == {"vae", "transformer"}
    entry = "transformer.gelu = 'sigmoid' of diffsynth"
    for row in report["rows"]:
        block = "blocks." in row["module"]
        assert row["ok"] != (block or "end to end" in row["module"])
        if block and row["dtype"] == "float32":
            assert row["first"].endswith("img_mlp.mlp_hidden") and row["removed_by"] == entry
    last = printed.out.splitlines()[-2]
    assert last.endswith(f"blocks.0.img_mlp.mlp_hidden, which {entry} removes")
    assert f"(equal under {entry})" in printed.out
    before = [(row["module"], row["max_abs"]) for row in report["rows"]]
    assert [(row["module"], row["max_abs"]) for row in run("--against", "diffsynth")[2]["rows"]] == before


@pytest.mark.usefixtures("diffsynth")
@pytest.mark.parametrize("name", ["embedded", "text-to-image", "edit plus", "2511", "layered"])
def test_with_its_gelu_no_module_differs_from_diffsynth_s(run, monkeypatch, name):
    plain = mmdit_layers.MLP.__init__

    def sigmoid(self, width):
        plain(self, width)
        self.gelu = "sigmoid"

    monkeypatch.setattr(mmdit_layers.MLP, "__init__", sigmoid)
    folder = mini.CHECKPOINT if name == "embedded" else tiny(name)
    status, printed, report = run(folder, "--against", "diffsynth")
    assert status == 0, printed.out
    assert f"no difference from diffsynth in {len(report['rows'])} comparisons" in printed.out


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", ["embedded", "text-to-image", "edit plus"])
def test_the_encoder_does_not_differ_from_the_engine_s(run, name):
    folder = mini.CHECKPOINT if name == "embedded" else tiny(name)
    status, printed, report = run(folder, "--against", "diffsynth-engine")
    assert status == 0, printed.out
    assert modules(report) == {"text_encoder"} and len(report["rows"]) > 10


@pytest.mark.usefixtures("diffsynth")
def test_a_killed_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    whole = run("--against", "diffsynth", "--dtype", "float32")
    (tmp_path / "parity.jsonl").unlink()
    step, ran = compare._Run.step, []

    def until(self, stage):
        if stage.full == "transformer.txt_in":
            raise KeyboardInterrupt
        return step(self, stage)

    def counted(self, stage):
        ran.append(stage.full)
        return step(self, stage)

    monkeypatch.setattr(compare._Run, "step", until)
    with pytest.raises(KeyboardInterrupt):
        options = {"dtypes": ["float32"], "device": "cpu", "progress": False, "against": "diffsynth"}
        compare.parity(None, tmp_path / "parity.json", **options)
    monkeypatch.setattr(compare._Run, "step", counted)
    assert run("--against", "diffsynth", "--dtype", "float32") == whole and ran[0] == "transformer.txt_in"


@pytest.mark.parametrize("package", ["diffsynth", "diffsynth-engine"])
def test_a_missing_package_is_one_line(run, monkeypatch, package):
    def version(_name):
        raise PackageNotFoundError

    monkeypatch.setattr(parity_oracles, "version", version)
    status, printed, _ = run("--against", package)
    assert status == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert f"found {package} none" in line and f"pip install --no-deps {package}==" in line


ACTING = [  # in float32, where RoPE's tables and an exact sigma change nothing
    (tool, entry)
    for tool, entries in DIALECTS.items()
    for entry in entries
    if entry.switch.startswith(("transformer.", "time.rounding")) and entry.value not in ("rounded", "exact")
]


def network(seed):
    config = MMDiTConfig(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return randomise_(MMDiT(config), seed).eval().requires_grad_(False)


@pytest.mark.parametrize(("tool", "entry"), ACTING, ids=lambda value: getattr(value, "switch", value))
def test_every_entry_that_acts_in_the_transformer_is_found(tool, entry):
    """Against the same transformer under the entry: two pictures, the larger one second, of odd sides."""
    grids = ((1, 3, 5), (1, 5, 7))
    ours = network(0)
    img, txt, timestep, _ = inputs(ours.config, grids, 1, 6, False, 0)
    trial = Trial(layout=Layout(6, grids), sigma=0.8726, rows=(0,))
    timestep = torch.tensor([trial.sigma])

    def side(_network, streams):
        return {"velocity": ours(streams["img"], txt, timestep, grids)}

    switches = Switches.from_flat({entry.switch: entry.value})

    def reference(_network, streams):
        with scope(**vars(trial)), switched_transformer(ours, switches):
            return side(_network, streams)

    stage = Stage("transformer", "whole", side, reference)
    assert removing(stage, ours, ours, {"img": img}, trial) == f"{entry.switch} = {entry.value!r} of {tool}"


def test_what_no_entry_removes_has_none():
    ours, other = network(0), network(1)
    grids = ((1, 3, 5),)
    img, txt, timestep, _ = inputs(ours.config, grids, 1, 6, False, 0)

    def side(network, streams):
        return {"velocity": network(streams["img"], txt, timestep, grids)}

    stage = Stage("transformer", "whole", side, side)
    trial = Trial(layout=Layout(6, grids), sigma=float(timestep), rows=(0,))
    assert removing(stage, ours, other, {"img": img}, trial) is None
