"""What two processes do that train together: `test_train.py` looks at the outcomes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Generator

import qwenedit
from qwenedit.training.cache import Cache, encoders_of
from qwenedit.training.data import looked_at, read_entries
from qwenedit.training.loss import flow_matching_loss, freeze_unreached
from qwenedit.training.run import _wanted, batches_of_step, train
from qwenedit.training.spec import read_spec
from qwenedit.training.together import Together
from qwenedit.weights.slices import is_split, whole
from tests.support import relative_error
from tests.training.pairs import log_of, spec_of

FOLDERS = {name: Path(one) for name, one in json.loads(os.environ.get("QWENEDIT_TEST_FOLDERS", "{}")).items()}
LORA = {"rank": 2}
WHOLE = {"lora": None, "ema": 0.9, "dtype": "bfloat16", "checkpointing": True}


def spec(output="out", **changed):
    pairs = FOLDERS["pairs"]
    common = {"batch": 2, "accumulate": 2, "report_every": 1, "rate": 1e-2, "dtype": "float32"}
    return spec_of(pairs, output=str(pairs / output), cache=str(pairs / "cache"), **{**common, **changed})


def gradients(pipe, batches, *, lora):
    """By name, each the whole; and the means over processes, of what is not split."""
    if lora:
        name = pipe.add_lora(rank=2, generator=Generator().manual_seed(0))
        live = pipe.lora_parameters(name)
        with torch.no_grad():  # `up` starts at 0, where `down` has no gradient
            for number, x in enumerate(live.values()):
                x.copy_(torch.randn(x.shape, generator=Generator().manual_seed(number)) / 8)
    else:
        pipe.mmdit.requires_grad_(True)
        live = dict(pipe.mmdit.named_parameters())
    freeze_unreached(pipe.mmdit)
    for batch, share in batches:
        (flow_matching_loss(pipe, batch) * share).backward()
    made = {}
    for name, x in live.items():
        if not x.requires_grad:
            continue
        grad = whole(x.grad).clone()
        if lora and is_split(pipe.mmdit):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        made[name] = grad
    return made


def case_gradients():
    """Over steps of several micro-batches, also fewer than there are processes, of weighted rows with
    references of several sizes."""
    together, model = Together("cpu"), str(FOLDERS["plus"])
    table = FOLDERS["pairs"] / "several" / "pairs.jsonl"
    plan = read_spec({**spec(lora=None), "model": model, "data": str(table)})
    pipe = qwenedit.load(model, device="cpu", progress=False)
    rows = looked_at(read_entries(plan.data, plan.base), pipe.variant, pipe.areas, progress=False)
    cache = Cache(FOLDERS["pairs"] / "plus", encoders_of(pipe))
    with together.first_alone() as alone:
        if alone:
            cache.encode(pipe, [_wanted(plan, row) for row in rows], progress=False)
    errors, most = {}, []
    for lora in (False, True):
        for step in range(2):
            batches = list(batches_of_step(plan, cache, rows, step, Generator().manual_seed(step)))
            own = together.own(batches)
            most.append([len(batches), len(own), sum(share == 0 for _, share in own)])
            one = qwenedit.load(model, device="cpu", dtype="float64", progress=False, text_encoder=False)
            split = together.load(model, "float64", progress=False)
            assert is_split(split.mmdit)
            got, wanted = gradients(split, own, lora=lora), gradients(one, batches, lora=lora)
            assert got.keys() == wanted.keys()
            errors[f"lora {lora}, step {step}"] = max(relative_error(got[x], wanted[x]) for x in wanted)
    everyones = [None, None]
    dist.all_gather_object(everyones, most)
    return [errors, everyones]


def trained(output, **changed):
    return train(spec(output, **changed), device="cpu", progress=False)


def tensors(path):
    if path.is_file():
        return load_file(path)
    return {name: x for file in sorted(path.rglob("*.safetensors")) for name, x in load_file(file).items()}


def resumed(kind, *names, **options):
    """A run of two steps, and one that was stopped after one: their files, their logs, and what is left."""
    straight, stopped = (FOLDERS["pairs"] / f"{kind} {which}" for which in ("straight", "stopped"))
    trained(straight.name, steps=2, **options)
    trained(stopped.name, steps=1, **options)
    before = [path.name for path in stopped.glob("state-*")]
    trained(stopped.name, steps=2, **options) if kind == "lora" else again(stopped, options)
    dist.barrier()
    equal = {}
    for name in names:
        one, other = tensors(straight / name), tensors(stopped / name)
        equal[name] = one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())
    after = [path.name for path in stopped.glob("state*")]
    return [equal, log_of(straight) == log_of(stopped), before, after]


def again(stopped, options):
    """The whole model of a shorter run is never taken for a longer one's: it has to go first."""
    with Together("cpu").first_alone() as alone:
        if alone:
            for name in ("model", "model_ema"):
                (stopped / name).rename(stopped.with_name(f"{stopped.name} {name}"))
    trained(stopped.name, steps=2, **options)


def case_resumed_lora():
    return resumed("lora", "lora.safetensors", lora=LORA)


def case_resumed_whole():
    return resumed("whole", "model", "model_ema", **WHOLE)


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def case_what_is_refused():
    pipe = qwenedit.load(device="cpu", progress=False)
    return {
        "accumulate": message(lambda: trained("refused", accumulate=1)),
        "pipe": message(lambda: train(spec("refused", dtype=None), pipe)),
        "of one": message(lambda: trained("one", steps=1, lora=LORA)),
    }
