"""What two processes do, case by case: `test_two_processes.py` looks at the outcomes."""

from __future__ import annotations

import torch
import torch.distributed as dist

import qwenedit


def case_mesh():
    pipe = qwenedit.load(device="cpu", progress=False, parallel="cfg=2")
    own = pipe.processes
    total = torch.full((1,), float(own.rank))
    dist.all_reduce(total, group=own.group("cfg"))
    return [own.count, list(own.mesh.mesh.shape), total.item()]
