"""The code that one reads is the code that runs. what_runs.py does the work; it also runs as a script."""

import textwrap

import pytest
import torch

from tests import what_runs


@pytest.fixture(scope="module")
def outcomes():
    return list(what_runs.outcomes())


def names(outcomes):
    return [f"{outcome.name} ({outcome.file})" for outcome in outcomes]


def test_all_forwards_are_tried(outcomes):
    assert all(file.exists() for file in what_runs.network_files())
    assert len(outcomes) >= 20
    assert [(outcome.file, outcome.name) for outcome in outcomes] == what_runs.forwards()


def test_a_changed_forward_changes_a_run(outcomes):
    assert outcomes
    assert not names(outcome for outcome in outcomes if outcome.run == "-")


def test_a1_a_changed_forward_acts_in_every_mode(outcomes):
    """The transformer's modes are memory modes; the VAE's are its two directions, for pictures and videos."""
    assert {mode for outcome in outcomes for mode in outcome.modes} == set(what_runs.MODES)
    for outcome in outcomes:
        if outcome.file.endswith("mmdit.py"):
            assert {"resident", "stream", "precomputed", "float8"} <= set(outcome.modes), outcome.name
    unchanged = {name: outcome.unchanged for name, outcome in zip(names(outcomes), outcomes, strict=True)}
    assert not {name: modes for name, modes in unchanged.items() if modes}


def test_what_is_changed_is_what_forward_returns():
    source = textwrap.dedent('''
        import torch

        class Other:
            def forward(self, x):
                return x

        class Layer:
            def forward(self, x, pair=False):
                def inner(y):
                    return y
                if pair:
                    return inner(x), (
                        torch.tensor(3)
                    )
                return (
                    "é" and inner(x)  # é is two bytes
                )
    ''')  # fmt: skip
    layer, other = (what_runs.changed(source, name) for name in ("Layer", "Other"))
    assert layer.count("_times_1_01((") == 2 and other.count("_times_1_01((") == 1
    spaces = [{}, {}]
    for text, space in zip((layer, other), spaces, strict=True):
        exec(text, space)
    x = torch.ones(2)
    for name, space, wanted in (
        ("Layer", spaces[0], 1.01),
        ("Layer", spaces[1], 1),
        ("Other", spaces[1], 1.01),
    ):
        assert torch.equal(space[name]().forward(x), x * wanted)
    first, second = spaces[0]["Layer"]().forward(x, pair=True)
    assert torch.equal(first, x * 1.01) and torch.equal(second, torch.tensor(3))
    with pytest.raises(ValueError, match="0 classes Missing"):
        what_runs.changed(source, "Missing")
