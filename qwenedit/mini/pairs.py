"""The last stage's data: edits that are drawn and encoded once, and batches of them.

A sliding pool holds the newest edits. Each is used about `REUSE` times, with fresh noise every time. Block n
of a seed always holds the same edits, and a batch depends only on its generator and the pool, so a run saves
none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from qwenedit.family import EDIT
from qwenedit.inputs.processor import ImageProcessorConfig, Processor
from qwenedit.latents import PATCH, normalise, pack
from qwenedit.mini.build import TOKEN
from qwenedit.mini.scenes import (
    ACTIONS,
    COLOURS,
    KINDS,
    PLACES,
    SIDE,
    Request,
    Scene,
    Shape,
    instruction,
    outcome,
    paint,
    random_request,
    scenes,
)
from qwenedit.networks.vae import VAE

__all__ = [
    "BLOCK", "CELLS", "DRAWS", "REUSE", "Batch", "Pairs", "Pool", "World", "contents", "patches",
    "random_edit",
]  # fmt: skip

BLOCK = 64  # pairs that are made at a time
REUSE = 6  # how often each is used, about
DRAWS = 2  # noises for each encoded prompt
SHIFT = 2.5  # of the training's sigmas towards noise
NO_PROMPT, NO_REFERENCE, NO_PICTURE = 0.10, 0.08, 0.05  # how often each is dropped
CHANGED_WEIGHT = 3.0  # of the loss on tokens that a determined edit changes
CELLS = SIDE // TOKEN  # cells (tokens) per side of a picture
GREY = 128  # the language model sees a picture of this value when its picture is dropped

# Relative frequency of each action. Replacing takes longest to learn, then the background.
SHARES = {
    "recolour": 1.4, "remove": 0.8, "background": 1.5, "add": 1.0, "replace": 2.4, "move": 1.4,
    "add any": 0.6, "recolour any": 0.6, "add something": 0.6,
}  # fmt: skip


# Edits ready for training, one per row:
#   source                   (N, 3, 64, 64) uint8, the picture before
#   before, after            (N, 16, 64) normalised packed latents of both pictures
#   ids                      (N, T) tokens of the instruction and of the template's end, padded
#   weight                   (N, 16) of the loss on each token
#   contents, referent, changed, about     the labels of `Grounding`
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

    def index(names: Sequence[str], name: str | None) -> int:
        return 0 if name is None else 1 + names.index(name)

    referent = [0.0] * CELLS**2
    old = None if request.referent is None else scene.find(request.referent)
    for cell in () if old is None else _cells(old):
        referent[cell] = 1.0
    return {
        "contents": contents(scene),
        "referent": referent,
        "about": [
            ACTIONS.index(request.action), index(KINDS, request.referent), index(KINDS, request.kind),
            index(list(COLOURS), request.colour), index(list(PLACES), request.place),
            index(list(COLOURS), None if old is None else old.colour),
        ],
    }  # fmt: skip


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


class World:
    """Makes blocks of training pairs; each depends only on the seed and its number."""

    LENGTH = 14  # tokens after the picture: the instruction and the template's end

    def __init__(self, tokens: Processor, vae: VAE, seed: int) -> None:
        """`vae` computes in float32 on the CPU."""
        self.processor, self.vae, self.seed = tokens, vae, seed
        whole = tokens.tokenizer.encode(EDIT.render("", [CELLS**2])).ids
        end = len(tokens.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n").ids)
        self.head = torch.tensor(whole[:-end])
        self.no_prompt = torch.tensor(self.suffix(" "))

    def suffix(self, prompt: str) -> list[int]:
        """The tokens after the picture, padded to `LENGTH`."""
        text = EDIT.render(prompt, [CELLS**2])
        ids = self.processor.tokenizer.encode(text).ids[len(self.head) :]
        assert len(ids) <= self.LENGTH, f"{prompt!r} has too many tokens"
        return ids + [self.processor.pad_token_id] * (self.LENGTH - len(ids))

    @torch.no_grad()
    def block(self, number: int) -> Pairs:
        rng = Random(f"{self.seed} block {number}")
        ids, labels, weights, before, after = [], [], [], [], []
        for _ in range(BLOCK):
            scene, request = random_edit(rng)
            target = outcome(rng, scene, request)
            ids.append(self.suffix(instruction(rng, request)))
            labels.append(_labels(scene, request))
            before.append(paint(scene))
            after.append(paint(target))
            change = (before[-1] - after[-1]).abs().amax(dim=0)
            changed = F.max_pool2d(change[None], TOKEN)[0].flatten() > 0.02
            labels[-1]["changed"] = changed.float().tolist()
            weights.append(torch.ones(CELLS**2) if request.is_open else 1 + changed * (CHANGED_WEIGHT - 1))
        pictures = torch.stack(before + after).clamp(0, 1)
        pixels = (pictures * 255).round()
        raw = self.vae.encode((pixels / 127.5 - 1)[:, :, None]).mode()
        latents = pack(normalise(raw, self.vae.config.latents_mean, self.vae.config.latents_std))
        return {
            "source": pixels[:BLOCK].to(torch.uint8),
            "before": latents[:BLOCK],
            "after": latents[BLOCK:],
            "ids": torch.tensor(ids),
            "weight": torch.stack(weights),
            **{name: torch.tensor([one[name] for one in labels]) for name in labels[0]},
        }


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one step: B pairs with `DRAWS` noises each; some lack their prompt or picture."""

    ids: Tensor  # (B, T)
    real: Tensor  # (B, T) bool, False at padding
    pixel_values: Tensor
    pairs: Pairs
    sigma: Tensor  # (DRAWS B,)
    noise: Tensor  # (DRAWS B, 16, 64)
    with_reference: bool

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            ids=self.ids.to(device),
            real=self.real.to(device),
            pixel_values=self.pixel_values.to(device),
            pairs={name: x.to(device) for name, x in self.pairs.items()},
            sigma=self.sigma.to(device),
            noise=self.noise.to(device),
            with_reference=self.with_reference,
        )


class Pool:
    """The newest blocks of pairs."""

    def __init__(self, world: World, blocks: int) -> None:
        self.world, self.count = world, blocks
        self.blocks: dict[int, Pairs] = {}

    def slide(self, oldest: int) -> None:
        """Hold `count` blocks from `oldest` on; make the new ones, drop the old ones."""
        wanted = range(oldest, oldest + self.count)
        self.blocks = {n: self.blocks.get(n) or self.world.block(n) for n in wanted}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        world, tokens = self.world, self.world.processor
        held = list(self.blocks.values())
        chosen = torch.randint(self.count * BLOCK, (size,), generator=generator).tolist()
        pairs = {name: torch.stack([held[i // BLOCK][name][i % BLOCK] for i in chosen]) for name in held[0]}
        draws = DRAWS * size
        # Stratified: one sigma falls into each of `draws` equal parts.
        uniform = torch.randperm(draws, generator=generator) + torch.rand(draws, generator=generator)
        uniform = uniform / draws
        noise = torch.randn((draws, CELLS**2, world.vae.config.z_dim * PATCH**2), generator=generator)
        no_prompt, no_picture = torch.rand((2, size), generator=generator) < torch.tensor(
            [[NO_PROMPT], [NO_PICTURE]]
        )
        suffix = torch.where(no_prompt[:, None], world.no_prompt, pairs["ids"])
        source = torch.where(no_picture[:, None, None, None], GREY, pairs["source"]).to(torch.uint8)
        ids = torch.cat([world.head.expand(size, -1), suffix], dim=1)
        return Batch(
            ids=ids,
            real=ids != tokens.pad_token_id,
            pixel_values=patches(source, tokens.config),
            pairs=pairs,
            sigma=SHIFT * uniform / (1 + (SHIFT - 1) * uniform),
            noise=noise,
            with_reference=float(torch.rand((), generator=generator)) >= NO_REFERENCE,
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
