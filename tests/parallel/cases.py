"""What two processes do, case by case: `test_two_processes.py` looks at the outcomes.

Each process also makes what one process makes, with a pipeline that is not shared, and compares the two.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

import qwenedit
from tests.tiny import checkpoint, picture


@functools.cache
def pipe(parallel=None, folder=None, **options):
    return qwenedit.load(folder, device="cpu", progress=False, parallel=parallel, **options)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


PICTURE, OTHER = picture(70, 50), picture(40, 64, 1)
PROMPT = "把圆变成红色"


def latents(system, **options):
    options = {"num_inference_steps": 2, "generator": generator(), "output_type": "latent", **options}
    return system.edit(options.pop("image", PICTURE), options.pop("prompt", PROMPT), **options).images


def difference(one, other):
    """0 where the two are equal to the bit; else relative to the largest value."""
    if torch.equal(one, other):
        return 0.0
    return float((one.double() - other.double()).abs().max() / one.double().abs().max())


def both(parallel, **options):
    """The difference of a shared run from one process's."""
    return difference(latents(pipe(), **options), latents(pipe(parallel), **options))


def case_mesh():
    own = pipe("cfg=2").processes
    total = torch.full((1,), float(own.rank))
    dist.all_reduce(total, group=own.group("cfg"))
    return [own.count, list(own.mesh.mesh.shape), total.item()]


def case_cfg():
    return both("cfg=2")


def case_ulysses():
    return both("ulysses=2")
