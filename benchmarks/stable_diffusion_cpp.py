"""A guided step beside stable-diffusion.cpp's on the CPU: `python -m benchmarks.stable_diffusion_cpp`.

PyPI has no wheel of another implementation for the CPU, but the source of this one: `pip install
stable-diffusion-cpp-python==0.4.7` builds it with gcc and CMake, in ten minutes or so. Both sides have the
same random weights: a transformer of 2 blocks at full width, with one picture of the target's size. A step's
time is the difference between runs of more and of fewer steps, in which encoding and decoding drop out.

Prints Markdown; --out replaces the table of limits.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.files import BLOCKS, DATA, LAYERS, write_transformer, write_vae
from benchmarks.frame import Setting
from benchmarks.report import out_folder, renew, table
from benchmarks.transformer import TEXT_LENGTH, step_ours

FEW, MANY = 1, 4  # steps
ROUNDS = 3
SIDES = (256,)  # pixels
TYPES = ("f32", "bf16", "q8_0")  # of its weights in memory
VOCABULARY, WIDTH, INNER, KEYS = 152064, 3584, 18944, 512  # of the official language model


def write_files(folder: Path) -> None:
    """The transformer under its official names, the VAE under Wan's, and a language model of two layers."""
    write_transformer(folder)
    write_vae(folder)
    official = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    names = json.loads((DATA / "keys" / "vae_wan_to_diffusers.json").read_text())
    save_file({wan: official[name] for wan, name in names.items()}, folder / "vae.safetensors")
    save_file(dict(language_model()), folder / "llm.safetensors")


def language_model() -> Iterator[tuple[str, torch.Tensor]]:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / (shape[-1] if len(shape) > 1 else 4) ** 0.5).bfloat16()

    yield "model.embed_tokens.weight", random(VOCABULARY, WIDTH)
    yield "model.norm.weight", torch.ones(WIDTH, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        for name, rows in (("q", WIDTH), ("k", KEYS), ("v", KEYS)):
            yield f"{start}.self_attn.{name}_proj.weight", random(rows, WIDTH)
            yield f"{start}.self_attn.{name}_proj.bias", random(rows)
        yield f"{start}.self_attn.o_proj.weight", random(WIDTH, WIDTH)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            yield f"{start}.mlp.{name}_proj.weight", random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}.{name}.weight", torch.ones(WIDTH, dtype=torch.bfloat16)


def theirs(folder: Path, side: int, kind: str, threads: int) -> Callable[[], float]:
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        diffusion_model_path=str(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
        vae_path=str(folder / "vae.safetensors"),
        llm_path=str(folder / "llm.safetensors"),
        wtype=kind, n_threads=threads, verbose=False,
    )  # fmt: skip
    picture = Image.effect_noise((side, side), 60).convert("RGB")

    def seconds(steps: int) -> float:
        start = time.process_time()
        model.generate_image(
            "red " * (TEXT_LENGTH - 10), "blue " * (TEXT_LENGTH - 20), ref_images=[picture], width=side,
            height=side, sample_steps=steps, sample_method="euler", cfg_scale=4.0, seed=0,
        )  # fmt: skip
        return time.process_time() - start

    return lambda: (seconds(MANY) - seconds(FEW)) / (MANY - FEW)


@torch.no_grad()
def ours(folder: Path, side: int, dtype: str, threads: int) -> Callable[[], float]:
    step = step_ours(False, num_layers=BLOCKS)(Setting("cpu", dtype, threads, folder))((side // 16) ** 2)

    def seconds() -> float:
        start = time.process_time()
        with torch.inference_mode():
            step()
        return time.process_time() - start

    return seconds


def measured(folder: Path, side: int, threads: int) -> list[list[str]]:
    """One row a side and dtype: the median of rounds in turn, and its ratio to our float32."""
    calls = {f"qwenedit, {dtype}": ours(folder, side, dtype, threads) for dtype in ("float32", "bfloat16")}
    calls |= {f"stable-diffusion.cpp, {kind}": theirs(folder, side, kind, threads) for kind in TYPES}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(call())
    base = statistics.median(seconds["qwenedit, float32"])
    return [
        [f"{side} px", name, f"{(one := statistics.median(times)):.2f}", f"{one / base:.2f}"]
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stable_diffusion_cpp", description=__doc__.split(":")[0]
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--out", type=partial(out_folder, renews="limits.md"), metavar="FOLDER",
        help="replace the table of limits.md",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        rows = [row for side in SIDES for row in measured(folder, side, options.threads)]
    text = table(["picture", "", "CPU s / step", "over our float32"], rows)
    print(text)
    if options.out is not None:
        renew(options.out / "limits.md", {"stable-diffusion.cpp": text})


if __name__ == "__main__":
    main()
