"""The one entrance of files, JSON, TOML, names and texts from outside."""

import os
import socket

import numpy as np
import pytest
import torch

from qwenedit.checks import real_number, whole_number
from qwenedit.files import read_header, read_lines, read_tensors
from qwenedit.foreign import MAX_TEXT, inner_name, parse_json, plain_file, read_json, read_toml, shown


@pytest.mark.parametrize(
    "text, safe",
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\u202eb", r"a\u202eb"),  # turns the direction of writing
        ("one\ntwo", r"one\ntwo"),
        ("\ud800", r"\ud800"),
        ("猫 – é", "猫 – é"),
        ("x" * 301, "x" * 300 + "..."),
    ],
)
def test_a_foreign_text_is_shown_escaped(text, safe):
    assert shown(text) == safe


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "C:x",
        "a\\b",
        "a\0b",
        "a\x1b[2J",
        "é" * 128,
        3,
        None,
    ],
)
def test_a_name_that_leads_outside_of_its_folder_is_refused(name):
    with pytest.raises(ValueError, match=r"the shard is .*, wanted "):
        inner_name(name, "the shard")


def test_a_name_inside_of_its_folder_is_kept():
    assert inner_name("transformer/模型-00001-of-00009.safetensors", "x").endswith("9.safetensors")


@pytest.fixture(
    params=["fifo", "device", "folder", "loop", "long", "null", "gone", "inside a file", "socket"]
)
def no_file(request, tmp_path, monkeypatch):
    path = tmp_path / "x"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "loop":
        path.symlink_to(path)
    elif request.param == "long":
        path = tmp_path / ("x" * 300)
    elif request.param == "null":
        path = f"{path}\0"
    elif request.param == "inside a file":
        path.write_text("{}")
        path = path / "config.json"
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path has a limit of its own
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("x")
    return path


@pytest.mark.parametrize("read", [plain_file, read_json, read_toml, read_tensors])
def test_what_is_no_plain_file_is_refused_at_once(read, no_file):
    with pytest.raises(ValueError, match=r"no such file|wanted a file|cannot be read"):
        read(no_file)


DEEP = "[" * 100_000


def test_deep_nesting_is_one_clear_error(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match=r"the switch cannot be read as JSON: it is nested too deeply"):
        parse_json(DEEP, "the switch")
    path.write_text('{"a": ' * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_text(f"a = {DEEP}")
    with pytest.raises(ValueError, match="nested too deeply"):
        read_toml(path)
    path.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    with pytest.raises(ValueError, match="nested too deeply"):
        read_header(path)


def test_a_tensor_that_a_header_has_twice_is_refused(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="a key comes twice"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("metadata", ["false", "0", "[]", '""'])
def test_metadata_that_is_no_object_is_refused(tmp_path, metadata):
    header = f'{{"__metadata__": {metadata}}}'.encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"__metadata__ is .*, wanted texts by name"):
        read_header(tmp_path / "x")


def test_a_text_of_many_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT + 1)
    for read in (read_json, read_toml):
        with pytest.raises(ValueError, match="wanted at most 100,000,000"):
            read(path)


def test_a_mark_before_the_text_does_not_count(tmp_path):
    path = tmp_path / "x"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("last", ["[" * 100_000, '{"a": ', "\0" * 40])
def test_a_last_line_that_is_not_json_is_left_out(tmp_path, last):
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"a": 1}}\n{last}\n')
    assert read_lines(path, dict, "result") == [{"a": 1}]
    path.write_text(f'{last}\n{{"a": 1}}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no result"):
        read_lines(path, dict, "result")


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_are_ints(value):
    assert type(whole_number("steps", value)) is int


@pytest.mark.parametrize("value", [3, 0.5, np.float32(0.5), np.int16(3), torch.tensor(0.5)])
def test_real_numbers_of_any_library_are_floats(value):
    assert type(real_number("scale", value)) is float


@pytest.mark.parametrize(
    "value", [True, "3", None, 3.0, np.float32(3), np.bool_(True), torch.ones(2), 0, 10**9]
)
def test_other_values_are_no_whole_numbers(value):
    with pytest.raises(ValueError, match=r"steps is .*, wanted"):
        whole_number("steps", value, most=1000)


@pytest.mark.parametrize("value", [True, "3", None, float("nan"), np.float64("inf"), 1j, torch.ones(2)])
def test_other_values_are_no_real_numbers(value):
    with pytest.raises(ValueError, match=r"scale is .*, wanted"):
        real_number("scale", value)
