"""Qwen2.5-VL against DiffSynth-Engine's own, which shares no code with transformers; random weights."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenedit.networks.vision_language import VisionLanguage, mrope_positions
from qwenedit.parity.oracle_networks import engine_encoder
from qwenedit.weights.keys import NETWORKS, official_to_ours
from tests import oracles
from tests.support import FP32, assert_close, randomise_
from tests.vision_language import IMAGE, PAD, VISION_START, batch_of, configs, encode, layouts

official = oracles.diffsynth_engine("models.qwen_image.qwen2_5_vl")  # or skip

# The base of its RoPE is a constant; it takes rows without padding.
engine_configs = configs().map(
    lambda config: dataclasses.replace(
        config, text_config=dataclasses.replace(config.text_config, rope_theta=1_000_000.0)
    )
)
one_row = layouts.map(lambda rows: rows[:1])


def pair(config, seed):
    """Both networks, sharing their tensors."""
    reference = engine_encoder(config)
    for name, value in list(reference.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(parent), leaf, torch.nn.Parameter(torch.empty(value.shape)))
    randomise_(reference, seed)
    with torch.device("meta"):
        ours = VisionLanguage(config).eval()
    rules = NETWORKS["text_encoder"]
    state = {key.replace("language_model.", "model."): x for key, x in reference.state_dict().items()}
    state = {rules.hub_key(key): x for key, x in state.items()}
    state = {official_to_ours(rules.table, key): x for key, x in state.items()}
    ours.load_state_dict(state, strict=True, assign=True)
    return ours, reference


@torch.no_grad()
def theirs(reference, batch, positions):
    """Tokens and pictures as `Qwen2_5_VLForConditionalGeneration.forward` joins them."""
    x = reference.language_model.embed_tokens(batch.input_ids)
    if batch.pixel_values is not None:
        seen = reference.visual(batch.pixel_values, torch.tensor(batch.image_grid_thw))
        x = x.masked_scatter((batch.input_ids == IMAGE)[..., None], seen)
    tables = reference.language_model.rotary_emb(x, positions)
    for layer in reference.language_model.layers:
        x = layer(x, position_embeddings=tables)[0]
    return reference.language_model.norm(x)


def positions_of(config, batch):
    merge = config.vision_config.spatial_merge_size
    return mrope_positions(
        batch.input_ids, None, batch.image_grid_thw, image_token_id=IMAGE, spatial_merge_size=merge
    )


CASES = dict(config=engine_configs, layout=one_row, seed=st.integers(0, 1000))


@settings(max_examples=40)
@given(**CASES)
def test_the_encoder_is_the_engine_s(config, layout, seed):
    ours, reference = pair(config, seed)
    batch = batch_of(config, layout, seed)
    wanted = theirs(reference, batch, positions_of(config, batch))
    with torch.no_grad():
        assert_close(encode(ours, batch), wanted, FP32)


@settings(max_examples=40)
@given(**CASES)
def test_the_positions_are_the_engine_s(config, layout, seed):
    batch = batch_of(config, layout, seed)
    ids = dict(image_token_id=IMAGE, video_token_id=PAD + 1, vision_start_token_id=VISION_START)
    vision = SimpleNamespace(spatial_merge_size=config.vision_config.spatial_merge_size, tokens_per_second=2)
    network = SimpleNamespace(config=SimpleNamespace(**ids), vision_config=vision)
    grids = torch.tensor(batch.image_grid_thw) if batch.image_grid_thw else None
    get_rope_index = official.Qwen2_5_VLForConditionalGeneration.get_rope_index
    wanted, _ = get_rope_index(network, batch.input_ids, grids, attention_mask=batch.attention_mask)
    assert torch.equal(positions_of(config, batch), wanted)


@settings(max_examples=1)
@given(config=engine_configs)
def test_another_base_of_rope_is_refused(config):
    other = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, rope_theta=1e4))
    with pytest.raises(ValueError, match=r"rope_theta is 10000.0, wanted 1000000.0, a constant"):
        engine_encoder(other)
