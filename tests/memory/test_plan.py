"""What fits: sizes from headers, peaks by mode and stage, and the mode that is chosen."""

import re
from pathlib import Path

import pytest
import torch

import qwenedit
import qwenedit.memory.plan as planning
from qwenedit import mini
from qwenedit.checks import device_of
from qwenedit.cli import options as cli
from qwenedit.memory import machine
from qwenedit.memory.machine import host_free, parse_bytes
from qwenedit.memory.plan import STAGES, choose, plan
from qwenedit.memory.residency import Modes
from qwenedit.memory.sizes import network_sizes
from qwenedit.networks.mmdit import MMDiT
from qwenedit.sampling.precomputed import PrecomputedCache
from qwenedit.taps import taps
from qwenedit.weights.checkpoints import COMPONENTS
from qwenedit.weights.hub import HubError
from qwenedit.weights.loading import compare_networks, read_networks
from tests.sparse import no_holes, write_sparse
from tests.tiny import checkpoint, picture

GIB = 2**30
TRANSFORMER, TEXT_ENCODER, LM_HEAD, VAE = 40_860_802_176, 16_584_333_312, 2 * 544_997_376, 253_785_062
MODULATION, BLOCK, REST = 2 * 6_796_984_320, 2 * 339_831_296, 2 * 40_523_328


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    if reason := no_holes(folder):
        pytest.skip(reason)
    return write_sparse(folder)


def weights_at(made, mode, stage):
    """What is planned beyond the stage's own computation, which no mode changes."""
    whole = Modes("resident")
    all_weights = TRANSFORMER + TEXT_ENCODER - LM_HEAD + VAE
    return made.peaks[mode][stage] - (made.peaks[whole][stage] - all_weights)


def test_weights_of_every_mode_are_the_published_sizes(official):
    made = plan(official, device_memory="80GiB")
    table = 50 * 60 * 3 * (18432 + 2 * 3072) * 2  # 2511 has that of the references besides
    text = TEXT_ENCODER - LM_HEAD
    at = {(mode, stage): weights_at(made, mode, stage) for mode in made.peaks for stage in STAGES}
    precomputed = Modes("resident", "precomputed")
    assert at[precomputed, "sampling"] == TRANSFORMER - MODULATION + table + text + VAE
    stage = Modes("stage")
    assert [at[stage, one] for one in STAGES] == [text, VAE, TRANSFORMER, VAE]
    stream = Modes("stream")
    assert at[stream, "sampling"] == 2 * BLOCK + REST and at[stream, "VAE decode"] == VAE
    assert at[stream, "text encoding"] < 3 * GIB
    both = Modes("stream", "precomputed")
    assert at[both, "sampling"] == 2 * (BLOCK - MODULATION // 60) + REST + table
    float8 = at[Modes("stage", storage="float8"), "sampling"]
    assert TRANSFORMER // 2 < float8 - 2 * BLOCK < 0.51 * TRANSFORMER  # two blocks are widened at a time
    assert at[Modes("stage", storage="float8"), "text encoding"] < 0.6 * text


@pytest.mark.parametrize(
    "memory, wanted",
    [
        ("80GiB", Modes("resident")),
        ("48GiB", Modes("resident", "precomputed")),
        ("42GiB", Modes("stage")),
        ("32GiB", Modes("stage", "precomputed")),
        ("24GiB", Modes("stream")),
        ("1GiB", None),
    ],
)
def test_the_fastest_mode_that_fits_is_chosen(official, memory, wanted):
    made = plan(official, device_memory=memory)
    assert made.mode == wanted
    assert ("<- chosen" in str(made)) == (wanted is not None)
    if wanted is None:
        assert re.search(r"nothing fits: wanted at least \d\.\d\d GiB", str(made))


def test_the_dtype_decides_and_more_tokens_take_more(official):
    stored, wide = (plan(official, device_memory="80g", dtype=dtype) for dtype in (None, "float32"))
    assert wide.peaks[Modes("stage")]["sampling"] > 1.9 * stored.peaks[Modes("stage")]["sampling"]
    on_cpu = plan(official, host_memory="200g", device="cpu")
    assert on_cpu.peaks == plan(official, host_memory="200g", device="cpu", dtype="float32").peaks
    assert on_cpu.peaks[Modes("stage")]["sampling"] > wide.peaks[Modes("stage")]["sampling"]  # other kernels
    peaks = [
        plan(official, device_memory="80g", **options).peaks[Modes("stage")]
        for options in ({"pictures": 0}, {"pictures": 1}, {"pictures": 3}, {"height": 1536, "width": 1536})
    ]
    sampling = [one["sampling"] for one in peaks]
    assert sampling[0] < sampling[1] < sampling[2] and sampling[1] < sampling[3]
    assert peaks[1]["VAE decode"] == peaks[2]["VAE decode"] < peaks[3]["VAE decode"]


def test_weights_are_those_that_are_loaded():
    folder = checkpoint("plus")
    for dtype in (torch.float32, torch.bfloat16, None):
        compared = compare_networks(folder, list(COMPONENTS))
        planned = network_sizes({one.report.component: one.found for one in compared}, dtype)
        loaded = read_networks(compared, device=torch.device("cpu"), dtype=dtype, progress=False)
        for (component, weights), network in zip(planned.items(), loaded, strict=True):
            assert weights.all == sum(x.nbytes for x in network.parameters()), component
            if isinstance(network, MMDiT):
                block = network.blocks[0]
                own = [block.img_mod.linear, block.txt_mod.linear]
                assert len(weights.blocks) == len(network.blocks)
                first = weights.blocks["blocks.0."]
                assert first.all == sum(x.nbytes for x in block.parameters())
                assert first.modulation == sum(x.nbytes for one in own for x in one.parameters())


def test_modes_in_words():
    assert str(Modes()) == "resident" and str(Modes("stage", "precomputed")) == "stage, precomputed"
    assert str(Modes("stage", "precomputed", "float8")) == "stage, precomputed, float8"


def chosen(folder, dtype=torch.bfloat16, *, text_encoder=True, **modes):
    """The residency that "auto" becomes on the CPU."""
    names = [name for name in COMPONENTS if text_encoder or name != "text_encoder"]
    found = {one.report.component: one.found for one in compare_networks(folder, names)}
    return choose(Modes("auto", **modes), folder, found, device=torch.device("cpu"), dtype=dtype).residency


def test_a_small_model_is_resident(monkeypatch):
    for folder in (mini.CHECKPOINT, checkpoint("edit"), checkpoint("generate")):
        assert chosen(folder) == "resident"
        assert plan(folder).mode == Modes("resident")
    monkeypatch.setattr(planning, "host_free", lambda: 1)
    assert chosen(mini.CHECKPOINT) == "resident"


def test_a_fault_of_the_plan_is_not_hidden(monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("a fault")

    monkeypatch.setattr(planning, "_SMALL", 0)
    monkeypatch.setattr(planning, "activations", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        qwenedit.load(mini.CHECKPOINT, device="cpu", progress=False)


@pytest.mark.parametrize("free, wanted", [(80, "resident"), (48, "stage"), (24, "stream"), (1, "stream")])
def test_the_residency_that_load_chooses(official, monkeypatch, free, wanted):
    monkeypatch.setattr(planning, "host_free", lambda: free * GIB)
    assert chosen(official) == wanted


@pytest.mark.parametrize(
    "free, how, wanted",
    [
        (48, {"storage": "float8"}, "resident"),
        (24, {"storage": "float8"}, "stage"),
        (1, {"storage": "float8"}, "stage"),  # "stream" keeps nothing that could be stored
        (48, {"modulation": "precomputed"}, "resident"),
        (32, {"modulation": "precomputed"}, "stage"),
        (32, {}, "stream"),
    ],
)
def test_the_residency_depends_on_the_other_modes(official, monkeypatch, free, how, wanted):
    monkeypatch.setattr(planning, "host_free", lambda: free * GIB)
    assert chosen(official, **how) == wanted


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_precomputed_modulation_takes_what_is_planned(zero_cond_t):
    folder = checkpoint("plus", zero_cond_t=zero_cond_t)
    pipe = qwenedit.load(folder, device="cpu", modulation="precomputed", progress=False)
    cache = PrecomputedCache([1.0, 0.7, 0.3])
    with torch.no_grad():
        cache.modulation(pipe.mmdit, torch.ones(1), torch.float32, None)
    kept = [
        x.untyped_storage()
        for step in cache._ahead.values()
        for block in step.blocks
        for parts in block
        for part in parts
        for x in part
    ]
    size = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
    assert size == planning._table(folder, torch.float32, 3)


def test_layered_has_a_frame_for_each_layer_and_one_more():
    folder, seen = checkpoint("layered"), []
    pipe = qwenedit.load(folder, device="cpu", progress=False)
    with taps(pipe.mmdit, {"img_in": lambda x, site: seen.append(x.shape[1])}):
        pipe.decompose(picture(60, 60), "a fox", layers=3, resolution=64, num_inference_steps=1)
    made = plan(folder, device="cpu", layers=3, height=64, width=64)
    peaks, fewer = (
        plan(folder, device="cpu", layers=layers, height=64, width=64).peaks[Modes("resident")]
        for layers in (3, 2)
    )
    weights = sum(x.nbytes for net in (pipe.mmdit, pipe.vae, pipe.vision_language) for x in net.parameters())
    computed = peaks["sampling"] - weights - planning.LIBRARIES
    assert computed == (seen[0] + 100) * pipe.mmdit.config.width * 20 * 4 and seen[0] == (4 + 1) * 16
    one = round(64 * 64 * pipe.vae.config.base_dim * 5.8 * 4)
    assert abs(peaks["VAE decode"] - fewer["VAE decode"] - one) <= 1
    text = plan(checkpoint("generate"), device="cpu").peaks[Modes("stage")]["text encoding"]
    assert made.peaks[Modes("stage")]["text encoding"] == text  # it sees no picture
    assert "3 layers of 64x64 from 1 picture" in str(made)
    assert "4 layers of 640x640 from 1 picture" in str(plan(folder, device="cpu"))
    for options, message in (({"pictures": 0}, "pictures for Qwen-Image-Layered is 0, wanted"),
                             ({"layers": 0}, "layers is 0"), ({"height": 100}, "height is 100")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            plan(folder, **options)


def test_without_a_text_encoder(official, monkeypatch):
    monkeypatch.setattr(planning, "host_free", lambda: 48 * GIB)
    assert chosen(official) == "stage"
    assert chosen(official, text_encoder=False) == "resident"
    assert plan(official, device_memory="48GiB", text_encoder=False).mode == Modes("resident")


@pytest.mark.parametrize(
    "text, wanted",
    [("24GiB", 24 * GIB), ("24GB", 24 * GIB), ("24g", 24 * GIB), (" 1.5 GiB", GIB * 3 // 2), ("512M", 2**29),
     ("1073741824", GIB), (GIB, GIB), ("2tib", 2 * 2**40), ("64k", 2**16), ("100B", 100)],
)  # fmt: skip
def test_sizes(text, wanted):
    assert parse_bytes("device_memory", text) == wanted


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "24 potatoes", "0", 0, -1, True, "1e9", "nan", "0.1B"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=re.escape(f"host_memory is {text!r}, wanted a size such as 24GiB")):
        parse_bytes("host_memory", text)


def test_the_memory_of_the_machine(monkeypatch, tmp_path):
    assert 0 < host_free() < 2**50
    limit, used = tmp_path / "limit", tmp_path / "used"
    limit.write_text("5000\n")
    used.write_text("2000\n")
    monkeypatch.setattr(machine, "_CGROUPS", ((str(limit), str(used)),))
    assert host_free() == 3000
    limit.write_text("max\n")
    assert host_free() > 3000


def test_bad_arguments(tmp_path):
    for options, message in (
        ({"pictures": 2}, "pictures for Qwen-Image-Edit is 2, wanted at most 1"),
        ({"pictures": True}, "pictures for Qwen-Image-Edit is True, wanted a whole number"),
        ({"height": 100}, "height is 100, wanted a positive multiple of 16"),
        ({"steps": 0}, "steps is 0"),
        ({"device_memory": "lots"}, "device_memory is 'lots'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**options)
    with pytest.raises(ValueError, match="no checkpoint at"):
        plan(tmp_path / "absent")


def test_the_command_line(official, capsys):
    assert cli.main(["plan"]) == 0
    printed = capsys.readouterr().out
    on = "CPU" if device_of(None).type == "cpu" else "accelerator"
    assert printed.startswith("the embedded model: 64x64 from 1 picture, ") and f"on the {on}" in printed
    arguments = ["plan", str(official), "--device-memory", "24GB", "--height", "512", "--width", "768"]
    assert cli.main([*arguments, "--pictures", "3"]) == 0
    printed = capsys.readouterr().out
    assert "768x512 from 3 pictures, as stored, 24.00 GiB on the accelerator" in printed
    (line,) = [line for line in printed.splitlines() if "<- chosen" in line]
    assert line.split()[0] == "stream"
    assert cli.main(["plan", "--device-memory", "big"]) == 2
    assert capsys.readouterr().err == "qwenedit: device_memory is 'big', wanted a size such as 24GiB\n"


@pytest.mark.parametrize("unreached", [True, False])
def test_what_is_not_here_is_a_download_even_without_headers(monkeypatch, unreached):
    def fail(*_arguments, **_options):
        raise HubError("the hub is asleep", unreached=unreached)

    monkeypatch.setattr(planning, "is_local", lambda *_, **__: False)
    monkeypatch.setattr(planning, "download_plan", lambda *_, **__: "somebody/a-model: 3 files, 57 bytes")
    monkeypatch.setattr(planning, "remote_headers", fail)
    if not unreached:
        with pytest.raises(HubError, match="the hub is asleep"):
            plan("somebody/a-model")
        return
    made = plan("somebody/a-model", files={"vae": Path("x")})
    assert str(made).startswith("somebody/a-model: 3 files, 57 bytes\n") and made.mode is None
    assert "headers are not to be had: the hub is asleep\n" in str(made)
