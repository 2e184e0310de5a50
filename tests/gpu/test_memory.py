"""Memory modes on the device: equal bits, streams that keep their order, and peaks against the plan."""

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.memory.plan import STAGES, plan
from qwenedit.memory.residency import Modes
from qwenedit.networks.mmdit import MMDiT
from tests.sparse import no_holes, write_sparse

PROMPT = "make the circle red"
BLOCKS = {"transformer": 6, "language": 4, "vision": 8}
EQUAL = [Modes("stage"), Modes("stream"), Modes("resident", "precomputed"), Modes("stream", "precomputed")]
ROUNDS = 20  # of streaming: a race shows now and then only


def load(source, device, mode, **options):
    return qwenedit.load(
        source, device=device, residency=mode.residency, modulation=mode.modulation, storage=mode.storage,
        progress=False, **options,
    )  # fmt: skip


def edited(pipe):
    example = Image.open(mini.EXAMPLE).convert("RGB")
    generator = torch.Generator().manual_seed(0)
    return pipe.edit(example, PROMPT, num_inference_steps=3, generator=generator, output_type="latent").images


@pytest.fixture(scope="module")
def resident(device):
    return edited(load(None, device, Modes("resident"), dtype="bfloat16"))


@pytest.mark.parametrize("mode", EQUAL, ids=str)
def test_every_mode_has_the_bits_of_the_resident_one(device, resident, mode):
    assert torch.equal(edited(load(None, device, mode, dtype="bfloat16")), resident)


def test_float8_is_close(device, resident):
    got = edited(load(None, device, Modes("resident", storage="float8"), dtype="bfloat16"))
    assert (got - resident).float().norm() < 0.2 * resident.float().norm()


def test_streaming_never_uses_a_block_that_has_not_arrived(device, resident):
    pipe = load(None, device, Modes("stream"), dtype="bfloat16")
    for _ in range(ROUNDS):
        assert torch.equal(edited(pipe), resident)


def test_streaming_beside_a_busy_device(device, resident):
    """The device is behind the host, so that a copy that does not wait would overtake a use."""
    pipe = load(None, device, Modes("stream"), dtype="bfloat16")
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(ROUNDS // 4):
        for _ in range(50):
            busy = (busy @ busy).tanh()
        assert torch.equal(edited(pipe), resident)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    if reason := no_holes(folder):
        pytest.skip(reason)
    return write_sparse(folder, blocks=BLOCKS)


@pytest.mark.parametrize("mode", [Modes("resident"), Modes("stage"), Modes("stream"), *EQUAL[2:]], ids=str)
def test_the_peak_is_what_is_planned(device, official, mode):
    """At the official width, with weights of zeros. cuBLAS's and cuDNN's own memory counts here."""
    planned = plan(official, device_memory="100GiB", pictures=1, steps=2, height=1024, width=1024).peaks[mode]
    picture = Image.new("RGB", (1024, 1024))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    pipe = load(official, device, mode)
    pipe.check_finite = False  # zeros over zeros in the guidance
    pipe.edit(picture, PROMPT, num_inference_steps=2, output_type="pt")
    got = torch.cuda.max_memory_allocated(device) - before
    wanted = max(planned[stage] for stage in STAGES)
    assert abs(got - wanted) < 0.15 * wanted, (got, wanted)
    assert isinstance(pipe.mmdit, MMDiT)
