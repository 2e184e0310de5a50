"""The oracle: did an edit do what was asked? It reads shapes off a picture and compares them with the scene.

    verdict = judge(source_scene, request, picture)
    verdict.success, verdict.preserved, verdict.reason

Reading: what differs from the expected background falls into connected pieces; each piece's area and centre
give, for every kind, the one shape it could be, and the kind whose shape covers it best is what it is.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qwenedit.inputs.pictures import vae_pixels
from qwenedit.mini.scenes import (
    COLOURS,
    KINDS,
    SIDE,
    Background,
    Request,
    Scene,
    Shape,
    area,
    coverage,
    outcome,
    paint,
    paint_background,
    visible,
)

__all__ = ["Found", "Verdict", "judge", "read_shapes"]

FOREGROUND = 0.2  # distance from the background, in RGB of [0, 1], from which a pixel is foreground
LEAST_AREA = 16  # square pixels; smaller pieces are blemishes, not shapes
LEAST_FIT = 0.72  # overlap (intersection over union) of a piece with the shape that it is taken for
PLACE_TOLERANCE = 4.0  # pixels between where a shape is and where it should be
SIZE_TOLERANCE = 1.3  # likewise, the larger radius over the smaller one
BACKGROUND_TOLERANCE = 0.12  # mean distance of the background's pixels from the expected ones
PRESERVED = 22.0  # dB of the untouched region, for strict success


@dataclass(frozen=True)
class Found:
    """A shape read off a picture, and how well it fits (intersection over union)."""

    shape: Shape
    fit: float


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of an edited picture.

    Attributes:
        success: the picture shows what was asked for, and otherwise the source's shapes and background.
        preserved: PSNR in dB against the source where the edit should change nothing.
        reason: the first thing that is wrong; "" on success.
        found: the shapes read off the picture.
    """

    success: bool
    preserved: float
    reason: str
    found: tuple[Shape, ...]

    @property
    def strict(self) -> bool:
        """Success, with the untouched region at no less than `PRESERVED` dB."""
        return self.success and self.preserved >= PRESERVED


def read_shapes(picture: Tensor, background: Background) -> list[Found]:
    """The shapes of a picture (3, SIDE, SIDE) in [0, 1] whose background is known."""
    ground = paint_background(background)
    pieces = _pieces((picture - ground).norm(dim=0) > FOREGROUND)
    return [_read(picture, ground, piece) for piece in pieces if int(piece.sum()) >= LEAST_AREA]


def judge(scene: Scene, request: Request, picture: Image.Image | Tensor) -> Verdict:
    """Judge an edited picture of a scene.

    Args:
        picture: PIL, brought to 64x64, or (3, 64, 64) in [0, 1].
    """
    if isinstance(picture, Image.Image):
        picture = vae_pixels(picture, SIDE, SIDE)[0] / 2 + 0.5
    expected = scene if request.is_open else outcome(Random(0), scene, request)
    if request.action == "recolour any":
        expected = dataclasses.replace(
            scene, shapes=tuple(shape for shape in scene.shapes if shape.kind != request.referent)
        )
    pieces = read_shapes(picture, expected.background)
    found = [one.shape for one in pieces if one.fit >= LEAST_FIT]
    reason = _first_fault(scene, request, expected, found, len(pieces) - len(found))
    ground = paint_background(expected.background)
    away = (picture - ground).norm(dim=0)
    empty = _around((*expected.shapes, *found)) == 0
    if not reason and bool(empty.any()) and float(away[empty].mean()) > BACKGROUND_TOLERANCE:
        reason = "the background has another colour"
    return Verdict(not reason, _preservation(scene, request, expected, picture, found), reason, tuple(found))


def _first_fault(scene: Scene, request: Request, expected: Scene, found: list[Shape], badly: int) -> str:
    """The first difference between the expected shapes and the found ones; "" if there is none."""
    rest = list(found)
    for shape in expected.shapes:
        near = [one for one in rest if math.dist((one.x, one.y), (shape.x, shape.y)) <= PLACE_TOLERANCE]
        if not near:
            return f"no {shape.colour} {shape.kind} where it should be"
        got = min(near, key=lambda one: math.dist((one.x, one.y), (shape.x, shape.y)))
        rest.remove(got)
        if got.kind != shape.kind or got.colour != shape.colour:
            return f"a {got.colour} {got.kind} in place of a {shape.colour} {shape.kind}"
        if max(got.radius, shape.radius) > SIZE_TOLERANCE * min(got.radius, shape.radius):
            return f"the {shape.kind} has radius {got.radius:.1f}, wanted {shape.radius:.1f}"
    if badly:
        return f"{badly} piece(s) that are no clear shape"
    if not request.is_open:
        return f"a {rest[0].colour} {rest[0].kind} too many" if rest else ""
    if len(rest) != 1:
        return f"{len(rest)} shapes are new or changed, wanted 1"
    (new,) = rest
    if request.action == "recolour any":
        old = scene.find(request.referent)
        if new.kind != old.kind or math.dist((new.x, new.y), (old.x, old.y)) > PLACE_TOLERANCE:
            return f"a {new.colour} {new.kind} in place of the {old.kind}"
        return "the colour has not changed" if new.colour == old.colour else ""
    if request.kind not in (None, new.kind) or request.colour not in (None, new.colour):
        return f"a {new.colour} {new.kind} was added"
    return "" if visible(new.colour, scene.background) else "the new shape can hardly be seen"


def _preservation(
    scene: Scene, request: Request, expected: Scene, picture: Tensor, found: list[Shape]
) -> float:
    """PSNR of the pixels that the edit should leave alone, a pixel away from those that it should not."""
    before = paint(scene)
    touched = (before - paint(expected)).abs().amax(dim=0) > 0
    if request.is_open:  # what was added or changed, wherever the picture has it
        kept = _around(expected.shapes) > 0
        touched = touched | (_around(tuple(found)) > 0) & ~kept
    untouched = F.max_pool2d(touched[None, None].float(), 3, 1, 1)[0, 0] == 0
    if not bool(untouched.any()):
        return math.inf
    error = (picture - before).pow(2).mean(dim=0)[untouched].mean()
    return -10 * math.log10(max(float(error), 1e-10))


def _around(shapes: tuple[Shape, ...]) -> Tensor:
    """(SIDE, SIDE): above 0 within the circles around shapes, two pixels enlarged."""
    inside = torch.zeros(SIDE, SIDE)
    for shape in shapes:
        place = torch.tensor([shape.x, shape.y, shape.extent + 2])
        inside = torch.maximum(inside, coverage("circle", *place))
    return inside


def _pieces(mask: Tensor) -> list[Tensor]:
    """The connected pieces of a mask (SIDE, SIDE), corners touching included."""
    labels = torch.arange(1.0, mask.numel() + 1).view(1, 1, *mask.shape) * mask
    while True:  # the largest label floods each piece
        grown = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    return [labels[0, 0] == label for label in labels.unique().tolist() if label]


def _read(picture: Tensor, ground: Tensor, piece: Tensor) -> Found:
    """The one shape that a piece of a picture is."""
    inner = F.avg_pool2d(piece[None, None].float(), 3, 1, 1)[0, 0] > 0.99  # off the blurred outline
    colour = picture[:, inner if bool(inner.any()) else piece].median(dim=1).values
    name = min(COLOURS, key=lambda one: math.dist(colour.tolist(), [v / 255 for v in COLOURS[one]]))
    # How much of each pixel the piece covers: where the pixel is on the way from the ground to the colour.
    near = F.max_pool2d(piece[None, None].float(), 3, 1, 1)[0, 0] > 0
    way = colour[:, None, None] - ground
    cover = ((picture - ground) * way).sum(dim=0) / way.pow(2).sum(dim=0).clamp_min(1e-6)
    cover = cover.clamp(0, 1) * near
    total = cover.sum()
    centres = torch.arange(SIDE) + 0.5
    x, y = (cover.sum(dim=0) * centres).sum() / total, (cover.sum(dim=1) * centres).sum() / total
    best, fit = KINDS[0], -1.0
    for kind in KINDS:
        shape = coverage(kind, x, y, (total / area(kind)).sqrt())
        overlap = float(torch.minimum(shape, cover).sum() / torch.maximum(shape, cover).sum())
        if overlap > fit:
            best, fit = kind, overlap
    radius = float((total / area(best)).sqrt())
    return Found(Shape(best, name, float(x), float(y), radius), fit)
