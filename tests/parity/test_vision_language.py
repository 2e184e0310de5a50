"""Qwen2.5-VL against transformers' Qwen2_5_VLModel, with the same random weights."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qwenedit.networks.vision_language import (
    TextConfig,
    VisionLanguage,
    VisionLanguageConfig,
    mrope_positions,
)
from qwenedit.networks.vision_tower import VisionConfig, window_order
from qwenedit.weights.configs import vision_language_config
from qwenedit.weights.keys import NETWORKS, official_to_ours
from tests.support import FP32, FP64_CAST, assert_close, randomise_
from tests.vision_language import IMAGE, PAD, VISION_END, VISION_START, batch_of, configs, encode, layouts


def official(config):
    """Our config as the reference's."""
    text = dataclasses.asdict(config.text_config)
    text["rope_scaling"] = {"type": "default", "mrope_section": list(text.pop("mrope_section"))}
    return Qwen2_5_VLConfig(
        text_config={**text, "pad_token_id": PAD},
        vision_config=dataclasses.asdict(config.vision_config),
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=PAD + 1,
        tie_word_embeddings=False,
    )


def pair(config, seed, dtype=torch.float32):
    """Both networks, sharing their tensors."""
    reference = Qwen2_5_VLForConditionalGeneration(official(config)).eval()
    randomise_(reference, seed)
    for module in reference.modules():  # parameters only: `.to` would cast the RoPE frequencies too
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    with torch.device("meta"):
        ours = VisionLanguage(config).eval()
    rules = NETWORKS["text_encoder"]
    state = {rules.hub_key(key): x for key, x in reference.state_dict().items()}
    state = {official_to_ours(rules.table, k): x for k, x in state.items() if k not in rules.skipped}
    ours.load_state_dict(state, strict=True, assign=True)
    return ours, reference.model


@torch.no_grad()
def run_both(ours, reference, batch):
    """Both outputs where there are tokens; at padding neither means anything."""
    wanted = reference(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        image_grid_thw=torch.tensor(batch.image_grid_thw) if batch.image_grid_thw else None,
        use_cache=False,
    ).last_hidden_state
    got = encode(ours, batch)
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    real = batch.attention_mask.bool()
    return got[real], wanted[real]


CASES = dict(
    config=configs(),
    layout=layouts,
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 1000),
)
many = settings(max_examples=30)


@many
@given(**CASES)
def test_whole_network_fp32(config, layout, side, seed):
    ours, reference = pair(config, seed)
    got, wanted = run_both(ours, reference, batch_of(config, layout, seed, side))
    assert_close(got, wanted, FP32)


@many
@given(**CASES)
def test_whole_network_fp64(config, layout, side, seed):
    """The reference rounds to float32 in every RMSNorm, in the tower's RoPE and in both tables."""
    ours, reference = pair(config, seed, torch.float64)
    got, wanted = run_both(ours, reference, batch_of(config, layout, seed, side).to(torch.float64))
    assert_close(got, wanted, FP64_CAST)


@many
@given(**CASES)
def test_positions(config, layout, side, seed):
    batch = batch_of(config, layout, seed, side)
    with torch.device("meta"):
        reference = Qwen2_5_VLForConditionalGeneration(official(config)).model
    grids = torch.tensor(batch.image_grid_thw) if batch.image_grid_thw else None
    wanted, _ = reference.get_rope_index(batch.input_ids, grids, attention_mask=batch.attention_mask)
    got = mrope_positions(
        batch.input_ids,
        batch.attention_mask,
        batch.image_grid_thw,
        image_token_id=IMAGE,
        spatial_merge_size=config.vision_config.spatial_merge_size,
    )
    assert torch.equal(got, wanted)


@many
@given(
    config=configs(),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_tower(config, sizes, seed):
    """Windows that divide the picture and windows that do not, pictures smaller than a window, several."""
    ours, reference = pair(config, seed)
    batch = batch_of(config, [([(0, height, width) for height, width in sizes], 1)], seed)
    with torch.no_grad():
        wanted = reference.visual(batch.pixel_values, torch.tensor(batch.image_grid_thw))
        got = ours.vision(batch.pixel_values, batch.image_grid_thw)
    assert_close(got, wanted, FP32)
    index, seams = reference.visual.get_window_index(torch.tensor(batch.image_grid_thw))
    order, lengths = window_order(
        batch.image_grid_thw, config.vision_config.spatial_merge_size, config.vision_config.window_side
    )
    assert order == index.tolist()
    assert lengths == torch.tensor(seams).unique_consecutive().diff().tolist()


@given(config=configs(), length=st.integers(1, 9), batch=st.integers(1, 2), seed=st.integers(0, 1000))
def test_blocks_of_the_language_model(config, length, batch, seed):
    ours, reference = pair(config, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, config.text_config.hidden_size, generator=generator)
    positions = torch.randint(0, 200, (3, batch, length), generator=generator)
    with torch.no_grad():
        cos, sin = reference.language_model.rotary_emb(x, positions)
        rope = ours.language.rope(positions, x.dtype)
        for block, official_block in zip(ours.language.blocks, reference.language_model.layers, strict=True):
            wanted = official_block(x, position_embeddings=(cos, sin))[0]
            assert_close(block(x, rope, None), wanted, FP32)
            assert_close(block.norm1(x), official_block.input_layernorm(x), FP32)
            assert_close(block.mlp(x), official_block.mlp(x), FP32)
            wanted, _ = official_block.self_attn(x, position_embeddings=(cos, sin))
            assert_close(block.attn(x, rope, None), wanted, FP32)


@given(config=configs(), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_blocks_of_the_tower(config, sizes, seed):
    ours, reference = pair(config, seed)
    vision = config.vision_config
    generator = torch.Generator().manual_seed(seed)
    merged = vision.spatial_merge_size**2
    lengths = [merged * size for size in sizes]
    x = torch.randn(sum(lengths), vision.hidden_size, generator=generator)
    angles = torch.randn(sum(lengths), vision.hidden_size // vision.num_heads // 2, generator=generator)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    doubled = torch.cat([angles, angles], dim=-1)
    seams = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        for block, official_block in zip(ours.vision.blocks, reference.visual.blocks, strict=True):
            wanted = official_block(x, seams, position_embeddings=(doubled.cos(), doubled.sin()))
            assert_close(block(x, rope, lengths), wanted, FP32)
        assert_close(ours.vision.merger(x), reference.visual.merger(x), FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=8)
@given(config=configs(), layout=layouts, seed=st.integers(0, 1000))
def test_half_precision_is_no_further_from_fp32_than_the_reference(dtype, config, layout, seed):
    exact, _ = pair(config, seed)
    ours, reference = pair(config, seed, dtype)
    rounded = {name: x.to(exact.get_parameter(name).dtype) for name, x in ours.state_dict().items()}
    exact.load_state_dict(rounded)
    batch = batch_of(config, layout, seed)
    got, wanted = run_both(ours, reference, batch.to(dtype))
    with torch.no_grad():
        truth = encode(exact, batch.to(dtype).to(torch.float32))[batch.attention_mask.bool()]

    def rms(x):
        return float(x.double().pow(2).mean().sqrt())

    assert rms(got - truth) <= 1.25 * rms(wanted - truth)


@given(config=configs())
def test_a_config_that_the_reference_saves_is_read_back(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config")
    official(config).save_pretrained(folder)
    assert vision_language_config(json.loads((folder / "config.json").read_text()), "config.json") == config


@pytest.mark.slow
def test_official_width_at_cut_depth():
    """Widths of Qwen2.5-VL-7B, one block of the 28 and two of the tower's 32, one of each kind."""
    config = VisionLanguageConfig(
        text_config=TextConfig(
            vocab_size=24, hidden_size=3584, intermediate_size=18944, num_hidden_layers=1,
            num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6,
            mrope_section=(16, 24, 24),
        ),
        vision_config=VisionConfig(
            depth=2, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
            temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=(1,),
            out_hidden_size=3584,
        ),
        image_token_id=IMAGE,
    )  # fmt: skip
    ours, reference = pair(config, 1)
    layout = [([(3, 5, 9)], 4), ([(2, 4, 4), (1, 3, 6)], 7)]
    got, wanted = run_both(ours, reference, batch_of(config, layout, 2))
    assert_close(got, wanted, FP32)


@given(config=configs(), layout=layouts, seed=st.integers(0, 1000))
def test_bfloat16_is_equal_to_the_bit(config, layout, seed):
    """Every cast is where the reference has it: nothing else would round alike."""
    ours, reference = pair(config, seed, torch.bfloat16)
    got, wanted = run_both(ours, reference, batch_of(config, layout, seed).to(torch.bfloat16))
    assert torch.equal(got, wanted)
