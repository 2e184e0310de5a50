"""Runs that four processes share, against one process's. cases_four.py has what the processes do."""

import pytest

from tests.parallel.processes import off_by_parts, run_cases, value
from tests.tiny import checkpoint


@pytest.fixture(scope="module")
def outcomes():
    folders = {
        "plus": checkpoint("plus", heads=4),
        "zero_cond_t": checkpoint("plus", heads=4, zero_cond_t=True),
    }
    return run_cases("cases_four", 4, folders)


def test_the_order_of_the_mesh(outcomes):
    of_cfg, of_ulysses = zip(*value(outcomes, "mesh"), strict=True)
    assert of_cfg == ([0, 2], [1, 3], [0, 2], [1, 3])
    assert of_ulysses == ([0, 1], [0, 1], [2, 3], [2, 3])


def test_passes_with_fewer_tokens_than_processes(outcomes):
    """By tokens alone, and by tokens and heads."""
    assert max(value(outcomes, "passes")) <= 1e-14


def test_too_few_tokens_are_refused(outcomes):
    message = "1 tokens of text and 4 of the target do not go with parallel 'ulysses=2,tensor=2'"
    assert message in value(outcomes, "too_few_tokens")


def test_taps_are_whole_where_tokens_and_heads_are_shared(outcomes):
    assert value(outcomes, "taps_of_tokens_and_heads") == []
    assert max(value(outcomes, "heads")) <= 1e-14


def test_runs_are_equal(outcomes):
    found = value(outcomes, "runs")
    assert len(found) == 22
    few = off_by_parts(outcomes)
    assert not {name: x for name, x in found.items() if x > few}


def test_taps(outcomes):
    *apart, refusal = value(outcomes, "taps_and_a_tap_in_one")
    assert max(apart) <= off_by_parts(outcomes)
    assert "the processes differ in taps: process 3 has" in refusal


def test_a_failure_in_one_process_reaches_all(outcomes):
    *others, own = (outcome.value for outcome in outcomes["z_a_failure_reaches_all"])
    assert own == "ArithmeticError: of this process alone"
    for number, text in enumerate(others):
        assert text.startswith(f"ProcessLost: process {number} waited for process")
        assert text.endswith("process 3 failed with ArithmeticError: of this process alone")
