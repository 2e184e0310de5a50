"""The sampler's short form of the transformer against `MMDiT.forward`: the same numbers, and no view lost."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from qwenedit.checks import NonFiniteError
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.instruments.trace import trace_ops
from qwenedit.networks import mmdit
from qwenedit.networks.low_rank import Delta, LowRank, LowRankLinear
from qwenedit.networks.mmdit import Block, JointAttention, MMDiT, MMDiTConfig
from qwenedit.sampling import fast
from qwenedit.sampling.fast import FastRun, FastStep, modulation
from qwenedit.sampling.sampler import euler, predictor
from qwenedit.taps import swapped, taps
from tests.support import assert_close, randomise_

CONFIG = MMDiTConfig(
    patch_size=2, in_channels=8, out_channels=2, num_layers=3, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 8, 12),
)  # fmt: skip
ONE, TWO = ((1, 2, 2),), ((1, 3, 2), (1, 1, 4))
# Where matrices have other numbers of rows in the two forms, their kernels may round differently: seen were
# 8e-7 (a target of one token) and 1.3e-15; in bfloat16 nothing.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}
DTYPES = list(CLOSE)


def network(dtype=torch.float32, **changes):
    return randomise_(MMDiT(dataclasses.replace(CONFIG, **changes))).requires_grad_(False).to(dtype)


def conditioning(rows=(ONE,), dtype=torch.float32, grid=(1, 2, 3), padded=False, length=7):
    """A row for each of `rows`, its references' grids; where `padded`, every row's text but the first's."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    def prompt(length):
        mask = torch.ones(len(rows), length, dtype=torch.bool)
        mask[1:, -2:] = False
        return Prompt(draw(len(rows), length, 10), mask if padded else None)

    return Conditioning(
        prompt=prompt(length),
        negative=prompt(4),
        target_grid=grid,
        reference_latents=tuple(tuple(draw(g[1] * g[2], 8) for g in row) for row in rows),
        reference_grids=rows,
    )


def latents(rows=1, dtype=torch.float32, tokens=6):
    return torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def forms(monkeypatch):
    """The forms that ran, in order."""
    ran = []
    velocity = FastStep.velocity

    def counted(*args):
        ran.append("fast")
        return velocity(*args)

    monkeypatch.setattr(FastStep, "velocity", counted)
    return ran


@torch.no_grad()
def plain(model, whole, x, sigma=0.5):
    with taps(model, {"velocity": lambda x, site: None}):
        return predictor(model, whole, guided=True)(x, sigma)


CASES = {
    "one": {},
    "none": {"rows": ((),)},
    "two": {"rows": (TWO,)},
    "a token": {"grid": (1, 1, 1)},
    "batch": {"rows": (ONE, ONE)},
    "masked": {"rows": (ONE, ONE, ONE), "padded": True},
    "ragged": {"rows": (ONE, TWO, ()), "padded": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_both_forms_predict_the_same(case, zero_cond_t, dtype, forms):
    model, whole = network(dtype, zero_cond_t=zero_cond_t), conditioning(dtype=dtype, **CASES[case])
    x = latents(whole.batch, dtype, whole.target_grid[1] * whole.target_grid[2])
    wanted = plain(model, whole, x)
    assert not forms
    predict = predictor(model, whole, guided=True)
    for _ in range(2):  # made, and kept
        for ours, reference in zip(predict(x, 0.5), wanted, strict=True):
            assert_close(ours, reference, CLOSE[dtype])
    assert len(forms) == 2 * 2 * len({*whole.reference_grids})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.no_grad()
def test_what_has_the_same_shapes_is_equal_bit_by_bit(zero_cond_t, dtype):
    """Modulation, text, rotary tables and whole blocks; the last block and the references are close."""
    model, whole = network(dtype, zero_cond_t=zero_cond_t), conditioning((ONE, ONE), dtype, padded=True)
    (group,) = whole.groups()
    seen, inputs = {}, []
    img = torch.cat([latents(2, dtype), group.references], dim=1)
    timestep = torch.tensor(0.3, dtype=dtype)
    handles = [
        block.register_forward_pre_hook(lambda _block, args: inputs.append(args)) for block in model.blocks
    ]
    with taps(model, {"*": lambda x, site: seen.update({site.full: x})}):
        model(img, group.prompt.embeds, timestep.expand(2), group.grids, group.prompt.mask)
    for handle in handles:
        handle.remove()

    run = FastRun(model)
    kept = run.kept(group.references, group.prompt, 10)
    assert torch.equal(kept.txt, seen["txt_in"])
    assert_close(kept.references[0], seen["img_in"][:, 6:], CLOSE[dtype])
    turn = run.turn(group.grids, 7, img.device)
    cos, sin = torch.cat([seen["rope.txt"], seen["rope.img"]]).unbind(-1)
    assert torch.equal(turn.cos[:, 0, ::2], cos) and torch.equal(turn.cos[:, 0, 1::2], cos)
    assert torch.equal(turn.sin[:, 0, ::2], -sin) and torch.equal(turn.sin[:, 0, 1::2], sin)
    mods = modulation(model, timestep.expand(2), img)
    for number, of_block in enumerate(mods.blocks):
        img_mod, txt_mod = seen[f"blocks.{number}.img_mod"], seen[f"blocks.{number}.txt_mod"]
        parts = [(of_block.target, img_mod[:2]), (of_block.txt, txt_mod)]
        assert (of_block.reference is not None) == zero_cond_t
        if zero_cond_t:
            parts.append((of_block.reference, img_mod[2:]))
        for ours, reference in parts:
            shift1, scale1, gate1, shift2, scale2, gate2 = reference[:, None].chunk(6, dim=-1)
            wanted = shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2
            assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    for block, of_block, args in zip(model.blocks, mods.blocks, inputs, strict=True):
        img, txt, _temb, _rope, key_mask, _split = args
        img_out, txt_out = block(*args)
        ours = fast._block(block, img, txt, of_block, turn, key_mask, 6)
        assert torch.equal(ours[0], img_out) and torch.equal(ours[1], txt_out)
        last = fast._last_block(block, img, txt, of_block, turn, key_mask, 6)
        assert_close(last, img_out[:, :6], CLOSE[dtype])


@torch.no_grad()
def test_the_residual_stream_is_clipped_in_float16():
    model, whole, inputs = network(torch.float16), conditioning(dtype=torch.float16), []
    block, (group,) = model.blocks[0], whole.groups()
    for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
        mlp.down.bias[0], mod.linear.bias[5 * 48] = 60000.0, 20.0
    img = torch.cat([latents(dtype=torch.float16), group.references], dim=1)
    timestep = torch.tensor([0.3], dtype=torch.float16)
    block.register_forward_pre_hook(lambda _block, args: inputs.append(args))
    model(img, group.prompt.embeds, timestep, group.grids)
    img, txt, *_ = inputs[0]
    wanted = block(*inputs[0])
    assert all((x[..., 0] == 65504).all() for x in wanted)
    turn, mods = FastRun(model).turn(group.grids, 7, img.device), modulation(model, timestep, img).blocks[0]
    ours = fast._block(block, img, txt, mods, turn, None, 6)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert (fast._last_block(block, img, txt, mods, turn, None, 6)[..., 0] == 65504).all()


class Mine(nn.Linear):
    pass


def halved(self, *args):
    return tuple(0.5 * x for x in BLOCK(self, *args))


BLOCK, ATTENTION = Block.forward, JointAttention.forward


@contextlib.contextmanager
def with_hook(module, register):
    handle = register(module)(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def set_to(owner, name, value):
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


VIEWS = {
    "tap": lambda m: taps(m, {"blocks.1.img_mid": lambda x, site: None}),
    "forward hook": lambda m: with_hook(m.blocks[2].txt_mlp, lambda x: x.register_forward_hook),
    "pre-hook": lambda m: with_hook(m, lambda x: x.register_forward_pre_hook),
    "global hook": lambda m: with_hook(m, lambda _: nn.modules.module.register_module_forward_hook),
    "swapped layer": lambda m: swapped(m, "blocks.2.txt_mlp.up", lambda old: randomise_(Mine(48, 192))),
    "own forward": lambda m: set_to(m.blocks[1], "forward", lambda *args: BLOCK(m.blocks[1], *args)),
    "forward of the class": lambda m: set_to(JointAttention, "forward", lambda *a: ATTENTION(*a)),
    "checkpointing": lambda m: set_to(m, "checkpointing", True),
    "gradients": lambda m: torch.enable_grad(),
    "autocast": lambda m: torch.autocast("cpu", torch.bfloat16),
    "trace": trace_ops,
}


@pytest.mark.parametrize("view", VIEWS)
@torch.no_grad()
def test_who_looks_inside_sees_the_plain_form(view, forms):
    model, whole = network(), conditioning()
    predict = predictor(model, whole, guided=True)
    before = predict(latents(), 0.5)
    assert forms == ["fast", "fast"]
    with VIEWS[view](model):
        assert not fast.possible(model)
        predict(latents(), 0.5)
    assert forms == ["fast", "fast"]
    again = predict(latents(), 0.5)
    assert len(forms) == 4 and all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


@torch.no_grad()
def test_what_is_put_in_runs(monkeypatch):
    model, whole = network(), conditioning()
    before = predictor(model, whole, guided=True)(latents(), 0.5)
    monkeypatch.setattr(Block, "forward", halved)
    after = predictor(model, whole, guided=True)(latents(), 0.5)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not fast.possible(torch.compile(model, backend="eager"))


@torch.no_grad()
def test_what_others_have_compiled_is_what_runs():
    model = network()
    assert fast.possible(model)
    model.blocks[1].compile(backend="eager")  # by others than compile_blocks, and with their options
    assert not fast.possible(model)
    model = network()
    model.compile(backend="eager")
    assert not fast.possible(model)


@torch.no_grad()
def test_a_default_device_is_no_view():
    with torch.device("cpu"):
        assert fast.possible(network())


def lora(model, name, seed=0):
    layer = model.get_submodule(name)
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(2, layer.in_features, generator=generator)
    up = torch.randn(layer.out_features, 2, generator=generator)
    changed = LowRankLinear(layer)
    changed.held.append(LowRank("one", Delta(down, up, 0.5), layer.weight, 0.7))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, changed)
    return changed


def rescale(model):
    model.txt_in.held[0].scale = -0.3


def replace(model):
    model.txt_in.weight = nn.Parameter(2 * model.txt_in.weight, requires_grad=False)


def write_data(model):
    model.img_in.weight.data = 2 * model.img_in.weight


CHANGES = {
    "img_in in place": lambda m: m.img_in.weight.mul_(2),
    "txt_in's bias in place": lambda m: m.txt_in.bias.mul_(torch.arange(48) % 3),
    "txt_norm in place": lambda m: m.txt_norm.weight.mul_(2),
    "another parameter": replace,
    "other data": write_data,
    "a block": lambda m: m.blocks[0].img_mod.linear.weight.mul_(2),
    "the last norm": lambda m: m.norm_out.linear.weight.mul_(2),
    "a LoRA": lambda m: lora(m, "img_in"),
    "a LoRA's scale": lambda m: (lora(m, "txt_in"), rescale(m)),
    "zero_cond_t": lambda m: setattr(m, "config", dataclasses.replace(m.config, zero_cond_t=True)),
    "inference mode": lambda m: torch.inference_mode()(lambda: m.txt_in.weight.mul_(2))(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_nothing_stale_is_used(change, forms):
    model, whole = network(), conditioning()
    predict = predictor(model, whole, guided=True)
    before = predict(latents(), 0.5)
    CHANGES[change](model)
    after = predict(latents(), 0.5)
    assert len(forms) == 4
    for ours, reference, old in zip(after, plain(model, whole, latents()), before, strict=True):
        assert_close(ours, reference, CLOSE[torch.float32])
        assert (ours - old).abs().max() > 1e-3


@torch.no_grad()
def test_a_loras_scale_counts_from_the_next_step_on():
    model, whole = network(), conditioning()
    lora(model, "txt_in")
    predict = predictor(model, whole, guided=True)
    predict(latents(), 0.5)
    rescale(model)
    for ours, reference in zip(predict(latents(), 0.5), plain(model, whole, latents()), strict=True):
        assert_close(ours, reference, CLOSE[torch.float32])


@torch.no_grad()
def test_what_is_kept_is_made_once_and_again_when_an_input_changes():
    model, whole = network(), conditioning((ONE, ONE), padded=True)
    (group,) = whole.groups()
    run = FastRun(model)
    first = run.kept(group.references, group.prompt, 10)
    assert run.kept(group.references, group.prompt, 10) is first
    group.prompt.embeds.add_(1)
    second = run.kept(group.references, group.prompt, 10)
    assert second is not first and not torch.equal(second.txt, first.txt)
    group.references.add_(1)
    third = run.kept(group.references, group.prompt, 10)
    assert third is not second and not torch.equal(third.references[0], second.references[0])
    assert run.kept(group.references, group.prompt, 10) is third
    assert torch.equal(third.key_mask, mmdit.joint_key_mask(group.prompt.mask, 10))
    group.prompt.mask[0, -1] = False
    fourth = run.kept(group.references, group.prompt, 10)
    assert torch.equal(fourth.key_mask, mmdit.joint_key_mask(group.prompt.mask, 10))
    assert run.kept(group.references, group.prompt, 11).key_mask.shape[-1] == 18
    assert run.turn(group.grids, 7, torch.device("cpu")) is run.turn(group.grids, 7, torch.device("cpu"))
    with torch.inference_mode():  # tensors of this mode do not say when they change
        prompt = Prompt(group.prompt.embeds.clone())
    assert run.kept(group.references, prompt, 10) is not run.kept(group.references, prompt, 10)


@torch.no_grad()
def test_both_branches_share_a_steps_modulation(monkeypatch):
    made = []
    monkeypatch.setattr(fast, "modulation", lambda *args: made.append(args[1]) or modulation(*args))
    predict = predictor(network(), conditioning((ONE, TWO, TWO)), guided=True)
    for _ in euler(predict, latents(3), [1.0, 0.4, 0.0]):
        pass
    assert [(float(t[0]), len(t)) for t in made] == [
        (1.0, 1), (1.0, 2), (pytest.approx(0.4), 1), (pytest.approx(0.4), 2),
    ]  # fmt: skip


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@torch.no_grad()
def test_nan_names_component_branch_and_step(branch, forms):
    whole = conditioning()
    broken = whole.prompt if branch == "cond" else whole.negative
    broken.embeds.fill_(float("nan"))
    steps = euler(predictor(network(), whole, guided=True), latents(), [1.0, 0.7, 0.0])
    with pytest.raises(
        NonFiniteError, match=rf"transformer: the {branch} velocity at step 0, sigma 1\.0000 has NaN or inf"
    ):
        next(steps)
    assert forms == ["fast", "fast"]


@torch.no_grad()
def test_infinity_from_a_later_step_on_is_named():
    model = network()
    steps = euler(predictor(model, conditioning(), guided=True), latents(), [1.0, 0.7, 0.0])
    next(steps)
    model.proj_out.bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"transformer: the cond velocity at step 1, sigma 0\.7000"):
        next(steps)


def test_grids_and_tokens_that_disagree_are_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="hold 10 tokens, but img has 9"):
        predictor(network(), conditioning(), guided=True)(latents(tokens=5), 0.5)


def test_it_knows_every_kind_of_module_of_the_transformer():
    assert {type(module) for module in network().modules()} < set(fast._KNOWN)
    assert mmdit.MMDiT in fast._KNOWN
