"""What the embedded model is trained on: batches of edits and of descriptions, and their tokens."""

from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch

import qwenedit
from qwenedit.family import EDIT, TEXT_TO_IMAGE
from qwenedit.inputs.processor import picture_patches
from qwenedit.mini import train_edit
from qwenedit.mini.descriptions import Description, Item, prompt, random_description
from qwenedit.mini.oracle import read_shapes
from qwenedit.mini.pairs import BLOCK, DRAWS, LENGTHS, Pool, World, patches
from qwenedit.mini.scenes import PLACES, Request, instruction
from qwenedit.mini.shapes import COLOURS, EXAMPLE, KINDS, Background, draw
from tests.mini.test_descriptions import read
from tests.support import assert_close


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def world(pipe):
    return World(pipe.processor, pipe.vae, 0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pool_of(world, template):
    pool = Pool(world, 1, template)
    pool.slide(0)
    return pool


@pytest.mark.parametrize("template", [EDIT, TEXT_TO_IMAGE])
def test_batches_are_functions_of_their_seed_and_the_pool(pipe, template):
    one, other = (Pool(World(pipe.processor, pipe.vae, 0), 2, template) for _ in range(2))
    one.slide(0)
    one.slide(3)
    other.slide(3)  # came here another way
    a, b = one.batch(6, seeded(5)), other.batch(6, seeded(5))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.noise, b.noise) and torch.equal(a.sigma, b.sigma)
    assert all(torch.equal(a.pairs[name], b.pairs[name]) for name in a.pairs)
    assert not torch.equal(a.ids, one.batch(6, seeded(6)).ids)
    assert len(one.blocks[3]["ids"]) == BLOCK and sorted(one.blocks) == [3, 4]


def test_training_sees_what_the_processor_makes(world):
    """Tokens and patches of a training batch are those that an edit gets."""
    tokens, picture = world.processor, draw(EXAMPLE)
    batch = tokens(["Make the circle red."], [[picture]], EDIT)
    ids = torch.cat([world.heads[EDIT], torch.tensor(world.suffix("Make the circle red."))])
    assert ids[: batch.input_ids.shape[1]].tolist() == batch.input_ids[0].tolist()
    assert set(ids[batch.input_ids.shape[1] :].tolist()) == {tokens.pad_token_id}
    pixels = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
    )
    assert torch.equal(patches(pixels[None], tokens.config), picture_patches(picture, tokens.config)[0])


def test_batches_of_descriptions_have_no_pictures(world):
    """One in ten has lost its prompt; noise levels fall into equal parts."""
    tokens, batch = world.processor, pool_of(world, TEXT_TO_IMAGE).batch(400, seeded(0))
    assert batch.pixel_values is None and not batch.with_reference
    assert set(batch.pairs) == {"after", "ids", "weight", "told"} and bool((batch.pairs["weight"] == 1).all())
    head = world.heads[TEXT_TO_IMAGE]
    assert len(head) == tokens.drop_index(TEXT_TO_IMAGE)
    assert torch.equal(batch.ids[:, : len(head)], head.expand(400, -1))
    rest = batch.ids[:, len(head) :]
    lost = (rest == world.no_prompt[TEXT_TO_IMAGE]).all(dim=1)
    assert 0.05 < float(lost.float().mean()) < 0.16
    assert torch.equal(rest[~lost], batch.pairs["ids"][~lost])
    assert torch.equal(batch.real, batch.ids != tokens.pad_token_id)
    uniform = batch.sigma / (2.5 - 1.5 * batch.sigma)  # without the shift towards noise
    assert torch.equal((uniform * 400 * DRAWS).floor().sort().values.long(), torch.arange(400 * DRAWS))


def test_a_description_is_beside_its_own_picture(pipe, monkeypatch):
    """The words of each row's tokens are what the oracle reads off the picture that was encoded.

    And so are the labels: kind, colour and place of two shapes and the background, 0 for what is not said.
    """
    world = World(pipe.processor, pipe.vae, 3)
    painted, encoded = [], world.encoded
    monkeypatch.setattr(world, "encoded", lambda given: painted.extend(given) or encoded(given))
    block = world.descriptions(2)
    assert len(painted) == BLOCK == len(block["ids"])
    modes, after = world.packed(encoded(painted)[1].mode()), block["after"]
    assert torch.equal(modes[::2], after[::2])
    assert bool((modes != after)[1::2].any(dim=(1, 2)).all())  # these are samples
    assert not torch.equal(world.descriptions(1)["after"], block["after"])
    names = [[None, *one] for one in (*(KINDS, COLOURS, PLACES) * 2, COLOURS)]
    rows = zip(block["ids"].tolist(), block["told"].tolist(), painted, strict=True)
    for ids, labels, picture in islice(rows, 24):
        description = read(
            world.processor.tokenizer.decode(ids, skip_special_tokens=False).split("<|im_end|>")[0]
        )
        *told, background = (one[label] for one, label in zip(names, labels, strict=True))
        items = [Item(kind, colour, place) for kind, colour, place in (told[:3], told[3:]) if kind]
        assert Description(tuple(items), background) == description
        corner = [round(255 * value) for value in picture[:, 0, 0].tolist()]
        (ground,) = (name for name, rgb in COLOURS.items() if list(rgb) == corner)
        found = [one.shape for one in read_shapes(picture, Background(ground))]
        assert description.background in (None, ground)
        assert {(one.kind, one.colour) for one in found} == {(i.kind, i.colour) for i in description.items}
        for item in description.items:
            (shape,) = (one for one in found if one.kind == item.kind)
            x, y = PLACES[item.place] if item.place else (shape.x, shape.y)
            assert max(abs(shape.x - x), abs(shape.y - y)) < 4


def test_an_edit_starts_from_modes_and_ends_in_modes_and_samples(pipe):
    """References are modes in every run. Tokens that an edit leaves alone tell which results are samples."""
    world = World(pipe.processor, pipe.vae, 3)
    block = world.edits(1)
    with torch.no_grad():
        modes = world.packed(pipe.vae.encode((block["source"].float() / 127.5 - 1)[:, :, None]).mode())
    assert_close(block["before"], modes, 1e-5)
    kept = block["changed"] == 0
    rows = list(zip(block["after"], modes, kept, strict=True))
    of_modes, of_samples = (
        [float((a - b)[k].abs().mean()) for a, b, k in rows[n::2] if k.any()] for n in (0, 1)
    )
    # A third of the channels hardly show: in samples they are noise of deviation 1.
    assert len(of_modes) > 10 < len(of_samples) and max(of_modes) < 0.2 < min(of_samples)


def test_the_longest_texts_fit(world):
    longest = "An orange circle in the middle and an orange square at the bottom on an orange background."
    assert len(world.suffix(longest, TEXT_TO_IMAGE)) == LENGTHS[TEXT_TO_IMAGE]
    for template, text in ((TEXT_TO_IMAGE, f"{longest} {longest}"), (EDIT, f"{longest} {longest}")):
        with pytest.raises(AssertionError, match="too many tokens"):
            world.suffix(text, template)
    for seed in range(300):
        description, _ = random_description(Random(seed))
        world.suffix(prompt(Random(seed), description), TEXT_TO_IMAGE)
        world.suffix(instruction(Random(seed), Request("add", None, "circle", "orange", "center")))


def test_training_sees_what_generate_feeds(pipe, world, monkeypatch):
    """Tokens, embeddings and grids of a training batch are those of `generate`, for the empty prompt too."""
    both = Description((Item("circle", "red", "left"), Item("star", "blue", "center")), "white")
    texts = [prompt(Random(0), both, plain=True), "An orange star at the top.", "a blue square"]
    fed, grids = [], []
    hook = pipe.vision_language.register_forward_pre_hook(lambda _, given: fed.append(given[:2]))
    other = pipe.mmdit.register_forward_pre_hook(lambda _, given: grids.append(given[3]))
    pipe.generate(texts, num_inference_steps=1, generator=seeded(0))
    hook.remove()
    other.remove()
    assert len(fed) == 2
    for (ids, mask), suffixes in zip(
        fed, ([world.suffix(text, TEXT_TO_IMAGE) for text in texts], [world.no_prompt[TEXT_TO_IMAGE]] * 3),
        strict=True,
    ):  # fmt: skip
        for row, real, suffix in zip(ids, mask.bool(), suffixes, strict=True):
            whole = torch.cat([world.heads[TEXT_TO_IMAGE], torch.as_tensor(suffix)])
            assert whole[whole != pipe.processor.pad_token_id].tolist() == row[real].tolist()

    batch = pool_of(world, TEXT_TO_IMAGE).batch(3, seeded(0))
    ids = [
        torch.cat([world.heads[TEXT_TO_IMAGE], torch.tensor(world.suffix(x, TEXT_TO_IMAGE))]) for x in texts
    ]
    batch = replace(batch, ids=torch.stack(ids), real=torch.stack(ids) != pipe.processor.pad_token_id)
    given = {}

    def velocity_error(_mmdit, clean, references, txt, txt_mask, _sigma, _noise, grids, *, channels):
        assert channels is None
        given.update(references=references, txt=txt, mask=txt_mask, grids=grids)
        return torch.zeros(clean.shape[:2])

    monkeypatch.setattr(train_edit, "velocity_error", velocity_error)
    with torch.no_grad():
        train_edit.Student(pipe.vision_language, pipe.mmdit)(batch, pipe.processor.drop_index(TEXT_TO_IMAGE))
    conditioning = pipe.condition(None, texts)
    assert given["references"] is None and {given["grids"], *grids} == {(conditioning.target_grid,)}
    for row in range(3):
        wanted = conditioning.prompt.embeds[row, : conditioning.prompt.lengths[row]]
        assert_close(given["txt"][row][given["mask"][row]], wanted, 1e-5)
