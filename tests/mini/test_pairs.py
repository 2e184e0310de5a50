"""What the embedded model is trained on: batches of edits and of descriptions, and their tokens."""

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
import torch

import qwenedit
from qwenedit.family import EDIT, TEXT_TO_IMAGE
from qwenedit.inputs.processor import picture_patches
from qwenedit.mini import train_edit
from qwenedit.mini.descriptions import Description, Item, prompt, random_description
from qwenedit.mini.oracle import judge_described
from qwenedit.mini.pairs import BLOCK, DRAWS, LENGTHS, OUTCOMES, Pool, World, matched, patches
from qwenedit.mini.scenes import ACTIONS, OPEN, PLACES, Request, held_out, instruction
from qwenedit.mini.shapes import COLOURS, EXAMPLE, KINDS, draw
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
    for name in ("ids", "latents", "weight", "noise", "sigma"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
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
    assert set(batch.pairs) == {"ids", "told"} and bool((batch.weight == 1).all())
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


def test_a_description_is_beside_its_own_pictures(pipe, monkeypatch):
    """The words of each row's tokens are what the oracle reads off the pictures that were encoded.

    And so are the labels: kind, colour and place of two shapes and the background, 0 for what is not said.
    """
    world = World(pipe.processor, pipe.vae, 3)
    given, encoded = [], world.encoded
    monkeypatch.setattr(world, "encoded", lambda scenes: given.extend(scenes) or encoded(scenes))
    block = world.descriptions(2)
    assert len(given) == BLOCK * OUTCOMES and not any(map(held_out, given))
    assert block["after"].shape == block["spread"].shape == (BLOCK, OUTCOMES, 16, 64)
    assert not torch.equal(world.descriptions(1)["after"], block["after"])
    names = [[None, *one] for one in (*(KINDS, COLOURS, PLACES) * 2, COLOURS)]
    several = 0
    for row in range(24):
        ids, labels = block["ids"][row].tolist(), block["told"][row].tolist()
        text = world.processor.tokenizer.decode(ids, skip_special_tokens=False).split("<|im_end|>")[0]
        description = read(text)
        *told, background = (one[label] for one, label in zip(names, labels, strict=True))
        items = [Item(kind, colour, place) for kind, colour, place in (told[:3], told[3:]) if kind]
        assert Description(tuple(items), background) == description
        scenes = given[row * OUTCOMES : (row + 1) * OUTCOMES]
        for number, scene in enumerate(scenes[:3]):
            assert judge_described(description, draw(scene)).success
            assert_close(block["after"][row, number], encoded([scene])[1][0], 1e-4)
        free = background is None or any(item.place is None for item in items)
        assert free or len(set(scenes)) == 1
        several += len(set(scenes)) > 1
    assert several > 10


def test_edits_have_several_right_pictures_if_they_are_open(pipe):
    """Each outcome is right and has its own weights; all others' pictures are the same."""
    world = World(pipe.processor, pipe.vae, 3)
    block = world.edits(1)
    different = (block["after"] != block["after"][:, :1]).flatten(1).any(dim=1)
    actions = [ACTIONS[label] for label in block["about"][:, 0].tolist()]
    for action, several in zip(actions, different.tolist(), strict=True):
        assert several == (action in OPEN), action
    moved = (block["after"] - block["before"][:, None]).abs().amax(dim=-1)
    for row, action in enumerate(actions):
        heavy = block["weight"][row] > 1
        assert set(block["weight"][row].unique().tolist()) <= {1.0, 2.0 if action in OPEN else 3.0}
        assert torch.equal(block["changed"][row], heavy.float().mean(dim=0))
        if heavy.any() and not heavy.all():
            assert moved[row][heavy].mean() > 3 * moved[row][~heavy].mean()


def test_an_edit_starts_from_modes_and_ends_in_modes_and_samples(world):
    """References are modes in every run. Half of the right pictures are samples, with the VAE's deviation."""
    pool = pool_of(world, EDIT)
    block = pool.blocks[0]
    modes = world.vae.encode((block["source"].float() / 127.5 - 1)[:, :, None])
    assert_close(block["before"], world.packed(modes.mode()), 1e-5)
    drawn = world.packed(modes.sample(seeded(0))) - block["before"]
    batch = pool.batch(200, seeded(0))
    off = (batch.latents[:, None] - block["after"].flatten(0, 1)).abs().amax(dim=(2, 3))
    of_modes = off.amin(dim=1) == 0
    assert 0.4 < float(of_modes.float().mean()) < 0.6
    # A third of the channels hardly show: in samples they are noise of deviation 1.
    samples = batch.latents[~of_modes].flatten(0, 1).std(dim=0)
    hidden = drawn.flatten(0, 1).std(dim=0) > 0.9
    assert 10 < int(hidden.sum()) < 40 and bool((samples[hidden] > 0.7).all())
    assert bool((batch.latents[of_modes].flatten(0, 1).std(dim=0)[hidden] < 0.5).all())


def test_each_noise_gets_an_outcome_near_it():
    noise, outcomes = torch.randn((2, 40, 5, 3, 4), generator=seeded(0))
    order = matched(noise, outcomes)
    assert torch.equal(order.sort().values, torch.arange(5).expand(40, 5))

    def apart(order):
        return (noise - outcomes[torch.arange(40)[:, None], order]).pow(2).sum(dim=(1, 2, 3))

    every = torch.stack([apart(torch.tensor(one).expand(40, 5)) for one in permutations(range(5))])
    assert bool((apart(order) <= every[0]).all())  # the first is as they came
    gained, most = (every[0] - x for x in (apart(order), every.amin(dim=0)))
    assert float(gained.sum()) > 0.9 * float(most.sum()) > 0
    assert torch.equal(matched(noise, noise), torch.arange(5).expand(40, 5))


def test_the_noise_of_a_batch_decides_between_right_pictures(world):
    """And stays normal; edits with one right picture have noise that knows nothing of it."""
    pool = pool_of(world, EDIT)
    batch, block = pool.batch(400, seeded(0)), pool.blocks[0]
    assert abs(float(batch.noise.mean())) < 0.01 and abs(float(batch.noise.std()) - 1) < 0.01
    mean = {tuple(ids.tolist()): x.mean(dim=0) for ids, x in zip(block["ids"], block["after"], strict=True)}
    centre = torch.stack([mean[tuple(ids.tolist())] for ids in batch.pairs["ids"]]).repeat(DRAWS, 1, 1)
    towards = ((batch.latents - centre) * batch.noise).sum(dim=(1, 2))
    open_ = torch.tensor([ACTIONS[n] in OPEN for n in batch.pairs["about"][:, 0].tolist()]).repeat(DRAWS)
    assert float(towards[open_].mean()) > 5 > 2 > abs(float(towards[~open_].mean()))


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
