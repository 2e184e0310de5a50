"""The last stage's data: edits and descriptions that are drawn and encoded once, and batches of them.

A sliding pool holds the newest pairs. Each is used about `REUSE` times, with fresh noise every time. Block n
of a seed always holds the same pairs, and a batch depends only on its generator and the pool, so a run saves
none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from qwenedit.family import EDIT, TEXT_TO_IMAGE, Template
from qwenedit.inputs.processor import ImageProcessorConfig, Processor
from qwenedit.latents import PATCH, normalise, pack
from qwenedit.mini.build import TOKEN
from qwenedit.mini.descriptions import Description, prompt, random_description
from qwenedit.mini.scenes import ACTIONS, PLACES, Request, instruction, outcome, random_request, scenes
from qwenedit.mini.shapes import COLOURS, KINDS, SIDE, Scene, Shape, paint
from qwenedit.networks.vae import VAE, Posterior

__all__ = [
    "BLOCK", "CELLS", "DRAWS", "REUSE", "Batch", "Pairs", "Pool", "World", "contents", "patches",
    "random_edit",
]  # fmt: skip

BLOCK = 64  # pairs that are made at a time
REUSE = 6  # how often each is used, about
DRAWS = 2  # noises for each encoded prompt
SHIFT = 2.5  # of the training's sigmas towards noise
NO_PROMPT, NO_REFERENCE, NO_PICTURE = 0.10, 0.08, 0.05  # how often each is dropped
CHANGED_WEIGHT, OPEN_WEIGHT = 3.0, 2.0  # of the loss on tokens that a determined or an open edit changes
CELLS = SIDE // TOKEN  # cells (tokens) per side of a picture
GREY = 128  # the language model sees a picture of this value when its picture is dropped

# Relative frequency of each action. Replacing takes longest to learn, then what has many right pictures.
SHARES = {
    "recolour": 1.2, "remove": 0.6, "background": 2.0, "add": 0.8, "replace": 2.2, "move": 1.2,
    "add any": 1.1, "recolour any": 1.0, "add something": 1.1,
}  # fmt: skip


# Pairs ready for training, one per row. All have
#   after                    (N, 16, 64) normalised packed latents of the right picture
#   ids                      (N, T) tokens of the prompt and of the template's end, padded
#   weight                   (N, 16) of the loss on each token
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

    @torch.no_grad()
    def edits(self, number: int) -> Pairs:
        """A block of edits."""
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
            weights.append(1 + changed * ((OPEN_WEIGHT if request.is_open else CHANGED_WEIGHT) - 1))
        pixels, posterior = self.encoded(before + after)
        return {
            "source": pixels[:BLOCK].to(torch.uint8),
            "before": self.packed(posterior.mode())[:BLOCK],
            "after": self.targets(posterior, rng)[BLOCK:],
            "ids": torch.tensor(ids),
            "weight": torch.stack(weights),
            **{name: torch.tensor([one[name] for one in labels]) for name in labels[0]},
        }

    @torch.no_grad()
    def descriptions(self, number: int) -> Pairs:
        """A block of descriptions and pictures of them."""
        rng = Random(f"{self.seed} descriptions {number}")
        made = [random_description(rng) for _ in range(BLOCK)]
        return {
            "after": self.targets(self.encoded([paint(scene) for _, scene in made])[1], rng),
            "ids": torch.tensor([self.suffix(prompt(rng, one), TEXT_TO_IMAGE) for one, _ in made]),
            "weight": torch.ones(BLOCK, CELLS**2),
            "told": torch.tensor([_told(one) for one, _ in made]),
        }

    def encoded(self, painted: list[Tensor]) -> tuple[Tensor, Posterior]:
        """Pictures as they are stored, (N, 3, 64, 64) of 0 to 255, and the VAE's posterior of them."""
        pixels = (torch.stack(painted).clamp(0, 1) * 255).round()
        return pixels, self.vae.encode((pixels / 127.5 - 1)[:, :, None])

    def targets(self, posterior: Posterior, rng: Random) -> Tensor:
        """(N, 16, 64) latents to learn: of every second picture a sample, of the others the mode.

        A mask keeps samples in its surroundings, or with `mask.posterior=mode` modes.
        """
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        raw = posterior.sample(generator)
        raw[::2] = posterior.mode()[::2]
        return self.packed(raw)

    def packed(self, raw: Tensor) -> Tensor:
        return pack(normalise(raw, self.vae.config.latents_mean, self.vae.config.latents_std))


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one step: B pairs with `DRAWS` noises each; some lack their prompt or picture."""

    ids: Tensor  # (B, T)
    real: Tensor  # (B, T) bool, False at padding
    pixel_values: Tensor | None  # None: descriptions, which have no picture
    pairs: Pairs
    sigma: Tensor  # (DRAWS B,)
    noise: Tensor  # (DRAWS B, 16, 64)
    with_reference: bool

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            ids=self.ids.to(device),
            real=self.real.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device),
            pairs={name: x.to(device) for name, x in self.pairs.items()},
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
        noise = torch.randn((draws, CELLS**2, world.vae.config.z_dim * PATCH**2), generator=generator)
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
            sigma=SHIFT * uniform / (1 + (SHIFT - 1) * uniform),
            noise=noise,
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
