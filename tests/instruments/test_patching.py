"""Where the functions of patching.py act, and what they leave as it was."""

import pytest
import torch
from PIL import Image

import qwenedit
from qwenedit import Recorder, mini
from qwenedit.instruments.patching import add, patch_from, project_out, scale_by, share_from, skip, zero
from qwenedit.taps import taps
from tests.tiny import embedded_plus, picture

OUT = "blocks.2.img_out"
ALL = "blocks.*.img_out"
WIDTH = 128
TOKENS = {"target": slice(0, 12), "reference 1": slice(12, 28), "reference 2": slice(28, 40)}


@pytest.fixture(scope="module")
def pipe():
    return qwenedit.load(embedded_plus(), device="cpu", progress=False)


@pytest.fixture(scope="module")
def conditioning(pipe):
    images = [Image.open(mini.EXAMPLE), picture(64, 128)]
    found = pipe.condition([images] * 2, ["make the circle red", "a longer prompt: make the square blue"])
    return found


def run(pipe, conditioning, functions):
    """Tensors by step and branch that come out of `functions`, and the latents at the end."""
    recorder = Recorder()
    with torch.no_grad(), taps(pipe.mmdit, functions), taps(pipe.mmdit, dict.fromkeys(functions, recorder)):
        *_, last = pipe.steps(
            conditioning, num_inference_steps=2, true_cfg_scale=2.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return recorder, last.after


def before(pipe, conditioning, name, function):
    """The tensor before and after the function, for every record."""
    seen = Recorder()
    after = Recorder()
    with (
        torch.no_grad(),
        taps(pipe.mmdit, {name: seen}),
        taps(pipe.mmdit, {name: function}),
        taps(pipe.mmdit, {name: after}),
    ):
        *_, last = pipe.steps(
            conditioning, num_inference_steps=2, true_cfg_scale=2.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return [(key, seen[key], after[key]) for key in seen], last.after


def test_it_acts_in_its_steps_branch_and_blocks_alone(pipe, conditioning):
    pairs, _ = before(pipe, conditioning, ALL, zero(steps=[1], branch="cond", blocks=[1, 4]))
    changed = {(key.name, key.step, key.branch) for key, x, y in pairs if not torch.equal(x, y)}
    assert changed == {(f"blocks.{block}.img_out", 1, "cond") for block in (1, 4)}
    assert all(not y.any() for key, _, y in pairs if (key.name, key.step, key.branch) in changed)


@pytest.mark.parametrize("tokens", [*TOKENS, "reference", [3, 20, 39]])
@pytest.mark.parametrize("rows", [None, [1]])
def test_it_acts_on_its_tokens_and_rows_alone(pipe, conditioning, tokens, rows):
    pairs, _ = before(pipe, conditioning, OUT, scale_by(2.0, tokens=tokens, rows=rows))
    places = {"reference": slice(12, 40), **TOKENS}.get(tokens if isinstance(tokens, str) else "", tokens)
    for _, x, y in pairs:
        wanted = x.clone()
        for row in rows or range(2):
            wanted[row, places] *= 2
        assert x.shape == (2, 40, WIDTH) and torch.equal(y, wanted)


def test_text_tokens_are_those_of_the_text_stream(pipe, conditioning):
    pairs, _ = before(pipe, conditioning, "blocks.1.txt_mlp_add", zero(tokens="text"))
    assert pairs and all(x.any() and not y.any() for _, x, y in pairs)
    for name, tokens in (
        ("blocks.1.txt_mlp_add", "target"), (OUT, "text"), (OUT, "reference 3"),
        ("blocks.1.img_mod", "target"),
        ("temb", "target"), (OUT, [40]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"tap {name} has .*, but tokens "):
            run(pipe, conditioning, {name: zero(tokens=tokens)})


def test_a_zero_strength_is_the_plain_run_bit_by_bit(pipe, conditioning):
    _, plain = run(pipe, conditioning, {OUT: lambda *_: None})
    direction = torch.randn(WIDTH)
    for function in (
        add(direction, 0.0), scale_by(1.0), zero(steps=[]), zero(blocks=[0]), zero(rows=[]), zero(tokens=[]),
        project_out(direction, steps=[5]),
    ):  # fmt: skip
        assert torch.equal(run(pipe, conditioning, {OUT: function})[1], plain)
    assert not torch.equal(run(pipe, conditioning, {OUT: add(direction, 0.5)})[1], plain)


def test_directions_are_added_and_removed(pipe, conditioning):
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    unit = direction / direction.norm()
    pairs, _ = before(pipe, conditioning, OUT, add(direction, -1.5, tokens="target"))
    for _, x, y in pairs:
        assert torch.equal(y[:, :12], x[:, :12] - 1.5 * direction) and torch.equal(y[:, 12:], x[:, 12:])
    pairs, _ = before(pipe, conditioning, OUT, project_out(3 * direction))
    for _, x, y in pairs:
        assert (y @ unit).abs().max() <= 1e-5 * x.norm(dim=-1).max()
        rest = x - (x @ unit)[..., None] * unit
        assert (y - rest).abs().max() <= 1e-5 * x.abs().max()


def test_skipped_blocks_pass_both_streams_on(pipe, conditioning):
    names = [f"blocks.{block}.{stream}_out" for block in (1, 2, 3) for stream in ("img", "txt")]
    recorder = Recorder()
    with (
        torch.no_grad(),
        taps(pipe.mmdit, skip([2, 3], steps=[1])),
        taps(pipe.mmdit, dict.fromkeys(names, recorder)),
    ):
        list(pipe.steps(conditioning, num_inference_steps=2, generator=torch.Generator().manual_seed(0)))
    for stream in ("img", "txt"):
        for branch in ("cond", "uncond"):
            first, *others = (
                [recorder[f"blocks.{block}.{stream}_out", step, branch] for step in range(2)]
                for block in (1, 2, 3)
            )
            assert all(torch.equal(one[1], first[1]) and not torch.equal(one[0], first[0]) for one in others)


def test_a_patch_acts_in_its_place(pipe, conditioning):
    source, other = Recorder(), pipe.condition([[picture(64, 64), picture(64, 128)]] * 2, ["x"] * 2)
    with torch.no_grad(), taps(pipe.mmdit, {OUT: source}):
        list(pipe.steps(other, num_inference_steps=2, true_cfg_scale=2.0))
    function = patch_from(source, steps=[1], branch="cond", rows=[0], tokens="reference 1")
    pairs, _ = before(pipe, conditioning, OUT, function)
    for key, x, y in pairs:
        wanted = x.clone()
        if (key.step, key.branch) == (1, "cond"):
            wanted[0, 12:28] = source[OUT, 1, "cond"][0, 12:28]
            assert not torch.equal(wanted, x)
        assert torch.equal(y, wanted)
    with taps(pipe.mmdit, {ALL: patch_from(source, blocks=[2])}, strict=False):
        pass  # the others need no record
    with pytest.raises(KeyError, match="was not recorded"), taps(pipe.mmdit, {ALL: patch_from(source)}):
        pytest.fail("it ran")
    small = pipe.condition([[picture(64, 64)]] * 2, ["x"] * 2)
    with pytest.raises(ValueError, match=rf"tap {OUT}: the record is torch.float32 \(2, 40, 128\), wanted"):
        run(pipe, small, {OUT: patch_from(source, tokens="target")})


def test_rows_are_shared_in_their_place(pipe, conditioning):
    pairs, _ = before(pipe, conditioning, OUT, share_from(1, steps=[0], tokens="target"))
    for key, x, y in pairs:
        wanted = x.clone()
        if key.step == 0:
            wanted[0, :12] = x[1, :12]
        assert torch.equal(y, wanted)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: zero(tokens="picture"), "tokens is 'picture', wanted 'text', 'target'"),
        (lambda: zero(tokens="reference 0"), "tokens is 'reference 0'"),
        (lambda: zero(tokens=[-1]), "one of tokens is -1"),
        (lambda: zero(blocks=3), "blocks are 3"),
        (lambda: zero(rows="0"), "rows are '0'"),
        (lambda: zero(branch="both"), "branch is 'both'"),
        (lambda: scale_by(float("nan")), "factor is nan"),
        (lambda: add([1.0]), "direction is .*list.*, wanted a tensor of finite floats"),
        (lambda: add(torch.tensor([float("inf")])), "wanted a tensor of finite floats"),
        (lambda: project_out(torch.zeros(4)), r"direction has shape \(4,\), wanted a vector other than 0"),
        (lambda: project_out(torch.ones(2, 2)), r"direction has shape \(2, 2\), wanted a vector"),
        (lambda: skip([]), "blocks is empty"),
    ],
)
def test_wrong_arguments_fail_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_directions_that_do_not_fit(pipe, conditioning):
    for function in (add(torch.ones(64)), project_out(torch.ones(64)), add(torch.ones(1))):
        with pytest.raises(ValueError, match=r"direction has shape .*, but the tensor has \(2, 40, 128\)"):
            run(pipe, conditioning, {OUT: function})
