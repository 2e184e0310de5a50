"""The second renderer: well formed, the same from the same seed, and of the same world as the first one."""

import ast
import dataclasses
import math
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks import other_renderer
from benchmarks.other_renderer import draw, scenes, style
from qwenedit.inputs.pictures import vae_pixels
from qwenedit.mini.reading import read_shapes
from qwenedit.mini.scenes import (
    ACTIONS,
    CONTRAST,
    held_out,
    outcome,
    random_request,
    visible,
)
from qwenedit.mini.shapes import COLOURS, EXAMPLE, KINDS, SIDE, Background, Scene, Shape, paint


def some(count, seed="some", **options):
    return [scene for scene, _ in zip(scenes(Random(seed), **options), range(count), strict=False)]


def pixels(picture):
    return vae_pixels(picture, SIDE, SIDE)[0] / 2 + 0.5


def test_scenes_are_well_formed_and_the_same_from_the_same_seed():
    made = some(300)
    assert made == some(300) and made[0] != some(1, "another")[0]
    for scene in made:
        kinds = [shape.kind for shape in scene.shapes]
        assert 1 <= len(kinds) == len(set(kinds)) <= 3
        for i, shape in enumerate(scene.shapes):
            assert visible(shape.colour, scene.background)
            assert all(math.dist(shape.rgb, end) >= CONTRAST for end in scene.background.ends)
            assert all(shape.extent <= at <= SIDE - shape.extent for at in (shape.x, shape.y))
            for other in scene.shapes[:i]:
                assert shape.distance(other) > shape.extent + other.extent + 1


def test_scenes_vary_in_every_respect():
    made = some(300)
    counts = [len(scene.shapes) for scene in made]
    assert min(counts.count(n) for n in (1, 2, 3)) > 30
    shapes = [shape for scene in made for shape in scene.shapes]
    assert {shape.kind for shape in shapes} == set(KINDS)
    for share in (
        sum(shape.angle != 0 for shape in shapes) / len(shapes),
        sum(shape.outline != 0 for shape in shapes) / len(shapes),
        sum(any(shape.tint) for shape in shapes) / len(shapes),
        sum(scene.background.shade != 0 for scene in made) / len(made),
        sum(scene.softness == 0 for scene in made) / len(made),
        sum(scene.overshoot != 0 for scene in made) / len(made),
    ):
        assert 0.08 < share < 0.7
    assert len({style(scene).filter for scene in made if scene.softness}) == 5
    assert {style(scene).factor for scene in made} == {1, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("test", [False, True])
def test_scenes_are_of_the_asked_compositions(test):
    assert all(held_out(scene) == test for scene in some(40, test=test))


def test_every_action_can_be_asked_of_its_scenes_and_drawn():
    rng, left = Random("actions"), set(ACTIONS)
    for scene in some(60, "actions"):
        for action in ACTIONS:
            request = random_request(rng, scene, action)
            if request is not None:
                picture = draw(outcome(rng, scene, request))
                assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGB")
                left.discard(action)
    assert not left


def test_the_same_scene_is_the_same_picture_in_one_style_before_and_after_an_edit():
    rng = Random("styles")
    for scene in some(20, "styles"):
        assert draw(scene).tobytes() == draw(dataclasses.replace(scene)).tobytes()
        request = random_request(rng, scene, "recolour any")
        assert style(outcome(rng, scene, request)) == style(scene)


def test_both_renderers_show_the_same_but_differ_at_edges():
    """The oracle reads the same shapes off both pictures; inside and away from shapes they are alike."""
    for scene in [*some(40, "both"), EXAMPLE]:
        one, two = paint(scene), pixels(draw(scene))
        left, right = (read_shapes(x, scene.background) for x in (one, two))
        assert len(left) == len(right) == len(scene.shapes)
        for shape in scene.shapes:
            a, b = (min((f.shape for f in found), key=shape.distance) for found in (left, right))
            assert (a.kind, a.colour) == (b.kind, b.colour) == (shape.kind, shape.colour)
            assert a.distance(b) < 1 and 0.87 < a.radius / b.radius < 1.15
        differs = (one - two).norm(dim=0)
        flat = torch.ones(SIDE, SIDE, dtype=torch.bool)
        centres = torch.arange(SIDE) + 0.5
        for shape in scene.shapes:
            flat &= (centres - shape.x).hypot(centres[:, None] - shape.y) > shape.extent + 3
        assert differs[flat].max() < 0.02
        assert differs.max() > 0.05


@pytest.mark.parametrize("angle", [0.0, 37.0, 90.0, 180.0, 261.0])
@pytest.mark.parametrize("shade", [-0.4, 0.3])
def test_gradients_go_the_same_way(angle, shade):
    scene = Scene(Background("green", shade, angle), (), softness=1.0)
    assert (pixels(draw(scene)) - paint(scene)).abs().max() < 0.012


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_lies_inside_its_shape(kind):
    plain = Shape(kind, "red", 30.0, 33.0, 10.0)
    ground = Background("white")
    bare, lined = (
        pixels(draw(Scene(ground, (dataclasses.replace(plain, outline=width),)))) for width in (0.0, 1.6)
    )
    one, other = ((x < 0.98 * COLOURS["white"][0] / 255).any(dim=0) for x in (bare, lined))
    assert (one != other).sum() <= 0.03 * one.sum()  # of the pixels that the shape touches
    assert (lined[:, 33, 30] - bare[:, 33, 30]).abs().max() < 0.01  # the fill
    assert (lined - bare).abs().max() > 0.2


def test_it_has_no_drawing_of_the_first_renderer():
    """Only what a scene says is shared."""
    tree = ast.parse(Path(other_renderer.__file__).read_text(encoding="utf-8"))
    shared = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "qwenedit.mini.shapes"
        for alias in node.names
    }
    assert shared <= {"COLOURS", "KINDS", "SIDE", "Background", "Rgb", "Scene", "Shape"}
