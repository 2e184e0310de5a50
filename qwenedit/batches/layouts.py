"""Public benchmarks of editing as lists of edits: from the folders that their authors publish, results under
the names and sizes that their scorers read.

The scorers are the authors' own; nothing is scored here. docs/batch.md has the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenedit.batches.lines import raw_lines
from qwenedit.foreign import inner_name, read_json, shown

__all__ = ["LAYOUTS", "layout_lines"]

Raw = list[tuple[str, Any]]
_INSTRUCTIONS = {"cn": "a_to_b_instructions", "en": "a_to_b_instructions_eng"}  # of REDEdit-Bench


def layout_lines(layout: str, folder: Path, language: str | None = None) -> Raw:
    """The lines of a benchmark's edits, with the places where they stand; see lines.py.

    `language` is "en" or "cn"; None is what the authors make by default: both for GEdit-Bench, English for
    ImgEdit-Bench, Chinese for REDEdit-Bench.

    Raises:
        ValueError: a folder that is not as the benchmark's authors publish it, or without such edits.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {shown(folder)}, wanted that of the benchmark")
    lines = LAYOUTS[layout](folder, language)
    if not lines:
        spoken = "" if language is None else f" with --language {language}"
        raise ValueError(f"{shown(folder)} has no edits for --layout {layout}{spoken}")
    return lines


def _gedit(folder: Path, language: str | None) -> Raw:
    """GEdit-Bench: results in fullset/TASK/LANGUAGE/KEY.png, each beside its source, KEY_SRCIMG.png.

    The authors publish the data set stepfun-ai/GEdit-Bench for `datasets.load_dataset`. Here its rows are in
    metadata.jsonl and its pictures in files beside it, which `datasets` calls an ImageFolder; docs/batch.md
    has the lines that write it. The model edits `input_image_raw`. The scorer compares with `input_image`,
    and reads results at its size.

    Source: stepfun-ai/Step1X-Edit, GEdit-Bench/generate_image_example.py (fields, names),
        GEdit-Bench/EVAL.md and test_gedit_score.py (what is read: both files, the result resized, bicubic, to
        the source's size).
    """
    return _mapped(folder, "metadata.jsonl", lambda row: _gedit_line(row, language))


def _gedit_line(row: dict[str, Any], language: str | None) -> dict[str, Any] | None:
    spoken = _text(row, "instruction_language")
    if language not in (None, spoken):
        return None
    name = f"fullset/{_text(row, 'task_type')}/{spoken}/{_text(row, 'key')}"
    source = _text(row, "input_image_file_name")
    return {
        "image": _text(row, "input_image_raw_file_name"),
        "prompt": _text(row, "instruction"),
        "name": f"{name}.png",
        "size_of": source,
        "copies": {f"{name}_SRCIMG.png": source},
    }


def _imgedit(folder: Path, language: str | None) -> Raw:
    """ImgEdit-Bench, its basic part: results in KEY.png, at the model's size.

    The folder is `Benchmark/singleturn` of the authors' Benchmark.tar: pictures in folders, and the edits in
    singleturn.json, or in basic_edit.json, which their repository has.

    Source: PKU-YuanGroup/ImgEdit, Benchmark/Basic/basic_bench_readme.md and basic_bench.py
        (result_img_folder, origin_img_root); the data set sysuyy/ImgEdit.
    """
    if language == "cn":
        raise ValueError("--language is cn, but ImgEdit-Bench has English instructions only")
    names = ("basic_edit.json", "singleturn.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{shown(folder)} has neither {' nor '.join(names)}: wanted Benchmark/singleturn")
    found: Raw = []
    for key, row in read_json(files[0]).items():
        found.append(_at(f"edit {shown(key)}", row, _imgedit_line))
        if isinstance(found[-1][1], dict):
            found[-1][1]["name"] = f"{key}.png"
    return found


def _imgedit_line(row: dict[str, Any]) -> dict[str, Any]:
    return {"image": _text(row, "id"), "prompt": _text(row, "prompt")}


def _redbench(folder: Path, language: str | None) -> Raw:
    """REDEdit-Bench: results in TASK/TASK-ID.png, at the model's size.

    The folder is that of the authors' REDEdit_Bench.tar: redbench.jsonl, and the pictures that it names.

    Source: the README of the data set FireRedTeam/REDEdit-Bench (redbench.jsonl, the folders);
        redbench_eval.py with `--lang` (TASK/TASK-ID.png). The README, and the first redbench_eval.py of
        FireRedTeam/FireRed-Image-Edit, have TASK/ID.png.
    """
    instructions = _INSTRUCTIONS[language or "cn"]

    def line(row: dict[str, Any]) -> dict[str, Any]:
        task, number = _text(row, "task"), _text(row, "id")
        prompt = _text(row, instructions)
        return {"image": _text(row, "source"), "prompt": prompt, "name": f"{task}/{task}-{number}.png"}

    return _mapped(folder, "redbench.jsonl", line)


LAYOUTS: dict[str, Callable[[Path, str | None], Raw]] = {
    "gedit": _gedit, "imgedit": _imgedit, "redbench": _redbench
}  # fmt: skip


def _mapped(folder: Path, name: str, line: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Raw:
    found = [_at(f"{place} of {name}", row, line) for place, row in raw_lines(folder / name)]
    return [(place, value) for place, value in found if value is not None]


def _at(place: str, row: Any, line: Callable[[dict[str, Any]], dict[str, Any] | None]) -> tuple[str, Any]:
    """A row's place and its line, or what is wrong with the row."""
    try:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise ValueError(f"it is {shown(repr(row))}, wanted an object")
        value = line(row)
        if value is not None:  # names from elsewhere: pictures of the benchmark's own folder alone
            for name in (value["image"], value.get("size_of", value["image"])):
                inner_name(name, "the picture")
        return place, value
    except ValueError as error:
        return place, error


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {shown(repr(value))}, wanted a text")
    return value
