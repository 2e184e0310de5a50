"""What a training takes: its parts from headers, what fits, and what is refused. The fake device counts."""

import re

import pytest
import torch

import qwenedit
import qwenedit.memory.train_plan as planning
from qwenedit.cli import options as cli
from qwenedit.memory.plan import SPARE, plan
from qwenedit.memory.residency import Modes
from qwenedit.memory.train_plan import STAGES, Training, train_plan
from qwenedit.weights.hub import HubError
from tests.sparse import no_holes, write_sparse
from tests.tiny import checkpoint

VALUES = 20_430_401_088  # of the official transformer
VAE = 253_785_062  # bytes in bfloat16


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    if reason := no_holes(folder):
        pytest.skip(reason)
    return write_sparse(folder)


def test_all_weights_take_eighteen_bytes_each_and_an_average_four_more(official):
    parts = train_plan(official, Training(lora=False), device_memory="80GiB").parts
    assert parts["weights"] == 2 * VALUES + VAE
    assert [parts[name] / VALUES for name in ("masters", "moments", "gradients")] == [4, 8, 4]
    assert parts["LoRA"] == parts["average"] == 0
    averaged = train_plan(official, Training(lora=False, ema=True), device_memory="80GiB")
    assert averaged.parts["average"] == 4 * VALUES
    assert averaged.peaks[True]["training step"] > 22 * VALUES
    wide = train_plan(official, Training(lora=False), device_memory="80GiB", dtype="float32").parts
    assert wide["weights"] == 4 * VALUES + 2 * VAE and wide["masters"] == 0  # they are their own masters


@pytest.mark.parametrize("targets", ["attention", "musubi", r"transformer_blocks\.1\..*|proj_out"])
def test_a_lora_has_the_matrices_that_are_added(targets):
    folder = checkpoint("plus")
    pipe = qwenedit.load(folder, device="cpu", progress=False)
    weights = sum(x.nbytes for network in (pipe.mmdit, pipe.vae) for x in network.parameters())
    name = pipe.add_lora(rank=5, targets=targets)
    parts = train_plan(folder, Training(lora=True, rank=5, targets=targets), device="cpu").parts
    assert parts["LoRA"] == sum(x.nbytes for x in pipe.lora_parameters(name).values())
    assert parts["moments"] == 2 * parts["LoRA"] and parts["masters"] == 0
    assert parts["weights"] == weights


def test_encoding_is_as_with_each_network_alone(official):
    made = train_plan(official, Training(lora=True), device_memory="80GiB").peaks[False]
    alone = plan(official, device_memory="80GiB").peaks[Modes("stage")]
    assert [made[stage] for stage in STAGES[:2]] == [alone[stage] for stage in STAGES[:2]]


def test_the_edited_picture_is_encoded_where_none_is_given():
    made = train_plan(checkpoint("generate"), Training(lora=True), device="cpu", height=64, width=64)
    alone = plan(checkpoint("generate"), device="cpu", height=64, width=64).peaks[Modes("stage")]
    assert made.peaks[False]["VAE encode"] > alone["VAE encode"]
    assert "64x64 from 0 pictures" in str(made)


@pytest.mark.parametrize(
    "memory, wanted", [("200GiB", False), ("48GiB", True), ("24GiB", None)]
)  # fmt: skip
def test_checkpointing_is_chosen_where_it_is_needed(official, memory, wanted):
    made = train_plan(official, Training(lora=True), device_memory=memory)
    assert made.checkpointing is wanted
    assert ("<- chosen" in str(made)) == (wanted is not None)
    if wanted is None:
        least = max(made.peaks[True].values()) / SPARE / 2**30
        assert f"nothing fits: wanted at least {least:.2f} GiB" in str(made)


def test_more_tokens_rows_and_layers_keep_more(official):
    def kept(training=None, **options):
        made = train_plan(official, training or Training(lora=True), device_memory="80GiB", **options)
        return made.parts["activations"]

    usual = kept()
    assert kept(pictures=2) > 1.4 * usual
    assert kept(Training(lora=True, batch=3)) == 3 * usual
    assert kept(height=512, width=512) < 0.3 * usual
    assert usual < kept(Training(lora=True, targets="ai_toolkit"))
    assert kept(Training(lora=True, targets=r"transformer_blocks\.5\d\..*")) < usual / 3


def test_bad_arguments(tmp_path):
    for options, message in (
        ({"rank": 0}, "rank is 0, wanted a whole number of at least 1"),
        ({"batch": "2"}, "batch is '2', wanted a whole number"),
        ({"targets": "nothing"}, "targets are 'nothing', which matches no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            train_plan(None, Training(lora=True, **options))
    for options, message in (
        ({"pictures": 2}, "pictures for Qwen-Image-Edit is 2, wanted at most 1"),
        ({"height": 100}, "height is 100, wanted a positive multiple of 16"),
        ({"device_memory": "lots"}, "device_memory is 'lots'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_plan(None, Training(lora=True), **options)
    with pytest.raises(ValueError, match="wanted another checkpoint than Qwen-Image-Layered"):
        train_plan(checkpoint("layered"), Training(lora=True))
    with pytest.raises(ValueError, match="no checkpoint at"):
        train_plan(tmp_path / "absent", Training(lora=True))


def test_the_command_line(official, capsys):
    arguments = ["plan", str(official), "--device-memory", "80GB", "--train", "lora", "--batch", "2"]
    assert cli.main([*arguments, "--rank", "8", "--targets", "musubi"]) == 0
    printed = capsys.readouterr().out
    assert "a LoRA of rank 8 on musubi, 2 at a time, 1024x1024 from 1 picture, as stored" in printed
    (line,) = [line for line in printed.splitlines() if "<- chosen" in line]
    assert line.split()[:2] == ["activation", "checkpointing"]
    assert re.search(r"holds, in GiB: weights 38\.29, LoRA 0\.\d\d, moments", printed)
    assert cli.main(["plan", "--train", "whole", "--ema"]) == 0
    assert "all weights, 1 at a time, with a moving average, 64x64" in capsys.readouterr().out
    for bad, message in (
        (["--rank", "4"], "--rank is of a training, wanted --train beside it"),
        (["--train", "whole", "--targets", "musubi"], "--targets has no part in this training"),
        (["--train", "lora", "--controlnet", "org/name"], "--controlnet has no part in this training"),
        (["--train", "lora", "--rank", "0"], "rank is 0, wanted a whole number"),
    ):
        assert cli.main(["plan", *bad]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("unreached", [True, False])
def test_what_is_not_here_is_a_download_even_without_headers(monkeypatch, unreached):
    def fail(*_arguments, **_options):
        raise HubError("the hub is asleep", unreached=unreached)

    monkeypatch.setattr(planning, "is_local", lambda *_, **__: False)
    monkeypatch.setattr(planning, "download_plan", lambda *_, **__: "somebody/a-model: 3 files, 57 bytes")
    monkeypatch.setattr(planning, "remote_headers", fail)
    if not unreached:
        with pytest.raises(HubError, match="the hub is asleep"):
            train_plan("somebody/a-model", Training(lora=True))
        return
    made = train_plan("somebody/a-model", Training(lora=True))
    assert str(made).startswith("somebody/a-model: 3 files, 57 bytes\n") and made.checkpointing is None


def test_headers_of_a_hub_id_are_enough(monkeypatch):
    folder = checkpoint("plus")

    class Headers:
        def __enter__(self):
            return folder

        def __exit__(self, *_error):
            pass

    here = planning.is_local
    monkeypatch.setattr(planning, "is_local", lambda source, *_, **__: source == folder and here(folder))
    monkeypatch.setattr(planning, "download_plan", lambda *_, **__: "somebody/a-model: 57 bytes")
    monkeypatch.setattr(planning, "remote_headers", lambda *_, **__: Headers())
    made = train_plan("somebody/a-model", Training(lora=True, rank=2), dtype=torch.float32)
    assert made.source == "somebody/a-model" and str(made).endswith("57 bytes")
    assert made.peaks == train_plan(folder, Training(lora=True, rank=2), dtype=torch.float32).peaks
