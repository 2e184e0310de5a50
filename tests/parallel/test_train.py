"""Training by two processes: gradients are those of one, and a run that was stopped goes on bit by bit."""

import json

import pytest
from PIL import Image

from qwenedit.training.run import train
from tests.parallel.processes import run_cases, value
from tests.tiny import checkpoint
from tests.training.pairs import log_of, spec_of, write_pairs, write_table


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs, a run of one process; and beside them weighted rows, whose references have several sizes."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = write_pairs(folder / "several", 5)
    for k, row in enumerate(rows):
        first = f"first {k}.png"
        Image.open(folder / "several" / row["control"]).resize((96, 48 if k == 2 else 64)).save(
            folder / "several" / first
        )
        row["control"] = [first, row["control"]]
    Image.linear_gradient("L").resize((64, 64)).save(folder / "several" / "mask.png")
    rows[1]["mask"] = rows[4]["mask"] = "mask.png"
    write_table(folder / "several", rows)
    write_pairs(folder, 5)
    spec = {"steps": 1, "batch": 2, "accumulate": 2, "report_every": 1, "rate": 1e-2, "dtype": "float32"}
    train(spec_of(folder, output=str(folder / "one"), cache=str(folder / "cache"), **spec), device="cpu")
    return folder


@pytest.fixture(scope="module")
def outcomes(pairs):
    return run_cases("cases_train", 2, {"pairs": pairs, "plus": checkpoint("plus", heads=4)})


def test_gradients_are_those_of_one_process(outcomes):
    """In float64: sums in another order. The second step has one row, so the second process has no share.

    In the first one, references of several sizes make several forwards of a micro-batch, and not as many in
    both processes.
    """
    errors, counts = next(outcome.value for outcome in outcomes["gradients"])
    assert outcomes["gradients"][0].error is None, outcomes["gradients"][0].trace
    assert len(errors) == 4 and max(errors.values()) <= 1e-14, errors
    first, second = counts
    assert first[0][0] == 2 and first[1][0] == 1  # micro-batches of the steps
    assert [one[1] for one in first] == [one[1] for one in second]  # everyone has as many forwards
    assert second[1][2] == second[1][1] and first[1][2] == 0
    assert first[0][1] > 1 and first[0][2] + second[0][2] > 0


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(outcomes, kind):
    equal, logs, before, after = value(outcomes, f"resumed_{kind}")
    assert equal and all(equal.values()) and logs, equal
    assert before == ["state-00000001"] and after == ["state-00000002"]


def test_the_run_is_that_of_one_process(outcomes, pairs):
    """Up to the order of sums: the first loss and norm, before they have an effect."""
    value(outcomes, "resumed_lora")
    one, two = log_of(pairs / "one")[0], log_of(pairs / "lora straight")[0]
    assert one.keys() == two.keys()
    assert all(two[name] == pytest.approx(one[name], rel=1e-5) for name in one), (one, two)
    assert [line["step"] for line in log_of(pairs / "lora straight")] == [1, 2]


def test_one_process_does_not_go_on_with_the_state_of_several(outcomes, pairs):
    value(outcomes, "resumed_lora")
    settings = json.loads((pairs / "lora straight" / "spec.json").read_text())["settings"]
    assert settings["accumulate"] == 2
    spec = {"steps": 2, "batch": 2, "accumulate": 2, "report_every": 1, "rate": 1e-2, "dtype": "float32"}
    output = {"output": str(pairs / "lora straight"), "cache": str(pairs / "cache")}
    with pytest.raises(ValueError, match="a state of several processes: go on with torchrun"):
        train(spec_of(pairs, **output, **spec), device="cpu", progress=False)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("accumulate", "accumulate is 1, wanted at least 2, the number of processes"),
        ("pipe", "there are a pipe and 2 processes"),
        ("of one", "has a state of one process: go on with one"),
    ],
)
def test_what_cannot_be_is_refused(outcomes, what, wanted):
    assert wanted in value(outcomes, "what_is_refused")[what]
