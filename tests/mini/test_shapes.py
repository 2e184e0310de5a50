"""The embedded model's world is drawn right, against exact counts over 16 x 16 points a pixel."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwenedit import mini
from qwenedit.mini.shapes import (
    COLOURS,
    EXAMPLE,
    KINDS,
    SIDE,
    Background,
    Scene,
    Shape,
    area,
    coverage,
    draw,
    paint,
    paint_background,
)

FINE = 16  # points a pixel, in x and in y
CENTRES = torch.arange(SIDE) + 0.5
# Of each kind: the directions of its corners in degrees clockwise from the right, and their distances.
CORNERS = {
    "square": ((45, 135, 225, 315), (1.25,)),
    "triangle": ((-90, 30, 150), (1.4,)),
    "star": (range(-90, 270, 36), (1.35, 0.45 * 1.35)),
}


def shape(kind, *, x=31.3, y=32.6, radius=11.0, colour="orange", **look):
    return Shape(kind, colour, x, y, radius, **look)


def covered(one, softness=1.0):
    return coverage(one.kind, *torch.tensor([one.x, one.y, one.radius, one.angle]), softness)


def corners(one):
    """(N, 2), in order."""
    directions, distances = CORNERS[one.kind]
    turned = [math.radians(direction + one.angle) for direction in directions]
    reach = [one.radius * distances[i % len(distances)] for i in range(len(turned))]
    return torch.tensor(
        [(one.x + r * math.cos(at), one.y + r * math.sin(at)) for at, r in zip(turned, reach, strict=True)]
    )


def exact(one):
    """The share of each pixel that a shape covers: a ray from inside crosses the outline oddly often."""
    at = (torch.arange(SIDE * FINE) + 0.5) / FINE
    x, y = at[None, :], at[:, None]
    if one.kind == "circle":
        inside = (x - one.x).hypot(y - one.y) <= one.radius
    else:
        inside = torch.zeros(len(at), len(at), dtype=torch.bool)
        points = corners(one).tolist()
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0 + 1e-12))
    return inside.float().view(SIDE, FINE, SIDE, FINE).mean(dim=(1, 3))


def to_outline(one):
    """(SIDE, SIDE): the distance of each pixel's centre from the nearest point of a shape's outline."""
    at = torch.stack(torch.meshgrid(CENTRES, CENTRES, indexing="xy"), dim=-1)
    if one.kind == "circle":
        return ((at - torch.tensor([one.x, one.y])).norm(dim=-1) - one.radius).abs()
    points = corners(one)
    distances = []
    for start, end in zip(points, points.roll(-1, 0), strict=True):
        along = end - start
        share = (((at - start) @ along) / along.dot(along)).clamp(0, 1)
        distances.append((at - start - share[..., None] * along).norm(dim=-1))
    return torch.stack(distances).amin(dim=0)


def away_from_corners(one, least):
    at = torch.stack(torch.meshgrid(CENTRES, CENTRES, indexing="xy"), dim=-1)
    if one.kind == "circle":
        return torch.ones(SIDE, SIDE, dtype=torch.bool)
    return torch.cdist(at.flatten(0, 1), corners(one)).amin(dim=1).view(SIDE, SIDE) >= least


def colours_of(picture):
    return {tuple(round(value, 4) for value in one) for one in picture.flatten(1).T.tolist()}


def rounded(rgb):
    return tuple(round(value, 4) for value in rgb)


@pytest.mark.parametrize("angle", [0.0, -17.0, 8.5, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_has_its_area_and_its_centre_wherever_it_is(kind, angle):
    """Of nearly hard edges, a row of pixels is in or out as a whole; of soft ones, corners are cut."""
    tolerances = {0.3: (0.04, 0.25), 1.0: (0.01, 0.05), 1.8: (0.025, 0.06)}
    for x, y, radius in ((20.0, 31.0, 8.0), (33.3, 40.6, 12.0), (44.5, 21.25, 7.6)):
        one = shape(kind, x=x, y=y, radius=radius, angle=angle)
        assert exact(one).sum() == pytest.approx(area(kind) * radius**2, rel=0.01)
        for softness, (rel, pixels) in tolerances.items():
            cover = covered(one, softness).double()
            assert cover.sum() == pytest.approx(area(kind) * radius**2, rel=rel)
            assert (cover.sum(0) * CENTRES).sum() / cover.sum() == pytest.approx(x, abs=pixels)
            assert (cover.sum(1) * CENTRES).sum() / cover.sum() == pytest.approx(y, abs=pixels)


@pytest.mark.parametrize("angle", [0.0, -17.0, 8.5])
@pytest.mark.parametrize("kind", KINDS)
def test_anti_aliasing_follows_the_covered_area(kind, angle):
    """The distance to a straight edge and the area beyond it differ by at most 0.06 of a pixel."""
    one = shape(kind, angle=angle)
    error = (covered(one) - exact(one)).abs()
    assert error[away_from_corners(one, 1.5)].max() < 0.08
    assert error.mean() < 4e-3


def test_shapes_point_upwards_and_squares_lie_flat():
    def rows(kind):
        return (coverage(kind, *torch.tensor([32.0, 32.0, 10.0])) > 0.5).sum(dim=1)

    assert len(set(rows("square")[rows("square") > 0].tolist())) == 1
    triangle = rows("triangle")[rows("triangle") > 0]
    assert (triangle.diff() >= 0).all() and triangle[-1] > 4 * triangle[0]
    star = coverage("star", *torch.tensor([32.0, 32.0, 10.0])) > 0.5
    assert torch.equal(star, star.flip(1)) and not torch.equal(star, star.flip(0))


@pytest.mark.parametrize("kind", ["triangle", "star"])
def test_tilts_are_clockwise(kind):
    """The tip goes to the right."""
    upright, tilted = (covered(shape(kind, x=32.0, angle=angle)) for angle in (0.0, 15.0))
    top = int((upright.sum(dim=1) > 0.5).nonzero()[0])
    for cover, least, most in ((upright, -0.5, 0.5), (tilted, 2.0, 5.0)):
        rows = cover[top : top + 3].sum(dim=0)
        assert least < float((rows * CENTRES).sum() / rows.sum()) - 32 < most


@pytest.mark.parametrize("kind", KINDS)
def test_hard_edges_have_two_values_only(kind):
    ground, one = Background("green"), shape(kind, angle=11.0)
    picture = paint(Scene(ground, (one,), softness=0.0))
    assert colours_of(picture) == {rounded(ground.ends[0]), rounded(one.rgb)}
    inside = (picture - torch.tensor(one.rgb)[:, None, None]).abs().amax(dim=0) < 1e-4
    sure = to_outline(one) > 0.01
    assert torch.equal(inside[sure], (covered(one) > 0.5)[sure])


@pytest.mark.parametrize("softness", [0.4, 1.0, 1.8])
def test_edges_are_as_wide_as_the_scene_says(softness):
    """Across a square's right edge, at many offsets from the pixels' centres."""
    side = 11.0 * 1.25 * math.cos(math.pi / 4)
    seen = []
    for step in range(40):
        one = shape("square", x=30 + step / 40)
        row = paint(Scene(Background("black"), (dataclasses.replace(one, colour="white"),), softness))[0, 32]
        dark, bright = 20 / 255, 250 / 255
        share = (row - dark) / (bright - dark)
        seen += [(float(CENTRES[i] - one.x - side), float(share[i])) for i in range(32, SIDE)]
    between = [at for at, share in seen if 1e-3 < share < 1 - 1e-3]
    assert max(between) - min(between) == pytest.approx(softness, abs=0.06)
    assert abs(max(between) + min(between)) < 0.06
    assert all(share == pytest.approx(0.5 - at / softness, abs=1e-3) for at, share in seen if at in between)


@pytest.mark.parametrize("width", [0.8, 1.8])
@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_lies_inside_of_the_edge(kind, width):
    ground, plain = Background("white"), shape(kind, angle=9.0)
    one = dataclasses.replace(plain, outline=width)
    line = tuple(0.5 * value for value in one.rgb)
    picture, without = (paint(Scene(ground, (x,), softness=0.0)) for x in (one, plain))
    assert colours_of(picture) == {rounded(x) for x in (ground.ends[0], one.rgb, line)}
    white = torch.tensor(ground.ends[0])[:, None, None]
    assert torch.equal((picture == white).all(dim=0), (without == white).all(dim=0))
    on_line = (picture - torch.tensor(line)[:, None, None]).abs().amax(dim=0) < 1e-4
    filled = (picture - torch.tensor(one.rgb)[:, None, None]).abs().amax(dim=0) < 1e-4
    distance = to_outline(one)
    assert float(distance[filled].min()) >= width - 0.01
    # Between two of a star's arms the line is mitred: its own corner lies farther from the edge's.
    mitre = 1.0 if kind != "star" else 1.5
    assert float(distance[on_line].max()) <= mitre * width + 0.01


def test_outlines_are_darker_and_those_of_black_shapes_brighter():
    for colour in COLOURS:
        one = shape("square", colour=colour, outline=1.8)
        picture = paint(Scene(Background("yellow"), (one,), softness=0.0))
        at = int(one.x - 11.0 * 1.25 * math.cos(math.pi / 4) + 0.8)
        line, wanted = picture[:, 32, at].tolist(), float(colour == "black")
        assert line == pytest.approx([(value + wanted) / 2 for value in one.rgb], abs=1e-5)


def test_a_soft_outline_keeps_the_edge_where_it_is():
    for width in (0.0, 1.5):
        one = shape("circle", colour="black", outline=width)
        picture = paint(Scene(Background("white"), (one,), softness=1.8))
        assert float((picture[:, 32] < 0.9).any(dim=0).sum()) == pytest.approx(22, abs=2)
        assert picture[:, 32, 31].tolist() == pytest.approx(list(one.rgb), abs=1e-6)


def test_tints_are_added_to_the_colours_that_names_stand_for():
    ground = Background("green", 0.4, 90.0, (0.05, -0.1, 0.02))
    one = shape("circle", tint=(-0.1, 0.05, 0.1))
    assert one.rgb == pytest.approx((245 / 255 - 0.1, 140 / 255 + 0.05, 30 / 255 + 0.1))
    assert shape("circle", colour="white", tint=(0.1, 0.1, -0.1)).rgb == pytest.approx(
        (1, 1, 250 / 255 - 0.1)
    )
    near = (40 / 255 + 0.05, 160 / 255 - 0.1, 60 / 255 + 0.02)
    assert ground.ends[0] == pytest.approx(near)
    assert ground.ends[1] == pytest.approx([value + 0.4 * (1 - value) for value in near])
    picture = paint(Scene(ground, (one,)))
    assert picture[:, 32, 31].tolist() == pytest.approx(list(one.rgb))
    assert picture[:, 0, 5].tolist() == pytest.approx(ground.ends[0], abs=0.01)
    assert picture[:, -1, 5].tolist() == pytest.approx(ground.ends[1], abs=0.01)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 200.0, 317.0])
def test_a_gradient_goes_the_way_of_its_angle(angle):
    """It gets darker evenly along its way, and not at all across."""
    picture = paint_background(Background("blue", -0.45, angle)).sum(dim=0).double()
    right, down = float(picture.diff(dim=1).mean()), float(picture.diff(dim=0).mean())
    along = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    assert right * along[0] + down * along[1] < -0.005
    assert abs(down * along[0] - right * along[1]) < 1e-6
    for dim in (0, 1):
        assert float(picture.diff(dim=dim).std()) < 1e-6


def test_edges_ring():
    one = shape("square", x=32.0, y=32.0)
    plain, ringing = (paint(Scene(Background("green"), (one,), 1.0, much)) for much in (0.0, 0.3))
    red = ringing[0]  # 40 outside, 245 inside
    assert red[:, 20:44].max() > 245 / 255 + 0.03 and red.min() < 40 / 255 - 0.03
    assert 0 <= ringing.min() and ringing.max() <= 1
    far = to_outline(one) > 3
    assert (plain - ringing)[:, far].abs().max() < 1e-6
    assert (plain - ringing).abs().amax(dim=0)[to_outline(one) < 0.5].min() > 0.01
    more = paint(Scene(Background("green"), (one,), 1.0, 0.15))
    assert ((more - plain).abs() <= (ringing - plain).abs() + 1e-6).all()


def test_a_later_shape_and_each_look_are_part_of_the_scene():
    """Every attribute changes the picture, and nothing else does."""
    scene = Scene(Background("white", -0.3, 20.0), (shape("triangle"),))
    looks = [
        dataclasses.replace(scene, softness=0.4), dataclasses.replace(scene, overshoot=0.2),
        *(
            dataclasses.replace(scene, shapes=(dataclasses.replace(scene.shapes[0], **one),))
            for one in (
                {"angle": 12.0}, {"outline": 1.2}, {"tint": (0.05, 0.0, -0.05)}, {"radius": 9.0}, {"x": 30.0},
                {"colour": "red"}, {"kind": "star"},
            )
        ),
        *(
            dataclasses.replace(scene, background=dataclasses.replace(scene.background, **one))
            for one in ({"angle": 40.0}, {"shade": -0.2}, {"tint": (0.0, -0.1, 0.0)}, {"colour": "yellow"})
        ),
    ]  # fmt: skip
    pictures = {draw(one).tobytes() for one in (scene, *looks)}
    assert len(pictures) == 1 + len(looks)
    assert draw(scene).tobytes() == draw(dataclasses.replace(scene)).tobytes()


def test_the_example_is_drawn_by_the_code():
    for path in (mini.EXAMPLE, Path(__file__).parents[2] / "examples" / "scene.png"):
        assert Image.open(path).convert("RGB").tobytes() == draw(EXAMPLE).tobytes()
