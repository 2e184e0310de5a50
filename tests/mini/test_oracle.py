"""The oracle accepts what is right and refuses near misses, whoever drew the picture."""

import dataclasses
import math
from random import Random

import pytest
import torch
from PIL import Image

from benchmarks import other_renderer
from qwenedit.inputs.pictures import vae_pixels
from qwenedit.mini import shapes as own_renderer
from qwenedit.mini.descriptions import described, random_description
from qwenedit.mini.oracle import edges, judge, judge_described
from qwenedit.mini.reading import read_shapes
from qwenedit.mini.scenes import (
    ACTIONS,
    DETERMINED,
    OPEN,
    PLACES,
    Request,
    free,
    outcome,
    random_request,
    random_scene,
    visible,
    visible_colours,
)
from qwenedit.mini.shapes import COLOURS, KINDS, SIDE, Background, Scene, Shape, paint, paint_background

RENDERERS = {"own": own_renderer.draw, "other": other_renderer.draw}
NEIGHBOURS = {
    "red": "orange", "orange": "yellow", "yellow": "orange", "green": "blue", "blue": "purple",
    "purple": "blue", "white": "yellow", "black": "purple",
}  # fmt: skip
both = pytest.mark.parametrize("who", RENDERERS)


def worlds(who, seed):
    """Endless scenes as a renderer makes them."""
    rng = Random(f"oracle {seed}")
    if who == "other":
        yield from other_renderer.scenes(rng)
    while True:
        yield random_scene(rng)


def edits(who, count, seed="edits", actions=ACTIONS, least=1):
    """(scene, request, target) of every action in turn, of scenes with at least so many shapes."""
    rng, made = Random(f"requests {seed}"), []
    for scene in worlds(who, seed):
        action = actions[len(made) % len(actions)]
        request = random_request(rng, scene, action) if len(scene.shapes) >= least else None
        if request is not None:
            made.append((scene, request, outcome(rng, scene, request)))
        if len(made) == count:
            return made


def descriptions(who, count, seed="descriptions"):
    """(description, a scene that it describes, drawn softly or not)."""
    rng = Random(f"{seed} {who}")
    for _ in range(count):
        description, scene = random_description(rng)
        yield description, dataclasses.replace(scene, softness=rng.choice((0.0, 0.7, 1.0, 1.4)))


def drawn(who, scene):
    return vae_pixels(RENDERERS[who](scene), SIDE, SIDE)[0] / 2 + 0.5


def blemished(picture, kind):
    """A picture as a model might give it: noisy, or blurred."""
    if kind == "noise":
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
        return (picture + 0.03 * noise).clamp(0, 1)
    padded = torch.nn.functional.pad(picture[None], (1, 1, 1, 1), "replicate")
    return torch.nn.functional.avg_pool2d(padded, 3, 1)[0]


def refused(verdicts):
    return [verdict.reason for verdict in verdicts if not verdict.success]


# Right pictures


@both
@pytest.mark.parametrize("action", ACTIONS)
def test_right_pictures_are_accepted_and_their_sources_are_not(who, action):
    for scene, request, target in edits(who, 30, f"right {action}", (action,)):
        source = drawn(who, scene)
        verdict = judge(scene, request, drawn(who, target), source=source)
        assert verdict.strict and verdict.reason == "", (scene, request, verdict)
        if action == "background" and (source - drawn(who, target)).norm(dim=0).mean() < 0.08:
            continue  # from hardly graded to flat
        assert not judge(scene, request, source, source=source).success, (scene, request)


@both
@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_what_a_vae_leaves_is_tolerated(who, kind):
    for scene, request, target in edits(who, 63, kind):
        verdict = judge(scene, request, blemished(drawn(who, target), kind))
        assert verdict.success, (scene, request, verdict)


@both
@pytest.mark.parametrize("kind", [None, "noise", "blur"])
def test_pictures_from_text_are_accepted(who, kind):
    for description, scene in descriptions(who, 40):
        picture = drawn(who, scene)
        verdict = judge_described(description, blemished(picture, kind) if kind else picture)
        assert verdict.success and verdict.strict, (description, scene, verdict)


@both
@pytest.mark.parametrize("kind", [None, "noise", "blur"])
def test_every_shape_is_read(who, kind):
    scenes = worlds(who, "reading")
    for scene in (next(scenes) for _ in range(40)):
        picture = drawn(who, scene)
        found = read_shapes(blemished(picture, kind) if kind else picture, scene.background)
        assert len(found) == len(scene.shapes)
        for shape in scene.shapes:
            near = min((one.shape for one in found), key=shape.distance)
            assert (near.kind, near.colour) == (shape.kind, shape.colour)
            assert shape.distance(near) < 1
            # A line may be of the background's colour; the shape looks smaller then.
            assert (0.7 if shape.outline else 0.8) < near.radius / shape.radius < 1.25


def test_any_right_outcome_of_an_open_request_is_accepted():
    rng = Random("open")
    for scene, request, _ in edits("own", 30, actions=OPEN):
        for _ in range(3):
            assert judge(scene, request, paint(outcome(rng, scene, request))).success


def test_a_picture_may_have_any_size():
    scene, request, target = edits("own", 1)[0]
    large = own_renderer.draw(target).resize((256, 256), Image.Resampling.BICUBIC)
    assert judge(scene, request, large).success
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), wanted \(3, 64, 64\)"):
        judge(scene, request, torch.zeros(3, 32, 32))


# Near misses: each makes of a right scene a wrong one, or None where it cannot


def changed(scene, old, **new):
    shape = dataclasses.replace(old, **new)
    return dataclasses.replace(scene, shapes=tuple(shape if one is old else one for one in scene.shapes))


def another_kind(rng, scene, old):
    return changed(scene, old, kind=rng.choice([kind for kind in KINDS if kind != old.kind]))


def another_colour(_rng, scene, old):
    return changed(scene, old, colour=NEIGHBOURS[old.colour], tint=(0.0, 0.0, 0.0))


def moved(rng, scene, old):
    way, far = rng.uniform(0, 2 * math.pi), rng.uniform(6, 9)
    return changed(scene, old, x=old.x + far * math.cos(way), y=old.y + far * math.sin(way))


def larger(_rng, scene, old):
    return changed(scene, old, radius=old.radius * 1.45)


def smaller(_rng, scene, old):
    return changed(scene, old, radius=old.radius / 1.45)


def gone(_rng, scene, old):
    return dataclasses.replace(scene, shapes=tuple(one for one in scene.shapes if one is not old))


def an_extra_one(rng, scene, _old):
    names = visible_colours(scene.background)
    for _ in range(50):
        x, y = rng.uniform(5, SIDE - 5), rng.uniform(5, SIDE - 5)
        small = Shape(rng.choice(KINDS), rng.choice(names), x, y, 3.0)
        if free(scene.shapes, small):
            return dataclasses.replace(scene, shapes=(*scene.shapes, small))
    return None


def another_background(_rng, scene, _old):
    ground = dataclasses.replace(scene.background, colour=NEIGHBOURS[scene.background.colour])
    return dataclasses.replace(scene, background=ground)


def a_graded_background(rng, scene, _old):
    """A flat one is graded, a graded one goes elsewhere."""
    ground, away = scene.background, {"white": -0.35, "black": 0.35}
    if ground.shade:
        return dataclasses.replace(
            scene, background=dataclasses.replace(ground, shade=0.0) if abs(ground.shade) > 0.3 else
            dataclasses.replace(ground, angle=ground.angle + 180, shade=math.copysign(0.45, ground.shade)),
        )  # fmt: skip
    shade = away.get(ground.colour) or rng.choice((-0.35, 0.35))
    return dataclasses.replace(scene, background=Background(ground.colour, shade, rng.uniform(0, 360)))


SCENES = (
    another_kind, another_colour, moved, larger, smaller, gone, an_extra_one, another_background,
    a_graded_background,
)  # fmt: skip


# Near misses in pixels: of a right picture, its scene and one of its shapes


def around(shape):
    """The pixels that a shape has to do with."""
    centres = torch.arange(SIDE) + 0.5
    return (centres - shape.x).hypot(centres[:, None] - shape.y) < shape.extent + 1.5


def without_its_right_half(picture, scene, old):
    erased = picture.clone()
    within = around(old) & (torch.arange(SIDE) + 0.5 > old.x)
    erased[:, within] = paint_background(scene.background)[:, within]
    return erased


def half_recoloured(picture, scene, old):
    """The lower half of a shape has another colour."""
    mixed = paint(changed(scene, old, colour=NEIGHBOURS[old.colour], tint=(0.0, 0.0, 0.0)))
    lower = picture.clone()
    within = around(old) & (torch.arange(SIDE)[:, None] + 0.5 > old.y)
    lower[:, within] = mixed[:, within]
    return lower


def joined(picture, scene, old):
    """A bar of its colour joins a shape to the nearest other one."""
    others = [one for one in scene.shapes if one is not old]
    if not others:
        return None
    other, bridged = min(others, key=old.distance), picture.clone()
    for i in range(200):
        x, y = (old.x + (other.x - old.x) * i / 199, old.y + (other.y - old.y) * i / 199)
        rows, columns = (slice(max(0, round(at) - 3), round(at) + 3) for at in (y, x))
        bridged[:, rows, columns] = torch.tensor(old.rgb)[:, None, None]
    return bridged


def faded(picture, scene, old):
    """A shape has lost half of its colour to the background."""
    ground = paint_background(scene.background)
    return torch.where(around(old), picture.lerp(ground, 0.5), picture)


PIXELS = (without_its_right_half, half_recoloured, joined, faded)
NEAR_MISSES = [*SCENES, *PIXELS]


def missed(who, miss, rng, target, old):
    """The picture of a near miss, or None."""
    if miss in PIXELS:
        return miss(drawn(who, target), target, old)
    wrong = miss(rng, target, old)
    return None if wrong is None else drawn(who, wrong)


@both
@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.__name__)
def test_near_misses_are_refused(who, miss):
    """Of determined edits: of the shape that is edited, or of any other one."""
    rng, verdicts = Random(miss.__name__), []
    for scene, request, target in edits(who, 36, miss.__name__, DETERMINED):
        if target.shapes:
            picture = missed(who, miss, rng, target, rng.choice(target.shapes))
            if picture is not None:
                verdicts.append((judge(scene, request, picture), scene, request, target))
    accepted = [(one, *rest) for one, *rest in verdicts if one.success]
    assert len(verdicts) > 12
    assert not accepted, (len(accepted), len(verdicts), accepted[0])


@both
def test_a_request_fulfilled_on_the_wrong_shape_is_refused(who):
    rng, count = Random("wrong"), 0
    for scene, request, _ in edits(who, 60, "wrong", ("recolour", "remove", "replace", "move"), least=2):
        other = rng.choice([one.kind for one in scene.shapes if one.kind != request.referent])
        wrong = outcome(rng, scene, dataclasses.replace(request, referent=other))
        if {(one.kind, one.colour) for one in wrong.shapes} != {
            (one.kind, one.colour) for one in scene.shapes
        }:
            count += 1
            assert not judge(scene, request, drawn(who, wrong)).success, (scene, request)
    assert count > 20


@both
def test_half_done_edits_are_refused(who):
    """Half of the source and half of the target in every pixel: ghosts."""
    count = 0
    for scene, request, target in edits(who, 45, "ghosts", ("remove", "add", "move")):
        shape = target.shapes[-1] if request.action == "add" else scene.find(request.referent)
        if min(math.dist(shape.rgb, end) for end in scene.background.ends) > 0.45:
            count += 1
            ghost = drawn(who, scene).lerp(drawn(who, target), 0.5)
            assert not judge(scene, request, ghost).success, (scene, request)
    assert count > 20


# Near misses of descriptions


def swapped_colours(_rng, _description, scene):
    if len(scene.shapes) < 2 or scene.shapes[0].colour == scene.shapes[1].colour:
        return None
    one, two = scene.shapes
    swapped = (dataclasses.replace(one, colour=two.colour), dataclasses.replace(two, colour=one.colour))
    return dataclasses.replace(scene, shapes=swapped)


def swapped_places(_rng, description, scene):
    if len(scene.shapes) < 2 or all(item.place is None for item in description.items):
        return None
    one, two = scene.shapes
    swapped = (dataclasses.replace(one, x=two.x, y=two.y), dataclasses.replace(two, x=one.x, y=one.y))
    wanted = {item.kind: item.place for item in description.items}
    still = all(  # the one without a place may have stood where the other one belongs
        wanted[shape.kind] is None or math.dist((shape.x, shape.y), PLACES[wanted[shape.kind]]) < 10
        for shape in swapped
    )
    return None if still else dataclasses.replace(scene, shapes=swapped)


def another_place(rng, description, scene):
    placed = [item for item in description.items if item.place is not None]
    if not placed:
        return None
    x, y = PLACES[rng.choice([place for place in PLACES if place != placed[0].place])]
    wrong = changed(scene, scene.find(placed[0].kind), x=x, y=y)
    return wrong if len({(one.x, one.y) for one in wrong.shapes}) == len(wrong.shapes) else None


def one_missing(rng, _description, scene):
    return gone(rng, scene, rng.choice(scene.shapes))


def one_too_many(rng, _description, scene):
    return an_extra_one(rng, scene, None)


def wrong_kind(rng, _description, scene):
    return another_kind(rng, scene, rng.choice(scene.shapes))


def wrong_colour(rng, _description, scene):
    return another_colour(rng, scene, rng.choice(scene.shapes))


def too_small(rng, _description, scene):
    return changed(scene, rng.choice(scene.shapes), radius=4.0)


def wrong_background(rng, description, scene):
    return another_background(rng, scene, None) if description.background else None


def two_backgrounds(rng, _description, scene):
    return a_graded_background(rng, scene, None)


@both
@pytest.mark.parametrize(
    "miss",
    [
        swapped_colours, swapped_places, another_place, one_missing, one_too_many, wrong_kind, wrong_colour,
        too_small, wrong_background, two_backgrounds,
    ],
    ids=lambda miss: miss.__name__,
)  # fmt: skip
def test_near_misses_of_descriptions_are_refused(who, miss):
    rng, count = Random(miss.__name__), 0
    for description, scene in descriptions(who, 40, miss.__name__):
        wrong = miss(rng, description, scene)
        if wrong is not None:
            count += 1
            verdict = judge_described(description, drawn(who, wrong))
            assert not verdict.success, (description, wrong, verdict)
    assert count > 10


def test_another_scene_of_the_same_words_is_as_right():
    rng = Random("free")
    for description, _ in descriptions("own", 10):
        assert judge_described(description, paint(described(rng, description))).success


# What the oracle says


SCENE = Scene(
    Background("white"), (Shape("circle", "blue", 18.0, 20.0, 9.0), Shape("square", "green", 44.0, 44.0, 9.0))
)
CIRCLE, SQUARE = SCENE.shapes
RED = Request("recolour", "circle", colour="red")


@pytest.mark.parametrize(
    "shapes, reason",
    [
        ((dataclasses.replace(CIRCLE, colour="orange"), SQUARE), "an orange circle in place of a red circle"),
        ((dataclasses.replace(CIRCLE, colour="red", kind="star"), SQUARE), "a red star in place"),
        ((dataclasses.replace(CIRCLE, colour="red", x=26.0), SQUARE), "no red circle where"),
        ((dataclasses.replace(CIRCLE, colour="red", radius=5.5), SQUARE), "the circle has radius"),
        ((dataclasses.replace(CIRCLE, colour="red"),), "no green square"),
        (
            (dataclasses.replace(CIRCLE, colour="red"), SQUARE, Shape("star", "black", 48.0, 14.0, 8.0)),
            "a black star too many",
        ),
        ((dataclasses.replace(CIRCLE, colour="red"), dataclasses.replace(SQUARE, colour="black")), "a black"),
    ],
)
def test_the_oracle_says_what_is_wrong(shapes, reason):
    verdict = judge(SCENE, RED, paint(Scene(SCENE.background, shapes)))
    assert not verdict.success and reason in verdict.reason


def test_the_oracle_sees_a_background_of_another_colour():
    target = paint(outcome(Random(0), SCENE, RED))
    tinted = target * torch.tensor([1.0, 0.9, 0.9])[:, None, None]
    assert judge(SCENE, RED, tinted).reason == "the background has another colour"
    stained = target.clone()
    stained[:, 40:52, 6:18] -= 0.1
    assert judge(SCENE, RED, stained).reason == "the background is stained"


def test_the_oracle_measures_what_should_stay():
    target = paint(outcome(Random(0), SCENE, RED))
    verdict = judge(SCENE, RED, (target + 0.1).clamp(0, 1))  # the white ground cannot get whiter
    assert verdict.success and verdict.preserved < judge(SCENE, RED, target).preserved
    speckled = target.clone()
    speckled[:, 40:60, 5:25] -= 0.3 * (torch.arange(20) % 2 == 0)
    assert judge(SCENE, RED, speckled).preserved < 25


def test_what_should_stay_is_what_the_source_shows():
    """Not what our renderer would have made of its scene."""
    for scene, request, target in edits("other", 12, "source", ("recolour", "move"), least=2):
        source, result = other_renderer.draw(scene), other_renderer.draw(target)
        assert judge(scene, request, result, source=source).preserved > 60
        assert judge(scene, request, result).preserved < 50


def test_open_requests_want_exactly_one_new_thing():
    request = Request("add any", None, kind="star")
    star, other = Shape("star", "red", 46.0, 16.0, 8.0), Shape("triangle", "red", 46.0, 16.0, 8.0)
    again = Shape("star", "black", 18.0, 46.0, 8.0)

    def reason(*added):
        return judge(SCENE, request, paint(Scene(SCENE.background, SCENE.shapes + added))).reason

    assert reason(star) == ""
    assert "0 shapes are new" in reason() and "2 shapes are new" in reason(star, again)
    assert "triangle was added" in reason(other)
    assert "the new star has radius" in reason(dataclasses.replace(star, radius=4.5))
    anything = Request("recolour any", "circle")
    assert judge(SCENE, anything, paint(SCENE)).reason == "the colour has not changed"
    smaller = changed(SCENE, CIRCLE, colour="red", radius=6.0)
    assert "the circle has radius" in judge(SCENE, anything, paint(smaller)).reason


def test_the_oracle_says_what_is_wrong_with_a_picture_from_text():
    from qwenedit.mini.descriptions import Description, Item

    wanted = Description((Item("circle", "blue", "left"), Item("square", "green")), "white")
    right = Scene(
        Background("white"),
        (Shape("circle", "blue", 14.0, 32.0, 8.0), Shape("square", "green", 46.0, 40.0, 8.0)),
    )

    def reason(scene):
        return judge_described(wanted, paint(scene)).reason

    assert reason(right) == "" and judge_described(wanted, paint(right)).preserved == math.inf
    assert reason(changed(right, right.shapes[0], y=20.0)).startswith(
        "the circle is at (14, 20), wanted left"
    )
    assert reason(changed(right, right.shapes[1], kind="star")) == "no green square"
    assert reason(changed(right, right.shapes[1], radius=4.5)).startswith("the square has radius")
    assert reason(dataclasses.replace(right, background=Background("yellow"))).startswith(
        "the background is yellow, wanted white"
    )


def test_colours_are_told_apart():
    values = list(COLOURS.values())
    assert all(math.dist(a, b) / 255 > 0.25 for i, a in enumerate(values) for b in values[:i])
    assert all(name != near and near in COLOURS for name, near in NEIGHBOURS.items())
    assert visible("red", Background("white"))


# Edges


@both
def test_edges_of_right_pictures_are_right(who):
    for scene in (scene for scene, _ in zip(worlds(who, "edges"), range(40), strict=False)):
        assert edges(scene, drawn(who, scene)) > 0.85, scene


def test_what_costs_at_edges():
    right = paint(SCENE)
    assert edges(SCENE, right) > 0.99
    blurred, twice = blemished(right, "blur"), blemished(blemished(right, "blur"), "blur")
    assert edges(SCENE, right) > edges(SCENE, blurred) > edges(SCENE, twice)
    assert edges(SCENE, blemished(right, "noise")) > 0.97
    assert edges(SCENE, paint(changed(SCENE, CIRCLE, x=20.5))) < 0.9
    assert edges(SCENE, paint(changed(SCENE, CIRCLE, kind="star"))) < 0.8
    assert edges(SCENE, paint(gone(None, SCENE, CIRCLE))) < 0.8
    assert edges(SCENE, paint(Scene(SCENE.background, ()))) == 0
    assert edges(Scene(SCENE.background, ()), paint(Scene(SCENE.background, ()))) == 1
