"""What is kept of a run, how tokens are pooled and named, and what 8 bits lose."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.exploration import watching
from qwenedit.exploration.plan import MAPS, Cells, evenly, plan_of
from qwenedit.exploration.watching import pooled_attention, quantised
from qwenedit.exploration.words import MOST_WORDS, Word, words_of
from qwenedit.inputs.tokenizer import token_ids
from qwenedit.instruments.attention_maps import attention_map
from qwenedit.latents import Layout
from qwenedit.networks.mmdit_layers import joint_key_mask
from tests.support import assert_as_close_as


@given(st.integers(1, 200), st.integers(1, 200))
def test_steps_are_kept_evenly(count, most):
    kept = evenly(count, most)
    assert len(kept) == min(count, most) and kept == sorted(set(kept)) and kept[0] == 0
    assert len(kept) == 1 or kept[-1] == count - 1
    gaps = [b - a for a, b in pairwise(kept)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_cells_part_the_patches(rows, columns, pool):
    cells = Cells((rows, columns), pool)
    places = cells.of_patches().view(rows, columns)
    assert set(places.flatten().tolist()) == set(range(cells.count))
    for r in range(rows):
        for c in range(columns):
            assert places[r, c] == (r // pool) * cells.shape[1] + c // pool


@given(
    st.lists(st.tuples(st.just(1), st.integers(1, 130), st.integers(1, 130)), min_size=1, max_size=5),
    st.lists(st.integers(1, MOST_WORDS), min_size=1, max_size=2),
    st.integers(1, 20), st.integers(1, 60), st.integers(1, 24), st.sampled_from([MAPS, MAPS // 2]),
)  # fmt: skip
def test_maps_of_every_size_fit(grids, words, steps, blocks, heads, budget):
    """Nothing is left out that fits, and in any case a few steps and blocks are kept."""
    shown = [3 * k for k in range(steps)]
    plan = plan_of(grids, words, steps=shown, blocks=blocks, heads=heads, budget=budget)
    a_block = sum(math.prod(plan.size(count)) for count in words)
    taken = len(plan.steps) * len(plan.blocks) * plan.heads * a_block
    assert taken <= budget
    assert set(plan.steps) <= set(shown) and plan.heads in (1, heads) and plan.of_heads == heads
    assert len(plan.steps) >= min(steps, 6) * 0.8 and len(plan.blocks) >= min(blocks, 8) * 0.8
    whole = sum(
        (math.prod(grids[0][1:]) + count) * (sum(math.prod(grid[1:]) for grid in grids) + count)
        for count in words
    )
    if steps * blocks * heads * whole <= budget:
        assert plan.pictures[0].pool == 1 and plan.heads == heads
        assert plan.steps == shown and plan.blocks == list(range(blocks))
    elif len(plan.steps) < steps or len(plan.blocks) < blocks:
        assert taken > budget / 2, "more would fit"


def test_the_official_size():
    plan = plan_of([(1, 64, 64)] * 2, [20, 14], steps=evenly(40, 20), blocks=60, heads=24)
    assert plan.pictures[0].pool == 5 and plan.heads == 1
    assert len(plan.steps) >= 6 and len(plan.blocks) >= 8
    small = plan_of([(1, 4, 4)] * 2, [20, 14], steps=range(20), blocks=6, heads=4)
    assert small.pictures[0].pool == 1 and small.heads == 4 and len(small.steps) * len(small.blocks) == 120


def test_cells_of_the_joint_sequence():
    words = [Word("picture 1", 0, 3, 1), Word("red", 3, 4), Word("dot", 4, 6)]
    plan = plan_of([(1, 2, 3), (1, 1, 2), (1, 2, 2)], [3], steps=[0], blocks=1, heads=1)
    layout = Layout(6, ((1, 2, 3), (1, 1, 2), (1, 2, 2)))
    places = [*[6, 6, 6, 7, 8, 8], *range(6), 9, 10, *range(11, 15)]
    assert plan.places(layout, words).tolist() == places and plan.size(3) == (9, 15)
    without = Layout(6, ((1, 2, 3),))  # as in a step in which a switch leaves them out
    assert plan.places(without, words).tolist() == places[:12]


def masks(kind, tokens):
    if kind == "none":
        return None
    key_mask = joint_key_mask(torch.tensor([[True, True, True, False, False]]), tokens - 5)
    if kind == "padding":
        return key_mask
    hidden = key_mask.expand(-1, -1, tokens, -1).clone()
    hidden[:, :, :12, 20:] = False  # references, from the text and a part of the target
    return hidden


@pytest.mark.parametrize("kind", ["none", "padding", "rows"])
@pytest.mark.parametrize("mean_heads", [False, True])
def test_pooled_attention(kind, mean_heads, monkeypatch):
    tokens, heads = 29, 3
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, heads, 8, generator=generator) * 2 for _ in range(2))
    cells = torch.randint(0, 11, (tokens,), generator=generator)
    cells[:11] = torch.arange(11).flip(0)
    cells[cells == 4] = 3  # a cell without tokens
    key_mask = masks(kind, tokens)
    monkeypatch.setattr(watching, "CHUNK", 2 * tokens * heads)

    def plain(q, k):
        probs = attention_map(q, k, key_mask=key_mask, mean_heads=mean_heads).view(-1, tokens, tokens)
        counts = [max(1, int((cells == r).sum())) for r in range(7)]
        rows = [probs[:, cells == r].sum(1) / count for r, count in enumerate(counts)]
        return torch.stack(
            [torch.stack([row[:, cells == c].sum(1) for c in range(11)], dim=-1) for row in rows], dim=1
        )

    got = pooled_attention(q, k, cells, 7, 11, key_mask, mean_heads=mean_heads)
    assert got.shape == (1 if mean_heads else heads, 7, 11) and not got[:, 4].any() and not got[..., 4].any()
    assert_as_close_as(got, plain(q, k), plain(q.double(), k.double()))
    assert torch.allclose(got.sum(-1)[:, [0, 1, 2, 3, 5, 6]], torch.ones(()))  # shares of all attention


def test_attention_of_lower_precision_is_computed_in_float32():
    q = torch.randn(1, 6, 2, 4).bfloat16()
    pooled = pooled_attention(q, q, torch.arange(6), 6, 6)
    assert pooled.dtype == torch.float32 and torch.equal(pooled, attention_map(q, q)[0])


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_8_bits_lose_what_is_said(rows):
    x = torch.tensor(rows, dtype=torch.float64)
    codes, tops = quantised(x.float())
    assert codes.dtype == torch.uint8 and tops.dtype == torch.float32
    top = tops.double()[:, None]
    back = top * (codes.double() / 255) ** 2
    bound = top * ((x / top.clamp(min=1e-300)).sqrt() / 255 + 510.0**-2)
    assert (back - x).abs().le(bound + 1e-6 * top + 1e-38).all()


TEXTS = ["make the circle red", "把圆变成红色", "a 😀 in Zürich\n\nok", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_the_text(edit, text):
    ids = token_ids(edit.processor.tokenizer, text)
    words = words_of(ids, edit.processor)
    assert "".join(word.text for word in words) == text
    assert [word.start for word in words[1:]] == [word.stop for word in words[:-1]]
    assert words[0].start == 0 and words[-1].stop == len(ids)
    if text == TEXTS[1]:
        assert [word.text for word in words] == list(text)


def test_pictures_and_broken_characters_are_words(edit):
    processor = edit.processor
    template = "<|vision_start|>" + "<|image_pad|>" * 5 + "<|vision_end|>"
    ids = token_ids(processor.tokenizer, f"{template}{template}red")
    broken = token_ids(processor.tokenizer, "圆")[:2]  # of three bytes
    words = words_of([*ids, *broken], processor)
    assert [(word.text, word.stop - word.start, word.picture) for word in words] == [
        ("<|vision_start|>", 1, None), ("picture 1", 5, 1), ("<|vision_end|>", 1, None),
        ("<|vision_start|>", 1, None), ("picture 2", 5, 2), ("<|vision_end|>", 1, None),
        *[(processor.tokenizer.decode([one]), 1, None) for one in ids[14:]],
        *[("\ufffd", 1, None)] * 2,
    ]  # fmt: skip


def test_long_texts_are_joined(edit):
    ids = token_ids(edit.processor.tokenizer, "<|image_pad|><|image_pad|>" + "make the circle red " * 100)
    words = words_of(ids, edit.processor)
    assert len(words) <= MOST_WORDS and words[0].picture == 1 and words[0].stop == 2
    assert "".join(word.text for word in words[1:]) == "make the circle red " * 100
    assert max(word.stop - word.start for word in words[1:-1]) == min(
        word.stop - word.start for word in words[1:-1]
    )
