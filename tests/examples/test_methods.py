"""Published methods as interventions: who is changed by each, who is not, and what a strength of 0 gives."""

import dataclasses
import sys
from functools import partial

import pytest
import tomllib
import torch
from PIL import Image

import qwenedit
from benchmarks.methods import SPEC, code_lines, interventions, paper
from examples.methods.concept_attention import concept_attention
from examples.methods.drift import drift
from examples.methods.kv_inject import kv_inject
from examples.methods.masactrl import masactrl
from examples.methods.no_rope import no_rope
from examples.methods.query_key import query_key
from examples.methods.rf_inversion import rf_inversion
from examples.methods.rf_solver_edit import rf_solver_edit
from examples.methods.slider import direction, slider
from examples.methods.stable_flow import stable_flow, vitality
from examples.methods.steering import direction as steering_direction
from examples.methods.steering import steering
from examples.methods.step_caching import first_block, teacache
from qwenedit import Recorder, picture_latents, taps
from qwenedit.ablation.intervening import state_of
from qwenedit.ablation.sweep import ablate
from qwenedit.encoding.conditioning import Prompt
from qwenedit.inputs.pictures import to_pil
from qwenedit.mini import EXAMPLE
from tests.support import assert_close

STEPS = 5
PROMPTS = ["make the circle red", "把方块移到左边"]  # of different lengths
METHODS = {name: function for name, (function, _) in interventions().items()}
FEWER = {"same seed": partial(drift, edits=3, fresh=False), "fresh seeds": partial(drift, edits=3)}
NOTHING = {  # each method at the strength 0
    "kv inject": partial(kv_inject, alpha=0),
    "masactrl": partial(masactrl, steps=()),
    "query and key": partial(query_key, steps=()),
    "stable flow": lambda pipe: stable_flow(pipe, vital=()),
    "rf inversion": partial(rf_inversion, gamma=1, eta=0),
    "no rope": partial(no_rope, blocks=()),
    "concept attention": concept_attention,
    "slider": partial(slider, scale=0),
    "steering": partial(steering, scale=0),
    "first block": partial(first_block, threshold=0),
    "teacache": partial(teacache, threshold=0),
    "same seed": partial(drift, edits=1, fresh=False),
    "fresh seeds": partial(drift, edits=1, fresh=True),
}


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(device="cpu", progress=False)


def run(pipe, prompts=PROMPTS, steps=STEPS, pictures=None, output_type="pt", **options):
    """An edit of the example by each prompt, in one batch; rows have noise of their own."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe.edit(
        pictures or [Image.open(EXAMPLE)] * len(prompts), prompts, num_inference_steps=steps,
        generator=generators, output_type=output_type, **options,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def plain(pipe):
    return run(pipe)


@pytest.fixture(scope="module")
def conditioning(pipe):
    return pipe.condition([Image.open(EXAMPLE)] * 2, PROMPTS)


@pytest.fixture(scope="module")
def source(pipe):
    return picture_latents(pipe, Image.open(EXAMPLE))[0].expand(2, -1, -1)


def around(pipe, intervention, names, **options):
    """What these taps had in a run, before an intervention and after it, and the run's pictures."""
    before, after = Recorder(), Recorder()
    with taps(pipe.mmdit, dict.fromkeys(names, before)), intervention(pipe):
        with taps(pipe.mmdit, dict.fromkeys(names, after)):
            images = run(pipe, **options)
    assert list(before) == list(after)
    return before, after, images


def of_attention(*tensors):
    return [f"blocks.{n}.attn.{tensor}" for n in range(6) for tensor in tensors]


def placed(key):
    """The block and the tensor of a tap."""
    parts = key.name.split(".")
    return int(parts[1]), parts[-1]


# all of them


def test_each_is_a_row_of_the_sweep_with_its_paper_and_few_lines():
    files = {file for _, file in interventions().values()}
    folder = SPEC.parent / "methods"
    assert files == set(folder.glob("*.py")) - {folder / "__init__.py"} and len(files) == 12
    assert set(METHODS) - {"rf solver edit"} == set(NOTHING)  # its strength of 0 has a test of its own
    for file in files:
        assert 1 <= code_lines(file) <= 25, file.name
        assert "\nSource: " in file.read_text() and paper(file) != "–", file.name


@pytest.mark.parametrize("name", NOTHING)
def test_a_strength_of_0_gives_the_plain_run_bit_by_bit(pipe, plain, name):
    with NOTHING[name](pipe):
        assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", METHODS)
def test_it_changes_every_row_and_leaves_no_trace(pipe, plain, name):
    before = state_of(pipe)
    with {**METHODS, **FEWER}[name](pipe):
        images = run(pipe)
    moved = (images - plain).abs().amax(dim=(1, 2, 3))
    if name in ("concept attention", "first block"):  # the first changes nothing, the second nothing so early
        assert not moved.any()
    else:
        assert images.isfinite().all() and moved.min() > 0
    assert state_of(pipe) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_what_it_is_alone(pipe, name):
    """As `micro_batch` promises, whatever runs beside it."""
    pipe.micro_batch = 1
    try:
        with {**METHODS, **FEWER}[name](pipe):
            batch = run(pipe, steps=2)
        with {**METHODS, **FEWER}[name](pipe):
            alone = run(pipe, PROMPTS[:1], steps=2)
    finally:
        pipe.micro_batch = None
    assert torch.equal(batch[:1], alone)


@pytest.fixture(scope="module")
def lean():
    return [
        qwenedit.load(device="cpu", progress=False, dtype="bfloat16", residency=residency)
        for residency in ("stream", "resident")
    ]


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_in_bfloat16_and_with_streamed_weights(lean, name):
    found = []
    for pipe in lean:
        with {**METHODS, **FEWER}[name](pipe):
            found.append(run(pipe, PROMPTS[:1], steps=2))
    assert torch.equal(*found) and found[0].isfinite().all()


def test_they_are_rows_of_a_sweep(tmp_path, monkeypatch):
    spec = tomllib.loads(SPEC.read_text())
    assert spec["grid"]["intervention"] == ["none", *METHODS]
    monkeypatch.chdir(SPEC.parent)
    for name in [one for one in sys.modules if one.split(".")[0] == "methods"]:
        monkeypatch.delitem(sys.modules, name)
    swept = ablate({**spec, "pictures": ["mini:0"], "steps": 1}, tmp_path, device="cpu", progress=False)
    for name in [one for one in sys.modules if one.split(".")[0] == "methods"]:
        sys.modules.pop(name)  # other sweeps have a module of this name, too
    assert [one["intervention"] for one in swept.records.values()] == ["none", *METHODS]
    assert not swept.failed


# each of them


def test_kv_inject_blends_the_targets_keys_and_values_in_its_band(pipe):
    method = partial(kv_inject, alpha=0.25, blocks="2..3", steps=[1])
    before, after, _ = around(pipe, method, of_attention("img_k", "img_v", "img_q", "txt_k"), steps=2)
    blended = [(n, tensor) for n in (2, 3) for tensor in ("img_k", "img_v")]
    for key, x in before.items():
        if key.step == 1 and placed(key) in blended:
            wanted = torch.cat([0.75 * x[:, :16] + 0.25 * x[:, 16:], x[:, 16:]], dim=1)
            assert torch.equal(after[key], wanted) and not torch.equal(wanted, x)
        else:
            assert torch.equal(after[key], x)


def test_the_source_is_the_last_picture_which_sets_the_size(plus):
    pictures = [[Image.open(EXAMPLE).resize((32, 64)), Image.open(EXAMPLE)]] * 2
    with kv_inject(plus):
        assert run(plus, pictures=pictures, steps=1).isfinite().all()
    with (
        pytest.raises(ValueError, match=r"edited has the grid .*, wanted the target's grid"),
        kv_inject(plus),
    ):
        run(plus, pictures=[pictures[0][::-1]], prompts=PROMPTS[:1], steps=1, height=64, width=64)
    with pytest.raises(ValueError, match="the picture that is edited is missing"), kv_inject(plus):
        plus.generate("a red circle", num_inference_steps=1)


@pytest.fixture(scope="module")
def unchanged(pipe):
    """The queries, keys and values of the plain run."""
    seen = Recorder()
    with taps(pipe.mmdit, dict.fromkeys(of_attention("img_q", "img_k", "img_v"), seen)):
        run(pipe, steps=2)
    return seen


@pytest.mark.parametrize(
    "method, blocks, tensors",
    [
        (partial(masactrl, blocks="3..5", steps=[1]), (3, 4, 5), ("img_k", "img_v")),
        (partial(query_key, blocks="1..2", steps=[1]), (1, 2), ("img_q", "img_k")),
        (partial(stable_flow, vital=(2, 4)), (2, 4), ("img_k", "img_v")),
    ],
    ids=["masactrl", "query_key", "stable_flow"],
)
def test_the_second_pass_has_tensors_of_the_pass_over_the_source(
    pipe, source, unchanged, method, blocks, tensors
):
    sigmas, seen = {}, Recorder()
    note = {"temb": lambda x, site: sigmas.update({site.labels["step"]: site.labels["sigma"]})}
    names = ["latents", *of_attention("img_q", "img_k", "img_v")]
    with taps(pipe.mmdit, {**note, **dict.fromkeys(names, seen)}), method(pipe):
        run(pipe, steps=2)
    noise = next(seen[key] for key in seen if key.name == "latents")[:, :16]
    passes = [key for key in seen if key.step == 1 and key.call == 0]
    assert {key.branch for key in passes} == {"cond", "uncond"}
    for key in passes:  # step 0, where both passes start from noise, is as in the plain run
        first, second = seen[key], seen[key._replace(call=1)]
        if key.name == "latents":
            noised = (1 - sigmas[1]) * source + sigmas[1] * noise
            assert torch.equal(first, torch.cat([noised, source], dim=1))
            continue
        n, tensor = placed(key)
        assert torch.equal(first[:, :16], second[:, :16]) == (n in blocks and tensor in tensors)
        if n <= blocks[0]:
            plain = unchanged[key]
            assert torch.equal(second[:, 16:], plain[:, 16:])
            assert torch.equal(second, plain) != (n in blocks and tensor in tensors)


def test_the_vital_blocks_are_those_without_which_the_picture_moves_most(pipe):
    moved = vitality(pipe, [Image.open(EXAMPLE)] * 2, PROMPTS, num_inference_steps=STEPS,
                     generator=torch.Generator().manual_seed(0))  # fmt: skip
    ranked = sorted(range(6), key=lambda block: -moved[block])
    # From other noise blocks 1 and 2 change places; block 0 moves it 1.7 to 2 times as far as either.
    assert ranked[0] == 0 and 1 in ranked[:3] and moved[0] > 1.3 * moved[ranked[1]] and min(moved) > 0


def test_rf_inversions_controller_leads_to_the_source_and_from_its_inversion(pipe, conditioning, source):
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    with torch.no_grad(), rf_inversion(pipe, gamma=1, eta=1, steps=range(STEPS)):
        *_, last = pipe.steps(conditioning, **options)
    assert_close(last.after, source, 1e-6)
    with torch.no_grad():
        *_, inverted = qwenedit.invert(pipe, conditioning, source, num_inference_steps=STEPS)
    with torch.no_grad(), rf_inversion(pipe, gamma=0, eta=0):
        first = next(pipe.steps(conditioning, **options))
    assert torch.equal(first.latents, inverted.after)
    options["generator"].manual_seed(0)
    with torch.no_grad(), rf_inversion(pipe, gamma=1 - 1e-6, eta=0):
        almost = next(pipe.steps(conditioning, **options)).latents
    options["generator"].manual_seed(0)
    noise = next(pipe.steps(conditioning, **options)).latents
    assert_close(almost, noise, 1e-4)
    assert not torch.equal(almost, noise)


def test_rf_solver_edit_replays_the_values_of_the_inversion(pipe, conditioning, source):
    seen, names = Recorder(), of_attention("img_k", "img_v")
    with torch.no_grad():
        *_, inverted = qwenedit.invert(pipe, conditioning, source, iterations=1, num_inference_steps=STEPS)
    method = partial(rf_solver_edit, blocks="4..5", steps=[0, 1])
    with taps(pipe.mmdit, dict.fromkeys(names, seen)), method(pipe):
        run(pipe)
    for name in names:
        for step in range(STEPS):
            replayed, now = [seen[key] for key in seen.of(name) if key[1:3] == (step, "uncond")][-2:]
            same = step < 2 and placed(seen.of(name)[0]) in ((4, "img_v"), (5, "img_v"))
            assert torch.equal(replayed[:, :16], now[:, :16]) == same
            assert not torch.equal(replayed[:, 16:], now[:, 16:]) or placed(seen.of(name)[0])[0] == 0
    with rf_solver_edit(pipe, steps=()):
        assert torch.equal(run(pipe), run(pipe, latents=inverted.after, sampler="euler"))


def test_concepts_run_beside_the_text_as_text_would(pipe, conditioning):
    """A concept alone has what the text has if it is a text of one token; maps are shares of all concepts."""
    with concept_attention(pipe) as maps:
        run(pipe)
    assert len(maps) == 3 * STEPS and maps[0].shape == (2, 16, 4)
    assert_close(torch.stack(maps).sum(-1), torch.ones(3 * STEPS, 2, 16), 1e-6)
    words = pipe.condition(None, ["circle"], negative_prompt=None).prompt
    alone = Prompt(words.embeds[:, -6:-5].expand(2, -1, -1), None)
    seen = Recorder(branch="cond")
    with concept_attention(pipe, ["circle"]), taps(pipe.mmdit, {"blocks.*.attn.txt_heads": seen}):
        pipe.sample(dataclasses.replace(conditioning, prompt=alone), num_inference_steps=1)
    for n in range(6):
        text, concept = (seen[key] for key in seen.of(f"blocks.{n}.attn.txt_heads"))
        assert_close(concept, text, 1e-5)


def test_a_slider_moves_the_prompt_alone_and_the_colour_with_it(pipe):
    vector = direction(pipe, ["make the circle blue"], ["make the circle red"])
    assert float(vector.norm()) == pytest.approx(1)
    blues = []
    for scale in (0.0, 12.0, 36.0):
        before, after = Recorder(), Recorder()
        with slider(pipe, scale), taps(pipe.vision_language, {"out": before}, first=True):
            with taps(pipe.vision_language, {"out": after}):
                (image,) = run(pipe, ["make the circle red"], steps=8)
        assert torch.equal(before["out", None, "uncond"], after["out", None, "uncond"])
        moved = after["out", None, "cond"] - before["out", None, "cond"]
        assert (moved.norm(dim=-1) - scale).abs().max() < 1e-3
        circle = image[:, 18:26, 15:23].mean((1, 2))
        blues.append(float(circle[2] - circle[0]))
    assert blues[0] + 0.01 < blues[1] < 0 < blues[2]


def test_keys_without_rope_are_those_before_it(pipe):
    before, after, _ = around(
        pipe, partial(no_rope, blocks=(1, 4)), of_attention("img_k", "img_k_rot"), steps=1
    )
    for key in before:
        n, tensor = placed(key)
        plain = after[key._replace(name=f"blocks.{n}.attn.img_k")]
        assert torch.equal(after[key], plain if n in (1, 4) else before[key])
        assert tensor == "img_k" or not torch.equal(before[key], plain)


def test_steering_adds_the_difference_of_two_prompts_to_the_target(pipe):
    vector = steering_direction(
        pipe, 2, ("make the circle blue", "make the circle red"), Image.open(EXAMPLE), 4
    )
    names = [f"blocks.{n}.img_out" for n in range(4)]
    before, after = Recorder(), Recorder()
    with steering(pipe, 2.0), taps(pipe.mmdit, dict.fromkeys(names, before), first=True):
        with taps(pipe.mmdit, dict.fromkeys(names, after)):
            run(pipe, steps=1)
    for key, x in before.items():
        steered = torch.cat([x[:, :16] + 2 * vector, x[:, 16:]], dim=1)
        assert torch.equal(after[key], steered if key[:3] == (names[2], 0, "cond") else x)
    blues = []
    for scale in (0.0, 8.0):
        with steering(pipe, scale):
            (image,) = run(pipe, ["make the circle red"], steps=8)
        blues.append(float((image[2] - image[0])[18:26, 15:23].mean()))
    assert blues[0] < -0.5 and blues[1] > 0


def test_teacache_skips_steps_that_change_little_and_starts_afresh(pipe):
    plain = run(pipe, steps=10)
    far = []
    for threshold in (0.3, 0.8):
        with teacache(pipe, threshold) as (cache,):
            cached = run(pipe, steps=10)
            assert 0 < cache.skipped < 18
            count, cache.skipped = cache.skipped, 0
            assert torch.equal(run(pipe, steps=10), cached) and cache.skipped == count
        far.append((count, float((cached - plain).abs().mean())))
    assert far[0] < far[1] and 0 < far[0][1] < 0.05
    with teacache(pipe, 1e9) as (cache,):  # all but the first step of each branch and run
        assert torch.equal(run(pipe, steps=3), run(pipe, steps=3)) and cache.skipped == 8
    with first_block(pipe) as cache:
        assert 0 < (run(pipe, steps=10) - plain).abs().mean() < 0.05 and cache.skipped > 2


@pytest.mark.parametrize("fresh", [False, True])
def test_drift_is_edit_after_edit_of_the_last_picture(pipe, conditioning, fresh):
    options = {"num_inference_steps": 2, "output_type": "latent"}
    with drift(pipe, edits=3, fresh=fresh):
        found = run(pipe, steps=2, output_type="latent")
    noise = torch.cat(
        [next(pipe.steps(conditioning, generator=[torch.Generator().manual_seed(k) for k in (0, 1)])).latents]
    )
    for edit in range(3):
        if edit and fresh:
            noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(edit)).expand(2, -1, -1)
        made = pipe.sample(conditioning, latents=noise, **options).images
        pictures = to_pil(pipe.decode(made, conditioning.target_grid))
        latents = tuple((picture_latents(pipe, one)[0][0],) for one in pictures)
        conditioning = dataclasses.replace(conditioning, reference_latents=latents)
    assert torch.equal(found, made)
