"""The last stage's data: edits and descriptions that are drawn and encoded once, and batches of them.

A sliding pool holds the newest pairs. Each is used about `REUSE` times, with fresh noise every time. Block n
of a seed always holds the same pairs, and a batch depends only on its generator and the pool, so a run saves
none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from qwenedit.family import EDIT, TEXT_TO_IMAGE, Template
from qwenedit.inputs.processor import ImageProcessorConfig, Processor
from qwenedit.latents import normalise, pack
from qwenedit.mini.build import TOKEN
from qwenedit.mini.descriptions import Description, described, prompt, random_description
from qwenedit.mini.scenes import (
    ACTIONS,
    PLACES,
    Request,
    held_out,
    instruction,
    outcome,
    random_request,
    scenes,
)
from qwenedit.mini.shapes import COLOURS, KINDS, SIDE, Scene, Shape, paint
from qwenedit.networks.vae import VAE

__all__ = [
    "BLOCK", "CELLS", "DRAWS", "REUSE", "Batch", "Pairs", "Pool", "World", "contents", "matched",
    "patches", "random_edit",
]  # fmt: skip

BLOCK = 64  # pairs that are made at a time
REUSE = 8  # how often each is used, about
DRAWS = 2  # noises for each encoded prompt
OUTCOMES = 12  # right pictures that are drawn for each pair, and noises that are matched to them
SWEEPS = 2  # of exchanges between them
SHIFT = 2.5  # of the training's sigmas towards noise
NO_PROMPT, NO_REFERENCE, NO_PICTURE = 0.10, 0.08, 0.05  # how often each is dropped
CHANGED_WEIGHT, OPEN_WEIGHT = 3.0, 2.0  # of the loss on tokens that a determined or an open edit changes
CHANGE = 5  # of 255, from which on a pixel counts as changed
CELLS = SIDE // TOKEN  # cells (tokens) per side of a picture
GREY = 128  # the language model sees a picture of this value when its picture is dropped

# Relative frequency of each action. Replacing takes longest to learn, then what has many right pictures.
SHARES = {
    "recolour": 1.4, "remove": 0.7, "background": 2.0, "add": 0.7, "replace": 2.2, "move": 1.4,
    "add any": 1.3, "recolour any": 1.3, "add something": 1.2,
}  # fmt: skip


# Pairs ready for training, one per row. All have
#   after                    (N, OUTCOMES, 16, 64) normalised packed latents of right pictures: the modes
#   spread                   (N, OUTCOMES, 16, 64) the deviation of the VAE's posterior around them
#   weight                   (N, OUTCOMES, 16) of the loss on each token
#   ids                      (N, T) tokens of the prompt and of the template's end, padded
# and edits also
#   source                   (N, 3, 64, 64) uint8, the picture before
#   before                   (N, 16, 64) its latents
#   contents, referent, changed, about     the labels of `Grounding`
# and descriptions
#   told                     its labels for them
Pairs = dict[str, Tensor]


def random_edit(
    rng: Random, *, test: bool = False, actions: Mapping[str, float] = SHARES
) -> tuple[Scene, Request]:
    """A scene and a request for it; `actions` gives the relative frequencies."""
    while True:
        (action,) = rng.choices(list(actions), list(actions.values()))
        scene = next(scenes(rng, test=test))
        request = random_request(rng, scene, action)
        if request is not None:
            return scene, request


def _labels(scene: Scene, request: Request) -> dict[str, Any]:
    """The labels of `Grounding` for an edit."""
    referent = [0.0] * CELLS**2
    old = None if request.referent is None else scene.find(request.referent)
    for cell in () if old is None else _cells(old):
        referent[cell] = 1.0
    return {
        "contents": contents(scene),
        "referent": referent,
        "about": [
            ACTIONS.index(request.action), _index(KINDS, request.referent), _index(KINDS, request.kind),
            _index(list(COLOURS), request.colour), _index(list(PLACES), request.place),
            _index(list(COLOURS), None if old is None else old.colour),
        ],
    }  # fmt: skip


def _told(description: Description) -> list[int]:
    """The labels of `Grounding` for a description; 0: it does not say."""
    labels = []
    for item in (*description.items, None)[:2]:
        kind, colour, place = (None,) * 3 if item is None else (item.kind, item.colour, item.place)
        labels += [_index(KINDS, kind), _index(list(COLOURS), colour), _index(list(PLACES), place)]
    return [*labels, _index(list(COLOURS), description.background)]


def _index(names: Sequence[str], name: str | None) -> int:
    return 0 if name is None else 1 + names.index(name)


def contents(scene: Scene) -> list[list[float]]:
    """One row per cell: 1 for each kind, then each colour, of which a shape lies in the cell."""
    rows = [[0.0] * (len(KINDS) + len(COLOURS)) for _ in range(CELLS**2)]
    for shape in scene.shapes:
        for cell in _cells(shape):
            rows[cell][KINDS.index(shape.kind)] = 1.0
            rows[cell][len(KINDS) + list(COLOURS).index(shape.colour)] = 1.0
    return rows


def _cells(shape: Shape) -> list[int]:
    """The cells that a shape lies in: those that a circle of 0.8 times its radius touches."""
    cells = []
    for row in range(CELLS):
        for column in range(CELLS):
            dx = shape.x - min(max(shape.x, column * TOKEN), (column + 1) * TOKEN)
            dy = shape.y - min(max(shape.y, row * TOKEN), (row + 1) * TOKEN)
            if math.hypot(dx, dy) < 0.8 * shape.radius:
                cells.append(row * CELLS + column)
    return cells


# Tokens after the picture, or after the template's head if there is none: prompt and template's end.
LENGTHS = {EDIT: 14, TEXT_TO_IMAGE: 24}


class World:
    """Makes blocks of training pairs; each depends only on the seed and its number."""

    def __init__(self, tokens: Processor, vae: VAE, seed: int) -> None:
        """`vae` computes in float32 on the CPU."""
        self.processor, self.vae, self.seed = tokens, vae, seed
        end = len(tokens.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n").ids)

        def head(template: Template) -> Tensor:
            return torch.tensor(tokens.tokenizer.encode(template.render("", self.cells(template))).ids[:-end])

        self.heads = {template: head(template) for template in LENGTHS}
        self.no_prompt = {template: torch.tensor(self.suffix(" ", template)) for template in LENGTHS}

    @staticmethod
    def cells(template: Template) -> list[int]:
        """The numbers of tokens of the pictures of a prompt."""
        return [CELLS**2] if template is EDIT else []

    def suffix(self, prompt: str, template: Template = EDIT) -> list[int]:
        """The tokens after the head, padded to the template's length."""
        text, length = template.render(prompt, self.cells(template)), LENGTHS[template]
        ids = self.processor.tokenizer.encode(text).ids[len(self.heads[template]) :]
        assert len(ids) <= length, f"{prompt!r} has too many tokens"
        return ids + [self.processor.pad_token_id] * (length - len(ids))

    def edits(self, number: int) -> Pairs:
        """A block of edits."""
        rng = Random(f"{self.seed} block {number}")
        made = [random_edit(rng) for _ in range(BLOCK)]
        targets = [outcome(rng, *one) for one in made for _ in range(OUTCOMES)]
        source, before, _ = self.encoded([scene for scene, _ in made])
        pictures, after, spread = (x.unflatten(0, (BLOCK, OUTCOMES)) for x in self.encoded(targets))
        change = (pictures.int() - source[:, None].int()).abs().amax(dim=2) > CHANGE
        changed = F.max_pool2d(change.float(), TOKEN).flatten(2)
        high = torch.tensor([OPEN_WEIGHT if request.is_open else CHANGED_WEIGHT for _, request in made])
        labels = [_labels(*one) for one in made]
        return {
            "source": source,
            "before": before,
            "after": after,
            "spread": spread,
            "weight": 1 + changed * (high - 1)[:, None, None],
            "ids": torch.tensor([self.suffix(instruction(rng, request)) for _, request in made]),
            "changed": changed.mean(dim=1),
            **{name: torch.tensor([one[name] for one in labels]) for name in labels[0]},
        }

    def descriptions(self, number: int) -> Pairs:
        """A block of descriptions and pictures of them."""
        rng = Random(f"{self.seed} descriptions {number}")
        made = [random_description(rng)[0] for _ in range(BLOCK)]
        _, after, spread = self.encoded([self.scene(rng, one) for one in made for _ in range(OUTCOMES)])
        return {
            "after": after.unflatten(0, (BLOCK, OUTCOMES)),
            "spread": spread.unflatten(0, (BLOCK, OUTCOMES)),
            "weight": torch.ones(BLOCK, OUTCOMES, CELLS**2),
            "ids": torch.tensor([self.suffix(prompt(rng, one), TEXT_TO_IMAGE) for one in made]),
            "told": torch.tensor([_told(one) for one in made]),
        }

    @staticmethod
    def scene(rng: Random, description: Description) -> Scene:
        """A scene that a description is true of, of the compositions for training."""
        while held_out(scene := described(rng, description)):
            pass
        return scene

    @torch.no_grad()
    def encoded(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures as they are stored, (N, 3, 64, 64) uint8, and what the VAE makes of them.

        That is normalised packed latents (N, 16, 64): the modes and deviations of its posterior.
        """
        number = {scene: n for n, scene in enumerate(dict.fromkeys(scenes))}  # equal ones are drawn once
        pixels = (torch.stack([paint(scene) for scene in number]).clamp(0, 1) * 255).round()
        posterior = self.vae.encode((pixels / 127.5 - 1)[:, :, None])
        modes = self.packed(posterior.mode())
        spread = self.packed(posterior.at(torch.ones_like(posterior.mean))) - modes
        rows = torch.tensor([number[scene] for scene in scenes])
        return pixels.to(torch.uint8)[rows], modes[rows], spread[rows]

    def packed(self, raw: Tensor) -> Tensor:
        return pack(normalise(raw, self.vae.config.latents_mean, self.vae.config.latents_std))


def matched(noise: Tensor, outcomes: Tensor) -> Tensor:
    """Which outcome each noise is to lead to: (B, N) numbers of outcomes, each once in a row.

    Each noise gets an outcome near it, so that the noise decides between right pictures early. Noise and
    outcomes are both random and are only paired, so the noise stays normal. Two noises exchange their
    outcomes wherever that brings them nearer in sum.

    Args:
        noise, outcomes: (B, N, S, C).

    Source: Pooladian et al., "Multisample Flow Matching" (ICML 2023), whose pairs are of different
        conditions; here all are right answers to one prompt.
    """
    near = torch.einsum("bisc,bjsc->bij", noise, outcomes)  # in sum, distances differ by these alone
    rows, count = torch.arange(len(near)), near.shape[1]
    order = torch.arange(count).repeat(len(near), 1)
    for _ in range(SWEEPS):
        for i, j in combinations(range(count), 2):
            a, b = order[:, i], order[:, j]
            better = near[rows, i, b] + near[rows, j, a] > near[rows, i, a] + near[rows, j, b]
            order[:, i], order[:, j] = torch.where(better, b, a), torch.where(better, a, b)
    return order


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one step: B pairs with `DRAWS` noises each; some lack their prompt or picture."""

    ids: Tensor  # (B, T)
    real: Tensor  # (B, T) bool, False at padding
    pixel_values: Tensor | None  # None: descriptions, which have no picture
    pairs: Pairs  # without after, spread and weight, of which each draw has its own below
    latents: Tensor  # (DRAWS B, 16, 64) to learn
    weight: Tensor  # (DRAWS B, 16) of the loss on each token
    sigma: Tensor  # (DRAWS B,)
    noise: Tensor  # (DRAWS B, 16, 64)
    with_reference: bool

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            ids=self.ids.to(device),
            real=self.real.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device),
            pairs={name: x.to(device) for name, x in self.pairs.items()},
            latents=self.latents.to(device),
            weight=self.weight.to(device),
            sigma=self.sigma.to(device),
            noise=self.noise.to(device),
            with_reference=self.with_reference,
        )


class Pool:
    """The newest blocks of edits, or of descriptions."""

    def __init__(self, world: World, blocks: int, template: Template = EDIT) -> None:
        self.world, self.count, self.template = world, blocks, template
        self.make: Callable[[int], Pairs] = world.edits if template is EDIT else world.descriptions
        self.blocks: dict[int, Pairs] = {}

    def slide(self, oldest: int) -> None:
        """Hold `count` blocks from `oldest` on; make the new ones, drop the old ones."""
        wanted = range(oldest, oldest + self.count)
        self.blocks = {n: self.blocks.get(n) or self.make(n) for n in wanted}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        world, tokens = self.world, self.world.processor
        held = list(self.blocks.values())
        chosen = torch.randint(self.count * BLOCK, (size,), generator=generator).tolist()
        pairs = {name: torch.stack([held[i // BLOCK][name][i % BLOCK] for i in chosen]) for name in held[0]}
        draws = DRAWS * size
        # Stratified: one sigma falls into each of `draws` equal parts.
        uniform = torch.randperm(draws, generator=generator) + torch.rand(draws, generator=generator)
        uniform = uniform / draws
        noise = torch.randn(pairs["after"].shape, generator=generator)
        order = matched(noise, pairs["after"])[:, :DRAWS]
        after, spread, weight = (
            pairs.pop(name)[torch.arange(size), order.T].flatten(0, 1)
            for name in ("after", "spread", "weight")
        )
        # Of half of the pictures a sample is learned, of the others the mode: a mask keeps either.
        sampled = torch.rand((draws, 1, 1), generator=generator) < 0.5
        no_prompt, no_picture = torch.rand((2, size), generator=generator) < torch.tensor(
            [[NO_PROMPT], [NO_PICTURE]]
        )
        suffix = torch.where(no_prompt[:, None], world.no_prompt[self.template], pairs["ids"])
        ids = torch.cat([world.heads[self.template].expand(size, -1), suffix], dim=1)
        pixel_values = None
        if self.template is EDIT:
            source = torch.where(no_picture[:, None, None, None], GREY, pairs["source"]).to(torch.uint8)
            pixel_values = patches(source, tokens.config)
        return Batch(
            ids=ids,
            real=ids != tokens.pad_token_id,
            pixel_values=pixel_values,
            pairs=pairs,
            latents=after + sampled * spread * torch.randn(after.shape, generator=generator),
            weight=weight,
            sigma=SHIFT * uniform / (1 + (SHIFT - 1) * uniform),
            noise=noise[:, :DRAWS].transpose(0, 1).flatten(0, 1),
            with_reference=self.template is EDIT
            and float(torch.rand((), generator=generator)) >= NO_REFERENCE,
        )


def patches(pixels: Tensor, config: ImageProcessorConfig) -> Tensor:
    """(N, 3, 64, 64) uint8 -> the vision tower's patches, equal to those of `picture_patches`."""
    x = (pixels.double() * config.rescale_factor).float()
    mean, std = x.new_tensor(config.image_mean), x.new_tensor(config.image_std)
    x = (x - mean[:, None, None]) / std[:, None, None]
    patch, merge = config.patch_size, config.merge_size
    return repeat(
        x, "n c (rows i p) (columns j q) -> (n rows columns i j) (c frames p q)",
        i=merge, j=merge, p=patch, q=patch, frames=config.temporal_patch_size,
    )  # fmt: skip
