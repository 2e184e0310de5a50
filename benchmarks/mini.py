"""The success of the embedded model's edits: `python -m benchmarks.mini [--count 630] [--out docs]`.

The oracle (qwenedit/mini/oracle.py) judges held-out edits, of scenes whose composition was never trained on:
all of them by kind at the default settings, and a part of them under ablations. Prints Markdown tables; --out
also writes mini.md, mini.json and mini.png (a sheet of sources and results).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import qwenedit
from benchmarks.report import table
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.inputs.pictures import to_pil
from qwenedit.instruments.sheet import sheet
from qwenedit.mini.oracle import Verdict, judge
from qwenedit.mini.pairs import random_edit
from qwenedit.mini.scenes import ACTIONS, DETERMINED, OPEN, Request, instruction
from qwenedit.mini.shapes import SIDE, Scene, draw
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.sampler import Step

BATCH = 30
STEPS, SCALE = 20, 4.0  # the default settings of the embedded model's tables


@dataclasses.dataclass(frozen=True)
class Case:
    """A held-out edit: the scene, the request, and the request in words."""

    scene: Scene
    request: Request
    prompt: str


def cases(count: int, actions: tuple[str, ...] = ACTIONS, seed: str = "benchmark") -> list[Case]:
    """`count` held-out edits; the actions take turns."""
    rng = Random(seed)
    made = []
    for i in range(count):
        scene, request = random_edit(rng, test=True, actions={actions[i % len(actions)]: 1.0})
        made.append(Case(scene, request, instruction(rng, request)))
    return made


Change = Callable[[QwenImageEdit, list[Case], Conditioning], Conditioning]


def run(
    pipe: QwenImageEdit,
    todo: list[Case],
    *,
    steps: int = STEPS,
    scale: float = SCALE,
    norm: bool = True,
    change: Change | None = None,
    seed: int = 0,
) -> Tensor:
    """The edited pictures (N, 3, 64, 64) of N cases; `norm` rescales guidance as the pipeline does."""
    results = []
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        conditioning = pipe.condition([draw(case.scene) for case in part], [case.prompt for case in part])
        if change is not None:
            conditioning = change(pipe, part, conditioning)
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        with torch.no_grad():
            step: Step | None = None
            for step in pipe.steps(
                conditioning, num_inference_steps=steps, true_cfg_scale=scale, generator=generators
            ):
                if not norm and step.uncond is not None:
                    step.velocity = step.uncond + scale * (step.cond - step.uncond)
            assert step is not None
            results.append(pipe.decode(step.after, conditioning.target_grid))
    return torch.cat(results)


def verdicts_of(todo: list[Case], pictures: Tensor) -> list[Verdict]:
    return [judge(case.scene, case.request, x) for case, x in zip(todo, pictures, strict=True)]


def without_references(_pipe: QwenImageEdit, part: list[Case], conditioning: Conditioning) -> Conditioning:
    nothing: tuple[Any, ...] = ((),) * len(part)
    return dataclasses.replace(conditioning, reference_latents=nothing, reference_grids=nothing)


def without_picture(pipe: QwenImageEdit, part: list[Case], conditioning: Conditioning) -> Conditioning:
    """The language model sees a grey picture; the reference latents stay."""
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    blind = pipe.condition([grey] * len(part), [case.prompt for case in part])
    return dataclasses.replace(conditioning, prompt=blind.prompt, negative=blind.negative)


def without_both(pipe: QwenImageEdit, part: list[Case], conditioning: Conditioning) -> Conditioning:
    return without_references(pipe, part, without_picture(pipe, part, conditioning))


def without_instruction(_pipe: QwenImageEdit, _part: list[Case], conditioning: Conditioning) -> Conditioning:
    assert conditioning.negative is not None
    return dataclasses.replace(conditioning, prompt=conditioning.negative)


ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "CFG off": {"scale": 1.0},
    **{f"CFG {scale:g}": {"scale": scale} for scale in (2.5, 8.0)},
    **{f"CFG {scale:g}, no norm": {"scale": scale, "norm": False} for scale in (2.5, 4.0, 8.0)},
    "no reference latents": {"change": without_references},
    "language model sees grey": {"change": without_picture},
    "neither picture": {"change": without_both},
    'instruction " "': {"change": without_instruction},
    **{f"{steps} steps": {"steps": steps} for steps in (2, 4, 8, 50)},
}


def summary(todo: list[Case], verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """Rates by action, and over all determined and all open ones; groups without an edit are left out."""

    def of(actions: tuple[str, ...]) -> dict[str, float]:
        chosen = [v for case, v in zip(todo, verdicts, strict=True) if case.request.action in actions]
        kept = [v.preserved for v in chosen if math.isfinite(v.preserved)]
        return {
            "edits": len(chosen),
            "success": sum(v.success for v in chosen) / len(chosen),
            "strict": sum(v.strict for v in chosen) / len(chosen),
            "preserved": statistics.mean(kept) if kept else math.nan,
        }

    groups = {**{action: (action,) for action in ACTIONS}, "all determined": DETERMINED, "all open": OPEN}
    asked = {case.request.action for case in todo}
    return {name: of(actions) for name, actions in groups.items() if asked & set(actions)}


def diversity(pipe: QwenImageEdit, prompts: int, seeds: int, **options: Any) -> float:
    """Of open requests repeated with other noise: the share of right outcomes that differ.

    Two outcomes are alike if the new shapes have the same kind and colour and lie in the same quarter.
    """
    todo = cases(prompts, OPEN, seed="diversity")
    right: list[list[Any]] = [[] for _ in todo]
    for seed in range(seeds):
        pictures = run(pipe, todo, seed=1 + seed, **options)
        for case, picture, outcomes in zip(todo, pictures, right, strict=True):
            verdict = judge(case.scene, case.request, picture)
            old = {(s.kind, s.colour) for s in case.scene.shapes}
            new = [s for s in verdict.found if (s.kind, s.colour) not in old]
            if verdict.success and new:
                shape = new[0]
                outcomes.append((shape.kind, shape.colour, shape.x > SIDE / 2, shape.y > SIDE / 2))
    shares = [len(set(outcomes)) / len(outcomes) for outcomes in right if outcomes]
    return statistics.mean(shares) if shares else 0.0


def seconds_an_edit(pipe: QwenImageEdit, repeats: int = 7) -> list[float]:
    """Wall-clock seconds of single edits with guidance, sorted."""
    taken = []
    for case in cases(repeats + 1, DETERMINED, seed="timing"):
        start = time.perf_counter()
        pipe.edit(draw(case.scene), case.prompt, num_inference_steps=STEPS, true_cfg_scale=SCALE)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini", description=__doc__.split(":")[0])
    parser.add_argument("--model", help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--count", type=int, default=630, help="held-out edits (default: %(default)s)")
    parser.add_argument("--ablated", type=int, default=180, help="of these under each ablation")
    parser.add_argument("--out", type=Path, help="folder for mini.md, mini.json, mini.png")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    pipe = qwenedit.load(options.model, device="cpu", progress=False)
    pipe.progress = False

    todo = cases(options.count)
    pictures = run(pipe, todo)
    verdicts = verdicts_of(todo, pictures)
    by_action = summary(todo, verdicts)
    taken = seconds_an_edit(pipe)
    rows = [
        [name, f"{x['edits']:.0f}", f"{x['success']:.1%}", f"{x['strict']:.1%}", f"{x['preserved']:.1f}"]
        for name, x in by_action.items()
    ]
    text = [
        f"Held-out edits at {STEPS} steps, guidance {SCALE:g}, by kind:",
        table(["edit", "edits", "success", "strict", "kept, dB"], rows),
        f"Seconds an edit: median {statistics.median(taken):.2f} ({taken[0]:.2f} to {taken[-1]:.2f}), "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}.",
    ]
    print("\n\n".join(text), flush=True)

    rows, ablated = [], {}
    part = todo[: options.ablated]
    for name, change in ABLATIONS.items() if options.ablated else ():
        rates = summary(part, verdicts_of(part, run(pipe, part, **change)))
        determined, several = rates["all determined"], rates["all open"]
        differ = diversity(pipe, 18, 4, **change) if "CFG" in name or name == "default" else math.nan
        ablated[name] = {"determined": determined, "open": several, "diversity": differ}
        values = [
            f"{determined['success']:.1%}",
            f"{several['success']:.1%}",
            f"{determined['preserved']:.1f}",
        ]
        rows.append([name, *values, "" if math.isnan(differ) else f"{differ:.2f}"])
        print(rows[-1], flush=True)
    if rows:
        text += [
            f"Ablations, on {len(part)} of the edits. Diversity: of the right outcomes of open edits over 4 "
            "seeds, the share that differ.",
            table(["changed", "determined", "open", "kept, dB", "diversity"], rows),
        ]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "mini.md").write_text("\n\n".join(text) + "\n")
        document = {"edits": by_action, "seconds": taken, "ablations": ablated}
        (options.out / "mini.json").write_text(json.dumps(document, indent=1) + "\n")
        shown = [
            (case.prompt + ("" if verdict.success else " (fails)"), [draw(case.scene), image])
            for case, verdict, image in zip(todo, verdicts, to_pil(pictures), strict=True)
        ]
        sheet(shown[:36], scale=2, columns=4).save(options.out / "mini.png")


if __name__ == "__main__":
    main()
