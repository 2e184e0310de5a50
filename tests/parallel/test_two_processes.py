"""Runs that two processes share, against one process's. cases.py has what the processes do."""

import pytest

from qwenedit.parallel.spec import ParallelSpec, checked_spec, spec_of
from tests.parallel.processes import run_cases, value


@pytest.fixture(scope="module")
def outcomes():
    return run_cases("cases", 2)


def test_processes_meet_in_a_mesh(outcomes):
    assert value(outcomes, "mesh") == [2, [2, 1, 1], 1.0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cfg=2", ParallelSpec(cfg=2)),
        (" ulysses = 4 ,cfg=2,tensor=1", ParallelSpec(cfg=2, ulysses=4)),
        ("cfg=1", None),
        (None, None),
    ],
)
def test_a_spec_is_read(text, wanted):
    assert spec_of(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wanted AXIS=N"),
        ("cfg", "wanted AXIS=N"),
        ("ring=2", "'ring=2', wanted AXIS=N with one of cfg, ulysses, tensor"),
        ("cfg=2,cfg=2", "cfg twice"),
        ("ulysses=0", "ulysses is 0, wanted a whole number of at least 1"),
        ("ulysses=-2", "ulysses is '-2'"),
        ("ulysses=two", "ulysses is 'two'"),
        ("ulysses=٢", "ulysses is"),  # a digit, but not one of ours
        ("cfg=3", "cfg is 3, wanted 1 or 2"),
        (2, "parallel is int"),
    ],
)
def test_what_is_no_spec_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        spec_of(text)


def test_heads_that_cannot_be_shared_out_are_refused():
    ParallelSpec(ulysses=2, tensor=3).require_heads(12)
    with pytest.raises(ValueError, match="has 12 attention heads, which ulysses=4 times tensor=2 does not"):
        ParallelSpec(ulysses=4, tensor=2).require_heads(12)


def test_another_number_of_processes_is_refused_with_the_remedy():
    wanted = "wanted 4 processes, got 1: start with torchrun --nproc-per-node 4 -m qwenedit"
    with pytest.raises(ValueError, match=wanted):
        checked_spec("cfg=2,ulysses=2", compile=False)


def test_compiled_blocks_exchange_nothing():
    with pytest.raises(ValueError, match="compile=True does not go with parallel 'ulysses=2'"):
        checked_spec("ulysses=2", compile=True)


@pytest.mark.parametrize("mode", ["cfg", "ulysses"])
def test_equal(outcomes, mode):
    assert value(outcomes, mode) == 0
