"""The oracle judges an edit: it reads the shapes off a picture and compares them with the expected scene.

    verdict = judge(source_scene, request, picture)
    verdict.success, verdict.preserved, verdict.reason

Pixels that differ from the expected background form connected pieces. For every kind, a piece's area and
centre give the one shape that it could be; the kind whose shape overlaps the piece best is taken.
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

from qwenedit.inputs.pictures import as_picture, vae_pixels
from qwenedit.mini.scenes import Request, outcome, visible
from qwenedit.mini.shapes import (
    COLOURS,
    KINDS,
    SIDE,
    Background,
    Scene,
    Shape,
    area,
    coverage,
    paint,
    paint_background,
)

__all__ = ["Found", "Verdict", "judge", "read_shapes"]

FOREGROUND = 0.2  # a pixel at least this far from the background, in RGB of [0, 1], is foreground
LEAST_AREA = 16  # square pixels; smaller pieces are blemishes, not shapes
LEAST_FIT = 0.72  # least intersection over union of a piece with its shape
PLACE_TOLERANCE = 4.0  # pixels between a shape's centre and the expected one
SIZE_TOLERANCE = 1.3  # ratio of a shape's radius and the expected one
BACKGROUND_TOLERANCE = 0.12  # mean distance of the background's pixels from the expected ones
PRESERVED = 22.0  # dB of the untouched region that strict success needs


@dataclass(frozen=True)
class Found:
    """A shape read off a picture, with its fit: intersection over union with the piece."""

    shape: Shape
    fit: float


@dataclass(frozen=True)
class Verdict:
    """The oracle's judgement of an edited picture.

    Attributes:
        success: the picture shows the requested change, and else the source's shapes and background.
        preserved: PSNR in dB against the source, of the pixels that the edit should leave alone.
        reason: the first fault; "" on success.
        found: the shapes read off the picture.
    """

    success: bool
    preserved: float
    reason: str
    found: tuple[Shape, ...]

    @property
    def strict(self) -> bool:
        """Success, with at least `PRESERVED` dB in the untouched region."""
        return self.success and self.preserved >= PRESERVED


def read_shapes(picture: Tensor, background: Background) -> list[Found]:
    """The shapes of a picture (3, SIDE, SIDE) in [0, 1] whose background is known."""
    ground = paint_background(background)
    pieces = _pieces((picture - ground).norm(dim=0) > FOREGROUND)
    return [_read(picture, ground, piece) for piece in pieces if int(piece.sum()) >= LEAST_AREA]


def judge(scene: Scene, request: Request, picture: Image.Image | Tensor) -> Verdict:
    """Judge an edited picture of a scene.

    Args:
        picture: a PIL image, resized to 64x64, or (3, 64, 64) in [0, 1].
    """
    if isinstance(picture, Image.Image):
        picture = vae_pixels(as_picture(picture), SIDE, SIDE)[0] / 2 + 0.5
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


def _first_fault(scene: Scene, request: Request, expected: Scene, found: list[Shape], unclear: int) -> str:
    """The first difference between expected and found shapes, or ""; `unclear` pieces fit no shape."""
    rest = list(found)
    for shape in expected.shapes:
        got = min(rest, key=shape.distance, default=None)
        if got is None or shape.distance(got) > PLACE_TOLERANCE:
            return f"no {shape.colour} {shape.kind} where it should be"
        rest.remove(got)
        if got.kind != shape.kind or got.colour != shape.colour:
            return f"a {got.colour} {got.kind} in place of a {shape.colour} {shape.kind}"
        if max(got.radius, shape.radius) > SIZE_TOLERANCE * min(got.radius, shape.radius):
            return f"the {shape.kind} has radius {got.radius:.1f}, wanted {shape.radius:.1f}"
    if unclear:
        return f"{unclear} piece(s) that are no clear shape"
    if not request.is_open:
        return f"a {rest[0].colour} {rest[0].kind} too many" if rest else ""
    if len(rest) != 1:
        return f"{len(rest)} shapes are new or changed, wanted 1"
    (new,) = rest
    if request.action == "recolour any":
        old = scene.find(request.referent)
        if new.kind != old.kind or new.distance(old) > PLACE_TOLERANCE:
            return f"a {new.colour} {new.kind} in place of the {old.kind}"
        return "the colour has not changed" if new.colour == old.colour else ""
    if request.kind not in (None, new.kind) or request.colour not in (None, new.colour):
        return f"a {new.colour} {new.kind} was added"
    return "" if visible(new.colour, scene.background) else "the new shape can hardly be seen"


def _preservation(
    scene: Scene, request: Request, expected: Scene, picture: Tensor, found: list[Shape]
) -> float:
    """PSNR of the pixels that the edit should leave alone, without the pixels next to those it may change."""
    before = paint(scene)
    touched = (before - paint(expected)).abs().amax(dim=0) > 0
    if request.is_open:  # the new or changed shape, wherever the picture has it
        kept = _around(expected.shapes) > 0
        touched = touched | (_around(tuple(found)) > 0) & ~kept
    untouched = F.max_pool2d(touched[None, None].float(), 3, 1, 1)[0, 0] == 0
    if not bool(untouched.any()):
        return math.inf
    error = (picture - before).pow(2).mean(dim=0)[untouched].mean()
    return -10 * math.log10(max(float(error), 1e-10))


def _around(shapes: tuple[Shape, ...]) -> Tensor:
    """(SIDE, SIDE), above 0 within the circles around shapes, enlarged by two pixels."""
    inside = torch.zeros(SIDE, SIDE)
    for shape in shapes:
        place = torch.tensor([shape.x, shape.y, shape.extent + 2])
        inside = torch.maximum(inside, coverage("circle", *place))
    return inside


def _pieces(mask: Tensor) -> list[Tensor]:
    """The connected pieces of a mask (SIDE, SIDE); pixels that touch at a corner are connected."""
    labels = torch.arange(1.0, mask.numel() + 1).view(1, 1, *mask.shape) * mask
    while True:  # the largest label floods each piece
        grown = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    return [labels[0, 0] == label for label in labels.unique().tolist() if label]


def _read(picture: Tensor, ground: Tensor, piece: Tensor) -> Found:
    """The shape that fits a piece of a picture best."""
    inner = F.avg_pool2d(piece[None, None].float(), 3, 1, 1)[0, 0] > 0.99  # off the blurred outline
    colour = picture[:, inner if bool(inner.any()) else piece].median(dim=1).values
    name = min(COLOURS, key=lambda one: math.dist(colour.tolist(), [v / 255 for v in COLOURS[one]]))
    # The share of each pixel that the piece covers: how far the pixel is from the ground to the colour.
    near = F.max_pool2d(piece[None, None].float(), 3, 1, 1)[0, 0] > 0
    way = colour[:, None, None] - ground
    cover = ((picture - ground) * way).sum(dim=0) / way.pow(2).sum(dim=0).clamp_min(1e-6)
    cover = cover.clamp(0, 1) * near
    total = cover.sum()
    centres = torch.arange(SIDE) + 0.5
    x, y = (cover.sum(dim=0) * centres).sum() / total, (cover.sum(dim=1) * centres).sum() / total
    fits = []
    for kind in KINDS:
        radius = (total / area(kind)).sqrt()
        shape = coverage(kind, x, y, radius)
        overlap = float(torch.minimum(shape, cover).sum() / torch.maximum(shape, cover).sum())
        fits.append(Found(Shape(kind, name, float(x), float(y), float(radius)), overlap))
    return max(fits, key=lambda found: found.fit)
