"""Weights that are split over two processes: what each reads, and what runs compute with them."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Shard

from qwenedit.weights.slices import own_part
from tests.parallel.cases_split import CALLS, DTYPES
from tests.parallel.processes import off_by_parts, run_cases, value

FP64 = 1e-14  # of the largest value: a sum of parts in another order, over a few blocks
# A float64 run is rounded to float32 on the way, as the reference's: in RoPE, mean squares, Euler's step. The
# last bit of a sum can turn such a rounding, of one number or another.
TURNED = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def outcomes():
    return run_cases("cases_split", 2, {})


def test_split_weights_give_the_same_bits_whatever_is_called(outcomes):
    equal = value(outcomes, "every_call_with_split_weights")
    assert len(equal) == len(CALLS) * len(DTYPES) and all(equal.values()), equal


def test_split_heads_give_the_same_numbers_whatever_is_called(outcomes):
    errors = value(outcomes, "every_call_with_split_heads")
    assert len(errors) == len(CALLS)
    assert max(errors.values()) <= FP64 and max(errors.values()) > 0, errors


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 5, 7, 8])
def test_parts_are_those_of_torch_chunk(size, count):
    values, taken = torch.arange(size), []
    for rank in range(count):
        mesh = SimpleNamespace(size=lambda: count, get_local_rank=lambda rank=rank: rank)
        rows = SimpleNamespace(shape=(size, 3), placements=(Shard(0),), device_mesh=mesh)
        part, columns = own_part(rows)
        assert columns == slice(0, 3)
        taken.append(values[part].tolist())
    wanted = [chunk.tolist() for chunk in values.chunk(count)]
    assert taken == wanted + [[]] * (count - len(wanted))


def test_each_process_reads_its_own_part(outcomes):
    equal, transformer, text_encoder = value(outcomes, "read_with_split_weights")
    assert equal and 0.5 <= transformer <= 0.55 and 0.5 <= text_encoder <= 0.55
    equal, blocks = value(outcomes, "read_with_split_heads")
    assert equal and 0.5 <= blocks <= 0.55


def test_each_process_has_the_weights_that_are_planned(outcomes):
    for held, planned in value(outcomes, "planned"):
        assert held == planned


def test_an_edit_with_split_weights_has_the_same_bits(outcomes):
    apart = value(outcomes, "edit_with_split_weights")
    assert len(apart) == 6
    few = off_by_parts(outcomes)
    for name, x in apart.items():
        assert x <= (few if name == "torch.float32 ulysses=2" else 0), apart


def test_an_edit_with_split_heads_has_the_same_numbers(outcomes):
    errors = value(outcomes, "edit_with_split_heads")
    assert max(errors) <= TURNED, errors


def test_gradients_pass_split_heads(outcomes):
    errors = value(outcomes, "gradients_with_split_heads")
    assert len(errors) == 2 and max(errors.values()) <= FP64, errors


def test_what_is_computed_once_stays_so(outcomes):
    weights, heads, alone = value(outcomes, "what_is_computed_once")
    assert weights == heads == alone and alone[0] is False and alone[2]["step_invariant"] == 1


def test_every_tap_sees_whole_tensors_and_acts(outcomes):
    fired, equal, acts, unchanged = value(outcomes, "taps_with_split_weights")
    assert fired == equal and fired > 60 and acts and not unchanged


def test_a_lora_acts_beside_split_weights_and_in_them(outcomes):
    told = value(outcomes, "lora_beside_split_weights_and_fused")
    assert told["acts"] and told["weights"]
    assert max(told["beside"], told["fused"]) <= off_by_parts(outcomes), told


def test_a_lora_is_fused_into_split_heads(outcomes):
    error, refused = value(outcomes, "lora_fused_into_split_heads")
    assert error <= FP64
    assert "call fuse_lora" in refused


def test_a_split_pipeline_is_saved_by_the_first_process(outcomes):
    told = value(outcomes, "saved")
    assert len(told) == 3
    for how, (equal, refused) in told.items():
        assert equal and (how == "{'parallel': 'cfg=2'}" or "is not an empty folder" in refused), how


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("fp8", "transformer_blocks.1.attn.to_q.weight"),
        ("fp8 in heads", "is stored as float8_e4m3fn: wanted bfloat16, float16 or float32"),
        ("stage", "which 'stage' does not: wanted residency='resident'"),
        ("float8", "which 'auto, float8' does not"),
        ("precomputed", "which 'auto, precomputed' does not"),
        ("compile", "compile=True does not go with split_weights=True"),
        ("both", "both split the weights: wanted one of them"),
        ("alone", "wanted parallel, too, like 'cfg=2'"),
        ("offload", "load without split_weights and tensor"),
        ("move", "stay in torch.float32 on cpu: to have them in torch.bfloat16 on cpu pass it to load"),
    ],
)
def test_what_split_weights_cannot_do_is_refused_with_the_remedy(outcomes, what, wanted):
    assert wanted in value(outcomes, "what_is_refused")[what]
