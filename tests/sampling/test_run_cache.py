"""The transformer's run cache and skipped outputs: the same numbers, and observers still see every step."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

import qwenedit
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.instruments.trace import trace_ops
from qwenedit.networks.low_rank import Delta, LowRank, LowRankLinear
from qwenedit.networks.mmdit import Block, JointAttention, MMDiT, MMDiTConfig, RunCache
from qwenedit.networks.mmdit_layers import Modulation, joint_key_mask
from qwenedit.sampling.predictor import predictor
from qwenedit.sampling.sampler import checked, euler
from qwenedit.taps import NonFiniteError, observed, swapped, taps
from tests.support import FP32, FP64_CAST, assert_as_close_as, assert_close, randomise_

CONFIG = MMDiTConfig(
    patch_size=2, in_channels=8, out_channels=2, num_layers=3, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 8, 12),
)  # fmt: skip
ONE, TWO = ((1, 2, 2),), ((1, 3, 2), (1, 1, 4))
# With `target_only`, the last block's matrices have fewer rows, and kernels may round differently.
# (RoPE and the QK norm round to float32 also in a float64 network.)
CLOSE = {torch.float32: FP32, torch.float64: FP64_CAST}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def network(dtype=torch.float32, **changes):
    return randomise_(MMDiT(dataclasses.replace(CONFIG, **changes))).requires_grad_(False).to(dtype)


def conditioning(rows=(ONE,), dtype=torch.float32, grid=(1, 2, 3), padded=False, length=7):
    """One row per entry of `rows`, the grids of its references. `padded` pads every text but the first."""
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
def cached(monkeypatch):
    """Whether each forward of the transformer had a cache, in order."""
    ran = []
    forward = MMDiT.forward

    def counted(self, *args, cache=None, target_only=False, control=None):
        assert target_only == (cache is not None)
        ran.append(cache is not None)
        return forward(self, *args, cache=cache, target_only=target_only, control=control)

    counted.__module__ = MMDiT.__module__  # so that it does not count as foreign
    monkeypatch.setattr(MMDiT, "forward", counted)
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
def test_a_cached_run_predicts_the_same(case, zero_cond_t, dtype, cached):
    model, whole = network(dtype, zero_cond_t=zero_cond_t), conditioning(dtype=dtype, **CASES[case])
    x = latents(whole.batch, dtype, whole.target_grid[1] * whole.target_grid[2])
    wanted = plain(model, whole, x)
    exact = plain(network(torch.float64, zero_cond_t=zero_cond_t), whole.to(dtype=torch.float64), x.double())
    assert not any(cached)
    cached.clear()
    predict = predictor(model, whole, guided=True)
    for _ in range(2):  # first computed, then from the cache
        for ours, reference, truth in zip(predict(x, 0.5), wanted, exact, strict=True):
            if dtype == torch.float64:
                assert_close(ours, reference, FP64_CAST)
            else:
                assert_as_close_as(ours, reference, truth)
    assert cached == [True] * (2 * 2 * len({*whole.reference_grids}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.no_grad()
def test_a_cache_alone_changes_no_bit(zero_cond_t, dtype):
    model, whole = network(dtype, zero_cond_t=zero_cond_t), conditioning((ONE, ONE), dtype, padded=True)
    (group,) = whole.groups()
    img = torch.cat([latents(2, dtype), group.references], dim=1)
    args = group.prompt.embeds, torch.tensor([0.3, 0.3], dtype=dtype), group.grids, group.prompt.mask
    wanted, cache = model(img, *args), RunCache()
    for _ in range(2):
        assert torch.equal(model(img, *args, cache=cache), wanted)
    only = model(img, *args, target_only=True)
    assert only.shape[1] == 6
    assert_close(only, wanted[:, :6], CLOSE.get(dtype, 2e-2))


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
    assert all((x[..., 0] == 65504).all() for x in block(*inputs[0]))
    only, _ = block(*inputs[0][:-1], 6)
    assert only.shape[1] == 6 and (only[..., 0] == 65504).all()


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
    "gradients": lambda m: torch.enable_grad(),
    "autocast": lambda m: torch.autocast("cpu", torch.bfloat16),
    "trace": trace_ops,
}


@pytest.mark.parametrize("view", VIEWS)
@torch.no_grad()
def test_who_looks_inside_sees_every_forward(view, cached):
    model, whole = network(), conditioning()
    predict = predictor(model, whole, guided=True)
    before = predict(latents(), 0.5)
    with VIEWS[view](model):
        assert observed(model)
        predict(latents(), 0.5)
    again = predict(latents(), 0.5)
    assert cached == [True, True, False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


@torch.no_grad()
def test_what_is_put_in_runs(monkeypatch):
    model, whole = network(), conditioning()
    before = predictor(model, whole, guided=True)(latents(), 0.5)
    monkeypatch.setattr(Block, "forward", halved)
    after = predictor(model, whole, guided=True)(latents(), 0.5)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_a_model_that_is_compiled_as_a_whole_has_no_cache():
    model = network()
    assert not observed(model)
    model.blocks[1].compile(backend="eager")  # compiled blocks keep the cache
    assert not observed(model)
    assert observed(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    assert observed(model)


@torch.no_grad()
def test_a_default_device_is_no_view():
    with torch.device("cpu"):
        assert not observed(network())


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
def test_nothing_stale_is_used(change, cached):
    model, whole = network(), conditioning()
    predict = predictor(model, whole, guided=True)
    before = predict(latents(), 0.5)
    CHANGES[change](model)
    after = predict(latents(), 0.5)
    assert cached == [True] * 4
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
def test_step_invariant_tensors_are_made_once_and_again_when_an_input_changes():
    model, whole = network(), conditioning((ONE, ONE), padded=True)
    (group,) = whole.groups()
    cache, prompt = RunCache(), group.prompt

    def made(embeds=prompt.embeds):
        return cache.step_invariant(model, group.references, embeds, group.grids, prompt.mask)

    first = made()
    assert made() is first and torch.equal(first.txt, model.txt_in(model.txt_norm(prompt.embeds)))
    prompt.embeds.add_(1)
    second = made()
    assert second is not first and not torch.equal(second.txt, first.txt) and made() is second
    assert torch.equal(second.key_mask, joint_key_mask(prompt.mask, 10))
    prompt.mask[0, -1] = False
    assert torch.equal(made().key_mask, joint_key_mask(prompt.mask, 10))
    with torch.inference_mode():  # its tensors do not count writes
        embeds = prompt.embeds.clone()
    assert made(embeds) is not made(embeds)


@torch.no_grad()
def test_both_branches_share_a_steps_modulation(monkeypatch):
    made, forward = [], Modulation.forward

    def counted(self, temb):
        made.append(len(temb))
        return forward(self, temb)

    counted.__module__ = Modulation.__module__
    monkeypatch.setattr(Modulation, "forward", counted)
    predict = predictor(network(), conditioning((ONE, TWO, TWO)), guided=True)
    for count, _ in enumerate(euler(predict, latents(3), [1.0, 0.4, 0.0]), 1):
        assert len(made) == count * 2 * 3 * 2 and sum(made) == count * 2 * 3 * 3  # streams, blocks, groups


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@torch.no_grad()
def test_nan_names_component_branch_and_step(branch, cached):
    whole = conditioning()
    broken = whole.prompt if branch == "cond" else whole.negative
    broken.embeds.fill_(float("nan"))
    steps = checked(euler(predictor(network(), whole, guided=True), latents(), [1.0, 0.7, 0.0]))
    with pytest.raises(
        NonFiniteError, match=rf"transformer: the {branch} velocity at step 0, sigma 1\.0000 has NaN or inf"
    ):
        next(steps)
    assert cached == [True, True]


@torch.no_grad()
def test_infinity_from_a_later_step_on_is_named():
    model = network()
    steps = checked(euler(predictor(model, conditioning(), guided=True), latents(), [1.0, 0.7, 0.0]))
    next(steps)
    model.proj_out.bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"transformer: the cond velocity at step 1, sigma 0\.7000"):
        next(steps)


def test_grids_and_tokens_that_disagree_are_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="hold 10 tokens, but img has 9"):
        predictor(network(), conditioning(), guided=True)(latents(tokens=5), 0.5)


@torch.no_grad()
@pytest.mark.parametrize("part", ["mmdit", "vae", "vision_language"])
def test_nothing_of_a_network_is_foreign(part):
    assert not observed(getattr(qwenedit.load(progress=False), part))
