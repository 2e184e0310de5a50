"""What each of several processes needs, at the official size, from headers."""

import pytest

from qwenedit.cli import options as cli
from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from qwenedit.parallel.spec import spec_of
from tests.memory.test_plan import BLOCK, LM_HEAD, REST, TEXT_ENCODER, TRANSFORMER, VAE, official  # noqa: F401

TEXT = TEXT_ENCODER - LM_HEAD
RESIDENT = Modes("resident")
TEXT_REST = 151_667 * 3584 * 2  # its embeddings, which are not split, and little more


def planned(folder, parallel=None, **options):
    return plan(folder, device_memory="80GiB", parallel=spec_of(parallel), **options)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_weights_are_split(official, count):  # noqa: F811
    """In the stage that computes the same in every mode and keeps all weights, decoding."""
    whole = planned(official).peaks[RESIDENT]["VAE decode"]
    tensor = planned(official, f"tensor={count}").peaks[RESIDENT]["VAE decode"]
    split = planned(official, f"ulysses={count}", split_weights=True).peaks[RESIDENT]["VAE decode"]
    own = TRANSFORMER * (count - 1) / count
    assert whole - tensor == pytest.approx(own, rel=0.01)  # but for what is in no block
    assert whole - split == pytest.approx(own + (TEXT - TEXT_REST) * (count - 1) / count, rel=0.01)


def test_what_is_gathered_counts_while_it_is(official):  # noqa: F811
    alone, shared = (
        planned(official, "cfg=2", split_weights=split).peaks[RESIDENT] for split in (False, True)
    )
    kept = alone["VAE decode"] - shared["VAE decode"]
    assert alone["sampling"] - shared["sampling"] == kept - 2 * BLOCK - REST
    assert alone["VAE encode"] - shared["VAE encode"] == kept
    assert 0 < kept - (alone["text encoding"] - shared["text encoding"]) < 2**30  # two blocks of 28


def test_tokens_and_heads_are_shared(official):  # noqa: F811
    whole = planned(official).peaks
    assert planned(official, "cfg=2").peaks == whole
    ulysses = [planned(official, f"ulysses={count}").peaks for count in (2, 4)]
    assert ulysses[0].keys() == whole.keys()  # every mode goes with it
    for mode in whole:
        sampling = [one[mode]["sampling"] for one in (whole, *ulysses)]
        assert sampling[0] > sampling[1] > sampling[2]
        assert all(ulysses[1][mode][stage] == whole[mode][stage] for stage in STAGES if stage != "sampling")
    assert list(planned(official, "tensor=2").peaks) == [RESIDENT]
    assert list(planned(official, "cfg=2", split_weights=True).peaks) == [RESIDENT]
    assert VAE < planned(official, "tensor=8").peaks[RESIDENT]["VAE encode"]


def test_the_command_says_it_of_each_process(official, capsys):  # noqa: F811
    arguments = ["plan", str(official), "--device-memory", "80GiB"]
    assert cli.main([*arguments, "--parallel", "cfg=2,ulysses=2", "--split-weights"]) == 0
    said = capsys.readouterr().out
    assert "each of 4 processes (cfg=2,ulysses=2, split weights)" in said and "resident" in said
    assert "stage" not in said and "<- chosen" in said


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--split-weights"], "wanted parallel, too"),
        (["--split-weights", "--parallel", "tensor=2"], "both split the weights"),
        (["--parallel", "ulysses=5"], "ulysses=5 times tensor=1 does not divide"),
        (["--parallel", "cfg=3"], "wanted 1 or 2"),
        (["--parallel", "cfg=2", "--train", "lora"], "--parallel has no part in this training"),
    ],
)
def test_what_cannot_be_is_one_line(official, capsys, options, wanted):  # noqa: F811
    assert cli.main(["plan", str(official), "--device-memory", "80GiB", *options]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1
