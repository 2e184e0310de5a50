"""The table of recommended settings, how a checkpoint finds its own, and the command line's use of it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import qwenedit
from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.family import LIGHTNING, PRESETS, VARIANTS, preset_of
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.sampling.switched import schedule
from qwenedit.switches import Guidance, Switches, Time
from qwenedit.weights.checkpoints import find_preset
from tests.tiny import checkpoint

DATA = Path(__file__).parent / "data"
OFFICIAL = json.loads((DATA / "sampling.json").read_text())
CONFIGS = json.loads((DATA / "official_configs.json").read_text())
FIRERED = ("FireRed-Image-Edit-1.0", "FireRed-Image-Edit-1.1")  # with the configs of Edit-2509


def folder_of(root, name, model):
    """An official checkpoint without weights, in a folder of any name."""
    for file, value in CONFIGS[model].items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return root / name


def test_the_table_is_that_of_the_model_cards():
    assert {*CONFIGS, *FIRERED, *LIGHTNING} == set(PRESETS)
    for name in (*CONFIGS, *FIRERED):
        official = OFFICIAL[name]
        official = OFFICIAL[official["same_as"]] if "same_as" in official else official
        preset = PRESETS[name]
        assert preset.num_inference_steps == official["steps"]
        assert preset.true_cfg_scale == official["true_cfg_scale"]
        assert preset.negative_prompt == official["negative_prompt"]
        assert preset.switches == Switches()
        of_layers = {key: official.get(key) for key in ("layers", "resolution", "cfg_normalize")}
        assert of_layers == dict.fromkeys(of_layers) | (asdict(preset.layering) if preset.layering else {})
        has_sizes = "aspect_ratios" in official
        sizes = OFFICIAL["Qwen-Image"]["aspect_ratios"].values() if has_sizes else []
        assert [list(size) for size in preset.sizes] == list(sizes)


def test_lightning_runs_the_published_schedule():
    """Shift 3 at every size, without the terminal stretch: 3 s / (1 + 2 s)."""
    for name, steps in zip(LIGHTNING, OFFICIAL["lightning"]["steps"], strict=True):
        run = PRESETS[name].sampling()
        assert run.num_inference_steps == steps and run.true_cfg_scale == 1 and run.negative_prompt is None
        for tokens in (16, 4096):
            got = schedule(load_scheduler(mini.CHECKPOINT), PRESETS[name].switches.time, steps, tokens)
            even = [1 - i / steps for i in range(steps)]
            assert got == pytest.approx([3 * s / (1 + 2 * s) for s in even] + [0])


@pytest.mark.parametrize("model", CONFIGS)
def test_official_checkpoints_are_recognised(tmp_path, model):
    assert preset_of(folder_of(tmp_path, model, model)) is PRESETS[model]
    cached = f"models--Qwen--{model}/snapshots/{'1' * 40}"
    assert preset_of(folder_of(tmp_path, cached, model)) is PRESETS[model]
    nameless = {"Qwen-Image-2512": "Qwen-Image"}.get(model, model)  # their configs are the same
    assert preset_of(folder_of(tmp_path, "some/folder", model)) is PRESETS[nameless]
    assert find_preset(f"Qwen/{model}") is PRESETS[model]


@pytest.mark.parametrize("model", FIRERED)
def test_firered_is_edit_2509_by_its_configs_and_itself_by_its_name(tmp_path, model):
    cached = f"models--FireRedTeam--{model}/snapshots/{'1' * 40}"
    for name in (model, model.lower(), cached):
        assert preset_of(folder_of(tmp_path, name, "Qwen-Image-Edit-2509")) is PRESETS[model]
    assert preset_of(folder_of(tmp_path, "mine", "Qwen-Image-Edit-2509")).name == "Qwen-Image-Edit-2509"
    wrong = folder_of(tmp_path, f"{model}/other", "Qwen-Image-Edit-2511")
    assert preset_of(wrong).name == "Qwen-Image-Edit-2511"
    assert find_preset(f"FireRedTeam/{model}") is PRESETS[model]


def test_firered_loads_as_it_is(tmp_path, capsys):
    folder = Path(shutil.copytree(checkpoint("plus"), tmp_path / "FireRed-Image-Edit-1.1"))
    pipe = qwenedit.load(folder, device="cpu", progress=False)
    assert pipe.variant is VARIANTS["QwenImageEditPlusPipeline"] and not pipe.mmdit.config.zero_cond_t
    assert cli.main(["info", str(folder)]) == 0
    wanted = (
        "preset FireRed-Image-Edit-1.1: 40 steps, true_cfg_scale 4.0, negative prompt ' '; made for 1 to 3"
    )
    assert wanted in capsys.readouterr().out


def test_configs_weigh_more_than_names(tmp_path):
    wrong = folder_of(tmp_path, "Qwen-Image-2512", "Qwen-Image-Edit-2511")
    assert preset_of(wrong) is PRESETS["Qwen-Image-Edit-2511"]
    inside = folder_of(tmp_path, "Qwen-Image-2512/other", "Qwen-Image")
    assert preset_of(inside) is PRESETS["Qwen-Image"]
    for kind, name in (
        ("generate", "Qwen-Image"),
        ("edit", "Qwen-Image-Edit"),
        ("plus", "Qwen-Image-Edit-2509"),
    ):
        assert find_preset(checkpoint(kind)).name == name
    assert find_preset() is PRESETS["Qwen-Image-Edit"]
    assert find_preset("nobody/nothing") is None
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a FluxPipeline: there is no preset for it"):
        preset_of(tmp_path)


def test_what_is_given_is_kept():
    edit = PRESETS["Qwen-Image-Edit"]
    run = edit.sampling()
    assert (run.num_inference_steps, run.true_cfg_scale, run.negative_prompt) == (50, 4.0, " ")
    assert edit.switches == Switches()
    run = edit.sampling(3, 2.0, "blurred")
    assert (run.num_inference_steps, run.true_cfg_scale, run.negative_prompt) == (3, 2.0, "blurred")
    assert PRESETS["Qwen-Image-2512"].sampling(true_cfg_scale=1.0).negative_prompt is None
    assert PRESETS["Qwen-Image-2512"].sampling(true_cfg_scale=1.5).negative_prompt.startswith("低分辨率")
    assert edit.sampling(true_cfg_scale=1.0, negative_prompt="blurred").negative_prompt == "blurred"
    fast = PRESETS["lightning-4"]
    assert fast.switches == Switches(time=Time(sigmas="lightning"))
    assert fast.sampling(true_cfg_scale=2.0).negative_prompt == " "


@pytest.fixture
def called(monkeypatch):
    """What the pipeline's methods are called with by the command line."""
    calls = []

    def generate(_pipe, *_arguments, **options):
        calls.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("qwenedit.pipeline.QwenImageEdit.generate", generate)
    return calls


def generate(folder, *options):
    arguments = ["generate", "x", "-o", "out.png", "--quiet", "--device", "cpu", "--model", str(folder)]
    assert cli.main([*arguments, *options]) == 130


@pytest.mark.parametrize(
    "kind, zero_cond_t, steps", [("edit", False, 50), ("plus", False, 40), ("plus", True, 40)]
)
def test_the_command_line_takes_the_checkpoints_own(tmp_path, monkeypatch, called, kind, zero_cond_t, steps):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(kind, zero_cond_t=zero_cond_t)
    generate(folder)
    (run,) = called
    assert run["num_inference_steps"] == steps and run["true_cfg_scale"] == 4.0
    assert run["negative_prompt"] == " " and run["switches"] == Switches()
    generate(folder, "--steps", "3", "--true-cfg-scale", "2", "--negative-prompt", "blurred")
    assert called[1]["num_inference_steps"] == 3 and called[1]["true_cfg_scale"] == 2.0
    assert called[1]["negative_prompt"] == "blurred"


def test_the_command_line_with_a_named_preset(tmp_path, monkeypatch, called, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(checkpoint("generate"), tmp_path / "Qwen-Image-2512"))
    generate(folder)
    assert called[0]["negative_prompt"] == PRESETS["Qwen-Image-2512"].negative_prompt
    generate(folder, "--preset", "lightning-8")
    assert called[1]["num_inference_steps"] == 8 and called[1]["true_cfg_scale"] == 1.0
    assert called[1]["switches"] == Switches(time=Time(sigmas="lightning"))
    generate(folder, "--preset", "lightning-4", "--steps", "5", "--switch", "guidance.norm=none")
    wanted = Switches(time=Time(sigmas="lightning"), guidance=Guidance(norm="none"))
    assert called[2]["num_inference_steps"] == 5 and called[2]["switches"] == wanted
    generate(folder, "--preset", "lightning-4", "--switch", "time.sigmas=official")
    assert called[3]["switches"] == Switches()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["generate", "x", "-o", "out.png", "--preset", "fast"])
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_info_shows_it(capsys):
    assert cli.main(["info"]) == 0
    assert (
        "preset Qwen-Image-Edit: 50 steps, true_cfg_scale 4.0, negative prompt ' '\n"
        in capsys.readouterr().out
    )
    assert cli.main(["info", str(checkpoint("generate"))]) == 0
    assert "negative prompt ' '; sizes 1328x1328, 1664x928" in capsys.readouterr().out
