"""The stage edit: text encoder and transformer learn together to edit and to draw, over the frozen VAE.

Heads that exist only in training make the text encoder name what lies where and what the instruction changes.
Without them the networks take far longer to find the shape that a word refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from qwenedit.family import TEXT_TO_IMAGE, VARIANTS
from qwenedit.inputs.geometry import Areas
from qwenedit.inputs.processor import Processor
from qwenedit.instruments.sheet import sheet
from qwenedit.latents import PATCH, Grid
from qwenedit.mini.build import AREA, SCHEDULER, TOKEN, TRANSFORMER, text_encoder_config
from qwenedit.mini.oracle import judge
from qwenedit.mini.pairs import BLOCK, CELLS, DRAWS, REUSE, Batch, Pairs, Pool, World, random_edit
from qwenedit.mini.scenes import ACTIONS, DETERMINED, PLACES, instruction
from qwenedit.mini.shapes import COLOURS, KINDS, draw
from qwenedit.mini.train_vae import visibility
from qwenedit.mini.training import Stage, averaged, begin, go_on_from, unfused_attention
from qwenedit.networks.mmdit import MMDiT
from qwenedit.networks.mmdit_layers import Modulation
from qwenedit.networks.vae import VAE
from qwenedit.networks.vision_language import VisionLanguage
from qwenedit.pipeline import QwenImageEdit
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.training.loss import freeze_unreached, velocity_error, weighted_mean
from qwenedit.weights.configs import config_from, vision_language_config
from qwenedit.weights.loading import load_network

__all__ = ["Grounding", "Student", "networks", "train_edit"]

JUDGE_EVERY = 1000  # steps
TEXT_ROWS, TEXT_SHARE = 0.5, 0.3  # descriptions in a step, as a share of edits; their share of the loss
LEAST_VISIBLE = 0.1  # weight of channels of the latents that pictures hardly show; the mean is about 1
Networks = tuple[VisionLanguage, MMDiT]


class Grounding(nn.Module):
    """Heads on the text encoder's output, in training only: what lies in each cell, what is asked."""

    # Classes of the last token's answers: the action; the referent's kind; the wanted kind, colour and place;
    # the referent's colour. Each but the action may be "none".
    WORDS = (len(ACTIONS), *(len(names) + 1 for names in (KINDS, KINDS, COLOURS, PLACES, COLOURS)))
    # Of a description's: kind, colour and place of the first and of the second shape; the background.
    TOLD = tuple(len(names) + 1 for names in (*(KINDS, COLOURS, PLACES) * 2, COLOURS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.Linear(width, len(KINDS) + len(COLOURS))
        self.words = nn.Linear(width, sum(self.WORDS) + 2 * CELLS**2)
        self.told = nn.Linear(width, sum(self.TOLD))

    def forward(self, cells: Tensor, last: Tensor, labels: Pairs) -> Tensor:
        """The loss from the embeddings of the picture's tokens (B, 16, D) and of the last token (B, D)."""
        contents = F.binary_cross_entropy_with_logits(self.cells(cells).float(), labels["contents"])
        answers = self.words(last).float().split([*self.WORDS, CELLS**2, CELLS**2], dim=-1)
        where = F.binary_cross_entropy_with_logits(answers[-2], labels["referent"])
        change = F.binary_cross_entropy_with_logits(answers[-1], labels["changed"])
        return contents + _mean_entropy(answers[:-2], labels["about"]) + 2 * where + 2 * change

    def of_description(self, last: Tensor, labels: Pairs) -> Tensor:
        """The loss from the embedding of a description's last token (B, D)."""
        return _mean_entropy(self.told(last).float().split(self.TOLD, dim=-1), labels["told"])


def _mean_entropy(answers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The mean cross entropy of answers, each (B, classes), with labels (B, answers)."""
    each = [F.cross_entropy(one, label) for one, label in zip(answers, labels.unbind(1), strict=True)]
    return torch.stack(each).mean()


@torch.no_grad()
def initialise(vision_language: VisionLanguage, mmdit: MMDiT) -> None:
    """No modulation, open gates, zero velocity and small embeddings to start from."""
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
    """All that is trained, as one module that computes the loss of a batch."""

    channels: Tensor | None

    def __init__(self, vision_language: VisionLanguage, mmdit: MMDiT, channels: Tensor | None = None) -> None:
        """`channels`: weights of a token's channels in the loss of the velocity."""
        super().__init__()
        self.register_buffer("channels", channels, persistent=False)
        self.vision_language = vision_language
        self.mmdit = mmdit
        self.grounding = Grounding(mmdit.config.joint_attention_dim)

    def forward(self, batch: Batch, drop: int) -> tuple[Tensor, Tensor]:
        """The losses of the velocity and of the grounding heads; `drop`: the template's first tokens."""
        pairs, count = batch.pairs, len(batch.ids)
        patch_grid: Grid = (1, 2 * CELLS, 2 * CELLS)
        grids = None if batch.pixel_values is None else [patch_grid] * count
        # Padding is on the right, where causal attention never looks, so the text encoder needs no mask.
        txt = self.vision_language(batch.ids, None, batch.pixel_values, grids)[:, drop:]
        real = batch.real[:, drop:]
        last = txt[torch.arange(count), real.sum(dim=1) - 1]
        if batch.pixel_values is None:
            grounding = self.grounding.of_description(last, pairs)
        else:
            grounding = self.grounding(txt[:, 1 : 1 + CELLS**2], last, pairs)
        grid: Grid = (1, CELLS, CELLS)
        references = None
        if batch.with_reference:  # detached: no gradient reaches them or what encoded them
            references = pairs["before"].detach().to(txt.dtype).repeat(DRAWS, 1, 1)
        error = velocity_error(
            self.mmdit,
            batch.latents.to(txt.dtype),
            references,
            txt.repeat(DRAWS, 1, 1),
            real.repeat(DRAWS, 1),
            batch.sigma,
            batch.noise.to(txt.dtype),
            (grid,) if references is None else (grid, grid),
            channels=self.channels,
        )
        return weighted_mean(error, batch.weight), grounding


def networks(tokens: Processor, start: Path | None = None) -> Networks:
    """Both networks of the embedded model: initialised for training, or with a checkpoint's weights.

    Raises:
        ValueError: the checkpoint has no such networks, or of another size.
    """
    ids = tokens.tokenizer.get_vocab(with_added_tokens=True)
    config = vision_language_config(text_encoder_config(ids), "text_encoder")
    vision_language, mmdit = VisionLanguage(config), MMDiT(TRANSFORMER)
    if start is None:
        initialise(vision_language, mmdit)
        return vision_language, mmdit
    for component, network in (("text_encoder", vision_language), ("transformer", mmdit)):
        trained = load_network(
            start, component, device=torch.device("cpu"), dtype=torch.float32, progress=False
        )
        go_on_from(network, trained)
    return vision_language, mmdit


def train_edit(
    folder: Path,
    stage: Stage,
    tokens: Processor,
    vae: VAE,
    *,
    tower: Mapping[str, Tensor] | None = None,
    make: Callable[[Processor], Networks] = networks,
    blocks: int = 40,
    compiled: bool = False,
) -> QwenImageEdit:
    """Train in `folder`, or resume there; returns the pipeline with the averaged weights, on the CPU.

    Args:
        tower: what `train_tower` returns; without it the networks learn much later to tell shapes apart.
        make: makes the networks.
        blocks: of training pairs, held at a time.
    """
    torch.manual_seed(stage.seed)
    channels = visibility(vae).clamp_min(LEAST_VISIBLE).repeat_interleave(PATCH**2)
    student = Student(*make(tokens), channels).to(stage.device)
    freeze_unreached(student.mmdit)
    if tower is not None:
        student.vision_language.vision.load_state_dict(tower)
    run = begin(folder, {"student": student}, stage)
    world = World(tokens, vae, stage.seed)
    pool, texts = Pool(world, blocks), Pool(world, max(1, blocks // 2), TEXT_TO_IMAGE)
    rows = max(1, round(stage.batch * TEXT_ROWS))
    if compiled:
        student.mmdit.compile()
        student.vision_language.language.compile()
    for step, generator in run:
        pool.slide(step * stage.batch // (BLOCK * REUSE))
        texts.slide(step * rows // (BLOCK * REUSE))
        for one, size, share in ((pool, stage.batch, 1 - TEXT_SHARE), (texts, rows, TEXT_SHARE)):
            batch = one.batch(size, generator).to(stage.device)
            with unfused_attention(student):
                flow, grounding = student(batch, tokens.drop_index(one.template))
            loss = flow + (0.5 if step < stage.steps // 2 else 0.2) * grounding
            names = ("flow", "grounding") if one is pool else ("from_text", "told")
            parts = dict(zip(names, (flow, grounding), strict=True))
            run.add(loss, share, **{name: x / share for name, x in parts.items()})
        run.update()
        if run.step % JUDGE_EVERY == 0:
            weights = averaged(run, "student", student)
            rates, pictures = held_out_success(pipeline_of(tokens, vae, weights, make), 96)
            run.log(success=rates)
            pictures.save(folder / "sheet.png")
    return pipeline_of(tokens, vae, averaged(run, "student", student), make)


def pipeline_of(
    tokens: Processor, vae: VAE, weights: dict[str, Tensor], make: Callable[[Processor], Networks]
) -> QwenImageEdit:
    """The pipeline of a student's weights, in float32 on the CPU."""
    student = Student(*make(tokens)).eval().requires_grad_(False)
    student.load_state_dict(weights)
    vision_language, mmdit = student.vision_language, student.mmdit
    pipe = QwenImageEdit(
        vision_language=vision_language,
        vae=vae,
        mmdit=mmdit,
        scheduler=config_from(FlowMatchScheduler, SCHEDULER, "scheduler"),
        processor=tokens,
        variant=VARIANTS["QwenImageEditPipeline"],
        areas=Areas(token=TOKEN, vae=AREA, vl=None, text_only=AREA),
    )
    pipe.progress = False
    return pipe


def held_out_success(pipe: QwenImageEdit, count: int) -> tuple[dict[str, float], Image.Image]:
    """Success rates of held-out edits by action, and a sheet of some: source and result."""
    rng = Random("held out")
    cases = [random_edit(rng, test=True, actions=dict.fromkeys(ACTIONS, 1.0)) for _ in range(count)]
    results: list[Image.Image] = []
    for start in range(0, count, 32):
        part = cases[start : start + 32]
        made = pipe.edit(
            [draw(scene) for scene, _ in part],
            [instruction(rng, request) for _, request in part],
            num_inference_steps=12,
            true_cfg_scale=3.0,
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
