"""The embedded model's world: the same from the same seed, drawn right, and every edit what it says."""

import dataclasses
import math
from random import Random

import pytest
import torch

from qwenedit import mini
from qwenedit.mini.oracle import judge, read_shapes
from qwenedit.mini.scenes import (
    ACTIONS,
    DETERMINED,
    OPEN,
    PLACES,
    Request,
    free,
    held_out,
    instruction,
    outcome,
    random_request,
    random_scene,
    scenes,
    visible,
    visible_colours,
)
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
)


def edits(count, seed="edits", actions=ACTIONS):
    """(scene, request, target) of every action in turn."""
    rng = Random(seed)
    made = []
    while len(made) < count:
        scene = random_scene(rng)
        request = random_request(rng, scene, actions[len(made) % len(actions)])
        if request is not None:
            made.append((scene, request, outcome(rng, scene, request)))
    return made


SCENES = [random_scene(Random(f"scene {seed}")) for seed in range(2000)]


def test_the_same_seed_makes_the_same_world():
    assert [random_scene(Random(f"scene {seed}")) for seed in range(50)] == SCENES[:50]
    assert edits(30) == edits(30) != edits(30, seed="others")
    one, two = (draw(edits(1)[0][2]).tobytes() for _ in range(2))
    assert one == two


def test_scenes_are_well_formed():
    for scene in SCENES:
        kinds = [shape.kind for shape in scene.shapes]
        assert 1 <= len(kinds) == len(set(kinds)) <= 3
        for i, shape in enumerate(scene.shapes):
            others = scene.shapes[:i] + scene.shapes[i + 1 :]
            assert visible(shape.colour, scene.background) and free(others, shape)
            for end in scene.background.ends:
                assert math.dist(shape.rgb, end) >= 0.3  # also where they are tinted
            assert max(shape.extent, shape.radius) <= min(shape.x, shape.y, SIDE - shape.x, SIDE - shape.y)
            assert all(
                math.dist((shape.x, shape.y), (one.x, one.y)) > shape.extent + one.extent for one in others
            )


def test_no_two_shapes_and_no_edge_of_the_picture_touch():
    """In the pictures: what the shapes cover is as much as they cover one by one."""
    for scene in SCENES[:100]:
        covers = [
            coverage(one.kind, *torch.tensor([one.x, one.y, one.radius, one.angle]), scene.softness)
            for one in scene.shapes
        ]
        for cover, one in zip(covers, scene.shapes, strict=True):
            assert float(cover.sum()) == pytest.approx(area(one.kind) * one.radius**2, rel=0.05)
        assert float(torch.stack(covers).sum(dim=0).max()) <= 1 + 1e-5


def test_looks_are_drawn_from_their_whole_ranges():
    """No renderer's habit is left: a look is plain in some scenes, as wide as may be in others."""
    shapes = [shape for scene in SCENES for shape in scene.shapes]
    grounds = [scene.background for scene in SCENES]

    def spread(values, least, most, *, share=1.0, plain=None):
        """The values other than the plain one are this share of all, and reach both ends of their range."""
        other = [value for value in values if value != plain]
        assert len(other) / len(values) == pytest.approx(share, abs=0.06)
        width = 0.05 * (most - least)
        assert least <= min(other) < least + width and most - width < max(other) <= most
        inner = sum(least + 0.25 * (most - least) < value < most - 0.25 * (most - least) for value in other)
        assert 0.35 < inner / len(other) < 0.65, "half of a uniform distribution"

    spread([scene.softness for scene in SCENES], 0.0, 1.8, share=0.7, plain=1.0)
    spread([scene.overshoot for scene in SCENES], 0.0, 0.4, share=0.2, plain=0.0)
    spread([shape.outline for shape in shapes], 0.8, 1.8, share=0.2, plain=0.0)
    for kind, most in {"square": 20.0, "triangle": 20.0, "star": 18.0}.items():
        spread([one.angle for one in shapes if one.kind == kind], -most, most, share=0.4, plain=0.0)
    for colours in (shapes, grounds):
        for i in range(3):
            spread([one.tint[i] for one in colours], -0.1, 0.1, share=0.4, plain=0.0)
    shaded = [one for one in grounds if one.shade]
    spread([abs(one.shade) for one in grounds], 0.15, 0.45, share=0.6, plain=0.0)
    spread([one.angle for one in shaded], 0.0, 360.0)
    assert 0.2 < sum(one.shade > 0 for one in shaded) / len(shaded) < 0.8
    assert {one.colour for one in grounds} == {one.colour for one in shapes} == set(COLOURS)


def test_sizes_and_places_are_drawn_from_their_whole_ranges():
    alone = [scene.shapes[0] for scene in SCENES if len(scene.shapes) == 1]
    for kind in KINDS:
        own = [shape for shape in alone if shape.kind == kind]
        radii = [shape.radius for shape in own]
        assert min(radii) < 6.6 and 11.4 < max(radii) and 6 <= min(radii) and max(radii) <= 12
        for axis in ("x", "y"):
            margins = [getattr(shape, axis) - shape.extent for shape in own]
            others = [SIDE - getattr(shape, axis) - shape.extent for shape in own]
            assert 0 <= min(margins) < 2 and 0 <= min(others) < 2
    counts = [len(scene.shapes) for scene in SCENES]
    assert {count: counts.count(count) / len(counts) for count in (1, 2, 3)} == pytest.approx(
        {1: 0.2, 2: 0.4, 3: 0.4}, abs=0.1
    )


@pytest.mark.parametrize("action", ACTIONS)
def test_an_edit_changes_what_it_says_and_nothing_else(action):
    for scene, request, target in edits(25, actions=(action,)):
        assert request.is_open == (action in OPEN) and (action in DETERMINED) != request.is_open
        old, new = set(scene.shapes), set(target.shapes)
        assert (scene.background == target.background) == (action != "background")
        if action == "background":
            assert old == new and target.background == Background(request.colour)
        elif action == "remove":
            assert old - new == {scene.find(request.referent)} and not new - old
        elif action.startswith("add"):
            (added,) = new - old
            assert not old - new and request.kind in (None, added.kind)
            assert request.colour in (None, added.colour)
            (place,) = (name for name, at in PLACES.items() if at == (added.x, added.y))
            assert request.place in (None, place)
            assert added == Shape(added.kind, added.colour, added.x, added.y, 9.0)  # plainly drawn
            assert free(scene.shapes, added) and visible(added.colour, scene.background)
        else:
            (before,), (after,) = old - new, new - old
            assert before.kind == request.referent
            changed = {f.name for f in dataclasses.fields(Shape)}
            changed = {name for name in changed if getattr(before, name) != getattr(after, name)}
            colours = {"colour", "tint"}  # a new colour is the very one that its name stands for
            allowed = {"recolour": colours, "recolour any": colours, "replace": {"kind"}}
            assert changed - {"tint"} and changed <= allowed.get(action, {"x", "y"})
            assert not action.startswith("recolour") or after.tint == (0.0, 0.0, 0.0)
            assert action != "move" or (after.x, after.y) == PLACES[request.place]
        assert (target.softness, target.overshoot) == (scene.softness, scene.overshoot)


def test_every_request_that_is_offered_has_an_outcome():
    """Of thousands, whatever is drawn: each kind that may be added has a free place, each colour another."""
    offered = dict.fromkeys(ACTIONS, 0)
    for seed, scene in enumerate(SCENES):
        rng = Random(f"offered {seed}")
        assert len(visible_colours(scene.background)) >= 2
        for action in ACTIONS:
            request = random_request(rng, scene, action)
            if request is None:
                continue
            offered[action] += 1
            target = outcome(rng, scene, request)
            assert target != scene
            for i, shape in enumerate(target.shapes):
                assert free(target.shapes[:i] + target.shapes[i + 1 :], shape)
                assert all(math.dist(shape.rgb, end) >= 0.3 for end in target.background.ends)
            if request.is_open and action != "recolour any":
                for kind in (request.kind,) if request.kind else scene.absent:
                    rooms = [free(scene.shapes, Shape(kind, "white", *at, 9.0)) for at in PLACES.values()]
                    assert any(rooms), (scene, request)
    assert all(count > len(SCENES) // 5 for count in offered.values()), offered


def test_open_additions_take_each_of_the_five_places():
    aside = Scene(Background("white"), (Shape("circle", "blue", 8.0, 8.0, 6.0),))
    for request in (Request("add any", kind="star"), Request("add something", colour="red")):
        drawn = [outcome(Random(seed), aside, request).shapes[-1] for seed in range(60)]
        assert {(one.x, one.y) for one in drawn} == set(PLACES.values())
        kinds = {request.kind} if request.kind else {*KINDS} - {"circle"}
        colours = {request.colour} if request.colour else set(visible_colours(aside.background))
        assert {one.kind for one in drawn} == kinds and {one.colour for one in drawn} == colours
    below = Scene(Background("white"), (Shape("circle", "blue", 32.0, 46.0, 6.0),))
    drawn = [outcome(Random(seed), below, Request("add any", kind="star")).shapes[-1] for seed in range(30)]
    assert {(one.x, one.y) for one in drawn} == {PLACES[name] for name in ("left", "right", "top")}


def test_nothing_is_added_where_there_is_no_room():
    crowded = Scene(
        Background("white"),
        (
            Shape("star", "red", 20.0, 20.0, 12.0), Shape("square", "blue", 44.0, 44.0, 12.0),
            Shape("circle", "green", 44.0, 17.0, 9.0),
        ),
    )  # fmt: skip
    for action in ("add", "add any", "add something"):
        assert random_request(Random(0), crowded, action) is None
    assert random_request(Random(0), crowded, "recolour any") is not None


def test_instructions_are_words_of_the_tokenizer():
    """Every word is one token: an instruction has as many tokens as words and full stops."""
    from qwenedit.inputs.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(mini.CHECKPOINT / "tokenizer")
    rng = Random("words")
    for _, request, _ in edits(200):
        text = instruction(rng, request)
        assert len(tokenizer.encode(text).ids) == len(text.split()) + text.endswith("."), text


def test_a_plain_instruction_is_the_first_wording():
    rng = Random(0)
    request = Request("add", None, "circle", "orange", "center")
    assert instruction(rng, request, plain=True) == "add an orange circle in the center"


def test_held_out_compositions_are_about_a_tenth_and_never_trained_on():
    rng = Random("split")
    drawn = [random_scene(rng) for _ in range(1500)]
    assert 0.05 < sum(map(held_out, drawn)) / len(drawn) < 0.17
    assert not any(held_out(scene) for scene, _ in zip(scenes(rng), range(100), strict=False))
    assert all(held_out(scene) for scene, _ in zip(scenes(rng, test=True), range(20), strict=False))
    moved = dataclasses.replace(EXAMPLE, shapes=EXAMPLE.shapes[::-1])
    assert held_out(moved) == held_out(EXAMPLE)


# The oracle


def blemished(picture, kind):
    """A picture as a model might give it: noisy, or blurred."""
    if kind == "noise":
        return (
            picture + 0.03 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
        ).clamp(0, 1)
    padded = torch.nn.functional.pad(picture[None], (1, 1, 1, 1), "replicate")
    return torch.nn.functional.avg_pool2d(padded, 3, 1)[0]


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_the_oracle_reads_every_shape(kind):
    for _, _, target in edits(30):
        found = read_shapes(blemished(paint(target), kind), target.background)
        assert len(found) == len(target.shapes)
        for shape in target.shapes:
            near = min(found, key=lambda one: math.dist((one.shape.x, one.shape.y), (shape.x, shape.y))).shape
            assert (near.kind, near.colour) == (shape.kind, shape.colour)
            assert math.dist((near.x, near.y), (shape.x, shape.y)) < 1
            assert 0.8 < near.radius / shape.radius < 1.25


def test_the_oracle_accepts_right_pictures_and_refuses_the_source():
    for scene, request, target in edits(90):
        verdict = judge(scene, request, draw(target))
        assert verdict.success and verdict.strict and verdict.reason == "", (request, verdict)
        assert not judge(scene, request, draw(scene)).success, request


def test_the_oracle_accepts_any_right_outcome_of_an_open_request():
    rng = Random("open")
    for scene, request, _ in edits(30, actions=OPEN):
        for _ in range(3):
            assert judge(scene, request, paint(outcome(rng, scene, request))).success


SCENE = Scene(
    Background("white"), (Shape("circle", "blue", 18.0, 20.0, 9.0), Shape("square", "green", 44.0, 44.0, 9.0))
)
CIRCLE, SQUARE = SCENE.shapes
RED = Request("recolour", "circle", colour="red")


@pytest.mark.parametrize(
    "shapes, reason",
    [
        ((dataclasses.replace(CIRCLE, colour="orange"), SQUARE), "an orange|a orange circle in place"),
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
    assert not verdict.success
    assert any(part in verdict.reason for part in reason.split("|")), verdict.reason


def test_the_oracle_sees_a_background_of_another_colour():
    target = paint(outcome(Random(0), SCENE, RED))
    tinted = target * torch.tensor([1.0, 0.9, 0.9])[:, None, None]
    assert judge(SCENE, RED, tinted).reason == "the background has another colour"


def test_the_oracle_measures_what_should_stay():
    target = paint(outcome(Random(0), SCENE, RED))
    verdict = judge(SCENE, RED, (target + 0.1).clamp(0, 1))  # the white ground cannot get whiter
    assert verdict.success and verdict.preserved < judge(SCENE, RED, target).preserved
    speckled = target.clone()
    speckled[:, 40:60, 5:25] -= 0.3 * (torch.arange(20) % 2 == 0)
    assert judge(SCENE, RED, speckled).preserved < 25


def test_open_requests_want_exactly_one_new_thing():
    request = Request("add any", None, kind="star")
    star, other = Shape("star", "red", 46.0, 16.0, 8.0), Shape("triangle", "red", 46.0, 16.0, 8.0)
    again = Shape("star", "black", 18.0, 46.0, 8.0)

    def reason(*added):
        return judge(SCENE, request, paint(Scene(SCENE.background, SCENE.shapes + added))).reason

    assert reason(star) == ""
    assert "0 shapes are new" in reason() and "2 shapes are new" in reason(star, again)
    assert "triangle was added" in reason(other)
    anything = Request("recolour any", "circle")
    assert judge(SCENE, anything, paint(SCENE)).reason == "the colour has not changed"


def test_colours_are_told_apart():
    values = list(COLOURS.values())
    assert all(math.dist(a, b) / 255 > 0.25 for i, a in enumerate(values) for b in values[:i])
