"""The transformer against diffusers' QwenImageTransformer2DModel, with the same random weights."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.models.transformers.transformer_qwenimage import (
    QwenEmbedRope,
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    apply_rotary_emb_qwen,
)
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.networks.mmdit import KEY_TABLE, MMDiT, MMDiTConfig
from qwenedit.networks.mmdit_layers import Rope, TimeEmbedding, joint_key_mask, joint_rope, rotate
from tests.support import EPS, FP32, FP64_CAST, assert_close, copy_weights, randomise_

AXES = [(2, 4, 6), (4, 4, 8), (8, 12, 12), (4, 2, 10)]


def rms(x):
    return float(x.double().pow(2).mean().sqrt())


@st.composite
def configs(draw):
    axes = draw(st.sampled_from(AXES))
    latent_channels = draw(st.integers(1, 5))
    return MMDiTConfig(
        patch_size=2,
        in_channels=4 * latent_channels,
        out_channels=latent_channels,
        num_layers=draw(st.integers(1, 3)),
        attention_head_dim=sum(axes),
        num_attention_heads=draw(st.integers(1, 3)),
        joint_attention_dim=draw(st.integers(5, 24)),
        guidance_embeds=False,
        axes_dims_rope=axes,
        zero_cond_t=draw(st.booleans()),
    )


grids = st.lists(st.tuples(st.just(1), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4)


def pair(config, seed, dtype=torch.float32):
    reference = diffusers.QwenImageTransformer2DModel(**dataclasses.asdict(config)).eval()
    randomise_(reference, seed)
    for module in reference.modules():  # `.to` of a model prints advice about mixed precision; modules do not
        module._apply(lambda t: t.to(dtype), recurse=False)
    with torch.device("meta"):
        ours = MMDiT(config).eval()
    copy_weights(ours, reference, KEY_TABLE)
    return ours, reference


def inputs(config, grids, batch, length, masked, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = sum(rows * columns for _, rows, columns in grids)
    img = torch.randn(batch, tokens, config.in_channels, generator=generator).to(dtype)
    txt = torch.randn(batch, length, config.joint_attention_dim, generator=generator).to(dtype)
    timestep = torch.rand(batch, generator=generator).to(dtype)
    mask = None
    if masked:
        mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask[0] = True
        mask[-1, -1] = False
    return img, txt, timestep, mask


@torch.no_grad()
def run_both(ours, reference, grids, img, txt, timestep, mask):
    wanted = reference(
        hidden_states=img,
        encoder_hidden_states=txt,
        encoder_hidden_states_mask=mask,
        timestep=timestep,
        img_shapes=[grids] * len(img),
        return_dict=False,
    )[0]
    return ours(img, txt, timestep, grids, mask), wanted


CASES = dict(
    config=configs(),
    grids=grids,
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(**CASES)
def test_whole_network_fp32(config, grids, batch, length, masked, seed):
    ours, reference = pair(config, seed)
    got, wanted = run_both(ours, reference, grids, *inputs(config, grids, batch, length, masked, seed))
    assert_close(got, wanted, FP32)


@given(**CASES)
def test_whole_network_fp64(config, grids, batch, length, masked, seed):
    """The reference rounds to float32 in RoPE, in RMSNorm's mean and in the sinusoids; nowhere else."""
    ours, reference = pair(config, seed, torch.float64)
    case = inputs(config, grids, batch, length, masked, seed, torch.float64)
    got, wanted = run_both(ours, reference, grids, *case)
    assert_close(got, wanted, FP64_CAST)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_fp32_than_the_reference(zero_cond_t, dtype):
    config = MMDiTConfig(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
        zero_cond_t=zero_cond_t,
    )  # fmt: skip
    grids = [(1, 6, 4), (1, 5, 7)]
    exact, _ = pair(config, 3)
    ours, reference = pair(config, 3, dtype)
    img, txt, timestep, mask = inputs(config, grids, 2, 7, True, 3)
    low = (img.to(dtype), txt.to(dtype), timestep.to(dtype), mask)
    got, wanted = run_both(ours, reference, grids, *low)
    with torch.no_grad():
        truth = exact(low[0].float(), low[1].float(), low[2].float(), grids, mask)
    assert rms(got - truth) <= 1.25 * rms(wanted - truth)


@given(**CASES)
def test_block(config, grids, batch, length, masked, seed):
    ours, reference = pair(config, seed)
    tokens = sum(rows * columns for _, rows, columns in grids)
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(batch, tokens, config.width, generator=generator)
    txt = torch.randn(batch, length, config.width, generator=generator)
    temb = torch.randn(batch * (2 if config.zero_cond_t else 1), config.width, generator=generator)
    mask = torch.arange(length) < 2 if masked else None
    mask = mask.expand(batch, -1) if masked else None
    target = grids[0][1] * grids[0][2]
    index = torch.tensor([[0] * target + [1] * (tokens - target)] * batch) if config.zero_cond_t else None
    with torch.no_grad():
        rope = joint_rope(*ours.rope(grids, length, img.device))
        key_mask = None
        if masked:
            key_mask = torch.cat([mask, mask.new_ones(batch, tokens)], dim=1)[:, None, None]
        got_img, got_txt = ours.blocks[0](img, txt, temb, rope, key_mask, target)
        wanted_txt, wanted_img = reference.transformer_blocks[0](
            hidden_states=img,
            encoder_hidden_states=txt,
            encoder_hidden_states_mask=mask,
            temb=temb,
            image_rotary_emb=reference.pos_embed([grids], device=img.device, max_txt_seq_len=length),
            modulate_index=index,
        )
    assert isinstance(reference.transformer_blocks[0], QwenImageTransformerBlock)
    assert_close(got_img, wanted_img, FP32, "img")
    assert_close(got_txt, wanted_txt, FP32, "txt")


@given(**CASES)
def test_joint_attention(config, grids, batch, length, masked, seed):
    ours, reference = pair(config, seed)
    tokens = sum(rows * columns for _, rows, columns in grids)
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(batch, tokens, config.width, generator=generator)
    txt = torch.randn(batch, length, config.width, generator=generator)
    mask = inputs(config, grids, batch, length, masked, seed)[-1]
    with torch.no_grad():
        key_mask = None if mask is None else joint_key_mask(mask, tokens)
        got = ours.blocks[0].attn(img, txt, joint_rope(*ours.rope(grids, length, img.device)), key_mask)
        wanted = reference.transformer_blocks[0].attn(
            hidden_states=img,
            encoder_hidden_states=txt,
            encoder_hidden_states_mask=mask,
            image_rotary_emb=reference.pos_embed([grids], device=img.device, max_txt_seq_len=length),
        )
    for name, one, other in zip(("img", "txt"), got, wanted, strict=True):
        assert_close(one, other, FP32, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(config=configs(), shape=st.tuples(st.integers(1, 3), st.integers(1, 9)), seed=st.integers(0, 1000))
def test_the_small_modules_are_equal_bit_by_bit(dtype, config, shape, seed):
    """The MLP, the last norm, and the RMSNorms of prompt, queries and keys: the same kernels in one order."""
    ours, reference = pair(config, seed, dtype)
    official, own = reference.transformer_blocks[0], ours.blocks[0]
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes):
        return (2 * torch.randn(*sizes, generator=generator)).to(dtype)

    x, temb = random(*shape, config.width), random(shape[0], config.width)
    heads = random(*shape, config.num_attention_heads, config.attention_head_dim)
    prompt = random(*shape, config.joint_attention_dim)
    with torch.no_grad():
        for got, wanted in (
            (own.img_mlp(x), official.img_mlp(x)),
            (own.txt_mlp(x), official.txt_mlp(x)),
            (ours.norm_out(x, temb), reference.norm_out(x, temb)),
            (own.img_mod(temb), official.img_mod(temb)),
            (own.txt_mod(temb), official.txt_mod(temb)),
            (ours.txt_norm(prompt), reference.txt_norm(prompt)),
            (own.attn.q_norm(heads, 0), official.attn.norm_q(heads)),
            (own.attn.k_norm(heads, 0), official.attn.norm_k(heads)),
            (own.attn.q_norm(heads, heads.shape[1]), official.attn.norm_added_q(heads)),
            (own.attn.k_norm(heads, heads.shape[1]), official.attn.norm_added_k(heads)),
        ):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    kinds = (type(official.img_mlp), type(reference.norm_out), type(reference.txt_norm))
    assert kinds == (FeedForward, AdaLayerNormContinuous, RMSNorm)


@given(axes=st.sampled_from([*AXES, (16, 56, 56)]), grids=grids, length=st.integers(1, 40))
def test_rope_is_the_references_complex_table(axes, grids, length):
    img, txt = Rope(axes)(grids, length, torch.device("cpu"))
    wanted_img, wanted_txt = QwenEmbedRope(10000, list(axes), scale_rope=True)(
        [grids], device=torch.device("cpu"), max_txt_seq_len=length
    )
    # The angles are the same numbers; a cosine or sine is within a few last digits, whose ever it is.
    assert_close(img, torch.view_as_real(wanted_img), 8 * EPS, "img")
    assert_close(txt, torch.view_as_real(wanted_txt), 8 * EPS, "txt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(tokens=st.integers(1, 9), heads=st.integers(1, 3), pairs=st.integers(1, 8), seed=st.integers(0, 99))
def test_rotation_equals_the_complex_product(dtype, tokens, heads, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, heads, 2 * pairs, generator=generator).to(dtype)
    angle = torch.randn(tokens, pairs, generator=generator)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)
    wanted = apply_rotary_emb_qwen(x, torch.view_as_complex(table), use_real=False)
    # Two products and a sum, each rounded, on both sides; some complex kernels fuse the product and the sum.
    assert_close(rotate(x, joint_rope(table, table[:0])), wanted, 4 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(timestep=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_time_embedding(dtype, timestep):
    reference = QwenTimestepProjEmbeddings(embedding_dim=12)
    randomise_(reference)
    ours = TimeEmbedding(12)
    ours.load_state_dict(
        {k.removeprefix("timestep_embedder."): v for k, v in reference.state_dict().items()}, strict=True
    )
    timestep = torch.tensor(timestep).to(dtype)
    ours.to(dtype), reference.to(dtype)
    with torch.no_grad():
        got = ours(timestep, dtype)
        wanted = reference(timestep, torch.empty(0, dtype=dtype))
    assert torch.equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_official_width_at_cut_depth(zero_cond_t):
    """One block of the official 60, at full width: 0.4 B parameters in fp32, shared by both sides."""
    config = MMDiTConfig(
        patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=3584, guidance_embeds=False, axes_dims_rope=(16, 56, 56),
        zero_cond_t=zero_cond_t,
    )  # fmt: skip
    ours, reference = pair(config, 1)
    grids = [(1, 9, 6), (1, 4, 7)]
    got, wanted = run_both(ours, reference, grids, *inputs(config, grids, 2, 11, True, 5))
    assert_close(got, wanted, FP32)
