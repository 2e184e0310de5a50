"""Runs that two processes share, against one process's. cases.py has what the processes do."""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from qwenedit.memory.residency import Modes
from qwenedit.parallel import processes
from qwenedit.parallel.digest import described
from qwenedit.parallel.processes import Processes, ProcessLost, begin, meet, own_device
from qwenedit.parallel.runs import agree
from qwenedit.parallel.spec import ParallelSpec, checked_spec, spec_of
from tests.parallel.processes import RUN, off_by_parts, run_cases, value
from tests.tiny import checkpoint


@pytest.fixture(scope="module")
def outcomes():
    folders = {
        "plus": checkpoint("plus", heads=4),
        "edit": checkpoint("edit", heads=4),
        "zero_cond_t": checkpoint("plus", heads=4, zero_cond_t=True),
        "layered": checkpoint("layered", heads=4),
        "three heads": checkpoint("plus", heads=3),
    }
    return run_cases("cases", 2, folders)


def test_networks_that_were_moved_are_refused():
    with FakeTensorMode():
        network = torch.nn.Module()
        network.weight = torch.nn.Parameter(torch.empty(2, device="cuda"))
    processes = SimpleNamespace(device=torch.device("cpu"), spec=spec_of("ulysses=2"))
    with pytest.raises(ValueError, match=r"on cuda, but .* on cpu: wanted load\(.*device='cuda'\)"):
        agree(processes, None, SimpleNamespace(guidance=None), [network], None)


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


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="parallel 'cfg=2' on the device mps, wanted cpu or cuda"):
        meet("cfg=2", torch.device("mps"), compile=False, split_weights=False, modes=Modes())


def test_a_process_has_the_gpu_with_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "device_of", torch.device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for given in (None, "cuda", torch.device("cuda")):
        assert own_device(given) == torch.device("cuda:1")
    assert own_device("cuda:0") == torch.device("cuda:0")
    assert own_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match="LOCAL_RANK is 2, and this process sees 2 GPUs: wanted no more processes"
    ):
        own_device("cuda")


def test_the_gpu_is_current_in_a_group_of_the_callers(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    begin(torch.device("cuda:1"), 2)
    assert current == [torch.device("cuda:1")]


def test_after_a_lost_run_errors_are_still_the_callers(monkeypatch):
    monkeypatch.setattr(Processes, "agreed", 0)
    left = object.__new__(Processes)  # no process group: it has been left
    left.rank = 0
    with pytest.raises(ValueError, match="bad height"), left.in_one_run():
        raise ValueError("bad height")
    with pytest.raises(ProcessLost, match="process 0 left the others"), left.waiting("ulysses", "heads"):
        pass


def test_pictures_of_other_colours_differ():
    red, blue = (Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert described(red) == described(red.copy()) != described(blue)


def test_compiled_blocks_exchange_nothing():
    with pytest.raises(ValueError, match="compile=True does not go with parallel 'ulysses=2'"):
        checked_spec("ulysses=2", compile=True)


# --- the networks: ulysses


ONE_ROW = ("one image token", "one reference token", "layers")  # where a process has a single row of a matrix
# Some kernels for a single row sum in another order: float32's rounding of a few hundred terms.
# Some processors have an order for each number of rows. There `off_by_parts` allows each part of the tokens
# the same: last digits of the dtype in one pass, in guided runs RUN, as for `tensor=2` with its other order
# of sums. What is no rounding is caught in float64, below.
PASS_BITS = 8


def test_a_process_holds_half(outcomes):
    held = value(outcomes, "a_process_holds_half")
    assert held == {
        "blocks.0.img_norm1": [2, 12, 48],  # of 24 tokens
        "blocks.0.attn.img_q": [2, 12, 48],
        "blocks.0.attn.img_out": [2, 12, 48],
        "blocks.1.txt_mlp.up": [2, 3, 48],  # of 6
    }


def test_passes_are_equal(outcomes):
    for dtype in ("float32", "bfloat16"):
        found = value(outcomes, dtype)
        assert len(found) == 21
        few = off_by_parts(outcomes, PASS_BITS * torch.finfo(getattr(torch, dtype)).eps)
        apart = {name: x for name, x in found.items() if x > few and not name.startswith(ONE_ROW)}
        assert not apart, dtype
    assert max(value(outcomes, "float32").values()) < 1e-6


def test_passes_in_float64(outcomes):
    assert max(value(outcomes, "float64").values()) <= 1e-14


@pytest.mark.parametrize(
    "where", ["of_the_transformer", "of_a_controlnet", "of_a_blockwise_controlnet", "under_tensor"]
)
def test_every_tap_is_whole_and_writes_act(outcomes, where):
    assert value(outcomes, f"every_tap_{where}") == []


def test_control_add_is_whole(outcomes):
    assert value(outcomes, "control_add_is_whole") == [0, 0, 0, 0, 0]


def test_maps_a_few_heads_at_a_time(outcomes):
    for mode in ("", "_under_tensor"):
        assert max(value(outcomes, f"heads_at_a_time{mode}")) <= 1e-14


def test_attention_maps(outcomes):
    assert value(outcomes, "instruments_of_attention") <= 1e-14


def test_gradients_are_refused(outcomes):
    assert "gradients do not cross processes: wrap the run" in value(outcomes, "gradients_are_refused")


# --- runs: cfg and ulysses


def too_far(found, mode, bound):
    """The runs of a mode that are off by more."""
    return {name: x for name, x in found.items() if name.endswith(mode) and x > bound}


def test_runs_are_equal(outcomes):
    found = value(outcomes, "runs")
    assert len(found) > 70
    assert not too_far(found, "cfg=2", 0)
    assert not too_far(found, "ulysses=2", off_by_parts(outcomes))


def test_runs_with_split_weights_are_equal_or_refused(outcomes):
    """With tensor parallelism sums over heads and inside MLPs are in another order."""
    found = value(outcomes, "runs_with_split_weights")
    rounding = found.pop("rounding to bfloat16")
    refusals = {name: found.pop(name) for name in list(found) if isinstance(found[name], str)}
    of_lora = refusals.pop("lora: tensor=2")
    assert "splits layers, and a LoRA is beside them: call fuse_lora" in of_lora
    modes = ("stage", "stream", "float8")
    assert set(refusals) == {f"{name}: {mode}" for name in modes for mode in ("ulysses=2", "tensor=2")}
    assert all("wanted residency='resident', modulation='live'" in text for text in refusals.values())
    assert not too_far(found, "ulysses=2", off_by_parts(outcomes))
    assert found.pop("bfloat16: tensor=2") < 2 * rounding
    assert len(found) > 60 and not too_far(found, "tensor=2", RUN)


def test_layers_are_equal(outcomes):
    of_cfg, of_ulysses = value(outcomes, "layers")
    assert of_cfg == 0 and of_ulysses <= off_by_parts(outcomes)


def test_parts_of_a_run_are_equal(outcomes):
    found = value(outcomes, "parts")
    assert found.keys() == {"cfg=2", "ulysses=2"} and not any(found["cfg=2"])
    assert max(found["ulysses=2"]) <= off_by_parts(outcomes)


def test_without_a_generator_all_draw_the_noise_of_the_first(outcomes):
    of_cfg, of_ulysses = value(outcomes, "without_a_generator")
    assert of_cfg == 0 and of_ulysses <= off_by_parts(outcomes)


def test_a_branch_is_run_once_and_caches_stay(outcomes):
    """Step-invariant tensors, time embeddings, modulations of blocks, blocks: in 3 steps of 2 blocks."""
    assert value(outcomes, "memory_and_branches") == {
        "None": [2, 3, 6, 12], "cfg=2": [1, 3, 6, 6], "ulysses=2": [2, 3, 6, 12]
    }  # fmt: skip


def test_first_block_cache(outcomes):
    apart, alone, shared = value(outcomes, "first_block_cache")
    assert apart == 0 and alone[1] > 0 and alone == [2 * count for count in shared]


def test_instruments(outcomes):
    """Pictures, records, and how many there are; a process sees one branch under cfg, both under ulysses."""
    found = value(outcomes, "instruments")
    assert found == {"cfg=2": [0, 0, 0.5, 0.5, 1], "ulysses=2": [0, 0, 1, 1, 2]}


def test_maps_of_a_branch_are_where_it_runs(outcomes):
    assert value(outcomes, "maps_of_one_branch") == [True, True]


def test_copies(outcomes):
    apart, refusal = value(outcomes, "copies")
    assert apart <= off_by_parts(outcomes)
    assert refusal == "ValueError: a pipeline that processes share cannot be pickled: load it in each of them"


# --- refusals


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two threads", "another thread's run has not ended: processes share one run at a time"),
        ("another's net", "ValueError: a network of this run is shared in another pipeline's way"),
        ("explore", "ValueError: explore looks inside one process's run"),
        ("batch", "ValueError: batch makes edits in one process.*load it without parallel"),
        ("no guidance", "ValueError: parallel 'cfg=2' .* has none: wanted a true_cfg_scale above 1"),
        ("a tap in one", r"differ in taps: process 1 has ..blocks.0.img_out.., process 0 \[\];"),
        ("a tap in one, cfg", r"differ in taps: process 1 has ..blocks.0.img_out.., process 0 \[\];"),
        ("other seeds", "differ in generator: process 1 has"),
        ("other steps", "differ in num_inference_steps: process 1 has 3, process 0 2; all of them"),
        ("other parts of a batch", "differ in micro_batch: process 1 has 2, process 0 1"),
        ("other weights", "differ in weights: process 1 has"),
        ("other pictures", "differ in image: process 1 has"),
        ("heads", "has 3 attention heads, which ulysses=2 times tensor=1 does not divide"),
        ("first block", r"ValueError: first_block_cache decides by all tokens.*load without ulysses"),
    ],
)
def test_all_processes_refuse(outcomes, case, message):
    for outcome in outcomes["refusals"]:
        assert outcome.error is None, outcome.trace
        assert re.search(message, outcome.value[case])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no guidance in one", "ValueError: parallel 'cfg=2'"),
        ("bad input in one", "ValueError: prompt is int"),
    ],
)
def test_what_one_process_refuses_the_others_say(outcomes, case, message):
    first, second = (outcome.value[case] for outcome in outcomes["refusals"])
    assert first.startswith(message)
    assert second.startswith(f"ProcessLost: process 0 failed before the run: {message}")


def test_after_refusals_a_run_is_equal(outcomes):
    apart = [outcome.value["and then a run is equal"] for outcome in outcomes["refusals"]]
    assert max(apart) <= off_by_parts(outcomes)


def test_a_failure_in_a_run_hangs_no_process(outcomes):
    first, second = (outcome.value for outcome in outcomes["z_a_failure_in_a_run"])
    assert first[0] == second[0] == "ZeroDivisionError: division by zero"  # in both: they go on
    assert second[1] == "ArithmeticError: of this process alone"
    assert re.fullmatch(r"ProcessLost: process 0 waited for process 1 .* failed with Arith.*alone", first[1])
    for number, text in enumerate((first[2], second[2])):
        assert text == f"ProcessLost: process {number} left the others when a run failed: start again"
