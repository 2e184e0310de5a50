"""What must hold of the transformer whatever its weights."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.networks.mmdit import MMDiT, MMDiTConfig
from qwenedit.networks.mmdit_layers import Rope, joint_rope, rope_table, rotate
from qwenedit.taps import tap_names, taps
from tests.support import EPS, FP32, assert_close, randomise_, shapes_checked

CONFIG = MMDiTConfig(
    patch_size=2, in_channels=12, out_channels=3, num_layers=2, attention_head_dim=24, num_attention_heads=2,
    joint_attention_dim=10, guidance_embeds=False, axes_dims_rope=(4, 8, 12),
)  # fmt: skip
GRIDS = [(1, 3, 5), (1, 4, 2)]

cpu = torch.device("cpu")
grids = st.lists(st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


def network(seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return randomise_(MMDiT(config), seed).requires_grad_(False)


def inputs(grids=GRIDS, batch=2, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(rows * columns for _, rows, columns in grids)
    return (
        torch.randn(batch, tokens, CONFIG.in_channels, generator=generator),
        torch.randn(batch, length, CONFIG.joint_attention_dim, generator=generator),
        torch.rand(batch, generator=generator),
        grids,
    )


@given(offset=st.integers(-20, 20), a=st.integers(-30, 30), b=st.integers(-30, 30), axis=st.integers(0, 2))
def test_rope_depends_on_differences_only(offset, a, b, axis):
    axes = CONFIG.axes_dims_rope
    q, k = torch.randn(1, 1, 1, sum(axes)), torch.randn(1, 1, 1, sum(axes))

    def score(x, y):
        at_x, at_y = torch.full((1, 3), 3), torch.full((1, 3), 3)
        at_x[0, axis], at_y[0, axis] = x, y
        of_x, of_y = (
            joint_rope(rope_table(at, axes), torch.empty(0, sum(axes) // 2, 2)) for at in (at_x, at_y)
        )
        return (rotate(q, of_x) * rotate(k, of_y)).sum()

    # Angles are up to 50, and each is rounded to half a last digit: two in a pair's product, on both sides.
    rounding = 4 * 50 * EPS / 2 * q.norm() * k.norm()
    assert (score(a, b) - score(a + offset, b + offset)).abs() <= rounding


@given(grids=grids, length=st.integers(1, 9))
def test_text_starts_after_the_largest_half_size(grids, length):
    _, txt = Rope((2, 2, 2))(grids, length, cpu)
    start = max(max(rows // 2, columns // 2) for _, rows, columns in grids)
    angle = torch.arange(start, start + length, dtype=torch.float32)
    for axis in range(3):
        torch.testing.assert_close(txt[:, axis, 0], angle.cos())
        torch.testing.assert_close(txt[:, axis, 1], angle.sin())


def test_an_odd_grid_has_its_extra_row_on_the_negative_side():
    img, _ = Rope((2, 2, 2))([(1, 3, 1)], 1, cpu)
    torch.testing.assert_close(img[:, 1, 1], torch.tensor([-2.0, -1.0, 0.0]).sin())


def test_positions_are_not_limited_to_4096():
    _, txt = Rope((2, 2, 2))([(1, 2, 2)], 5000, cpu)
    torch.testing.assert_close(txt[4999, 0, 0], torch.tensor(5000.0).cos())


@given(padding=st.integers(1, 6), seed=st.integers(0, 99), zero_cond_t=st.booleans())
def test_padded_text_equals_the_text_alone(padding, seed, zero_cond_t):
    ours = network(seed, zero_cond_t=zero_cond_t)
    img, txt, t, _ = inputs(seed=seed)
    alone = ours(img, txt, t, GRIDS)
    padded = torch.cat([txt, torch.randn(2, padding, txt.shape[-1])], dim=1)
    mask = torch.arange(txt.shape[1] + padding).expand(2, -1) < txt.shape[1]
    assert_close(ours(img, padded, t, GRIDS, mask), alone, FP32)
    unmasked = ours(img, padded, t, GRIDS)
    assert (unmasked - alone).abs().max() > 1e-3 * alone.abs().max()  # the mask does something


def test_a_mask_of_ones_equals_no_mask():
    ours = network()
    img, txt, t, grids = inputs()
    ones = torch.ones(txt.shape[:2], dtype=torch.bool)
    assert_close(ours(img, txt, t, grids, ones), ours(img, txt, t, grids), FP32)


@given(seed=st.integers(0, 99), zero_cond_t=st.booleans())
def test_a_row_does_not_depend_on_its_batch(seed, zero_cond_t):
    ours = network(seed, zero_cond_t=zero_cond_t)
    img, txt, t, grids = inputs(batch=3, seed=seed)
    whole = ours(img, txt, t, grids)
    for row in range(3):
        one = slice(row, row + 1)
        assert_close(whole[one], ours(img[one], txt[one], t[one], grids), FP32)


def test_zero_cond_t_changes_the_prediction_and_needs_references():
    img, txt, t, grids = inputs()
    plain, zero = network(), network(zero_cond_t=True)
    assert (plain(img, txt, t, grids) - zero(img, txt, t, grids)).abs().max() > 1e-2
    target = grids[:1]
    n = target[0][1] * target[0][2]
    assert_close(zero(img[:, :n], txt, t, target), plain(img[:, :n], txt, t, target), FP32)


def test_zero_cond_t_at_sigma_zero_is_the_plain_network():
    img, txt, _, grids = inputs()
    t = torch.zeros(2)
    assert_close(network(zero_cond_t=True)(img, txt, t, grids), network()(img, txt, t, grids), FP32)


@given(
    grids=grids,
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    zero_cond_t=st.booleans(),
    seed=st.integers(0, 9),
)
def test_shape_comments_hold(grids, batch, length, zero_cond_t, seed):
    ours = network(seed, zero_cond_t=zero_cond_t)
    with shapes_checked(), taps(ours, {"*": lambda x, site: None}):
        ours(*inputs(grids, batch, length, seed))


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_identity_taps_change_no_bit(zero_cond_t):
    ours = network(zero_cond_t=zero_cond_t)
    case = inputs()
    plain = ours(*case)
    names = [name for name in tap_names(ours) if not name.endswith(("scores", "probs"))]
    with taps(ours, {name: lambda x, site: x for name in names}):
        assert torch.equal(ours(*case), plain)
    assert torch.equal(ours(*case), plain)


def test_explicit_attention_equals_the_fused_one_and_its_maps_are_used():
    ours = network()
    img, txt, t, grids = inputs()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    plain = ours(img, txt, t, grids, mask)
    seen = {}
    with taps(ours, {"*.probs": lambda p, site: seen.update({site.full: p})}):
        assert_close(ours(img, txt, t, grids, mask), plain, FP32)
    assert set(seen) == {"blocks.0.attn.probs", "blocks.1.attn.probs"}
    for probs in seen.values():
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
        assert (probs[1, :, :, 3:5] == 0).all()  # the padded text of row 1 is attended to by nobody
    with taps(ours, {"blocks.0.attn.probs": lambda p, site: torch.full_like(p, 1 / p.shape[-1])}):
        assert (ours(img, txt, t, grids, mask) - plain).abs().max() > 1e-2


def test_every_module_fires():
    ours = network(zero_cond_t=True)
    fired = set()
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    ours(*inputs())
    containers = {name for name, m in ours.named_modules() if isinstance(m, torch.nn.ModuleList)}
    assert {name for name, _ in ours.named_modules()} - fired == containers


def test_bad_configs_and_grids_are_named():
    with pytest.raises(ValueError, match=r"axes_dims_rope is \(4, 8, 8\).*sum to attention_head_dim 24"):
        dataclasses.replace(CONFIG, axes_dims_rope=(4, 8, 8))
    with pytest.raises(ValueError, match="guidance_embeds"):
        dataclasses.replace(CONFIG, guidance_embeds=True)
    with pytest.raises(ValueError, match=r"in_channels is 10, wanted .* = 12"):
        dataclasses.replace(CONFIG, in_channels=10)
    img, txt, t, _ = inputs()
    with pytest.raises(ValueError, match="hold 9 tokens, but img has 23"):
        network()(img, txt, t, [(1, 3, 3)])
