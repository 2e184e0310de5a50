"""Published methods on held-out edits: `python -m benchmarks.methods [--count 60] [--only NAME] [--out DIR]`.

The embedded model's edits under each intervention of examples/methods.toml: how many the oracle accepts, how
well they preserve the rest, and how far they are from the source, each as the mean of paired differences to
the plain edits with its interval. Prints a Markdown table; --out also renews the rows of that in methods.md.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import qwenedit
from benchmarks.mini_cases import BATCH, SCALE, Case, cases, verdicts_of
from benchmarks.report import out_folder, renew, table
from benchmarks.samplers import edits
from examples.methods.concept_attention import concept_attention
from qwenedit.ablation.metrics import psnr
from qwenedit.ablation.statistics import Estimate, estimate
from qwenedit.foreign import read_toml
from qwenedit.inputs.pictures import vae_pixels
from qwenedit.mini.build import TOKEN
from qwenedit.mini.pairs import CELLS
from qwenedit.mini.scenes import DETERMINED, outcome
from qwenedit.mini.shapes import KINDS, SIDE, draw
from qwenedit.pipeline import QwenImageEdit

SPEC = Path(__file__).parents[1] / "examples" / "methods.toml"
STEPS = 20
MEASURES = ("success", "preserved", "source")  # a share; dB; dB

Intervention = Callable[[QwenImageEdit], AbstractContextManager[Any]]


def interventions() -> dict[str, tuple[Intervention, Path]]:
    """Those of the sweep, each with its file."""
    found = {}
    for name, place in read_toml(SPEC, "spec")["interventions"].items():
        module, _, function = place.partition(":")
        loaded = importlib.import_module(f"examples.{module}")
        found[name] = getattr(loaded, function), Path(str(loaded.__file__))
    return found


def code_lines(file: Path) -> int:
    """Lines of code, without docstring and imports, comments and empty lines."""
    text = file.read_text(encoding="utf-8")
    body = ast.parse(text).body
    left_out = {0}
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or node is body[0]:
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip().split("#")[0]) for number, line in lines if number not in left_out)


def paper(file: Path) -> str:
    """The first paper that its docstring names, as a link."""
    number = re.search(r"arXiv\s(\d{4}\.\d{5})", file.read_text(encoding="utf-8"))
    return f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else "–"


def measured(todo: list[Case], pictures: Tensor) -> dict[str, list[float]]:
    """Of each edit: success, the PSNR of what should stay, and that of all of it, to the source."""
    verdicts = verdicts_of(todo, pictures)
    sources = [vae_pixels(draw(case.scene), SIDE, SIDE)[0] / 2 + 0.5 for case in todo]
    return {
        "success": [float(verdict.success) for verdict in verdicts],
        "preserved": [verdict.preserved for verdict in verdicts],
        "source": [psnr(x, y) for x, y in zip(pictures, sources, strict=True)],
    }


def compared(values: list[float], plain: list[float]) -> Estimate:
    """The mean of the paired differences. Edits with nothing to preserve have no such value."""
    pairs = enumerate(zip(values, plain, strict=True))
    return estimate({(k, 0): a - b for k, (a, b) in pairs if math.isfinite(a) and math.isfinite(b)})


def shown(found: Estimate, name: str, *, sign: bool = True) -> str:
    factor, form = (100, "+.0f" if sign else ".0f") if name == "success" else (1, "+.1f" if sign else ".1f")
    if found.value is None or found.low is None or found.high is None:
        return "–"
    value, low, high = (format(factor * x, form).replace("-", "−") for x in found[:3] if x is not None)
    return f"{value} ({low} to {high})"


HEAD = ("", "paper", "lines", "success, points", "kept, dB", "distance to the source, dB")


def written(page: Path, rows: dict[str, list[str]], count: int) -> None:
    """Renew rows of the page's table; the others stay."""
    old = page.read_text(encoding="utf-8").partition("<!-- methods -->\n")[2].partition("<!-- end -->")[0]
    kept = [[cell.strip() for cell in line.split("|")[1:-1]] for line in old.splitlines() if "|" in line][2:]
    every = {**{row[0]: row for row in kept}, **{row[0]: row for row in rows.values()}}
    order = ["plain", *(link(name, file) for name, (_, file) in interventions().items())]
    made = table(HEAD, [every[name] for name in order if name in every])
    renew(page, {"methods": f"{count} held-out edits, {STEPS} steps, guidance {SCALE:g}.\n\n{made}"})


def concept_ranks(pipe: QwenImageEdit, todo: list[Case]) -> list[int]:
    """Where the shapes of the right pictures are in ConceptAttention's maps, one number a shape.

    It is the number of the 16 tokens that have more of the shape's kind than the token at its centre.
    """
    ranks, kinds = [], list(KINDS)
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        with concept_attention(pipe, concepts=kinds) as maps:
            edits(pipe, part, STEPS)
        for case, shares in zip(part, torch.stack(maps).mean(dim=0), strict=True):
            for shape in outcome(Random(0), case.scene, case.request).shapes:
                of_kind = shares[:, kinds.index(shape.kind)]
                place = int(shape.y) // TOKEN * CELLS + int(shape.x) // TOKEN
                ranks.append(int((of_kind > of_kind[place]).sum()))
    return ranks


def on_ranks(ranks: list[int], count: int) -> str:
    found = estimate({(k, 0): float(rank) for k, rank in enumerate(ranks)})
    mean, chance = shown(found, "rank", sign=False), (CELLS**2 - 1) / 2
    return (
        f"In the maps of {count} edits with {len(ranks)} shapes, {mean} of the other {CELLS**2 - 1} tokens\n"
        f"have more of a shape's kind than the token at its centre, on average; {chance} is chance."
    )


def link(name: str, file: Path) -> str:
    return f"[{name}](../examples/methods/{file.name})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="number of edits (default: 60)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods; all by default")
    parser.add_argument(
        "--out", type=partial(out_folder, renews="methods.md"), metavar="FOLDER",
        help="renew their rows in methods.md",
    )  # fmt: skip
    options = parser.parse_args()
    pipe = qwenedit.load(device="cpu", progress=False)
    pipe.progress = False
    todo = cases(options.count, DETERMINED, seed="methods")
    plain = measured(todo, edits(pipe, todo, STEPS))
    alone = [shown(compared(plain[name], [0.0] * len(todo)), name, sign=False) for name in MEASURES]
    rows = {"plain": ["plain", "", "", *alone]}
    known = interventions()
    for name in options.only or known:
        intervention, file = known[name]
        with intervention(pipe):
            found = measured(todo, edits(pipe, todo, STEPS))
        differences = [shown(compared(found[one], plain[one]), one) for one in MEASURES]
        rows[name] = [link(name, file), paper(file), str(code_lines(file)), *differences]
        print(rows[name], flush=True)
        if options.out is not None:
            written(options.out / "methods.md", rows, options.count)
    if "concept attention" in (options.only or known):
        text = on_ranks(concept_ranks(pipe, todo), options.count)
        print(text)
        if options.out is not None:
            renew(options.out / "methods.md", {"concepts": text})
    print(table(HEAD, list(rows.values())))


if __name__ == "__main__":
    main()
