"""Specs of sweeps: what they come to, and that every slip is named before anything runs."""

import shutil
from random import Random

import pytest
from PIL import Image, ImageChops

from qwenedit import mini
from qwenedit.ablation.spec import read_spec
from qwenedit.mini.scenes import DETERMINED, held_out, outcome
from qwenedit.mini.shapes import draw
from qwenedit.switches import Switches

ONE = {"pictures": ["mini:0"]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two pictures in the folder where we are."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(mini.EXAMPLE, "cat.png")
    Image.new("RGB", (20, 10), "red").save("dog.png")
    return tmp_path


def settings(cell):
    return (cell.true_cfg_scale, cell.steps, cell.negative_prompt, cell.switches.flat())


def test_the_least_that_a_spec_says():
    spec = read_spec(ONE)
    assert spec.model is None and spec.seeds == (0,) and spec.axes == () and spec.edits == 1
    assert [settings(cell) for cell in spec.cells] == [(4.0, 20, " ", {})]
    assert (spec.height, spec.width) == (None, None)


def test_the_grid_is_the_product_with_the_unablated_run_first():
    grid = {"references.latents": ["left_out", "concatenated"], "true_cfg_scale": [1, 4]}
    spec = read_spec({**ONE, "seeds": [0, 7], "grid": grid})
    out = {"references.latents": "left_out"}
    assert spec.axes == ("references.latents", "true_cfg_scale") and spec.edits == 8
    assert [settings(cell) for cell in spec.cells] == [
        (4.0, 20, " ", {}), (1.0, 20, " ", out), (4.0, 20, " ", out), (1.0, 20, " ", {}),
    ]  # fmt: skip
    assert spec.cells[0].values == {"references.latents": "concatenated", "true_cfg_scale": 4.0}


def test_an_unablated_run_outside_of_the_grid_is_added():
    spec = read_spec({**ONE, "true_cfg_scale": 3, "steps": 5, "grid": {"true_cfg_scale": [1, 4]}})
    assert [settings(cell)[:2] for cell in spec.cells] == [(3.0, 5), (1.0, 5), (4.0, 5)]
    assert spec.cells[0].values == {} and spec.cells[0].switches == Switches()


def test_every_call_argument_can_be_in_the_grid():
    spec = read_spec({**ONE, "grid": {"steps": [2, 20], "negative_prompt": [" ", "red"]}})
    found = {settings(cell)[1:3] for cell in spec.cells}
    assert found == {(2, " "), (20, " "), (2, "red"), (20, "red")}


def test_toml_with_names_quoted_or_not(files):
    path = files / "spec.toml"
    path.write_text(
        'pictures = ["cat.png", "mini:3"]\nprompts = ["把圆变红"]\nheight = 32\nwidth = 48\n'
        '[grid]\nreferences.latents = ["left_out"]\n"guidance.norm" = ["none", "global"]\n',
        encoding="utf-8",
    )
    spec = read_spec(path)
    assert spec.axes == ("references.latents", "guidance.norm") and len(spec.cells) == 3
    assert [case.name for case in spec.cases] == ["cat.png", "mini:3"]
    assert spec.cases[0].prompt == "把圆变红" and (spec.height, spec.width) == (32, 48)


def test_paths_are_relative_to_the_toml_file(files, monkeypatch):
    (files / "spec.toml").write_text('model = "mine"\npictures = ["dog.png"]\nprompts = ["x"]\n')
    (files / "mine").mkdir()
    (files / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    spec = read_spec("../spec.toml")
    assert spec.cases[0].pictures[0].size == (20, 10) and spec.model == "../mine"


@pytest.mark.usefixtures("files")
def test_pictures_with_prompts_each_or_all():
    pictures, prompts = ["cat.png", "mini:1", "dog.png"], ["x", "y"]
    each = read_spec({"pictures": pictures, "prompts": prompts})
    assert [(case.name, case.prompt) for case in each.cases if case.scene is None] == [
        ("cat.png", "x"), ("dog.png", "y"),
    ]  # fmt: skip
    assert [case.name for case in each.cases] == pictures
    every = read_spec({"pictures": pictures, "prompts": prompts, "pairing": "all"})
    assert [case.name for case in every.cases] == ["cat.png", "cat.png", "mini:1", "dog.png", "dog.png"]
    assert [case.prompt for case in every.cases if case.scene is None] == ["x", "y", "x", "y"]


def test_mini_pictures_are_held_out_scenes_with_one_right_answer():
    cases = [read_spec({"pictures": [f"mini:{seed}"]}).cases[0] for seed in range(12)]
    assert len({case.prompt for case in cases}) > 6
    for case in cases:
        assert held_out(case.scene) and case.request.action in DETERMINED
        outcome(Random(0), case.scene, case.request)
        assert ImageChops.difference(case.pictures[0], draw(case.scene)).getbbox() is None
    again = read_spec({"pictures": ["mini:5"]}).cases[0]
    assert (again.scene, again.request, again.prompt) == (
        cases[5].scene, cases[5].request, cases[5].prompt,
    )  # fmt: skip


def test_a_base_of_switches_and_combinations_that_cannot_be():
    spec = read_spec(
        {
            **ONE,
            "num_inference_steps": 3,
            "switches": {"seen": {"size": [32, 32]}},
            "grid": {
                "references.latents": ["concatenated", "left_out"],
                "references.sigma": [0.0, 0.5],
                "guidance.norm": ["reference", "none"],
                "guidance.rescale": [0.0, 0.7],
                "guidance_scale": [1, 4],
            },
        }
    )
    assert spec.cells[0].steps == 3 and spec.cells[0].switches.flat() == {"seen.size": [32, 32]}
    # left_out with sigma 0.5 cannot be, nor the reference's norm with rescaling: 3 of 4 pairs, and 3 of 4.
    assert sum(len(cell.combinations) for cell in spec.cells) == 3 * 3 * 2 and spec.impossible == 32 - 18
    # Without guidance its norms and its rescaling come to the same.
    unguided = [cell for cell in spec.cells if cell.true_cfg_scale == 1]
    assert len(spec.cells) == 9 + 3 == len({str(cell.settings) for cell in spec.cells})
    for cell in unguided:
        assert len(cell.combinations) == 3 and cell.values == cell.combinations[0]
        assert {values["guidance.norm"] for values in cell.combinations} == {"reference", "none"}


def test_several_pictures_and_pictures_as_values(files):
    Image.new("RGB", (20, 10), "red").save(files / "a.png")
    Image.new("RGB", (10, 20), "blue").save(files / "b.png")
    spec = read_spec(
        {
            "pictures": [[str(files / "a.png"), str(files / "b.png")]],
            "prompts": ["x"],
            "grid": {
                "references.latents": ["concatenated", "other"],
                "references.picture": [str(files / "a.png")],
            },
        }
    )
    (case,) = spec.cases
    assert case.name.endswith("a.png + " + str(files / "b.png")) and len(case.image) == 2
    assert case.shown.size == (25, 10)
    plain, changed = spec.cells
    assert plain.switches.flat() == {} and plain.values["references.picture"].endswith("a.png")
    assert changed.settings["switches"]["references.picture"].startswith("sha256")


FAULTS = [
    ({"attention": 1}, "attention is 1, wanted true or false"),
    ({"deterministc": True}, "did you mean deterministic"),
    (
        {**ONE, "switches": {"seen.siz": [8, 8]}},
        "switches: no switch is called 'seen.siz'; did you mean seen.size",
    ),
    ({**ONE, "switches": {"seen.size": [0, 8]}}, "seen.size is"),
    ({**ONE, "grid": {"seeds": [0, 1]}}, "grid: seeds is not to be varied"),
    ({**ONE, "grid": {"guidance_scal": [0, 1]}}, "did you mean"),
    ({**ONE, "grid": {"references.latents": ["left_out"], "references.sigma": [0.5]}}, "has no effect where"),
    ({**ONE, "grid": {"references.latents": ["other"], "references.picture": ["x.png"]}}, "no such picture"),
    (
        {**ONE, "grid": {f"references.{x}": [[0, i] for i in range(200)] for x in ("steps", "blocks")}},
        "40000 comb",
    ),
    (
        {**ONE, "switches": {"seen.other": "cat.png"}},
        "seen.other is given, but seen.picture is never 'other'",
    ),
    ({"pictures": [["mini:0", "mini:1"]]}, "wanted a mini: picture alone"),
    ({"pictures": [[]]}, "pictures is"),
    ({"picture": ["mini:0"]}, "there is no 'picture'; did you mean pictures"),
    ({**ONE, "true_cfg_scal": 4}, "there is no 'true_cfg_scal'; did you mean true_cfg_scale"),
    ({}, r"pictures is \[\], wanted a list of at least one text"),
    ({"pictures": "mini:0"}, "pictures is 'mini:0', wanted a list"),
    ({"pictures": ["mini:x"]}, "the picture is 'mini:x', wanted mini: and a whole number"),
    ({"pictures": ["mimi:0"], "prompts": ["x"]}, "no such picture: mimi:0; did you mean mini:0"),
    ({"pictures": ["cta.png"], "prompts": ["x"]}, "no such picture: cta.png; did you mean cat.png"),
    ({"pictures": ["cat.png"]}, r"there are no prompts, wanted one for each of 1 picture\(s\)"),
    ({**ONE, "prompts": ["x"]}, "every picture is a mini: one, which brings its own"),
    ({"pictures": ["cat.png"], "prompts": ["x", "y"]}, "2 prompts, wanted 1, .* or pairing = 'all'"),
    ({"pictures": ["cat.png"], "prompts": ["x"], "pairing": "al"}, "pairing is 'al', .* did you mean all"),
    ({"pictures": ["mini:1", "mini:1"]}, "the picture 'mini:1' with the prompt .* is there twice"),
    ({**ONE, "seeds": []}, r"seeds is \[\], wanted a list"),
    ({**ONE, "seeds": [1, 1]}, r"seeds are \[1, 1\], wanted each once"),
    ({**ONE, "seeds": [-1]}, "a seed is -1, wanted a whole number of at least 0"),
    ({**ONE, "seeds": [True]}, "a seed is True, wanted a whole number"),
    ({**ONE, "model": 3}, "model is 3, wanted a hub id or a folder"),
    ({**ONE, "height": 1.5}, "height is 1.5, wanted a whole number"),
    ({**ONE, "steps": 0}, "steps is 0, wanted a whole number of at least 1"),
    ({**ONE, "true_cfg_scale": float("nan")}, "true_cfg_scale is nan, wanted a finite number"),
    ({**ONE, "negative_prompt": 1}, "negative_prompt is 1, wanted a text"),
    ({**ONE, "grid": [1]}, r"grid is \[1\], wanted a table"),
    ({**ONE, "grid": {"steps": 5}}, "grid: steps is 5, wanted a list of values"),
    ({**ONE, "grid": {"steps": []}}, r"grid: steps is \[\], wanted a list of values"),
    ({**ONE, "grid": {"steps": [5, 5]}}, r"grid: steps is \[5, 5\], wanted each value once"),
    ({**ONE, "grid": {"true_cfg_scale": [1, 1.0]}}, "wanted each value once"),
    ({**ONE, "grid": {"step": [1]}}, "did you mean steps"),
    ({**ONE, "grid": {"guidance.nrom": ["none"]}}, "guidance.nrom.*guidance.norm"),
    ({**ONE, "grid": {"guidance": {"norm": ["nonne"]}}}, "guidance.norm.*nonne.*none"),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("raw, message", FAULTS, ids=range(len(FAULTS)))
def test_a_slip_is_named(raw, message):
    with pytest.raises(ValueError, match=message):
        read_spec(raw)


def test_files_that_are_no_spec(files):
    path = files / "spec.toml"
    with pytest.raises(ValueError, match=r"no such spec: nowhere.toml"):
        read_spec("nowhere.toml")
    path.write_text("pictures = [")
    with pytest.raises(ValueError, match=r"spec.toml is not"):
        read_spec(path)
    path.write_bytes(b"pictures = ['\xff']")
    with pytest.raises(ValueError, match=r"spec.toml is not"):
        read_spec(path)
    path.write_text('pictures = ["mini:0"]\nsteeps = 3')
    with pytest.raises(ValueError, match=r"spec.toml: there is no 'steeps'; did you mean steps"):
        read_spec(path)
    with pytest.raises(ValueError, match="is a folder, wanted a file"):
        read_spec(files)
    (files / "cat.png").write_text("hello")
    path.write_text('pictures = ["cat.png"]\nprompts = ["x"]')
    with pytest.raises(ValueError, match="not a picture that Pillow can read"):
        read_spec(path)


def test_without_a_toml_reader_it_is_said_what_to_do(files, monkeypatch):
    monkeypatch.setattr("qwenedit.foreign.TOML", "no_such_module")
    (files / "spec.toml").write_text('pictures = ["mini:0"]')
    with pytest.raises(ValueError, match=r"needs Python 3.11, or tomli \(pip install 'qwenedit\[report\]'\)"):
        read_spec("spec.toml")
    assert read_spec(ONE).edits == 1
