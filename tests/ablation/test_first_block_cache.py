"""First-block caching, and the state that it keeps for each branch of guidance."""

from collections import Counter

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from PIL import Image

import qwenedit
from qwenedit import mini
from qwenedit.ablation.first_block_cache import BranchState, first_block_cache
from qwenedit.switches import Guidance, References, Switches
from qwenedit.taps import cache_context, current_labels, scope, tap_names, taps
from tests.tiny import checkpoint, picture, reference_pipeline, tiny_areas

THRESHOLD = 0.12  # the changes of the embedded model's first block are 0.08 to 0.33 in 10 steps
STEPS = 10


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def edit(pipe, prompt="make the circle red", steps=STEPS, image=None, **options):
    image = image or Image.open(mini.EXAMPLE)
    seed = torch.Generator().manual_seed(0)
    return pipe.edit(
        image, prompt, num_inference_steps=steps, generator=seed, output_type="pt", **options
    ).images


@pytest.fixture(scope="module")
def plain(pipe):
    return edit(pipe)


def test_a_threshold_of_0_changes_no_bit_and_everything_is_as_before_afterwards(pipe, plain):
    names, blocks = tap_names(pipe.mmdit), pipe.mmdit.blocks
    with first_block_cache(pipe.mmdit, 0.0) as cache:
        assert tap_names(pipe.mmdit) == names
        assert torch.equal(edit(pipe), plain)
    assert (cache.computed, cache.skipped) == (2 * STEPS, 0)
    assert pipe.mmdit.blocks is blocks
    assert tap_names(pipe.mmdit) == names


def test_a_positive_threshold_skips_blocks_and_stays_close(pipe, plain):
    runs = Counter()

    with (
        first_block_cache(pipe.mmdit, THRESHOLD) as cache,
        taps(pipe.mmdit, {"blocks.*.img_out": lambda x, site: runs.update([site.full])}),
    ):
        cached = edit(pipe)
    assert runs["blocks.0.img_out"] == cache.computed + cache.skipped == 2 * STEPS
    assert [runs[f"blocks.{n}.img_out"] for n in range(1, 6)] == [cache.computed] * 5
    assert 4 <= cache.skipped < 2 * STEPS
    assert 0 < (cached - plain).abs().mean() < 0.02
    assert torch.equal(edit(pipe), plain)


def test_each_branch_needs_its_own_state(pipe, monkeypatch):
    """One state for both branches compares, and adds, what the other branch left."""
    negative = {
        "negative_prompt": "make the square red"
    }  # of the prompt's length, or mixing could not even run
    plain = edit(pipe, **negative)
    with first_block_cache(pipe.mmdit, 0.15) as cache:
        apart = edit(pipe, **negative)
    assert cache.skipped > 4
    one = {}
    monkeypatch.setattr(BranchState, "current", lambda self: one)
    # Nor can it tell by the step that it is the other branch's turn.
    monkeypatch.setattr("qwenedit.ablation.first_block_cache.current_labels", dict)
    with first_block_cache(pipe.mmdit, 0.15) as cache:
        mixed = edit(pipe, **negative)
    assert cache.skipped > 4
    assert (mixed - plain).abs().mean() > 2 * (apart - plain).abs().mean()


def test_a_second_run_does_not_start_from_the_first_ones_state(pipe):
    other = "make the circle blue"
    with first_block_cache(pipe.mmdit, 0.4):
        alone = edit(pipe, other, 4)
    with first_block_cache(pipe.mmdit, 0.4):
        edit(pipe, steps=1)
        assert torch.equal(edit(pipe, other, 4), alone)


def test_a_branch_that_begins_later_starts_afresh_too(pipe):
    """Guided from step 1 on: the negative prompt's branch never sees a step 0."""
    switches = Switches(guidance=Guidance(steps=(1, 4)))
    with first_block_cache(pipe.mmdit, 0.9) as cache:
        alone = edit(pipe, switches=switches)
        assert cache.skipped > 4
        assert torch.equal(edit(pipe, switches=switches), alone)


def test_beside_switches_of_references(pipe):
    """Where their number changes from step to step blocks are computed, and hidden ones stay hidden."""
    for references in (References(steps=(0, 3)), References(blocks=(0, 1)), References(blocks=(2, 4))):
        switches = Switches(references=references)
        plain = edit(pipe, switches=switches)
        with first_block_cache(pipe.mmdit, 0.0):
            assert torch.equal(edit(pipe, switches=switches), plain)
        with first_block_cache(pipe.mmdit, THRESHOLD) as cache:
            assert (edit(pipe, switches=switches) - plain).abs().mean() < 0.05
        assert cache.skipped


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_equals_the_reference(threshold, monkeypatch):
    tiny_areas(monkeypatch)
    folder = checkpoint("edit", layers=4)
    ours, reference = qwenedit.load(folder, device="cpu", progress=False), reference_pipeline(folder)
    with first_block_cache(ours.mmdit, threshold) as cache:
        got = edit(ours, "red", image=picture(64, 64))
    assert cache.skipped and cache.computed > 2
    apply_first_block_cache(reference.transformer, FirstBlockCacheConfig(threshold=threshold))
    wanted = reference(
        image=picture(64, 64), prompt="red", negative_prompt=" ", true_cfg_scale=4.0,
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    assert (got - wanted).abs().max() <= 1e-4
    assert (edit(ours, "red", image=picture(64, 64)) - wanted).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:the output's token grid")
def test_rows_that_do_not_run_together_have_states_apart(pipe):
    """Pictures of different sizes: the groups of rows run one after another under one branch."""
    images = [picture(64, 64), picture(100, 40)]

    def run(images, prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with first_block_cache(pipe.mmdit, 0.3) as cache:
            out = pipe.edit(
                images,
                prompts,
                num_inference_steps=4,
                generator=generators,
                output_type="pt",
                height=64,
                width=64,
            )
        return out.images, cache.skipped

    whole, skipped = run(images, ["red", "blue"], [0, 1])
    first, of_first = run(images[:1], ["red"], [0])
    second, of_second = run(images[1:], ["blue"], [1])
    assert skipped == of_first + of_second > 0
    assert (whole - torch.cat([first, second])).abs().max() <= 1e-4


def test_compiled_blocks_stay_compiled():
    ours = qwenedit.load(checkpoint("edit"), device="cpu", progress=False)
    run = {
        "prompt": "red",
        "image": picture(64, 64),
        "steps": 4,
        "true_cfg_scale": 1.0,
        "negative_prompt": None,
    }
    plain = edit(ours, **run)
    with first_block_cache(ours.mmdit, 0.9) as cache:
        wanted = edit(ours, **run)
    assert cache.skipped and not torch.equal(wanted, plain)
    for block in ours.mmdit.blocks:
        block.compile(backend="eager", fullgraph=True)
    with first_block_cache(ours.mmdit, 0.9):
        assert torch.equal(edit(ours, **run), wanted)
    assert torch.equal(edit(ours, **run), plain)


def test_the_blocks_are_back_after_an_exception(pipe):
    blocks = pipe.mmdit.blocks
    with pytest.raises(ZeroDivisionError), first_block_cache(pipe.mmdit, 0.1):
        assert pipe.mmdit.blocks is not blocks
        raise ZeroDivisionError
    assert pipe.mmdit.blocks is blocks


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_bad_threshold_is_refused(pipe, threshold):
    with pytest.raises(ValueError, match=r"threshold is .*, wanted 0 or more"):
        with first_block_cache(pipe.mmdit, threshold):
            pytest.fail("the block must not run")


def test_state_is_the_branchs_and_needs_one():
    states = BranchState(list)
    with pytest.raises(ValueError, match="no label branch is in force, wanted cache_context"):
        states.current()
    with cache_context("cond"):
        assert current_labels() == {"branch": "cond"}
        states.current().append(1)
        with scope(rows=[0, 2]):
            assert states.current() == []
            states.current().append(2)
    with cache_context("uncond"):
        assert states.current() == []
    with cache_context("cond"):
        assert states.current() == [1]
        with scope(rows=[0, 2], step=7):
            assert states.current() == [2]
    assert current_labels() == {}
