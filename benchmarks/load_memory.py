"""Peak memory of loading: `python -m benchmarks.load_memory [--gigabytes 3]`.

Writes a transformer checkpoint in the official layout (a few blocks at the official width, random weights),
loads it in a fresh process and compares the peak with what the design allows: the module's bytes plus one
tensor. Pages of the memory-mapped file do not count: the kernel drops them at will.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.files import OFFICIAL, transformer_config
from benchmarks.frame import watched
from qwenedit.networks.mmdit import KEY_TABLE, MMDiT, MMDiTConfig
from qwenedit.weights.keys import ours_to_official
from qwenedit.weights.loading import load_network


def write(folder: Path, blocks: int) -> None:
    """Write the checkpoint in shards, as large ones are: one per block."""
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer_config(blocks)))
    with torch.device("meta"):
        state = MMDiT(MMDiTConfig(num_layers=blocks, **OFFICIAL)).state_dict()
    shards: dict[str, list[str]] = {}
    for name in state:
        part = name.split(".")[1] if name.startswith("blocks.") else "rest"
        shards.setdefault(f"diffusion_pytorch_model-{part}.safetensors", []).append(name)
    weight_map = {}
    for file, names in shards.items():
        tensors = {
            ours_to_official(KEY_TABLE, name): torch.randn(state[name].shape, dtype=torch.bfloat16)
            for name in names
        }
        save_file(tensors, folder / "transformer" / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))


def measure(folder: Path, dtype: str) -> dict[str, int | float]:
    """Load the transformer and watch this process's memory meanwhile."""
    start = time.perf_counter()
    with watched("cpu") as grown:
        module = load_network(
            folder, "transformer", device=torch.device("cpu"), dtype=getattr(torch, dtype), progress=False
        )
        seconds = time.perf_counter() - start
    sizes = [x.nbytes for x in module.parameters()]
    return {"seconds": seconds, "module": sum(sizes), "largest": max(sizes), "grown": grown()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint, in bfloat16")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), max(1, round(options.gigabytes / 0.68)))
        print(f"torch {torch.__version__}, CPU; MiB; allowed is the module plus its largest tensor")
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, "-m", "benchmarks.load_memory", "--measure", name, dtype]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seen = json.loads(out)
            allowed = seen["module"] + seen["largest"]
            print(
                f"{dtype:9} module {seen['module'] >> 20}, largest tensor {seen['largest'] >> 20}, "
                f"grown by {seen['grown'] >> 20} at most, allowed {allowed >> 20}, {seen['seconds']:.1f} s"
            )


if __name__ == "__main__":
    main()
