"""Public benchmarks, as their authors describe their folders: their scorers find every result."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from qwenedit.batches.layouts import LAYOUTS, layout_lines
from qwenedit.batches.run import batch
from qwenedit.cli import options as cli
from qwenedit.cli.batch import LAYOUTS as NAMES

ROOT = Path(__file__).parents[2]
GEDIT = [  # rows as of stepfun-ai/GEdit-Bench, with sizes of `input_image` and `input_image_raw`
    ("background_change", "0f385bcf", "Change the background to a starry sky", "en", (48, 32), (96, 64)),
    ("background_change", "0f385bcf", "把背景换成星空", "cn", (48, 32), (96, 64)),
    ("subject-add", "5a90", "Add a hat", "en", (33, 47), (33, 47)),
]


def picture(size, colour="red"):
    one = Image.new("RGB", size, colour)
    one.paste("blue", (0, 0, size[0] // 2, size[1] // 2))
    return one


def rows():
    for number, (task, key, instruction, language, size, raw) in enumerate(GEDIT):
        yield {
            "task_type": task, "key": key, "instruction": instruction, "instruction_language": language,
            "input_image": picture(size, "green"), "input_image_raw": picture(raw, "red"),
            "Intersection_exist": number == 0,
        }  # fmt: skip


@pytest.fixture
def gedit(tmp_path, monkeypatch):
    """GEdit-Bench as files, written by the lines of docs/batch.md."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return list(rows())

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(lines, "docs/batch.md", "exec"), {})
    assert asked == [("stepfun-ai/GEdit-Bench", "train")]
    return tmp_path / "gedit"


@pytest.fixture
def imgedit(tmp_path):
    folder = tmp_path / "Benchmark" / "singleturn"
    edits = {
        "1082": {
            "id": "animal/000342021.jpg",
            "prompt": "Change the shell's texture.",
            "edit_type": "adjust",
        },
        "673": {"id": "style/000278574.jpg", "prompt": "Transfer the image.", "edit_type": "style"},
    }
    for edit in edits.values():
        (folder / edit["id"]).parent.mkdir(parents=True)
        picture((64, 48)).save(folder / edit["id"])
    (folder / "singleturn.json").write_text(json.dumps(edits))
    (folder / "judge_prompt.json").write_text("{}")
    return folder


@pytest.fixture
def redbench(tmp_path):
    folder = tmp_path / "REDEdit_Bench"
    lines = []
    for task, number, chinese, english in (
        ("add", "1", "在图片中绿色植物上增加一只七星瓢虫", "Add a ladybug on the green plant"),
        ("adjust", "144", "将天空的颜色调成更深的蓝色", "Change the sky color to a deeper blue"),
    ):
        source = f"redbench/{task}/{task}-{number}.png"
        (folder / source).parent.mkdir(parents=True)
        picture((48, 64)).save(folder / source)
        lines.append(
            {
                "id": number, "source": source, "a_to_b_instructions": chinese,
                "a_to_b_instructions_eng": english, "task": task,
            }
        )  # fmt: skip
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "redbench.jsonl").write_text(text, encoding="utf-8")
    return folder


def run(layout, folder, output, *words):
    words = ["--layout", layout, str(folder), "-o", str(output), "--device", "cpu", "--quiet", *words]
    return cli.main(["batch", *words, "--steps", "1", "--true-cfg-scale", "1"])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def records(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def test_geditbench(gedit, tmp_path):
    output = tmp_path / "results" / "mine"
    assert run("gedit", gedit, output, "--seed", "43") == 0
    names = [f"fullset/{task}/{language}/{key}" for task, key, _, language, *_ in GEDIT]
    assert files(output) == sorted(f"{name}{end}" for name in names for end in (".png", "_SRCIMG.png"))
    for name, row, record in zip(names, rows(), records(output), strict=True):
        # What the scorer does with them.
        source = Image.open(output / f"{name}_SRCIMG.png")
        edited = Image.open(output / f"{name}.png").convert("RGB").resize((source.size[0], source.size[1]))
        assert ImageChops.difference(source, row["input_image"]).getbbox() is None
        assert Image.open(output / f"{name}.png").size == edited.size == row["input_image"].size
        assert record["sizes"] == [list(row["input_image_raw"].size)] and record["made"] != record["written"]
        assert (record["prompt"], record["seed"]) == (row["instruction"], 43)


def test_one_language_of_geditbench(gedit):
    assert [line["prompt"] for _, line in layout_lines("gedit", gedit, "cn")] == ["把背景换成星空"]
    assert len(layout_lines("gedit", gedit, "en")) == 2


def test_imgedit(imgedit, tmp_path):
    assert run("imgedit", imgedit, tmp_path / "edited") == 0
    assert files(tmp_path / "edited") == ["1082.png", "673.png"]
    (record, _) = records(tmp_path / "edited")
    assert record["prompt"] == "Change the shell's texture." and record["made"] == record["written"]
    (imgedit / "singleturn.json").rename(imgedit / "basic_edit.json")
    assert [line["name"] for _, line in layout_lines("imgedit", imgedit)] == ["1082.png", "673.png"]


def test_redbench(redbench, tmp_path):
    for words, prompts in (
        ((), ["在图片中绿色植物上增加一只七星瓢虫", "将天空的颜色调成更深的蓝色"]),
        (("--language", "en"), ["Add a ladybug on the green plant", "Change the sky color to a deeper blue"]),
    ):
        output = tmp_path / f"edited {len(words)}"
        assert run("redbench", redbench, output, *words) == 0
        assert files(output) == ["add/add-1.png", "adjust/adjust-144.png"]
        assert [record["prompt"] for record in records(output)] == prompts


def test_a_layout_is_a_list_of_lines(redbench, tmp_path, edit):
    lines = [line for _, line in layout_lines("redbench", redbench)]
    for line in lines:
        line["image"] = str(redbench / line["image"])
    assert not batch(lines, tmp_path / "out", pipe=edit, options={"steps": 1}, progress=False).failed


def test_folders_of_something_else_are_refused_in_one_line(tmp_path, capsys, imgedit):
    empty = tmp_path / "empty"
    empty.mkdir()
    for layout, words, message in (
        ("gedit", (), "no such list of edits"), ("redbench", (), "no such list of edits"),
        ("imgedit", (), "has neither basic_edit.json nor singleturn.json: wanted Benchmark/singleturn"),
    ):  # fmt: skip
        assert run(layout, empty, tmp_path / "out", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and not (tmp_path / "out").exists()
    assert run("gedit", tmp_path / "none", tmp_path / "out") == 2
    assert "no such folder" in capsys.readouterr().err
    assert run("imgedit", imgedit, tmp_path / "out", "--language", "cn") == 2
    assert "ImgEdit-Bench has English instructions only" in capsys.readouterr().err


def test_every_bad_row_is_named(redbench, tmp_path, capsys):
    path = redbench / "redbench.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    bad = [
        {**rows[0], "task": ""},
        {**rows[0], "source": "../../secret.png"},
        {**rows[1], "source": "gone.png"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in [*bad, rows[1], 3]) + "\n{")
    assert run("redbench", redbench, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in (
        "5 of 6 edits cannot be made: line 1 of redbench.jsonl: task is '', wanted a text",
        "line 2 of redbench.jsonl: the picture is '../../secret.png', wanted the name of a file inside",
        "line 3 of redbench.jsonl: no such picture", "line 5 of redbench.jsonl: it is 3, wanted an object",
        "line 6 of redbench.jsonl: it cannot be read as JSON",
    ):  # fmt: skip
        assert part in line


def test_the_command_knows_every_layout():
    assert tuple(LAYOUTS) == NAMES
