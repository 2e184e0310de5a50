"""The embedded model's world in words: each scene shows what its text says, in the places that it names."""

import dataclasses
import itertools
import math
import re
from random import Random

import pytest

from qwenedit import mini
from qwenedit.inputs.tokenizer import load_tokenizer
from qwenedit.mini.descriptions import Description, Item, described, prompt, random_description
from qwenedit.mini.scenes import PLACES, free, held_out, visible
from qwenedit.mini.shapes import COLOURS, KINDS, Background, Shape, draw

WORDS = {
    "on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom",
    "in the center": "center", "in the middle": "center",
}  # fmt: skip
ITEM = re.compile(rf"(an?) (\w+) ({'|'.join(KINDS)})(?: ({'|'.join(WORDS)}))?")
DRAWN = [random_description(Random(f"description {seed}")) for seed in range(2000)]


def read(text):
    """What a text says, read without the code that wrote it: the items, and the background or None."""
    whole = re.fullmatch(r"(.+?)(?: on (an?) (\w+) background)?\.?", text.lower())
    found = [ITEM.fullmatch(part) for part in whole[1].split(" and ")]
    assert all(found), text
    for article, word in [(one[1], one[2]) for one in found] + [(whole[2], whole[3])]:
        assert article == (None if word is None else "an" if word[0] in "aeiou" else "a"), text
    return Description(tuple(Item(one[3], one[2], WORDS.get(one[4])) for one in found), whole[3])


def require_shown(description, scene):
    """The scene shows the items, each near its place, and nothing else, on the background."""
    assert {(one.kind, one.colour) for one in scene.shapes} == {
        (item.kind, item.colour) for item in description.items
    }
    assert len(scene.shapes) == len(description.items)
    assert description.background in (None, scene.background.colour)
    for item in description.items:
        shape = scene.find(item.kind)
        near = [
            place
            for place, (x, y) in PLACES.items()
            if math.dist((shape.x, shape.y), (x, y)) <= 3.5  # pixels, less than half of the places' distance
        ]
        assert len(near) == 1 and item.place in (None, near[0]), (item, shape)


def test_the_same_seed_gives_the_same():
    assert [random_description(Random(f"description {seed}")) for seed in range(50)] == DRAWN[:50]
    assert DRAWN[0] != DRAWN[1]
    for description, _ in DRAWN[:50]:
        one, two = (described(Random(7), description) for _ in range(2))
        assert one == two and prompt(Random(7), description) == prompt(Random(7), description)


def test_scenes_show_what_their_descriptions_say():
    for description, scene in DRAWN:
        require_shown(description, scene)


def test_texts_say_what_the_descriptions_are():
    """In every wording: center and middle, capitals, full stops."""
    texts = []
    for seed, (description, scene) in enumerate(DRAWN):
        text = prompt(Random(f"words {seed}"), description)
        assert read(text) == description, text
        require_shown(read(text), scene)
        assert read(prompt(Random(0), description, plain=True)) == description
        texts.append(text)
    for part in WORDS:
        assert sum(part in text for text in texts) > 50, part
    for sign in (str.isupper, lambda last: last == "."):
        share = sum(sign(text[0 if sign is str.isupper else -1]) for text in texts) / len(texts)
        assert 0.15 < share < 0.25


def test_a_plain_prompt_is_the_first_wording():
    both = (Item("circle", "red", "left"), Item("star", "orange", "center"))
    assert prompt(Random(0), Description(both, "white"), plain=True) == (
        "a red circle on the left and an orange star in the center on a white background"
    )
    assert prompt(Random(0), Description((Item("square", "blue"),)), plain=True) == "a blue square"


def test_descriptions_are_as_wide_as_they_may_be():
    items = [item for description, _ in DRAWN for item in description.items]
    assert {item.kind for item in items} == set(KINDS) and {item.colour for item in items} == set(COLOURS)
    assert {item.place for item in items} == {None, *PLACES}
    assert {one.background for one, _ in DRAWN} == {None, *COLOURS}
    assert {len(one.items) for one, _ in DRAWN} == {1, 2}
    shapes = [shape for _, scene in DRAWN for shape in scene.shapes]
    assert {one.radius for one in shapes} == {7, 8}
    offsets = [min(math.dist((shape.x, shape.y), place) for place in PLACES.values()) for shape in shapes]
    assert set(offsets) == {0, 3.5}  # the second for those that have no room otherwise
    for shape, offset in zip(shapes, offsets, strict=True):
        from_center = math.dist((shape.x, shape.y), PLACES["center"])
        assert from_center in (0, 18) if offset == 0 else (from_center, shape.radius) == (21.5, 7)
    anywhere = [
        min(PLACES, key=lambda place: math.dist(PLACES[place], (scene.shapes[-1].x, scene.shapes[-1].y)))
        for description, scene in DRAWN
        if all(item.place is None for item in description.items)
    ]
    assert set(anywhere) == set(PLACES)


def test_scenes_are_plain_and_well_formed():
    for _, scene in DRAWN:
        assert (scene.softness, scene.overshoot) == (1.0, 0.0)
        assert scene.background == Background(scene.background.colour)
        for i, shape in enumerate(scene.shapes):
            assert shape == Shape(shape.kind, shape.colour, shape.x, shape.y, shape.radius)
            assert visible(shape.colour, scene.background)
            assert free(scene.shapes[:i] + scene.shapes[i + 1 :], shape)
        assert draw(scene).size == (64, 64)


@pytest.mark.parametrize("one, other", list(itertools.permutations(PLACES, 2)))
def test_any_two_places_have_room_for_any_two_kinds(one, other):
    """The center and another place are the narrowest."""
    rng = Random(f"{one} {other}")
    for kind, second in itertools.permutations(KINDS, 2):
        description = Description((Item(kind, "red", one), Item(second, "blue", other)), "white")
        require_shown(description, described(rng, description))


def test_any_two_colours_have_a_background():
    rng = Random("colours")
    grounds = set()
    for one, other in itertools.product(COLOURS, repeat=2):
        for seed in range(3):
            description = Description((Item("circle", one), Item("star", other)))
            scene = described(rng, description)
            require_shown(description, scene)
            assert all(visible(colour, scene.background) for colour in (one, other)), seed
            grounds.add(scene.background.colour)
    assert grounds == set(COLOURS)  # where none is asked for, any is right


def test_everything_that_is_drawn_can_be_described():
    for seed, (description, _) in enumerate(DRAWN[:400]):
        require_shown(description, described(Random(seed), description))


@pytest.mark.parametrize(
    "description",
    [
        Description((Item("circle", "red", "left"), Item("star", "blue", "left"))),
        Description((Item("circle", "red", "left"), Item("star", "blue", "left")), "white"),
        Description((Item("circle", "red"),), "red"),
        Description((Item("circle", "white", "top"), Item("star", "blue")), "white"),
    ],
)
def test_what_no_scene_shows_is_refused_with_its_words(description):
    with pytest.raises(ValueError, match=r"no scene shows 'a (red|white) circle"):
        described(Random(0), description)


def test_the_split_holds_for_descriptions():
    assert not any(held_out(scene) for _, scene in DRAWN)
    rng = Random("held out")
    for _ in range(60):
        description, scene = random_description(rng, test=True)
        assert held_out(scene)
        require_shown(description, scene)
        if description.background is not None:  # then the words alone say the composition
            again = described(rng, description)
            assert held_out(again)


def test_words_are_tokens():
    """A description has as many tokens as words and full stops; "An", which may begin one, has two."""
    tokenizer = load_tokenizer(mini.CHECKPOINT / "tokenizer")
    for seed, (description, _) in enumerate(DRAWN[:500]):
        text = prompt(Random(f"words {seed}"), description)
        wanted = len(text.split()) + text.endswith(".") + text.startswith("An ")
        assert len(tokenizer.encode(text).ids) == wanted, text


def test_the_readers_of_this_file_see_what_is_wrong():
    """A scene with a shape at another place, of another colour or too many is not what a text says."""
    description = Description((Item("circle", "red", "left"),), "white")
    scene = described(Random(0), description)
    (circle,) = scene.shapes
    for shapes in (
        (dataclasses.replace(circle, x=50.0),), (dataclasses.replace(circle, colour="blue"),),
        (dataclasses.replace(circle, kind="star"),), (circle, Shape("star", "blue", 50.0, 32.0, 8.0)), (),
    ):  # fmt: skip
        with pytest.raises((AssertionError, StopIteration)):
            require_shown(description, dataclasses.replace(scene, shapes=shapes))
    assert read("An orange star in the middle on an orange background.") == Description(
        (Item("star", "orange", "center"),), "orange"
    )
