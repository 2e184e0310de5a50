"""The ControlNet's caches and taps, and the place in the transformer where controls come in."""

import dataclasses
import math

import pytest
import torch

from qwenedit import zero
from qwenedit.latents import Layout
from qwenedit.networks.controlnet import ControlNet, ControlNetConfig, spread
from qwenedit.networks.mmdit import RunCache
from qwenedit.networks.mmdit_layers import picture_positions, rope_table
from qwenedit.sampling.transformer_switches import switched_transformer
from qwenedit.switches import Switches, TransformerRule
from qwenedit.taps import observed, scope, tap_names, taps
from tests.properties import test_mmdit as mmdit
from tests.support import FP32, assert_close, randomise_, shapes_checked

CONFIG = ControlNetConfig(
    patch_size=2, in_channels=12, out_channels=3, num_layers=2, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=10, axes_dims_rope=(4, 8, 12), extra_condition_channels=4,
)  # fmt: skip
GRID = (1, 3, 5)
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def network(seed=0, **changes):
    return randomise_(ControlNet(dataclasses.replace(CONFIG, **changes)), seed).requires_grad_(False)


def inputs(grid=GRID, batch=2, length=5, seed=0):
    img, txt, timestep, _ = mmdit.inputs([grid], batch, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    cond = torch.randn(batch, img.shape[1], CONFIG.condition_channels, generator=generator)
    return img, cond, txt, timestep, grid


def residuals(count=2, tokens=15, batch=2, width=48):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, tokens, width, generator=generator) for _ in range(count)]


# --- the network


def test_shape_comments_hold_and_every_tap_fires():
    ours = network()
    with shapes_checked(), taps(ours, {"*": lambda x, site: None}):
        ours(*inputs(), MASK)


def test_identity_taps_change_no_bit():
    ours, case = network(), inputs()
    plain = ours(*case, MASK)
    names = [name for name in tap_names(ours) if not name.endswith(("scores", "probs"))]
    with taps(ours, {name: lambda x, site: x.clone() for name in names}):
        tapped = ours(*case, MASK)
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


def test_a_residual_is_what_its_tap_says():
    ours, case = network(), inputs()
    plain = ours(*case)
    with taps(ours, {"blocks.1.residual": lambda x, site: 2 * x}):
        got = ours(*case)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], 2 * plain[1])


def test_every_module_fires():
    ours, fired = network(), set()
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    ours(*inputs())
    assert {name for name, _ in ours.named_modules()} - fired == {"blocks", "residuals"}


@torch.no_grad()
def test_nothing_of_it_is_foreign():
    assert not observed(network())


@torch.no_grad()
def test_a_cache_changes_no_bit_and_keeps_nothing_stale(monkeypatch):
    ours, (img, cond, txt, timestep, grid), cache, made = network(), inputs(), RunCache(), []
    step_invariant = ControlNet.step_invariant
    monkeypatch.setattr(ControlNet, "step_invariant", lambda *args: made.append(1) or step_invariant(*args))
    other = cond.flip(1)

    def check(count):
        made.clear()
        for picture in (cond, other):
            got = ours(img, picture, txt, timestep, grid, MASK, cache=cache)
            assert len(made) == count
            made.clear()
            wanted = ours(img, picture, txt, timestep, grid, MASK)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            made.clear()

    check(1)
    check(0)
    ours.cond_in.weight.mul_(2)
    check(1)
    txt.add_(1)
    check(1)
    check(0)


@torch.no_grad()
def test_a_transformer_and_two_nets_share_a_cache():
    one, two, transformer, cache = network(), network(1), mmdit.network(), RunCache()
    img, cond, txt, timestep, grid = inputs()
    for _ in range(2):
        for net in (one, two):
            got = net(img, cond, txt, timestep, grid, cache=cache)
            wanted = net(img, cond, txt, timestep, grid)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        got = transformer(img, txt, timestep, [grid], cache=cache)
        assert torch.equal(got, transformer(img, txt, timestep, [grid]))


def test_a_row_does_not_depend_on_its_batch():
    ours = network()
    img, cond, txt, timestep, grid = inputs(batch=3)
    whole = ours(img, cond, txt, timestep, grid)
    for row in range(3):
        one = slice(row, row + 1)
        alone = ours(img[one], cond[one], txt[one], timestep[one], grid)
        for a, b in zip(whole, alone, strict=True):
            assert_close(a[one], b, FP32)


def test_bad_configs_and_grids_are_named():
    with pytest.raises(ValueError, match=r"axes_dims_rope is \(4, 8, 8\).*sum to attention_head_dim 24"):
        dataclasses.replace(CONFIG, axes_dims_rope=(4, 8, 8))
    with pytest.raises(ValueError, match="extra_condition_channels is -1, wanted 0 to"):
        dataclasses.replace(CONFIG, extra_condition_channels=-1)
    img, cond, txt, timestep, _ = inputs()
    with pytest.raises(ValueError, match="holds 9 tokens, but img has 15 and cond 15"):
        network()(img, cond, txt, timestep, (1, 3, 3))
    with pytest.raises(ValueError, match="holds 15 tokens, but img has 15 and cond 14"):
        network()(img, cond[:, 1:], txt, timestep, GRID)


# --- the place in the transformer


def test_control_is_called_after_every_block_with_the_targets_tokens_alone():
    ours, case, seen, out = mmdit.network(), mmdit.inputs(), [], {}
    with taps(ours, {"blocks.*.img_out": lambda x, site: out.update({site.full: x})}):
        ours(*case, control=lambda number, img: seen.append((number, img)))
    assert [number for number, _ in seen] == [0, 1]
    for number, img in seen:
        assert torch.equal(img, out[f"blocks.{number}.img_out"][:, :15])


@pytest.mark.parametrize("target_only", [False, True])
def test_a_control_that_returns_nothing_changes_no_bit(target_only):
    ours, case = mmdit.network(), mmdit.inputs()
    plain = ours(*case, target_only=target_only)
    assert torch.equal(ours(*case, control=lambda number, img: None, target_only=target_only), plain)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_reference_tokens_are_left_alone(zero_cond_t):
    """They enter the next block as they left the last one; what attends to the target may see it changed."""
    ours, case, got, out = mmdit.network(zero_cond_t=zero_cond_t), mmdit.inputs(), {}, {}
    added = residuals()
    ours.blocks[1].register_forward_pre_hook(lambda _block, args: got.update(img=args[0]))
    with taps(ours, {"blocks.0.img_out": lambda x, site: out.update(img=x)}):
        ours(*case, control=spread(added, 2))
    assert torch.equal(got["img"][:, 15:], out["img"][:, 15:])
    assert torch.equal(got["img"][:, :15], out["img"][:, :15] + added[0])


@pytest.mark.parametrize("grids", [mmdit.GRIDS, mmdit.GRIDS[:1]])
@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.no_grad()
def test_control_with_a_cache_and_the_target_only(zero_cond_t, grids):
    ours, case, control = mmdit.network(zero_cond_t=zero_cond_t), mmdit.inputs(grids), spread(residuals(), 2)
    plain = ours(*case, control=control)
    assert torch.equal(ours(*case, control=control, cache=RunCache()), plain)
    only = ours(*case, control=control, cache=RunCache(), target_only=True)
    assert_close(only, plain[:, :15], FP32)
    assert (only - ours(*case)[:, :15]).abs().max() > 1e-2


def test_what_is_added_is_a_tap():
    ours, case, control = mmdit.network(), mmdit.inputs(), spread(residuals(), 2)
    plain, seen = ours(*case), {}
    with taps(ours, {"*.control_add": lambda x, site: seen.update({site.full: x})}):
        controlled = ours(*case, control=control)
    assert list(seen) == ["blocks.0.control_add", "blocks.1.control_add"]
    assert all(torch.equal(x, control(number, None)) for number, x in enumerate(seen.values()))
    with taps(ours, {"*.control_add": zero}):
        assert torch.equal(ours(*case, control=control), plain)
    with taps(ours, {"blocks.1.control_add": zero}):
        assert not torch.equal(ours(*case, control=control), controlled)
    with shapes_checked(), taps(ours, {"*": lambda x, site: None}):
        ours(*case, control=control)


def test_its_taps_are_missed_only_where_no_other_fires():
    ours, case = mmdit.network(), mmdit.inputs()
    with taps(ours, {name: lambda x, site: None for name in tap_names(ours)}):
        ours(*case)
    with (
        pytest.raises(RuntimeError, match=r"2 of 2 attached taps never fired: blocks\.0\.control_add, b"),
        taps(ours, {"blocks.*.control_add": zero}),
    ):
        ours(*case)


def test_gradients_reach_the_control_through_checkpoints():
    ours, case = mmdit.network(), mmdit.inputs()
    gradients = []
    for checkpointing in (False, True):
        ours.checkpointing = checkpointing
        added = [x.requires_grad_() for x in residuals()]
        loss = ours(*case, control=spread(added, 2)).square().sum()
        gradients.append(torch.autograd.grad(loss, added))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(x.abs().max() > 0 for x in gradients[0])


def test_a_net_is_trained_through_the_transformer():
    """As it begins: the projections are zero, so that nothing is added, and they alone have a gradient."""
    transformer, net = mmdit.network(), network(extra_condition_channels=0).requires_grad_(True)
    for layer in (*net.residuals, net.cond_in):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    img, cond, txt, timestep, grid = inputs()
    control = spread(net(img, cond[..., :12], txt, timestep, grid), 2)
    velocity = transformer(img, txt, timestep, [grid], control=control)
    assert torch.equal(velocity, transformer(img, txt, timestep, [grid]))
    velocity.square().sum().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in net.residuals)
    assert net.cond_in.weight.grad.abs().max() == 0


@torch.no_grad()
def test_control_needs_no_more_compiled_graphs():
    def graphs_of(control):
        torch.compiler.reset()
        ours, graphs = mmdit.network(), []

        def backend(graph, _inputs):
            graphs.append(graph)
            return graph

        def run(grids):
            return ours(*mmdit.inputs(grids), control=control, cache=RunCache(), target_only=True)

        wanted = [run(grids) for grids in (mmdit.GRIDS, mmdit.GRIDS[:1])]
        for block in ours.blocks:
            block.compile(fullgraph=True, dynamic=True, backend=backend)
        for grids, other in zip((mmdit.GRIDS, mmdit.GRIDS[:1]), wanted, strict=True):
            assert_close(run(grids), other, FP32)
        torch.compiler.reset()
        return len(graphs)

    assert graphs_of(spread(residuals(), 2)) == graphs_of(None) > 0


@pytest.mark.parametrize("count, blocks", [(1, 1), (1, 60), (5, 60), (7, 60), (2, 3), (3, 2)])
def test_residuals_are_spread_over_the_blocks(count, blocks):
    control = spread(range(count), blocks)
    got = [control(number, None) for number in range(blocks)]
    in_a_row = math.ceil(blocks / count)
    assert got == [number // in_a_row for number in range(blocks)] and max(got) < count


def test_the_transformer_s_switches_act_on_a_controlnet():
    """Its positions are those of the target among the transformer's, whatever references are beside it."""
    ours, (img, cond, txt, timestep, grid) = network(), inputs()
    plain, tables, labels = ours(img, cond, txt, timestep, grid), {}, {"sigma": 0.8726, "rows": (0, 1)}
    for name, value in {"gelu": "sigmoid", "odd_grids": "positive", "text_start": "target"}.items():
        switches = Switches(transformer=TransformerRule(**{name: value}))
        seen = {"rope.img": lambda table, site, name=name: tables.update({name: table})}
        with (
            scope(layout=Layout(5, (grid, (1, 7, 4))), **labels),
            taps(ours, seen),
            switched_transformer(ours, switches, strict=False),
        ):
            changed = ours(img, cond, txt, timestep, grid)
        same = all(torch.equal(a, b) for a, b in zip(changed, plain, strict=True))
        assert same == (name == "text_start")  # the text starts at the target's half there anyway
    assert torch.equal(tables["gelu"], ours.rope([grid], 5, img.device)[0])
    moved = picture_positions(0, grid, img.device) + torch.tensor([0, 1, 1])
    assert torch.equal(tables["odd_grids"], rope_table(moved, CONFIG.axes_dims_rope))
    assert all(torch.equal(a, b) for a, b in zip(ours(img, cond, txt, timestep, grid), plain, strict=True))
