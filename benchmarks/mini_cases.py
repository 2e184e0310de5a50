"""The embedded model's held-out cases, run and judged: what mini.py and other benchmarks measure on.

    todo = cases(60, DETERMINED)                 # edits; renderer=OTHER: of pictures that others draw
    verdicts = verdicts_of(todo, run(pipe, todo))
    told = text_cases(60)                        # pictures from text
    verdicts = text_verdicts_of(told, run_text(pipe, told))

Compositions of the scenes were never trained on. Each case has its own noise, the same in every setting.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

from benchmarks import other_renderer
from qwenedit.ablation.metrics import pixels
from qwenedit.encoding.conditioning import Conditioning
from qwenedit.mini.descriptions import Description, random_description
from qwenedit.mini.descriptions import prompt as in_words
from qwenedit.mini.oracle import Verdict, judge, judge_described
from qwenedit.mini.scenes import (
    ACTIONS,
    DETERMINED,
    OPEN,
    Request,
    instruction,
    outcome,
    random_request,
    scenes,
)
from qwenedit.mini.shapes import SIDE, Scene, draw
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.sampler import Step

BATCH = 30
STEPS, SCALE = 20, 4.0  # the default settings of the embedded model's tables


@dataclasses.dataclass(frozen=True)
class Renderer:
    """A distribution of scenes, `scenes(rng, test=...)`, and how they are drawn, `draw(scene)`."""

    scenes: Callable[..., Iterator[Scene]]
    draw: Callable[[Scene], Image.Image]


OWN = Renderer(scenes, draw)  # the one that draws the training's pictures
OTHER = Renderer(other_renderer.scenes, other_renderer.draw)


@dataclasses.dataclass(frozen=True)
class Case:
    """A held-out edit: the scene and who draws it, the request, and the request in words."""

    scene: Scene
    request: Request
    prompt: str
    renderer: Renderer = OWN

    @property
    def picture(self) -> Image.Image:
        """The picture that is edited."""
        return self.renderer.draw(self.scene)


@dataclasses.dataclass(frozen=True)
class TextCase:
    """A held-out description, and the same in words."""

    description: Description
    prompt: str


def cases(
    count: int, actions: tuple[str, ...] = ACTIONS, seed: str = "benchmark", renderer: Renderer = OWN
) -> list[Case]:
    """`count` held-out edits; the actions take turns."""
    rng = Random(seed)
    drawn, made = renderer.scenes(rng, test=True), []
    for i in range(count):
        request = None
        while request is None:
            scene = next(drawn)
            request = random_request(rng, scene, actions[i % len(actions)])
        made.append(Case(scene, request, instruction(rng, request), renderer))
    return made


def text_cases(count: int, seed: str = "benchmark") -> list[TextCase]:
    """`count` held-out descriptions."""
    rng = Random(seed)
    chosen = [random_description(rng, test=True)[0] for _ in range(count)]
    return [TextCase(description, in_words(rng, description)) for description in chosen]


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
        conditioning = pipe.condition([case.picture for case in part], [case.prompt for case in part])
        if change is not None:
            conditioning = change(pipe, part, conditioning)
        with torch.no_grad():
            step: Step | None = None
            for step in pipe.steps(
                conditioning,
                num_inference_steps=steps,
                true_cfg_scale=scale,
                generator=noises(len(part), start, seed),
            ):
                if not norm and step.uncond is not None:
                    step.velocity = step.uncond + scale * (step.cond - step.uncond)
            assert step is not None
            results.append(pipe.decode(step.after, conditioning.target_grid))
    return torch.cat(results)


def run_text(pipe: QwenImageEdit, todo: list[TextCase], *, steps: int = STEPS, seed: int = 0) -> Tensor:
    """The pictures (N, 3, 64, 64) made from N descriptions."""
    results = []
    for start in range(0, len(todo), BATCH):
        part = todo[start : start + BATCH]
        made = pipe.generate(
            [case.prompt for case in part], num_inference_steps=steps, true_cfg_scale=SCALE,
            generator=noises(len(part), start, seed), output_type="pt",
        )  # fmt: skip
        results.append(made.images)
    return torch.cat(results)


def noises(count: int, start: int = 0, seed: int = 0) -> list[Generator]:
    """The generators of cases from number `start` on."""
    return [Generator().manual_seed(seed * 100_003 + start + i) for i in range(count)]


@torch.no_grad()
def reconstructed(pipe: QwenImageEdit, pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures through the VAE, without an edit: (N, 3, 64, 64)."""
    results = []
    for start in range(0, len(pictures), BATCH):
        x = torch.stack([pixels(picture) for picture in pictures[start : start + BATCH]]).float() * 2 - 1
        results.append(pipe.vae.decode(pipe.vae.encode(x[:, :, None]).mode())[:, :, 0])
    return torch.cat(results) / 2 + 0.5


def right_pictures(todo: list[Case]) -> list[Image.Image]:
    """What each case's picture becomes in a faultless edit; of an open one, one of the right pictures."""
    rng = Random("right pictures")
    return [case.renderer.draw(outcome(rng, case.scene, case.request)) for case in todo]


def verdicts_of(todo: list[Case], pictures: Tensor) -> list[Verdict]:
    return [
        judge(case.scene, case.request, x, source=case.picture)
        for case, x in zip(todo, pictures, strict=True)
    ]


def text_verdicts_of(todo: list[TextCase], pictures: Tensor) -> list[Verdict]:
    return [judge_described(case.description, x) for case, x in zip(todo, pictures, strict=True)]


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
        return {
            "edits": len(chosen),
            "success": mean([v.success for v in chosen]),
            "strict": mean([v.strict for v in chosen]),
            "preserved": mean([v.preserved for v in chosen]),
        }

    groups = {**{action: (action,) for action in ACTIONS}, "all determined": DETERMINED, "all open": OPEN}
    asked = {case.request.action for case in todo}
    return {name: of(actions) for name, actions in groups.items() if asked & set(actions)}


TEXT_GROUPS: dict[str, Callable[[Description], bool]] = {
    "one shape": lambda description: len(description.items) == 1,
    "two shapes": lambda description: len(description.items) == 2,
    "with a place": lambda description: any(item.place for item in description.items),
    "without a place": lambda description: not any(item.place for item in description.items),
    "with a background": lambda description: description.background is not None,
    "without a background": lambda description: description.background is None,
    "all": lambda _description: True,
}


def text_summary(todo: list[TextCase], verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """Rates by what a description says; groups without one are left out."""
    groups = {
        name: [v.success for case, v in zip(todo, verdicts, strict=True) if belongs(case.description)]
        for name, belongs in TEXT_GROUPS.items()
    }
    return {name: {"pictures": len(won), "success": mean(won)} for name, won in groups.items() if won}


def mean(values: Sequence[float]) -> float:
    """Of the finite values; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def diversity(pipe: QwenImageEdit, prompts: int, seeds: int, **options: Any) -> float:
    """Of open requests repeated with other noise: the share of right outcomes that differ.

    Two outcomes are alike if the new shapes have the same kind and colour and lie in the same quarter.
    """
    todo = cases(prompts, OPEN, seed="diversity")
    right: list[list[Any]] = [[] for _ in todo]
    for seed in range(seeds):
        pictures = run(pipe, todo, seed=1 + seed, **options)
        for case, verdict, outcomes in zip(todo, verdicts_of(todo, pictures), right, strict=True):
            old = {(s.kind, s.colour) for s in case.scene.shapes}
            new = [s for s in verdict.found if (s.kind, s.colour) not in old]
            if verdict.success and new:
                shape = new[0]
                outcomes.append((shape.kind, shape.colour, shape.x > SIDE / 2, shape.y > SIDE / 2))
    shares = [len(set(outcomes)) / len(outcomes) for outcomes in right if outcomes]
    return statistics.mean(shares) if shares else 0.0
