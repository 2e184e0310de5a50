"""`--parallel` of the command line: one picture from several processes, and one line where it cannot be."""

import subprocess
import sys

import pytest

from qwenedit import mini
from qwenedit.cli.options import main
from tests.parallel.processes import environment

EDIT = ["edit", str(mini.EXAMPLE), "make the circle red", "--seed", "0", "--steps", "2", "--quiet"]


def test_torchrun_writes_the_picture_of_one_process(tmp_path):
    alone, shared = tmp_path / "alone.png", tmp_path / "shared.png"
    assert main([*EDIT, "-o", str(alone)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "qwenedit", *EDIT, "--parallel", "cfg=2", "-o", str(shared)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(1)[0], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(shared)]  # process 0 alone writes and says so
    assert shared.read_bytes() == alone.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.png", "shared.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--parallel", "cfg=2,ulysses=2"],
            "wanted 4 processes, got 2: start with torchrun",
        ),
        (["--parallel", "ring=2"], "wanted AXIS=N with one of cfg, ulysses, tensor"),
        (["--parallel", "cfg=2", "--true-cfg-scale", "1"], "but this run has none: wanted a true_cfg_scale"),
        (["--parallel", "ulysses=2", "--compile"], "compile=True does not go with parallel 'ulysses=2'"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, tmp_path, capsys, monkeypatch):
    """Before any process is waited for."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*EDIT, *options, "-o", str(tmp_path / "out.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qwenedit: ") and message in line
    assert not list(tmp_path.iterdir())


def test_torchrun_without_parallel_is_refused(tmp_path, capsys, monkeypatch):
    """Each process would make the whole edit, and write the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert main([*EDIT, "-o", str(tmp_path / "out.png")]) == 2
    assert "torchrun started 2 processes, which would each make the whole" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_explore_is_for_one_process(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["explore", str(mini.EXAMPLE), "x", "-o", "out.html", "--parallel", "cfg=2"]) == 2
    assert capsys.readouterr().err.startswith("qwenedit: --parallel does not go with explore")
    assert not list(tmp_path.iterdir())


def test_other_processes_say_which_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*EDIT, "--parallel", "cfg=3", "-o", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err.startswith("qwenedit: process 1: parallel cfg is 3, wanted 1 or 2")
    assert main(["train", str(tmp_path / "spec.toml")]) == 2
    assert capsys.readouterr().err.startswith("qwenedit: process 1: no such spec")
