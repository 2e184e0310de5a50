"""Probabilities swapped between prompts of different lengths, by an alignment of their tokens."""

import itertools
from random import Random

import pytest
import torch
from PIL import Image

from qwenedit import Recorder, taps
from qwenedit.instruments.alignment import Alignment, _common, align, swap_probs
from qwenedit.instruments.records import Records
from qwenedit.mini import EXAMPLE
from qwenedit.networks import mmdit_layers

PROBS = "blocks.*.attn.probs"
RED, BLUE, LONG = "make the circle red", "make the circle blue", "make the big circle on the left blue"
CHINESE, LONGER = "把圆形变成红色", "请把大的圆形变成蓝色"
END = 5  # tokens of the template behind a prompt


def run(pipe, prompts, steps=3, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pictures = options.pop("pictures", None) or [Image.open(EXAMPLE)] * len(prompts)
    return pipe.edit(
        pictures, prompts, num_inference_steps=steps, generator=generators, output_type="pt", **options
    ).images


def recorded(pipe, prompts, recorder=None, **options):
    recorder = recorder or Recorder()
    with taps(pipe.mmdit, {PROBS: recorder}):
        return recorder, run(pipe, prompts, **options)


def swapped(pipe, records, alignment, prompts, options=None, **where):
    """The run with swapped probabilities, and these before and after the swap."""
    before, after = Recorder(), Recorder()
    with (
        taps(pipe.mmdit, {PROBS: before}),
        taps(pipe.mmdit, {PROBS: swap_probs(records, alignment, **where)}),
    ):
        with taps(pipe.mmdit, {PROBS: after}):
            images = run(pipe, prompts, **(options or {}))
    return before, after, images


# the alignment


def longest(a, b):
    """The length of a longest common subsequence, tried out."""
    for size in range(min(len(a), len(b)), 0, -1):
        of_b = set(itertools.combinations(b, size))
        if any(one in of_b for one in itertools.combinations(a, size)):
            return size
    return 0


def test_pairs_are_a_longest_common_subsequence():
    rng = Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(7))] for _ in "ab")
        pairs = _common(a, b)
        assert all(a[i] == b[j] for i, j in pairs) and len(pairs) == longest(a, b)
        assert all(x[0] < y[0] and x[1] < y[1] for x, y in itertools.pairwise(pairs))


def test_a_word_is_replaced_added_or_moved(edit):
    same = align(edit, RED, RED)
    assert same == Alignment(tuple((k, k) for k in range(4 + END)), (4 + END, 4 + END))
    assert align(edit, RED, BLUE).pairs == tuple((k, k) for k in range(4 + END) if k != 3)
    longer = align(edit, RED, LONG)
    assert longer.lengths == (4 + END, 8 + END)
    assert longer.pairs == ((0, 0), (1, 1), (2, 3), *((4 + k, 8 + k) for k in range(END)))
    assert align(edit, LONG, RED).pairs == tuple((j, i) for i, j in longer.pairs)
    assert align(edit, "", RED).pairs == tuple((k, 4 + k) for k in range(END))


def test_chinese_prompts_are_aligned_by_their_tokens(edit):
    found = align(edit, CHINESE, LONGER)
    tokens = [
        edit.processor.tokenizer.encode(text, add_special_tokens=False).ids for text in (CHINESE, LONGER)
    ]
    assert found.lengths == tuple(len(ids) + END for ids in tokens)
    shared = [(i, j) for i, j in found.pairs if i < len(tokens[0])]
    assert len(shared) >= 3 * 5 and all(tokens[0][i] == tokens[1][j] for i, j in shared)


def test_an_alignment_is_the_same_for_every_variant(edit, plus):
    assert align(edit, RED, LONG) == align(plus, RED, LONG)
    with pytest.raises(ValueError, match="a prompt is int, wanted a string"):
        align(edit, RED, 3)
    with pytest.raises(ValueError, match="wanted neither beside pictures"):
        align(edit, RED, "<|image_pad|>")


# the swap


@pytest.mark.parametrize("prompts", [[RED, CHINESE], [LONG, RED]])
def test_identical_prompts_change_no_bit(edit, prompts):
    records, wanted = recorded(edit, prompts)
    for branch in ("cond", "uncond"):
        negative = [align(edit, " ", " ")] * 2
        alignments = [align(edit, one, one) for one in prompts] if branch == "cond" else negative
        before, after, images = swapped(edit, records, alignments, prompts, branch=branch)
        assert torch.equal(images, wanted)
        assert all(torch.equal(before[key], after[key]) for key in before)


def check(before, after, records, alignments, texts_a, texts_b, image=32, target=16):
    """Every swapped map against one made entry by entry. `texts` are the real lengths; ends are padding."""
    for key, x in before.items():
        y = after[key]
        if key.branch != "cond":
            assert torch.equal(x, y)
            continue
        for k, row in enumerate(key.rows):
            (of_a,) = [one for one in records.of(key.name) if one[1:3] == key[1:3] and row in one.rows]
            theirs = records[of_a][of_a.rows.index(row)]
            text_a, text_b = theirs.shape[-1] - image, x.shape[-1] - image
            pairs = list(alignments[row].pairs)
            pictures = texts_b[row] - alignments[row].lengths[1]
            assert pictures == texts_a[row] - alignments[row].lengths[0] > 0
            partner = {j: j for j in range(pictures)} | {pictures + j: pictures + i for i, j in pairs}
            wanted = x[k].clone()
            for j, i in partner.items():
                wanted[:, text_b : text_b + target, j] = theirs[:, text_a : text_a + target, i]
            sums = wanted.sum(-1, keepdim=True)
            torch.testing.assert_close(
                y[k], wanted * (x[k].sum(-1, keepdim=True) / sums), rtol=1e-5, atol=1e-7
            )
            torch.testing.assert_close(y[k].sum(-1), x[k].sum(-1))
            assert torch.equal(y[k][:, :text_b], x[k][:, :text_b])  # the text's queries
            assert torch.equal(y[k][:, text_b + target :], x[k][:, text_b + target :])  # the reference's
            assert not torch.equal(y[k], x[k])


@pytest.mark.parametrize(
    "a, b",
    [([RED, RED], [BLUE, LONG]), ([LONG, CHINESE], [RED, LONGER]), ([CHINESE, RED], [BLUE, RED])],
    ids=["replaced and longer", "shorter and Chinese", "another language, and itself"],
)
@pytest.mark.parametrize("padding", [True, False])
def test_rows_of_several_lengths_under_guidance(edit, a, b, padding):
    pictures = edit.condition([Image.open(EXAMPLE)], [""]).prompt.lengths[0] - END
    records, _ = recorded(edit, a, Recorder(padding=padding), steps=1)
    alignments = [align(edit, *pair) for pair in zip(a, b, strict=True)]
    before, after, images = swapped(edit, records, alignments, b, {"steps": 1})
    texts = [[pictures + one.lengths[k] for one in alignments] for k in (0, 1)]
    check(before, after, records, alignments, *texts)
    assert images.isfinite().all()


def test_one_alignment_serves_all_rows_which_may_run_apart_and_in_parts_of_heads(edit, monkeypatch):
    one = align(edit, RED, LONG)
    records, _ = recorded(edit, [RED] * 2)
    wanted = swapped(edit, records, [one, one], [LONG] * 2)[2]
    assert torch.equal(swapped(edit, records, one, [LONG] * 2)[2], wanted)
    monkeypatch.setattr(mmdit_layers, "MAX_MAP", 2 * 2 * 60**2)  # two heads or three of a batch of two
    parted, _ = recorded(edit, [RED] * 2)
    assert any(key.heads for key in parted)
    monkeypatch.setattr(edit, "micro_batch", 1)
    found = swapped(edit, parted, one, [LONG] * 2)[2]
    assert (found - wanted).abs().max() < 1e-4
    assert (found - run(edit, [LONG] * 2)).abs().max() > 1e-2


def test_it_acts_in_the_wanted_steps_blocks_rows_and_queries(edit):
    one = align(edit, RED, BLUE)
    records, _ = recorded(edit, [RED] * 2, steps=2)
    before, after, _ = swapped(
        edit, records, one, [BLUE] * 2, {"steps": 2}, steps=[1], blocks=[2], rows=[1], queries="reference"
    )
    for key, x in before.items():
        if (key.name, key.step, key.branch) != ("blocks.2.attn.probs", 1, "cond"):
            assert torch.equal(x, after[key])
            continue
        moved = (x != after[key]).any(-1).any(1)  # row, query
        assert not moved[0].any() and not moved[1, :-16].any() and moved[1, -16:].all()


def test_several_pictures(plus):
    pictures = [[Image.open(EXAMPLE), Image.open(EXAMPLE).resize((32, 64))]]
    records, plain = recorded(plus, [RED], pictures=pictures, steps=2)
    same = swapped(plus, records, align(plus, RED, RED), [RED], {"pictures": pictures, "steps": 2})[2]
    assert torch.equal(same, plain)
    other = {"pictures": pictures, "steps": 2}
    images = swapped(plus, records, align(plus, RED, LONG), [LONG], other, queries="reference 2")[2]
    assert images.isfinite().all()
    with pytest.raises(ValueError, match="but queries is 'reference 3'"):
        swapped(plus, records, align(plus, RED, LONG), [LONG], other, queries="reference 3")


def test_what_does_not_fit_is_refused(edit):
    one = align(edit, RED, BLUE)
    records, _ = recorded(edit, [RED], steps=1)
    for arguments, options, message in (
        (({}, one), {}, "records are dict, wanted a Recorder"),
        ((records, 3), {}, "alignment is 3, wanted what align returned"),
        ((records, []), {}, r"alignment is \[\], wanted what align returned"),
        ((records, one), {"queries": "text"}, "queries is 'text', wanted"),
        ((records, one), {"queries": "reference x"}, "queries is 'reference x', wanted"),
        ((records, one), {"steps": "3"}, "steps are '3', wanted"),
        ((records, one), {"branch": "both"}, "branch is 'both', wanted"),
        ((records, one), {"blocks": [-1]}, "one of blocks is -1, wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_probs(*arguments, **options)
    with pytest.raises(ValueError, match="has no attention probabilities"):
        with taps(edit.mmdit, {"blocks.0.attn.scores": swap_probs(records, one)}):
            pytest.fail("nothing may run")
    with pytest.raises(KeyError, match="was not recorded"):
        with taps(edit.mmdit, {PROBS: swap_probs(Records(), one)}):
            pytest.fail("nothing may run")
    with pytest.raises(KeyError, match="was not recorded"):
        swapped(edit, records, one, [BLUE], {"steps": 2})
    with pytest.raises(ValueError, match="there are 1 alignments, wanted one for row 1, too"):
        both, _ = recorded(edit, [RED] * 2, steps=1)
        swapped(edit, both, [one], [BLUE] * 2, {"steps": 1})
    with pytest.raises(ValueError, match="tokens, but prompt b alone has"):
        swapped(edit, records, align(edit, RED, LONG * 20), [BLUE], {"steps": 1})
    with pytest.raises(ValueError, match="was it under prompt a, on the same pictures"):
        swapped(edit, records, align(edit, LONG, RED), [RED], {"steps": 1})
