"""The oracle judges pictures: it reads the shapes off one and compares them with what was asked for.

    verdict = judge(scene, request, picture)             # of an edit
    verdict = judge_described(description, picture)      # of a picture from text
    verdict.success, verdict.preserved, verdict.reason
    edges(scene, picture)                                # how cleanly the shapes are drawn

reading.py reads the shapes. What an edit should leave alone is measured, and does not decide.
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
from qwenedit.mini.descriptions import Description, Item
from qwenedit.mini.reading import (
    Found,
    drawn_alone,
    largest,
    length,
    plain,
    read_background,
    read_shapes,
)
from qwenedit.mini.scenes import PLACES, Request, article, outcome, visible
from qwenedit.mini.shapes import SIDE, Background, Scene, Shape, coverage, paint, paint_background

__all__ = ["Verdict", "edges", "judge", "judge_described"]

# Distances of colours are in RGB of [0, 1].
LEAST_FIT = 0.7  # least intersection over union of a piece with its template
PLACE_TOLERANCE = 4.0  # pixels between a shape's centre and the expected one
NEAR_PLACE = 10.0  # the same where words ask for a place
SIZE_TOLERANCE = 1.3  # ratio of a shape's radius and the expected one
SIZES = (5.4, 13.0)  # radii of shapes whose size is free
COLOUR_TOLERANCE = 0.2  # between a shape's colour and the expected one
BACKGROUND_TOLERANCE = 0.12  # mean distance of the background's pixels from the expected ones
STAIN, STAIN_SIDE = 0.15, 9  # the same in any square of the background, and its side in pixels
FADING = 0.06  # between the background's mean errors in the picture's halves
PRESERVED = 22.0  # dB of the untouched region that strict success needs
EDGE = 0.1  # a pixel where the picture changes by this much per pixel may lie on an edge


@dataclass(frozen=True)
class Verdict:
    """The oracle's judgement of a picture.

    Attributes:
        success: the picture shows what was asked for; of an edit, else the source's shapes and background.
        preserved: PSNR in dB against the source, of the pixels that the edit should leave alone; infinite
            if there are none.
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


def judge(
    scene: Scene,
    request: Request,
    picture: Image.Image | Tensor,
    *,
    source: Image.Image | Tensor | None = None,
) -> Verdict:
    """Judge an edited picture of a scene.

    Args:
        picture: a PIL image, resized to 64x64, or (3, 64, 64) in [0, 1].
        source: the picture that was edited, likewise; None: `paint(scene)`.
    """
    pixels = _pixels(picture)
    expected = scene if request.is_open else outcome(Random(0), scene, request)
    if request.action == "recolour any":
        expected = dataclasses.replace(
            scene, shapes=tuple(shape for shape in scene.shapes if shape.kind != request.referent)
        )
    pieces = read_shapes(pixels, expected.background)
    found, unclear = _clear(pieces)
    reason = _first_fault(scene, request, expected, found, unclear)
    reason = reason or _background_fault(pixels, expected.background, (*expected.shapes, *found))
    before = paint(scene) if source is None else _pixels(source)
    return Verdict(
        not reason, _preservation(scene, request, expected, before, pixels, found), reason, tuple(found)
    )


def judge_described(description: Description, picture: Image.Image | Tensor) -> Verdict:
    """Judge a picture that was made from a description; nothing is there to be preserved.

    Args:
        picture: a PIL image, resized to 64x64, or (3, 64, 64) in [0, 1].
    """
    pixels = _pixels(picture)
    background = read_background(pixels)
    wanted = background.colour if description.background is None else description.background
    found, unclear = _clear(read_shapes(pixels, background))
    reason = ""
    if description.background and math.dist(background.ends[0], plain(wanted)) > BACKGROUND_TOLERANCE:
        reason = f"the background is {background.colour}, wanted {wanted}"
        if background.colour == wanted:
            reason = f"the background is not quite {wanted}"
    reason = reason or _described_fault(description, found, unclear)
    reason = reason or _background_fault(pixels, background, tuple(found))
    return Verdict(not reason, math.inf, reason, tuple(found))


def edges(scene: Scene, picture: Image.Image | Tensor) -> float:
    """How well the edges of a picture follow the outlines of a scene's shapes, in [0, 1].

    The harmonic mean of two shares: of the picture's edge pixels, those within one pixel of an outline; and
    of the outlines' pixels, those with an edge pixel beside them or on them. An edge pixel is one where the
    picture changes at least half as fast as anywhere within two pixels. So blurred edges, ragged ones and
    ones in wrong places all cost. Both sides of a line along an edge are outlines.

    Source: the boundary F1 measure of Csurka et al., "What is a good evaluation measure for semantic
        segmentation?" (BMVC 2013), with a tolerance of one pixel.
    """
    change = _change(_pixels(picture))
    drawn = (change >= EDGE) & (change >= 0.5 * largest(change, 5))
    near, outline = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    for shape in scene.shapes:
        # A pixel's cover is between 0 and 1 if its centre is less than half the softness from the outline.
        near |= (drawn_alone(shape, 2.0) > 0) & (drawn_alone(shape, 2 + 2 * shape.outline) < 1)
        cover = drawn_alone(shape, 1.0)
        outline |= (cover > 0) & (cover < 1)
    if not bool(drawn.any()) or not bool(outline.any()):
        return float(not bool(drawn.any()) and not bool(outline.any()))
    right = float(near[drawn].float().mean())
    met = float(largest(drawn.float(), 3)[outline].mean())
    return 2 * right * met / max(right + met, 1e-6)


def _pixels(picture: Image.Image | Tensor) -> Tensor:
    if isinstance(picture, Image.Image):
        return vae_pixels(as_picture(picture), SIDE, SIDE)[0] / 2 + 0.5
    if picture.shape != (3, SIDE, SIDE):
        raise ValueError(f"the picture has shape {tuple(picture.shape)}, wanted (3, {SIDE}, {SIDE})")
    return picture.float()


# What is wrong


def _clear(pieces: list[Found]) -> tuple[list[Shape], int]:
    """The pieces that are clear shapes, and the number of the others."""
    found = [one.shape for one in pieces if one.fit >= LEAST_FIT]
    return found, len(pieces) - len(found)


def _first_fault(scene: Scene, request: Request, expected: Scene, found: list[Shape], unclear: int) -> str:
    """The first difference between expected and found shapes, or ""; `unclear` pieces fit no shape."""
    rest = list(found)
    for shape, seen in zip(expected.shapes, _as_seen(expected), strict=True):
        got = min(rest, key=shape.distance, default=None)
        if got is None or min(shape.distance(got), seen.distance(got)) > PLACE_TOLERANCE:
            return f"no {shape.colour} {shape.kind} where it should be"
        rest.remove(got)
        if got.kind != shape.kind or got.colour != shape.colour:
            return f"{_a(got)} in place of {_a(shape)}"
        if not (_same_size(got, shape) or _same_size(got, seen)):
            return f"the {shape.kind} has radius {got.radius:.1f}, wanted {shape.radius:.1f}"
        if not (_same_colour(got, shape) or _same_colour(got, seen)):
            return f"the {shape.kind} is not quite {shape.colour}"
    if unclear:
        return f"{unclear} piece(s) that are no clear shape"
    if not request.is_open:
        return f"{_a(rest[0])} too many" if rest else ""
    if len(rest) != 1:
        return f"{len(rest)} shapes are new or changed, wanted 1"
    (new,) = rest
    if request.action == "recolour any":
        old = scene.find(request.referent)
        seen = next(one for one in _as_seen(scene) if one.kind == old.kind)
        if new.kind != old.kind or min(old.distance(new), seen.distance(new)) > PLACE_TOLERANCE:
            return f"{_a(new)} in place of the {old.kind}"
        if not (_same_size(new, old) or _same_size(new, seen)):
            return f"the {old.kind} has radius {new.radius:.1f}, wanted {old.radius:.1f}"
        if new.colour == old.colour:
            return "the colour has not changed"
    elif request.kind not in (None, new.kind) or request.colour not in (None, new.colour):
        return f"{_a(new)} was added"
    elif not SIZES[0] <= new.radius <= SIZES[1]:
        return f"the new {new.kind} has radius {new.radius:.1f}"
    if not _same_colour(new, dataclasses.replace(new, tint=(0.0, 0.0, 0.0))):
        return f"the {new.kind} is not quite {new.colour}"
    return "" if visible(new.colour, scene.background) else "the new shape can hardly be seen"


def _described_fault(description: Description, found: list[Shape], unclear: int) -> str:
    """The first difference between what is described and what was found, or ""."""
    rest = list(found)
    for item in description.items:
        got = next((one for one in rest if (one.kind, one.colour) == (item.kind, item.colour)), None)
        if got is None:
            return f"no {item.colour} {item.kind}"
        rest.remove(got)
        if not SIZES[0] <= got.radius <= SIZES[1]:
            return f"the {item.kind} has radius {got.radius:.1f}"
        if not _same_colour(got, dataclasses.replace(got, tint=(0.0, 0.0, 0.0))):
            return f"the {item.kind} is not quite {item.colour}"
        if item.place is not None and not _in_place(got, item):
            return f"the {item.kind} is at ({got.x:.0f}, {got.y:.0f}), wanted {item.place}"
    if unclear:
        return f"{unclear} piece(s) that are no clear shape"
    return f"{_a(rest[0])} too many" if rest else ""


def _in_place(shape: Shape, item: Item) -> bool:
    far = {place: math.dist((shape.x, shape.y), at) for place, at in PLACES.items()}
    return min(far, key=far.__getitem__) == item.place and far[item.place] <= NEAR_PLACE


def _as_seen(scene: Scene) -> tuple[Shape, ...]:
    """The shapes of a scene where and as large as they look.

    A line along an edge may be of the background's colour; the shape looks smaller then.
    """
    if not any(shape.outline for shape in scene.shapes):
        return scene.shapes
    seen = [one.shape for one in read_shapes(paint(scene), scene.background)]
    return tuple(min(seen, key=shape.distance, default=shape) for shape in scene.shapes)


def _same_size(one: Shape, other: Shape) -> bool:
    return max(one.radius, other.radius) <= SIZE_TOLERANCE * min(one.radius, other.radius)


def _same_colour(one: Shape, other: Shape) -> bool:
    return math.dist(one.rgb, other.rgb) <= COLOUR_TOLERANCE


def _a(shape: Shape) -> str:
    return f"{article(shape.colour)} {shape.kind}"


def _background_fault(picture: Tensor, background: Background, shapes: tuple[Shape, ...]) -> str:
    """What is wrong with the pixels away from the shapes, or ""."""
    empty = (_around(shapes) == 0).float()
    if not bool(empty.any()):
        return ""
    off = (picture - paint_background(background)) * empty
    away = length(off)
    if float(away.sum() / empty.sum()) > BACKGROUND_TOLERANCE:
        return "the background has another colour"
    if _fading(off, empty) > FADING:
        return "the background fades otherwise"
    stained, seen = (F.avg_pool2d(x[None], STAIN_SIDE, 1)[0] for x in (away, empty))
    return "the background is stained" if bool((stained > STAIN * seen.clamp_min(0.5)).any()) else ""


def _fading(off: Tensor, empty: Tensor) -> float:
    """How far apart the mean colours of the left and right halves are, and those of the upper and lower."""

    def mean(rows: slice, columns: slice) -> Tensor:
        return off[:, rows, columns].sum(dim=(1, 2)) / empty[rows, columns].sum().clamp_min(1)

    whole, first, second = slice(None), slice(SIDE // 2), slice(SIDE // 2, None)
    across, down = mean(whole, second) - mean(whole, first), mean(second, whole) - mean(first, whole)
    return float(torch.cat([across, down]).norm())


def _preservation(
    scene: Scene, request: Request, expected: Scene, before: Tensor, picture: Tensor, found: list[Shape]
) -> float:
    """PSNR of the pixels that the edit should leave alone, without those within two of what it may change."""
    touched = (paint(scene) - paint(expected)).abs().amax(dim=0) > 0
    if request.is_open:  # the new or changed shape, wherever the picture has it
        kept = _around(expected.shapes) > 0
        touched = touched | (_around(tuple(found)) > 0) & ~kept
    untouched = largest(touched.float(), 5) == 0
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


def _change(picture: Tensor) -> Tensor:
    """How fast a picture changes at each pixel, per pixel, over both directions and all channels."""
    padded = F.pad(picture[None], (1, 1, 1, 1), "replicate")[0]
    across = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return length(torch.cat([across, down]))
