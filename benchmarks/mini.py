"""How well the embedded model does: `python -m benchmarks.mini [--count 630] [--ablated 180] [--out docs]`.

The oracle (qwenedit/mini/oracle.py) judges held-out cases: edits of pictures by the project's own renderer
and by another one, pictures from text, and edits within masks. Beside them: what the VAE loses, how sharp
edges are, seconds an edit, and a part of the edits under ablations. Prints Markdown tables; --out also writes
mini.md, mini.json and mini.png (sheets of cases and results).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import qwenedit
from benchmarks.masks import LOCAL, MODE, edited, kept, mask_of
from benchmarks.mini_cases import (
    ABLATIONS,
    OTHER,
    OWN,
    SCALE,
    STEPS,
    Case,
    Renderer,
    TextCase,
    cases,
    diversity,
    mean,
    reconstructed,
    right_pictures,
    run,
    run_text,
    summary,
    text_cases,
    text_summary,
    text_verdicts_of,
    verdicts_of,
)
from benchmarks.report import out_folder, table
from qwenedit.ablation.metrics import pixels, psnr
from qwenedit.files import replacing_file
from qwenedit.inputs.pictures import to_pil
from qwenedit.instruments.sheet import sheet
from qwenedit.mini.oracle import Verdict, edges
from qwenedit.mini.scenes import ACTIONS, DETERMINED, outcome
from qwenedit.pipeline import QwenImageEdit

RENDERERS = {"own": OWN, "other": OTHER}
NAMES = {"own": "the project's own renderer", "other": "another renderer, which training never saw"}
SHOWN = {"edits": 16, "from_text": 8, "masked": 6}  # cases of each sheet
NOISES = 4  # of each prompt that is shown
HEADING = 20  # pixels, its height


@dataclass(frozen=True)
class Edits:
    """Edits of one renderer's pictures, with the results (N, 3, 64, 64) and their verdicts."""

    todo: list[Case]
    pictures: Tensor
    verdicts: list[Verdict]


def edits_of(pipe: QwenImageEdit, count: int, renderer: Renderer) -> Edits:
    todo = cases(count, renderer=renderer)
    pictures = run(pipe, todo)
    return Edits(todo, pictures, verdicts_of(todo, pictures))


@dataclass(frozen=True)
class Masked(Edits):
    """Edits within masks."""

    masks: list[Image.Image]

    @property
    def figures(self) -> dict[str, float]:
        """`kept` is the PSNR in dB outside of the mask's tokens, against the picture that was given."""
        given = torch.stack([pixels(case.picture) for case in self.todo]).float()
        ratios, _ = kept(self.pictures, given, self.masks)
        return {
            "edits": len(self.todo), "success": mean([verdict.success for verdict in self.verdicts]),
            "kept": mean(ratios), "worst": min(ratios, default=math.nan),
        }  # fmt: skip


def masked_of(pipe: QwenImageEdit, count: int, renderer: Renderer, steps: int = STEPS) -> Masked:
    todo = cases(count, LOCAL, seed="masks", renderer=renderer)
    masks = [mask_of(case) for case in todo]
    pictures = edited(pipe, todo, masks, {"switches": MODE}, steps)
    return Masked(todo, pictures, verdicts_of(todo, pictures), masks)


def fidelity(pipe: QwenImageEdit, done: Edits) -> dict[str, float]:
    """PSNR of the given pictures through the VAE, and the `edges` of three kinds of pictures.

    `accepted` is the share of the edits whose right picture the oracle still accepts after the VAE: no
    transformer can do better. `given` are the pictures themselves, the most that can be reached; `decoded`
    those through the VAE; `edited` the successful edits that have one right outcome.
    """
    given = torch.stack([pixels(case.picture) for case in done.todo]).float()
    decoded = reconstructed(pipe, [case.picture for case in done.todo])
    right = verdicts_of(done.todo, reconstructed(pipe, right_pictures(done.todo)))
    ratios = [psnr(x, y) for x, y in zip(decoded, given, strict=True)]
    results = [
        (outcome(Random(0), case.scene, case.request), picture)
        for case, picture, verdict in zip(done.todo, done.pictures, done.verdicts, strict=True)
        if verdict.success and not case.request.is_open
    ]
    scenes = [case.scene for case in done.todo]
    return {
        "pictures": len(ratios), "psnr": mean(ratios), "worst": min(ratios),
        "accepted": mean([verdict.success for verdict in right]),
        "given": mean([edges(*pair) for pair in zip(scenes, given, strict=True)]),
        "decoded": mean([edges(*pair) for pair in zip(scenes, decoded, strict=True)]),
        "edited": mean([edges(*pair) for pair in results]),
    }  # fmt: skip


def seconds_an_edit(pipe: QwenImageEdit, repeats: int = 7) -> list[float]:
    """Wall-clock seconds of single edits with guidance, sorted."""
    taken = []
    for case in cases(repeats + 1, DETERMINED, seed="timing"):
        start = time.perf_counter()
        pipe.edit(case.picture, case.prompt, num_inference_steps=STEPS, true_cfg_scale=SCALE)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])


def ablations(pipe: QwenImageEdit, todo: list[Case]) -> dict[str, dict[str, Any]]:
    """Success and what is kept under each ablation; the diversity of open edits where guidance changes."""
    found = {}
    for name, change in ABLATIONS.items():
        rates = summary(todo, verdicts_of(todo, run(pipe, todo, **change)))
        determined, several = rates["all determined"], rates["all open"]
        differ = diversity(pipe, 18, 4, **change) if "CFG" in name or name == "default" else math.nan
        found[name] = {"determined": determined, "open": several, "diversity": differ}
        print(f"{name}: {determined['success']:.1%}, {several['success']:.1%}", flush=True)
    return found


Figures = dict[str, dict[str, float]]


def figures_table(
    head: Sequence[str], rows: Mapping[str, Mapping[str, float]], formats: Mapping[str, str]
) -> str:
    """A row for each name, with the columns of `formats`; NaN is left empty."""
    values = [
        [name, *("" if math.isnan(row[key]) else format(row[key], form) for key, form in formats.items())]
        for name, row in rows.items()
    ]
    return table(head, values)


def by_renderer(head: Sequence[str], figures: Figures, formats: Mapping[str, str]) -> str:
    return figures_table(["pictures by", *head], {NAMES[key]: row for key, row in figures.items()}, formats)


def edits_text(figures: dict[str, Figures]) -> str:
    head = ("edit", "edits", "success", "strict", "kept, dB")
    formats = {"edits": ".0f", "success": ".1%", "strict": ".1%", "preserved": ".1f"}
    return "\n\n".join(
        f"Held-out edits of pictures by {NAMES[key]}, by kind, at {STEPS} steps, guidance {SCALE:g}:\n\n"
        + figures_table(head, rows, formats)
        for key, rows in figures.items()
    )


def descriptions_text(figures: Figures) -> str:
    head, formats = ("prompt", "pictures", "success"), {"pictures": ".0f", "success": ".1%"}
    return "Pictures from text, by what the prompt says:\n\n" + figures_table(head, figures, formats)


def masked_text(figures: Figures) -> str:
    head = ("edits", "success", "kept, dB", "the least")
    formats = {"edits": ".0f", "success": ".1%", "kept": ".1f", "worst": ".1f"}
    return (
        "Edits within a mask, the tokens that the right picture changes (`mask.posterior=mode`). Kept: "
        "outside of it, against the given picture.\n\n" + by_renderer(head, figures, formats)
    )


def vae_text(figures: Figures) -> str:
    head = ("pictures", "PSNR, dB", "the least", "accepted", "edges, as drawn", "decoded", "after an edit")
    formats = {
        "pictures": ".0f", "psnr": ".1f", "worst": ".1f", "accepted": ".1%", "given": ".1%",
        "decoded": ".1%", "edited": ".1%",
    }  # fmt: skip
    return (
        "The VAE on the given pictures. Accepted: of the edits' right pictures after the VAE, by the oracle; "
        "no edit can do better. Edges: the share within a pixel of the true outline, of the pictures "
        "as they are drawn, after the VAE, and of successful edits.\n\n" + by_renderer(head, figures, formats)
    )


def seconds_text(taken: list[float]) -> str:
    return (
        f"Seconds an edit: median {statistics.median(taken):.2f} ({taken[0]:.2f} to {taken[-1]:.2f}), "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}."
    )


def ablations_text(found: dict[str, dict[str, Any]]) -> str:
    rows = {
        name: {
            "determined": row["determined"]["success"], "open": row["open"]["success"],
            "kept": row["determined"]["preserved"], "diversity": row["diversity"],
        }
        for name, row in found.items()
    }  # fmt: skip
    head = ("changed", "determined", "open", "kept, dB", "diversity")
    formats = {"determined": ".1%", "open": ".1%", "kept": ".1f", "diversity": ".2f"}
    count = sum(found["default"][kind]["edits"] for kind in ("determined", "open"))
    return (
        f"Ablations, on {count} of the edits of the first table. Diversity: of the right outcomes of open "
        "edits over 4 seeds, the share that differ.\n\n" + figures_table(head, rows, formats)
    )


TEXTS: dict[str, Callable[[Any], str]] = {  # of the parts of mini.json
    "edits": edits_text, "from_text": descriptions_text, "masked": masked_text, "vae": vae_text,
    "seconds": seconds_text, "ablations": ablations_text,
}  # fmt: skip


def captioned(prompt: str, verdicts: Sequence[Verdict]) -> str:
    failed = sum(not verdict.success for verdict in verdicts)
    if not failed:
        return prompt
    return prompt + (" (fails)" if len(verdicts) == 1 else f" ({failed} of {len(verdicts)} fail)")


def edits_sheet(done: Edits) -> Image.Image:
    """The given pictures, the masks if there are any, and the results."""
    between: list[list[Image.Image]] = [[] for _ in done.todo]
    count, across = SHOWN["edits"], 4
    if isinstance(done, Masked):
        between = [[mask] for mask in done.masks]
        count, across = SHOWN["masked"], 3
    columns = zip(done.todo, done.verdicts, between, to_pil(done.pictures), strict=True)
    rows = [
        (captioned(case.prompt, [verdict]), [case.picture, *mask, picture])
        for case, verdict, mask, picture in columns
    ]
    return sheet(rows[:count], scale=2, columns=across)


def text_sheet(pipe: QwenImageEdit, todo: list[TextCase]) -> Image.Image:
    """Each description with several noises."""
    pictures = [run_text(pipe, todo, seed=seed) for seed in range(NOISES)]
    verdicts = [text_verdicts_of(todo, one) for one in pictures]
    columns = zip(todo, zip(*verdicts, strict=True), zip(*map(to_pil, pictures), strict=True), strict=True)
    rows = [(captioned(case.prompt, verdict), made) for case, verdict, made in columns]
    return sheet(rows, scale=2, columns=2)


def stacked(sheets: dict[str, Image.Image]) -> Image.Image:
    """One page of sheets, each under its heading."""
    width, height = max(one.width for one in sheets.values()), sum(one.height for one in sheets.values())
    page = Image.new("RGB", (width, height + len(sheets) * HEADING), (255, 255, 255))
    ink, top = ImageDraw.Draw(page), 0
    for heading, one in sheets.items():
        ink.text((4, top + 4), heading.upper(), fill=(0, 0, 0))
        page.paste(one, (0, top + HEADING))
        top += HEADING + one.height
    return page


def write(folder: Path, text: str, document: dict[str, Any], page: Image.Image) -> None:
    writers: dict[str, Callable[[Path], object]] = {
        "mini.md": lambda path: path.write_text(text + "\n", encoding="utf-8"),
        "mini.json": lambda path: path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8"),
        "mini.png": lambda path: page.save(path, format="PNG"),
    }
    for name, writer in writers.items():
        with replacing_file(folder / name) as temporary:
            writer(temporary)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini", description=__doc__.split(":")[0])
    parser.add_argument("--model", help="checkpoint folder (default: the embedded one)")
    parser.add_argument(
        "--count", type=int, default=630,
        help="edits of each renderer's pictures, and descriptions; a third of it within masks "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ablated", type=int, default=180, help="edits under each ablation; 0: none (default: %(default)s)"
    )
    parser.add_argument("--out", type=out_folder, help="folder for mini.md, mini.json, mini.png")
    options = parser.parse_args(arguments)
    if min(options.count, options.ablated or len(ACTIONS)) < len(ACTIONS):
        parser.error(
            f"--count and --ablated are at least {len(ACTIONS)}, an edit of each kind, or --ablated 0"
        )
    torch.set_num_threads(min(2, torch.get_num_threads()))
    pipe = qwenedit.load(options.model, device="cpu", progress=False)
    pipe.progress = False
    document: dict[str, Any] = {}
    parts: list[str] = []

    def add(key: str, figures: Any) -> None:
        document[key] = figures
        parts.append(TEXTS[key](figures))
        print(parts[-1], end="\n\n", flush=True)

    edits = {key: edits_of(pipe, options.count, renderer) for key, renderer in RENDERERS.items()}
    add("edits", {key: summary(done.todo, done.verdicts) for key, done in edits.items()})
    told = text_cases(options.count)
    add("from_text", text_summary(told, text_verdicts_of(told, run_text(pipe, told))))
    masked = {key: masked_of(pipe, options.count // 3, renderer) for key, renderer in RENDERERS.items()}
    add("masked", {key: done.figures for key, done in masked.items()})
    add("vae", {key: fidelity(pipe, done) for key, done in edits.items()})
    add("seconds", seconds_an_edit(pipe))
    if options.ablated:
        add("ablations", ablations(pipe, edits["own"].todo[: options.ablated]))
    if options.out is not None:
        sheets = {
            **{f"edits of pictures by {NAMES[key]}": edits_sheet(done) for key, done in edits.items()},
            "pictures from text": text_sheet(pipe, told[: SHOWN["from_text"]]),
            **{f"within masks, pictures by {NAMES[key]}": edits_sheet(done) for key, done in masked.items()},
        }
        write(options.out, "\n\n".join(parts), document, stacked(sheets))


if __name__ == "__main__":
    main()
