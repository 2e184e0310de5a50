"""The second stage: text encoder and transformer learn to edit together, over the frozen VAE.

Heads that exist in training only make the text encoder say what lies where and what the instruction
changes; without them it takes far longer to find the shape that a word refers to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from qwenedit.family import EDIT, VARIANTS
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.processor import Processor
from qwenedit.latents import Grid
from qwenedit.mini.build import AREA, SCHEDULER, TRANSFORMER, text_encoder_config
from qwenedit.mini.oracle import judge
from qwenedit.mini.pairs import BLOCK, CELLS, DRAWS, REUSE, Batch, Pairs, Pool, World, random_edit
from qwenedit.mini.scenes import ACTIONS, COLOURS, DETERMINED, KINDS, PLACES, draw, instruction
from qwenedit.mini.sheet import sheet
from qwenedit.mini.training import Run, Weights, learning_rate
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.networks.mmdit_layers import Modulation
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.taps import taps
from qwenedit.training.loss import velocity_error, weighted_mean
from qwenedit.weights.configs import config_from, vision_language_config

__all__ = ["Grounding", "Student", "train_edit"]


class Grounding(nn.Module):
    """Heads on the text encoder's output: what lies in each cell, and what the instruction is about.

    They exist in training only.
    """

    # Answers of the last token: action, the referent's kind; the kind, colour and place that are wanted; the
    # referent's colour. All but the action may be none.
    WORDS = (len(ACTIONS), *(len(names) + 1 for names in (KINDS, KINDS, COLOURS, PLACES, COLOURS)))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.Linear(width, len(KINDS) + len(COLOURS))
        self.words = nn.Linear(width, sum(self.WORDS) + 2 * CELLS**2)

    def forward(self, cells: Tensor, last: Tensor, labels: Pairs) -> Tensor:
        """The loss from the vectors of the picture's tokens (B, 16, D) and of the last token (B, D)."""
        contents = F.binary_cross_entropy_with_logits(self.cells(cells).float(), labels["contents"])
        answers = self.words(last).float().split([*self.WORDS, CELLS**2, CELLS**2], dim=-1)
        about = sum(
            F.cross_entropy(answer, label)
            for answer, label in zip(answers, labels["about"].unbind(1), strict=False)
        ) / len(self.WORDS)
        where = F.binary_cross_entropy_with_logits(answers[-2], labels["referent"])
        change = F.binary_cross_entropy_with_logits(answers[-1], labels["changed"])
        return contents + about + 2 * where + 2 * change


@torch.no_grad()
def initialise(vision_language: VisionLanguage, mmdit: MMDiT) -> None:
    """Modulation starts as none with open gates, the velocity at 0, embeddings small."""
    vision_language.embed_tokens.weight.normal_(std=0.3)
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).repeat_interleave(mmdit.config.width)
    for module in mmdit.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.linear.weight)
            module.linear.bias.copy_(gates)
    for layer in (mmdit.norm_out.linear, mmdit.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class Student(nn.Module):
    """What is trained, as one module: the loss of a batch."""

    def __init__(self, vision_language: VisionLanguage, mmdit: MMDiT) -> None:
        super().__init__()
        self.vision_language = vision_language
        self.mmdit = mmdit
        self.grounding = Grounding(mmdit.config.joint_attention_dim)

    def forward(self, batch: Batch, drop: int) -> tuple[Tensor, Tensor]:
        """The losses of the velocity and of the grounding heads."""
        pairs, count = batch.pairs, len(batch.ids)
        patch_grid: Grid = (1, 2 * CELLS, 2 * CELLS)
        # Padding is on the right, where causal attention never looks, so the text encoder needs no mask.
        txt = self.vision_language(batch.ids, None, batch.pixel_values, [patch_grid] * count)[:, drop:]
        real = batch.real[:, drop:]
        last = txt[torch.arange(count), real.sum(dim=1) - 1]
        grounding = self.grounding(txt[:, 1 : 1 + CELLS**2], last, pairs)
        grid: Grid = (1, CELLS, CELLS)
        # Detached: no gradient reaches the reference latents or what encoded them.
        references = pairs["before"].detach().to(txt.dtype).repeat(DRAWS, 1, 1)
        error = velocity_error(
            self.mmdit,
            pairs["after"].to(txt.dtype).repeat(DRAWS, 1, 1),
            references if batch.with_reference else None,
            txt.repeat(DRAWS, 1, 1),
            real.repeat(DRAWS, 1),
            batch.sigma,
            batch.noise.to(txt.dtype),
            (grid, grid) if batch.with_reference else (grid,),
        )
        return weighted_mean(error, pairs["weight"].repeat(DRAWS, 1)), grounding


def networks(tokens: Processor, transformer: MMDiTConfig = TRANSFORMER) -> tuple[VisionLanguage, MMDiT]:
    """Both networks of the embedded model, initialised for training."""
    ids = tokens.tokenizer.get_vocab(with_added_tokens=True)
    config = vision_language_config(text_encoder_config(ids), "text_encoder")
    vision_language, mmdit = VisionLanguage(config), MMDiT(transformer)
    initialise(vision_language, mmdit)
    return vision_language, mmdit


def train_edit(
    folder: Path,
    tokens: Processor,
    vae: VAE,
    *,
    tower: Mapping[str, Tensor] | None = None,
    transformer: MMDiTConfig = TRANSFORMER,
    steps: int = 6000,
    batch: int = 64,
    rate: float = 1.5e-3,
    matrix_rate: float = 3e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    compiled: bool = False,
    blocks: int = 64,
    report_every: int = 50,
    judge_every: int = 1000,
    save_every: float = 45.0,
) -> QwenImageEdit:
    """Train in `folder`, or go on there; returns the pipeline with the averaged weights, on the CPU.

    `tower` is what `train_tower` returns: without it, shapes are told apart much later.
    """
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    student = Student(*networks(tokens, transformer)).to(device)
    if tower is not None:
        student.vision_language.vision.load_state_dict(tower)
    weights = Weights({"student": student}, dtype=dtype, rate=rate, matrix_rate=matrix_rate)
    run = Run(folder, weights, steps=steps, every=save_every)
    pool = Pool(World(tokens, vae, seed), blocks)
    drop = tokens.drop_index(EDIT)
    if compiled:
        student.mmdit.compile()
        student.vision_language.language.compile()
    for step in run:
        pool.slide(step * batch // (BLOCK * REUSE))
        inputs = pool.batch(batch, seed * 1_000_003 + step).to(device)
        # Attention written out, as for who taps its maps, is faster than the fused one at this size.
        with taps(student, {"*.probs": lambda _x, _site: None}, eager=False):
            flow, grounding = student(inputs, drop)
        loss = flow + (0.5 if step < steps // 2 else 0.2) * grounding
        loss.backward()
        weights.step(learning_rate(step, steps, warmup=min(100, steps // 10)), step)
        run.note(loss=loss, flow=flow, grounding=grounding)
        if (step + 1) % report_every == 0 or step + 1 == steps:
            run.report()
        if (step + 1) % judge_every == 0:
            rates, pictures = held_out_success(averaged(tokens, vae, weights, transformer), 96)
            run.log(success=rates)
            pictures.save(folder / "sheet.png")
    return averaged(tokens, vae, weights, transformer)


def averaged(tokens: Processor, vae: VAE, weights: Weights, transformer: MMDiTConfig) -> QwenImageEdit:
    """The pipeline of the averaged weights, in float32 on the CPU."""
    vision_language, mmdit = networks(tokens, transformer)
    state = weights.averaged("student")
    for prefix, network in (("vision_language.", vision_language), ("mmdit.", mmdit)):
        network.load_state_dict(
            {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        )
        network.eval().requires_grad_(False)
    pipe = QwenImageEdit(
        vision_language=vision_language,
        vae=vae,
        mmdit=mmdit,
        scheduler=config_from(FlowMatchScheduler, SCHEDULER, "scheduler"),
        processor=tokens,
        variant=VARIANTS["QwenImageEditPipeline"],
        areas=Areas(vae=AREA, vl=None),
    )
    pipe.progress = False
    return pipe


def held_out_success(
    pipe: QwenImageEdit, count: int, steps: int = 12, scale: float = 3.0
) -> tuple[dict[str, float], Image.Image]:
    """Share of held-out edits that succeed, by action, and a sheet of some: source and result."""
    rng = Random("held out")
    cases = [random_edit(rng, test=True, actions=dict.fromkeys(ACTIONS, 1.0)) for _ in range(count)]
    results: list[Image.Image] = []
    for start in range(0, count, 32):
        part = cases[start : start + 32]
        made = pipe.edit(
            [draw(scene) for scene, _ in part],
            [instruction(rng, request) for _, request in part],
            num_inference_steps=steps,
            true_cfg_scale=scale,
            generator=torch.Generator().manual_seed(start),
        )
        results.extend(made.images)
    won: dict[str, list[bool]] = {action: [] for action in ACTIONS}
    for (scene, request), picture in zip(cases, results, strict=True):
        won[request.action].append(judge(scene, request, picture).success)
    won["determined"] = [x for action in DETERMINED for x in won[action]]
    rows = [
        (instruction(rng, request, plain=True), [draw(scene), picture])
        for (scene, request), picture in zip(cases[:32], results[:32], strict=True)
    ]
    return {name: sum(x) / max(1, len(x)) for name, x in won.items()}, sheet(rows, scale=2, columns=4)
