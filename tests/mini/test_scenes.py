"""The embedded model's world: the same from the same seed, drawn right, and every edit what it says."""

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from qwenedit import mini
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
)
from qwenedit.mini.shapes import (
    EXAMPLE,
    KINDS,
    SIDE,
    Background,
    Shape,
    area,
    coverage,
    draw,
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


def test_the_same_seed_makes_the_same_world():
    assert edits(30) == edits(30) != edits(30, seed="others")
    one, two = (draw(edits(1)[0][2]).tobytes() for _ in range(2))
    assert one == two


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_has_its_area_and_its_centre_wherever_it_is(kind):
    for x, y, radius in ((20.0, 31.0, 8.0), (33.3, 40.6, 9.7), (44.5, 21.25, 7.6)):
        cover = coverage(kind, *torch.tensor([x, y, radius])).double()
        centres = torch.arange(SIDE) + 0.5
        assert cover.sum() == pytest.approx(area(kind) * radius**2, rel=0.01)
        assert (cover.sum(0) * centres).sum() / cover.sum() == pytest.approx(x, abs=0.05)
        assert (cover.sum(1) * centres).sum() / cover.sum() == pytest.approx(y, abs=0.05)


def test_anti_aliasing_follows_the_covered_area():
    """Against an exact count over 16 x 16 points a pixel, away from corners and at them."""
    fine = torch.arange(SIDE * 16).add(0.5) / 16
    inside = (fine - 30.3).hypot(fine[:, None] - 29.6) <= 9.2
    exact = inside.float().view(SIDE, 16, SIDE, 16).mean(dim=(1, 3))
    assert (coverage("circle", *torch.tensor([30.3, 29.6, 9.2])) - exact).abs().max() < 0.1


def test_shapes_point_upwards_and_squares_lie_flat():
    def rows(kind):
        cover = coverage(kind, *torch.tensor([32.0, 32.0, 10.0])) > 0.5
        return cover.sum(dim=1)

    assert len(set(rows("square")[rows("square") > 0].tolist())) == 1
    triangle = rows("triangle")[rows("triangle") > 0]
    assert (triangle.diff() >= 0).all() and triangle[-1] > 4 * triangle[0]
    star = coverage("star", *torch.tensor([32.0, 32.0, 10.0])) > 0.5
    assert torch.equal(star, star.flip(1)) and not torch.equal(star, star.flip(0))


def test_scenes_are_well_formed():
    rng = Random("scenes")
    for _ in range(200):
        scene = random_scene(rng)
        kinds = [shape.kind for shape in scene.shapes]
        assert 1 <= len(kinds) == len(set(kinds)) <= 3
        for i, shape in enumerate(scene.shapes):
            assert visible(shape.colour, scene.background)
            assert free(scene.shapes[:i] + scene.shapes[i + 1 :], shape)


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
            assert request.place is None or (added.x, added.y) == PLACES[request.place]
            assert free(scene.shapes, added) and visible(added.colour, scene.background)
        else:
            (before,), (after,) = old - new, new - old
            assert before.kind == request.referent
            changed = {f.name for f in dataclasses.fields(Shape)}
            changed = {name for name in changed if getattr(before, name) != getattr(after, name)}
            allowed = {"recolour": {"colour"}, "recolour any": {"colour"}, "replace": {"kind"}}
            assert changed and changed <= allowed.get(action, {"x", "y"})


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


def test_the_example_is_drawn_by_the_code():
    for path in (mini.EXAMPLE, Path(__file__).parents[2] / "examples" / "scene.png"):
        assert Image.open(path).convert("RGB").tobytes() == draw(EXAMPLE).tobytes()
