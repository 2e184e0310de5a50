"""What `make gpu` runs, and the table of the memory modes, on a machine without a GPU."""

import re
import subprocess
from itertools import pairwise

import pytest
import torch

import benchmarks.__main__ as program
from benchmarks import cases, gpu, modes
from qwenedit.memory.residency import Modes
from tests.tiny import checkpoint


def test_without_a_device_it_is_one_line_and_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.startswith("no CUDA device here")


@pytest.mark.parametrize("statuses, wanted", [([0, 0], 0), ([1, 0], 1), ([0, 2], 1), ([None, 0], 1)])
def test_with_one_the_tests_and_the_measurements_run(monkeypatch, capsys, statuses, wanted):
    """None: it did not end in time. The measurements run whether or not the tests have passed."""
    commands, left = [], list(statuses)

    def run(command, *, timeout):
        commands.append(command)
        if (status := left.pop(0)) is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main() == wanted
    tests, measure = commands
    assert "tests/gpu" in tests and measure[1:5] == ["-m", "benchmarks", "--device", "cuda"]
    assert {name for flag, name in pairwise(measure) if flag == "--only"} <= {*cases.CASES}
    minutes = float(measure[measure.index("--minutes") + 1])
    assert 0 < minutes + gpu.LONGEST <= gpu.MINUTES
    assert ("stopped after" in capsys.readouterr().err) == (None in statuses)


def test_a_device_that_is_not_there_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--device", "cuda:7", "--only", "import"])
    assert ended.value.code == 2 and "which cannot be used here" in capsys.readouterr().err


def test_no_case_starts_after_the_minutes_are_over(monkeypatch, capsys):
    monkeypatch.setattr(program, "compare", lambda *_: pytest.fail("it started"))
    program.main(["--only", "import", "--minutes", "0", "--device", "cpu"])
    assert "import: skipped, the 0 minutes are over" in capsys.readouterr().err


def test_every_mode_is_measured():
    found = modes.measured(checkpoint("plus", layers=3), "cpu", side=64, dtype="float32")
    assert {one.mode for one in found} >= {Modes(), Modes("stage"), Modes("stream", "precomputed")}
    assert all(one.step > 0 and one.planned > 0 and one.copies is None for one in found)
    text = modes.markdown(found)
    assert len(re.findall(r"^\| (resident|stage|stream)", text, re.MULTILINE)) == len(found)


def test_a_streamed_step_copies_every_block_in_both_branches():
    from qwenedit.memory.sizes import BlockSize, NetworkSize

    size = NetworkSize({"blocks.0.": BlockSize(100, 30), "blocks.1.": BlockSize(100, 30)}, {}, 7)
    assert modes.copies_of(Modes("stream"), size, 50.0) == 2 * 200 / 50
    assert modes.copies_of(Modes("stream", "precomputed"), size, 50.0) == 2 * 140 / 50
    assert modes.copies_of(Modes("stage"), size, 50.0) is None
    one = modes.Measured(Modes("stream"), 2 << 30, 1 << 30, 10.0, 8.0)
    assert "| stream | 2.00 | 1.00 | 10 | 8 | 80% |" in modes.markdown([one])
