"""Speed-up and difference of runs that processes share, on whatever devices there are:

    torchrun --nproc-per-node 2 -m benchmarks.parallel [--model ID] [--side 1024] [--steps 4] [--dtype T]

Every way to share a run among so many processes is run in turn: seconds a guided step, against one process
with one device; the largest difference of the final latents from its; and the memory of the device that
needs most. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import qwenedit
from benchmarks.report import table
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.parallel import processes
from qwenedit.parallel.spec import processes_started
from qwenedit.pipeline import QwenImageEdit

REPEATS = 3  # of a run, after one that warms up


def ways(count: int) -> list[dict[str, Any]]:
    """The arguments of `load` for so many processes.

    >>> [str(one["parallel"]) + " split" * one.get("split_weights", False) for one in ways(2)]
    ['cfg=2', 'ulysses=2', 'tensor=2', 'cfg=2 split', 'ulysses=2 split']
    """
    both = [f"cfg=2,ulysses={count // 2}"] if count > 2 and count % 2 == 0 else []
    shared = [*(["cfg=2"] if count == 2 else both), f"ulysses={count}"]
    plain = [{"parallel": spec} for spec in (*shared, f"tensor={count}")]
    return plain + [{"parallel": spec, "split_weights": True} for spec in shared]


def seconds_a_step(pipe: QwenImageEdit, conditioning: Conditioning, steps: int) -> tuple[float, Tensor]:
    """The median over runs, and the final latents."""
    taken = []
    for _ in range(1 + REPEATS):
        _wait_for_device(pipe.device)
        start = time.perf_counter()
        latents = pipe.sample(
            conditioning, num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images  # fmt: skip
        _wait_for_device(pipe.device)
        taken.append((time.perf_counter() - start) / steps)
    return statistics.median(taken[1:]), latents.cpu()


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(pipe: QwenImageEdit) -> int:
    """Bytes that a process needed: the peak of its accelerator, on the CPU those of its weights."""
    if pipe.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pipe.device)
    networks = (pipe.mmdit, pipe.vision_language, pipe.vae)
    held = [x for network in networks if network is not None for x in network.parameters()]
    return sum(getattr(x, "_local_tensor", x).nbytes for x in held if not x.is_meta)


def measured(options: argparse.Namespace, **how: Any) -> tuple[float, Tensor, int]:
    gc.collect()  # of the pipeline before: split modules are in reference cycles
    pipe = qwenedit.load(options.model, device=options.device, dtype=options.dtype, progress=False, **how)
    if pipe.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(pipe.device)
    picture = Image.linear_gradient("L").resize((512, 512)).convert("RGB")
    size = {} if options.side is None else {"height": options.side, "width": options.side}
    conditioning = pipe.condition(picture, "make it blue", **size)
    taken, latents = seconds_a_step(pipe, conditioning, options.steps)
    return taken, latents, memory(pipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="hub id or folder (default: the embedded model)")
    add("--side", type=int, metavar="N", help="pixels of a side (default: the model's)")
    add("--steps", type=int, default=4, metavar="N", help="of each run (default: 4)")
    add("--device", metavar="D", help="cpu, cuda, ... (default: the accelerator if there is one)")
    add("--dtype", metavar="T", help="float32 or bfloat16 (default: as stored; float32 on the CPU)")
    options = parser.parse_args()
    count = processes_started()
    if count < 2:
        sys.exit("wanted several processes: torchrun --nproc-per-node 2 -m benchmarks.parallel")
    processes.PATIENCE = 3600.0  # the others wait while one process runs alone
    rows: list[tuple[dict[str, Any], float, Tensor, int]] = []
    for number, how in enumerate([*ways(count), {}]):
        last = number == len(ways(count))
        if last and dist.get_rank():  # one process alone, with nothing beside it
            break
        rows.append((how, *measured(options, **how)))
    if dist.get_rank() == 0:
        _, alone, exact, bytes_of_one = rows[-1]
        print(f"{count} processes, {exact.dtype}, PyTorch {torch.__version__}")
        lines = []
        for how, taken, latents, held in rows:
            name = "one process" if not how else how["parallel"] + ", split" * how.get("split_weights", False)
            difference = float((latents.double() - exact.double()).abs().max() / exact.abs().max())
            share = f"{held / 2**30:.2f} GiB, {held / bytes_of_one:.0%}"
            lines.append([name, f"{taken:.3f} s", f"{alone / taken:.2f}", f"{difference:.1e}", share])
        print(table(["", "a step", "speed-up", "difference", "memory of process 0"], lines))
    dist.barrier()


if __name__ == "__main__":
    main()
