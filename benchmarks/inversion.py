"""The error of inversion and sampling in a row: `python -m benchmarks.inversion [--out docs]`.

A held-out picture is inverted to noise and sampled again by the embedded model: with the explicit backward
step and with fixed-point iterations, under the prompt alone and with the picture as reference. Prints a
Markdown table of relative errors of the latents; --out also writes inversion.md and inversion.svg.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import qwenedit
from benchmarks.mini_cases import cases
from benchmarks.report import out_folder, table
from qwenedit.ablation.charts import Line, chart
from qwenedit.ablation.drawing import Drawing, Text
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.files import replacing_file
from qwenedit.instruments.inversion import invert, picture_latents
from qwenedit.mini.scenes import DETERMINED
from qwenedit.mini.shapes import draw
from qwenedit.pipeline import QwenImageEdit

STEPS = (5, 10, 20, 40)
ITERATIONS = (0, 1, 3, 6)  # 0 is the explicit step
STYLE = """
svg { font-family: sans-serif; background: white; width: 1000px; height: 284px; }
text { fill: #555; font-size: 9px; }
.name { fill: #111; font-size: 10px; } .rule { stroke: #ddd; } polyline { fill: none; stroke-width: 1.6; }
.i0 { stroke: #b3261e; } .i1 { stroke: #c77700; } .i2 { stroke: #2e7d32; } .i3 { stroke: #0b62a8; }
"""


@torch.no_grad()
def round_trip(
    pipe: QwenImageEdit, conditioning: Conditioning, latents: Tensor, steps: int, iterations: int
) -> float:
    """The error of the reconstructed latents, relative to their norm."""
    options = {"num_inference_steps": steps, "true_cfg_scale": 1.0}
    *_, noise = invert(pipe, conditioning, latents, iterations=iterations, **options)
    *_, back = pipe.steps(conditioning, latents=noise.after, **options)
    return float((back.after - latents).norm() / latents.norm())


def error_table(errors: dict[str, dict[int, list[float]]]) -> str:
    rows = []
    for name, by_iterations in errors.items():
        for iterations, values in by_iterations.items():
            how = "explicit" if iterations == 0 else f"{iterations} iteration(s)"
            rows.append([f"{name}, {how}", *(f"{value:.2g}" for value in values)])
    return table(["relative error of the latents", *(f"{n} steps" for n in STEPS)], rows)


def figure(errors: dict[str, dict[int, list[float]]]) -> str:
    """Both plots side by side, with logarithmic axes."""
    page, across = Drawing("errors over steps", 500, 142), [math.log2(n / STEPS[0]) for n in STEPS]
    for i, (name, by_iterations) in enumerate(errors.items()):
        lines = [
            Line(across, [math.log10(value) for value in values], f"i{k}")
            for k, values in enumerate(by_iterations.values())
        ]
        ends = (across[0], across[-1])
        drawn = chart(f"log10 error, {name}", lines, x=ends, y=(-6, 0), along=f"log2 (steps / {STEPS[0]})")
        page.add(drawn, 250 * i, 0)
    key = " · ".join("explicit" if n == 0 else str(n) for n in ITERATIONS)
    page.marks.append(Text(30, 134, f"fixed-point iterations, from the top at the right end: {key}"))
    return page.svg(f"<style>{STYLE}</style>") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=out_folder, metavar="FOLDER", help="write inversion.md and inversion.svg"
    )
    options = parser.parse_args()
    pipe = qwenedit.load(device="cpu", progress=False)
    (case,) = cases(1, DETERMINED, seed="inversion")
    picture = draw(case.scene)
    latents, _ = picture_latents(pipe, picture)
    told = {
        "the prompt alone": pipe.condition(None, case.prompt, height=64, width=64),
        "with the reference": pipe.condition(picture, case.prompt),
    }
    errors = {
        name: {n: [round_trip(pipe, conditioning, latents, k, n) for k in STEPS] for n in ITERATIONS}
        for name, conditioning in told.items()
    }
    print(error_table(errors))
    if options.out is not None:
        text = (
            "# Inversion\n\n"
            "A picture of the embedded model's world back to noise, and from there to a picture again: how\n"
            "far the latents are off. Made by `python -m benchmarks.inversion --out docs`.\n"
            "What is computed: [inversion.py](../qwenedit/instruments/inversion.py).\n\n"
            "The prompt is an instruction to edit, which alone describes no picture. The rows of the prompt\n"
            "alone measure how well a trajectory is retraced, not how well a text is followed.\n\n"
            "![errors over steps](inversion.svg)\n\n"
        )
        for name, content in (
            ("inversion.md", text + error_table(errors) + "\n"),
            ("inversion.svg", figure(errors)),
        ):
            with replacing_file(options.out / name) as temporary:
                temporary.write_text(content)


if __name__ == "__main__":
    main()
