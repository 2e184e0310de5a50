"""ControlNets, and the transformer under their control, against diffusers with the same random weights."""

import dataclasses
import math

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.networks.controlnet import KEY_TABLE, ControlNet, ControlNetConfig, spread
from qwenedit.networks.mmdit import RunCache
from qwenedit.weights.keys import official_to_ours, ours_to_official
from tests.parity import test_mmdit
from tests.support import FP32, FP64_CAST, assert_close, copy_weights, randomise_

AXES = [(2, 4, 6), (4, 4, 8), (4, 2, 10)]
OFFICIAL = ControlNetConfig(  # of InstantX/Qwen-Image-ControlNet-Union
    patch_size=2, in_channels=64, out_channels=16, num_layers=5, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=3584, axes_dims_rope=(16, 56, 56),
)  # fmt: skip


@st.composite
def configs(draw):
    axes, latent_channels = draw(st.sampled_from(AXES)), draw(st.integers(1, 5))
    return ControlNetConfig(
        patch_size=2,
        in_channels=4 * latent_channels,
        out_channels=latent_channels,
        num_layers=draw(st.integers(1, 3)),
        attention_head_dim=sum(axes),
        num_attention_heads=draw(st.integers(1, 3)),
        joint_attention_dim=draw(st.integers(5, 24)),
        axes_dims_rope=axes,
        extra_condition_channels=draw(st.sampled_from([0, 4])),
    )


def to_dtype(module, dtype):
    for part in module.modules():  # `.to` of a model prints advice about mixed precision; modules do not
        part._apply(lambda t: t.to(dtype), recurse=False)
    return module


def pair(config, seed, dtype=torch.float32):
    """Ours and the reference's; the layers that are zero before training are random, too."""
    reference = diffusers.QwenImageControlNetModel(**dataclasses.asdict(config)).eval()
    to_dtype(randomise_(reference, seed), dtype)
    with torch.device("meta"):
        ours = ControlNet(config).eval()
    copy_weights(ours, reference, KEY_TABLE)
    return ours, reference


def inputs(config, grid, batch, length, masked, seed, dtype=torch.float32):
    img, txt, timestep, mask = test_mmdit.inputs(config, [grid], batch, length, masked, seed, dtype)
    generator = torch.Generator().manual_seed(seed + 2)
    cond = torch.randn(batch, img.shape[1], config.condition_channels, generator=generator).to(dtype)
    return img, cond, txt, timestep, mask


def run_reference(reference, grid, img, cond, txt, timestep, mask, scale):
    return reference(
        hidden_states=img, controlnet_cond=cond, conditioning_scale=scale, encoder_hidden_states=txt,
        encoder_hidden_states_mask=mask, timestep=timestep, img_shapes=[[grid]] * len(txt), return_dict=False,
    )  # fmt: skip


CASES = dict(
    config=configs(),
    grid=st.tuples(st.just(1), st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)


@torch.no_grad()
def check(dtype, tolerance, config, grid, batch, length, masked, seed):
    ours, reference = pair(config, seed, dtype)
    img, cond, txt, timestep, mask = inputs(config, grid, batch, length, masked, seed, dtype)
    got = ours(img, cond, txt, timestep, grid, mask)
    wanted = run_reference(reference, grid, img, cond, txt, timestep, mask, 0.7)
    assert len(got) == len(wanted) == config.num_layers
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert_close(one * 0.7, other, tolerance, f"residual {number}")


@given(**CASES)
def test_residuals_fp32(**case):
    check(torch.float32, FP32, **case)


@given(**CASES)
def test_residuals_fp64(**case):
    """The reference rounds to float32 in RoPE, in RMSNorm's mean and in the sinusoids; nowhere else."""
    check(torch.float64, FP64_CAST, **case)


@given(scales=st.lists(st.floats(-1, 2), min_size=1, max_size=3), **CASES)
def test_several_control_pictures_are_summed_as_in_the_reference(
    scales, config, grid, batch, length, masked, seed
):
    ours, reference = pair(config, seed)
    img, cond, txt, timestep, mask = inputs(config, grid, batch, length, masked, seed)
    conds = [cond.roll(number, dims=1) * (number + 1) for number in range(len(scales))]
    with torch.no_grad():
        several = diffusers.QwenImageMultiControlNetModel([reference])
        wanted = run_reference(several, grid, img, conds, txt, timestep, mask, scales)
        got = [ours(img, one, txt, timestep, grid, mask) for one in conds]
    for number, other in enumerate(wanted):
        summed = sum(one[number] * scale for one, scale in zip(got, scales, strict=True))
        assert_close(summed, other, FP32, f"residual {number}")


@torch.no_grad()
def check_controlled(dtype, tolerance, config, grids, count, batch, length, masked, seed):
    """The reference adds to all tokens: with references it gets zeros for theirs, and means the target."""
    ours, reference = test_mmdit.pair(config, seed, dtype)
    img, txt, timestep, mask = test_mmdit.inputs(config, grids, batch, length, masked, seed, dtype)
    generator = torch.Generator().manual_seed(seed + 3)
    target = math.prod(grids[0])
    residuals = [
        torch.randn(batch, target, config.width, generator=generator).to(dtype) for _ in range(count)
    ]
    rest = torch.zeros(batch, img.shape[1] - target, config.width, dtype=dtype)
    wanted = reference(
        hidden_states=img, encoder_hidden_states=txt, encoder_hidden_states_mask=mask, timestep=timestep,
        img_shapes=[grids] * batch, return_dict=False,
        controlnet_block_samples=[torch.cat([x, rest], dim=1) for x in residuals],
    )[0]  # fmt: skip
    control = spread(residuals, config.num_layers)
    case = img, txt, timestep, grids, mask
    got = ours(*case, control=control)
    assert_close(got, wanted, tolerance)
    assert not torch.equal(got, ours(*case))
    target_only = ours(*case, control=control, cache=RunCache(), target_only=True)
    assert_close(target_only, wanted[:, :target], tolerance)


CONTROLLED = dict(
    config=test_mmdit.configs().map(lambda config: dataclasses.replace(config, num_layers=5)),
    grids=test_mmdit.grids,
    count=st.integers(1, 7),  # of residuals, for 5 blocks
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(**CONTROLLED)
def test_the_controlled_transformer_fp32(**case):
    check_controlled(torch.float32, FP32, **case)


@given(**CONTROLLED)
def test_the_controlled_transformer_fp64(**case):
    check_controlled(torch.float64, FP64_CAST, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_no_further_from_fp32_than_the_reference(dtype):
    config = dataclasses.replace(
        OFFICIAL, num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    grid = (1, 6, 5)
    exact, _ = pair(config, 3)
    ours, reference = pair(config, 3, dtype)
    *low, mask = inputs(config, grid, 2, 7, True, 3)
    low = [x.to(dtype) for x in low]
    got = ours(*low, grid, mask)
    wanted = run_reference(reference, grid, *low, mask, 1.0)
    truth = exact(*(x.float() for x in low), grid, mask)
    for one, other, true in zip(got, wanted, truth, strict=True):
        assert test_mmdit.rms(one - true) <= 1.25 * test_mmdit.rms(other - true)


@pytest.mark.parametrize("extra", [0, 4])
def test_the_table_is_a_bijection_onto_the_official_tensors(extra):
    config = dataclasses.replace(OFFICIAL, extra_condition_channels=extra)
    with torch.device("meta"):
        reference = diffusers.QwenImageControlNetModel(**dataclasses.asdict(config))
        ours = {name: x.shape for name, x in ControlNet(config).state_dict().items()}
    official = {name: x.shape for name, x in reference.state_dict().items()}
    renamed = {key: official_to_ours(KEY_TABLE, key) for key in official}
    assert sorted(renamed.values()) == sorted(ours)  # onto, and no two to one
    assert all(ours[name] == official[key] for key, name in renamed.items())
    assert all(ours_to_official(KEY_TABLE, name) == key for key, name in renamed.items())
    for rule in KEY_TABLE:
        assert any(official_to_ours((rule,), key) for key in official), f"{rule} renames nothing"
