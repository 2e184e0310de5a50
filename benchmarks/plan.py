"""Planned and measured peaks of memory on the CPU: `python -m benchmarks.plan [--stream]`.

Each case runs in its own process: the whole embedded model, and those parts of the official model that fit
on a small machine, at full width with random weights: the VAE, two blocks of the transformer, a text encoder
cut in depth. The measured value is the growth of the highest resident set (VmHWM). --stream adds a whole edit
at the official size, block by block, from a sparse file of zeros. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import qwenedit
from benchmarks.files import write_text_encoder
from benchmarks.frame import status_bytes, watched
from qwenedit.inputs import geometry
from qwenedit.memory.plan import activations, plan
from qwenedit.memory.residency import Modes
from qwenedit.networks.mmdit import MMDiT, RunCache
from qwenedit.weights.checkpoints import read_areas, read_variant
from qwenedit.weights.configs import network_config
from qwenedit.weights.loading import load_network
from tests.sparse import write_sparse

SIDES = (256, 512)
STAGES = {
    "vae-encode": "VAE encode",
    "vae-decode": "VAE decode",
    "transformer": "sampling",
    "text-encoder": "text encoding",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.split(":")[0])
    parser.add_argument("--stream", action="store_true", help="also a whole edit at 256x256, streamed")
    parser.add_argument("--only", choices=["embedded", *STAGES], help="one case")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case, folder, dtype = options.measure
        print(json.dumps(measure(case, Path(folder), getattr(torch, dtype))))
        return
    print(f"torch {torch.__version__}, CPU, {options.dtype}; MiB of weights and activations")
    cases = [options.only] if options.only else ["embedded", *STAGES]
    for case in [*cases, *["stream"] * options.stream]:
        for side in SIDES if case in STAGES else SIDES[:1]:
            with tempfile.TemporaryDirectory() as name:
                write_sparse(name, areas={"vae_area": side**2, "vl_area": side**2})
                command = [sys.executable, "-m", "benchmarks.plan", "--measure", case, name, options.dtype]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seen = json.loads(out.splitlines()[-1])
                planned = seen["planned"]
                print(
                    f"{case:13} {'' if case == 'embedded' else side:4} planned {planned >> 20:6}, measured "
                    f"{seen['measured'] >> 20:6}: {planned / seen['measured'] - 1:+.0%}",
                    flush=True,
                )


def measure(case: str, folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """Bytes planned and measured, in this process."""
    if case in ("embedded", "stream"):
        return whole(case, folder, dtype)
    torch.manual_seed(0)
    network, run = PARTS[case](folder, dtype)
    weights = sum(x.nbytes for x in network.parameters())
    before = fresh_peak()
    with torch.no_grad():
        run()
    computed = activations(folder, sketch_of(folder), dtype)[STAGES[case]]
    return {"planned": weights + computed, "measured": weights + status_bytes("VmHWM") - before}


def fresh_peak() -> int:
    """Reset the highest resident set, of which files that were read are part; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def whole(case: str, folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """A whole edit. Pages of mapped files do not count: the kernel drops them at will."""
    source, residency = (folder, "stream") if case == "stream" else (None, "resident")
    planned = plan(source, device="cpu", dtype=dtype).peaks[Modes(residency)]
    picture = Image.new("RGB", (256, 256))
    with watched("cpu") as peak:
        pipe = qwenedit.load(source, device="cpu", dtype=dtype, progress=False, residency=residency)
        pipe.edit(picture, "x", num_inference_steps=1, true_cfg_scale=1.0, output_type="pt")
        measured = peak()
    return {"planned": max(planned.values()), "measured": measured}


def sketch_of(folder: Path) -> geometry.Geometry:
    areas = read_areas(folder, read_variant(folder))
    side = round(areas.vae**0.5)
    return geometry.plan([(side, side)], areas=areas)


Part = tuple[nn.Module, Callable[[], Any]]


def vae_encode(folder: Path, dtype: torch.dtype) -> Part:
    vae = load_network(folder, "vae", device=torch.device("cpu"), dtype=dtype, progress=False)
    randomise(vae)
    width, height = sketch_of(folder).pictures[0].vae
    return vae, lambda: vae.encode(torch.rand(1, 3, 1, height, width, dtype=dtype))


def vae_decode(folder: Path, dtype: torch.dtype) -> Part:
    vae = load_network(folder, "vae", device=torch.device("cpu"), dtype=dtype, progress=False)
    randomise(vae)
    width, height = sketch_of(folder).size
    return vae, lambda: vae.decode(torch.rand(1, 16, 1, height // 8, width // 8, dtype=dtype))


def transformer(folder: Path, dtype: torch.dtype) -> Part:
    config = network_config(folder, "transformer")
    with torch.device("meta"):
        mmdit = MMDiT(replace(config, num_layers=2)).to(dtype)
    mmdit = mmdit.to_empty(device="cpu").requires_grad_(False).eval()
    randomise(mmdit)
    sketch = sketch_of(folder)
    grids = [sketch.grid, *(picture.grid for picture in sketch.pictures)]
    target, reference = (torch.randn(1, rows * columns, 64).to(dtype) for _, rows, columns in grids)
    seen = (round(read_areas(folder, read_variant(folder)).vae ** 0.5) // 28) ** 2
    txt = torch.randn(1, seen + 100, config.joint_attention_dim).to(dtype)
    img, timestep, cache = torch.cat([target, reference], dim=1), torch.tensor([0.5], dtype=dtype), RunCache()
    return mmdit, lambda: mmdit(img, txt, timestep, grids, cache=cache, target_only=True)


def text_encoder(folder: Path, dtype: torch.dtype) -> Part:
    with tempfile.TemporaryDirectory() as name:
        write_text_encoder(Path(name))
        cpu = torch.device("cpu")
        network = load_network(Path(name), "text_encoder", device=cpu, dtype=dtype, progress=False)
    encoder: Any = network
    side = 2 * round(sketch_of(folder).pictures[0].vl[0] / 28)
    tokens = side * side // 4
    picture = encoder.config.image_token_id
    ids = torch.tensor([[*range(70), *[picture] * tokens, *range(100)]])
    pixels, grids = torch.randn(side * side, 1176), [(1, side, side)]
    return encoder, lambda: encoder(ids, None, None, grids, encoder.vision(pixels, grids))


def randomise(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.normal_().mul_(0.02)


PARTS: dict[str, Callable[[Path, torch.dtype], Part]] = {
    "vae-encode": vae_encode,
    "vae-decode": vae_decode,
    "transformer": transformer,
    "text-encoder": text_encoder,
}

if __name__ == "__main__":
    main()
