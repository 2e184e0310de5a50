"""What four processes do: two by two, and all four on the tokens of one pass."""

from __future__ import annotations

import torch
import torch.distributed as dist

import qwenedit
from tests.parallel.cases import RUNS, close, edited, pipe, refused, run
from tests.parallel.cases_networks import (
    CONFIG,
    CPU,
    MMDiT,
    ParallelSpec,
    case_every_tap_of_the_transformer,
    case_heads_at_a_time,
    difference,
    inputs,
    join,
    pair,
    passes,
)

CHOSEN = (
    "plain", "bfloat16", "zero_cond_t", "prompts of a batch", "stochastic", "mask", "controls",
    "blockwise control, half of the run", "lora", "stream", "references in some blocks, a batch",
)  # fmt: skip


def case_mesh():
    """Neighbours in the last axis have neighbouring numbers."""
    own = join(ParallelSpec(cfg=2, ulysses=2), CPU)
    found = []
    for axis in ("cfg", "ulysses"):
        told = [None, None]
        dist.all_gather_object(told, own.rank, group=own.group(axis))
        found.append(told)
    everyones = [None] * 4
    dist.all_gather_object(everyones, found)
    return everyones


ALL, BOTH = ParallelSpec(ulysses=4), ParallelSpec(ulysses=2, tensor=2)
every_tap, heads_at_a_time = case_every_tap_of_the_transformer, case_heads_at_a_time
del case_every_tap_of_the_transformer, case_heads_at_a_time  # they are for two processes


def case_passes():
    return [max(passes(torch.float64, spec).values()) for spec in (ALL, BOTH)]


def case_too_few_tokens():
    """torch shares no matrix out for no rows."""
    _, shared = pair(MMDiT, CONFIG, torch.float64, BOTH)
    return refused(lambda: shared(*inputs([(1, 2, 2)], 1, torch.float64)))


def case_taps_of_tokens_and_heads():
    return every_tap(BOTH)


def case_heads():
    """One at a time in the process that has one, or both at once."""
    return heads_at_a_time(BOTH)


def case_runs():
    found = {}
    for name in CHOSEN:
        alone = run(None, **RUNS[name])
        for mode in ("cfg=2,ulysses=2", "ulysses=4"):
            found[f"{name}: {mode}"] = close(alone, run(mode, **RUNS[name]))
    return found


def case_taps_and_a_tap_in_one():
    """A tap is whole in each process, which sees its own branch; a tap in one of them is refused in all."""
    seen = {}

    def write(x, site):
        seen.setdefault(site.labels["branch"], x.clone())
        return x * 0.5

    outputs = []
    for mode in (None, "cfg=2,ulysses=2"):
        seen.clear()
        with qwenedit.taps(pipe(mode).mmdit, {"blocks.1.img_attn_add": write}):
            outputs.append((edited(pipe(mode)), dict(seen)))
    (alone, wanted), (shared, own) = outputs
    (branch,) = own
    functions = {"blocks.0.img_out": write} if dist.get_rank() == 3 else {}
    with qwenedit.taps(pipe("ulysses=4").mmdit, functions, strict=False):
        refusal = refused(lambda: edited(pipe("ulysses=4")))
    return [difference(alone, shared), difference(wanted[branch], own[branch]), refusal]


def case_z_a_failure_reaches_all():
    """Also those that exchange nothing with the process that fails. The last case: the groups end with it."""

    def fail(_x, site):
        if dist.get_rank() == 3 and site.labels["step"] == 1:
            raise ArithmeticError("of this process alone")

    def failing():
        with qwenedit.taps(pipe("cfg=2,ulysses=2").mmdit, {"blocks.1.img_mid": fail}):
            edited(pipe("cfg=2,ulysses=2"))

    return refused(failing)
