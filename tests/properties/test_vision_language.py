"""What must hold of Qwen2.5-VL whatever the weights: no reference is needed to see it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenedit.networks.vision_language import TextConfig, VisionLanguageConfig, mrope_positions
from qwenedit.networks.vision_tower import VisionConfig, window_order
from qwenedit.taps import tap_names, taps
from qwenedit.weights.configs import vision_language_config
from tests.golden.models import TEXT_ENCODER
from tests.support import FP32, assert_close, shapes_checked
from tests.vision_language import IMAGE, Batch, batch_of, configs, encode, layouts, network

CONFIG = VisionLanguageConfig(
    text_config=TextConfig(
        vocab_size=24, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(1, 2, 1),
    ),
    vision_config=VisionConfig(
        depth=2, hidden_size=24, intermediate_size=14, num_heads=3, patch_size=2, temporal_patch_size=2,
        spatial_merge_size=2, window_size=8, fullatt_block_indexes=(1,), out_hidden_size=32,
    ),
    image_token_id=IMAGE,
)  # fmt: skip
LAYOUT = [([(1, 3, 5)], 4), ([(2, 2, 2), (0, 5, 1)], 2)]  # windows of 2 x 2 tokens, some cut
SEEDS = st.integers(0, 1000)


@given(config=configs(), layout=layouts, side=st.sampled_from(["left", "right"]), seed=SEEDS)
def test_a_padded_batch_is_its_rows(config, layout, side, seed):
    module = network(config, seed)
    batch = batch_of(config, layout, seed, side)
    together = encode(module, batch)
    for row, ids in enumerate(batch.rows):
        alone = encode(module, batch.single(row))[0]
        got = together[row, : len(ids)] if side == "right" else together[row, -len(ids) :]
        assert_close(got, alone, 1e-5, f"row {row}")


@given(config=configs(), layout=layouts, seed=SEEDS, data=st.data())
def test_what_comes_later_changes_nothing_before(config, layout, seed, data):
    module = network(config, seed)
    batch = batch_of(config, [layout[0]], seed)
    ids = batch.input_ids.clone()
    places = [i for i, token in enumerate(batch.rows[0]) if token < IMAGE]
    place = data.draw(st.sampled_from(places))
    ids[0, place] = (ids[0, place] + 1) % IMAGE
    plain = encode(module, batch)
    changed = module(ids, batch.attention_mask, batch.pixel_values, batch.image_grid_thw)
    assert torch.allclose(changed[:, :place], plain[:, :place], atol=1e-5)
    assert not torch.allclose(changed[:, place:], plain[:, place:])


@given(layout=layouts, side=st.sampled_from(["left", "right"]), seed=SEEDS)
def test_positions_grow_by_the_longer_side_of_a_picture(layout, side, seed):
    merge = CONFIG.vision_config.spatial_merge_size
    batch = batch_of(CONFIG, layout, seed, side)
    positions = mrope_positions(
        batch.input_ids,
        batch.attention_mask,
        batch.image_grid_thw,
        image_token_id=IMAGE,
        spatial_merge_size=merge,
    )
    for row, (pictures, tail) in enumerate(layout):
        real = positions[:, row, batch.attention_mask[row].bool()]
        sides = sum(max(height, width) for _, height, width in pictures)
        text = sum(before + 2 for before, _, _ in pictures) + tail
        assert real.max() == sides + text - 1  # and not: the number of tokens - 1
        is_text = torch.tensor(batch.rows[row]) != IMAGE
        assert torch.equal(real[0, is_text], real[1, is_text])
        assert torch.equal(real[0, is_text], real[2, is_text])
        assert bool((real[0, is_text].diff() > 0).all())
        assert positions[:, row, ~batch.attention_mask[row].bool()].eq(1).all()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3),
    merge=st.integers(1, 3),
    side=st.integers(1, 5),
)
def test_windows_cover_every_token_once(sizes, merge, side):
    grids = [(1, height * merge, width * merge) for height, width in sizes]
    order, lengths = window_order(grids, merge, side)
    assert sorted(order) == list(range(sum(height * width for height, width in sizes)))
    assert sum(lengths) == len(order) * merge**2
    assert max(lengths) <= (side * merge) ** 2


def test_pictures_do_not_see_each_other():
    """In the tower, that is: whichever blocks see whole pictures, they see one."""
    module = network(CONFIG).vision
    batch = batch_of(CONFIG, [([(0, 3, 5), (0, 4, 2)], 1)], 0)
    first = 3 * 5 * CONFIG.vision_config.spatial_merge_size**2
    both = module(batch.pixel_values, batch.image_grid_thw)
    assert_close(both[:15], module(batch.pixel_values[:first], batch.image_grid_thw[:1]), FP32)
    assert_close(both[15:], module(batch.pixel_values[first:], batch.image_grid_thw[1:]), FP32)


def test_the_tower_runs_only_if_there_is_a_picture():
    module = network(CONFIG)
    del module.vision
    assert encode(module, batch_of(CONFIG, [([], 4)], 0)).isfinite().all()


def test_a_mask_of_ones_is_no_mask():
    module, batch = network(CONFIG), batch_of(CONFIG, LAYOUT[:1], 0)
    unmasked = module(batch.input_ids, None, batch.pixel_values, batch.image_grid_thw)
    assert torch.equal(encode(module, batch), unmasked)


# --- taps -------------------------------------------------------------------------------------------------

EXPLICIT = ("scores", "probs")
PLAIN = [name for name in tap_names(network(CONFIG)) if not name.endswith(EXPLICIT)]


def test_the_identity_tap_changes_no_bit_and_every_tap_fires():
    module, batch = network(CONFIG), batch_of(CONFIG, LAYOUT, 0)
    plain = encode(module, batch)
    fired = set()
    with taps(module, {name: lambda x, site: fired.add(site.full) or x for name in PLAIN}):
        assert torch.equal(encode(module, batch), plain)
    assert fired == set(PLAIN)
    with taps(module, {name: lambda x, site: fired.add(site.full) for name in tap_names(module)}):
        encode(module, batch)
    assert fired == set(tap_names(module))


@pytest.mark.parametrize("name", tap_names(network(CONFIG)))
def test_a_replacement_reaches_the_output_from_every_tap(name):
    module, batch = network(CONFIG), batch_of(CONFIG, LAYOUT, 0)
    plain = encode(module, batch)
    generator = torch.Generator().manual_seed(1)
    with taps(module, {name: lambda x, site: x + 0.1 * torch.rand(x.shape, generator=generator)}):
        assert not torch.allclose(encode(module, batch), plain, atol=1e-4)


@given(config=configs(), layout=layouts, side=st.sampled_from(["left", "right"]), seed=SEEDS)
def test_explicit_attention_is_the_fused_one(config, layout, side, seed):
    module, batch = network(config, seed), batch_of(config, layout, seed, side)
    real = batch.attention_mask.bool()
    rows = []
    pattern = "*.probs" if batch.pixel_values is not None else "language.*.probs"
    with taps(module, {pattern: lambda x, site: rows.append(x.sum(-1))}):
        explicit = encode(module, batch)
    assert_close(explicit[real], encode(module, batch)[real], 1e-5)
    assert all(torch.allclose(row, torch.ones_like(row), atol=1e-5) for row in rows)


@given(config=configs(), layout=layouts, seed=SEEDS)
def test_letters_hold(config, layout, seed):
    module, batch = network(config, seed), batch_of(config, layout, seed)
    with shapes_checked():
        encode(module, batch)


def test_letters_hold_in_explicit_attention():
    module, batch = network(CONFIG), batch_of(CONFIG, LAYOUT, 0)
    with shapes_checked(), taps(module, {"language.*.scores": lambda x, site: None}):
        encode(module, batch)


def test_modules_fire_their_hooks():
    module, batch = network(CONFIG), batch_of(CONFIG, LAYOUT, 0)
    fired = set()
    for name, part in module.named_modules():
        part.register_forward_hook(lambda *_, name=name: fired.add(name))
    encode(module, batch)
    lists = {name for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList)}
    assert {name for name, _ in module.named_modules()} - fired == lists


@given(layout=layouts, side=st.sampled_from(["left", "right"]), seed=SEEDS)
def test_without_any_grid_image_tokens_are_text(layout, side, seed):
    batch = batch_of(CONFIG, layout, seed, side)
    as_text = batch.input_ids.clone().masked_fill(batch.input_ids == IMAGE, 0)
    options = {"image_token_id": IMAGE, "spatial_merge_size": 2}
    positions = mrope_positions(batch.input_ids, batch.attention_mask, None, **options)
    assert torch.equal(positions, mrope_positions(as_text, batch.attention_mask, None, **options))
    assert torch.isfinite(network(CONFIG)(batch.input_ids, batch.attention_mask)).all()


# --- what is refused --------------------------------------------------------------------------------------


def bad(**change):
    batch = batch_of(CONFIG, [([(1, 3, 5)], 4)], 0)
    return {**{key: getattr(batch, key) for key in Batch.__dataclass_fields__}, **change}


GOOD = bad()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pixel_values=None), "wanted both or neither"),
        (dict(image_grid_thw=[]), "wanted both or neither"),
        (dict(attention_mask=torch.ones(1, 3)), r"attention_mask has shape \(1, 3\), wanted \(1, 22\)"),
        (dict(image_grid_thw=[(1, 6, 9)]), r"grid is \(1, 6, 9\), wanted \(1, rows, columns\)"),
        (dict(image_grid_thw=[(2, 6, 10)]), r"grid is \(2, 6, 10\), wanted \(1, rows, columns\)"),
        (dict(image_grid_thw=[(1, 6, 12)]), "has 15 image tokens for picture 0, wanted 3 x 6 = 18"),
        (dict(image_grid_thw=[(1, 6, 10)] * 2), "image tokens for 1 pictures, wanted 2"),
        (dict(image_grid_thw=[(1, 6, 8)]), "an image token too many for the grids"),
        (dict(pixel_values=GOOD["pixel_values"][:-1]), r"has 59 patches, wanted 60 for \[\(1, 6, 10\)\]"),
    ],
)
def test_what_disagrees_is_named(change, message):
    given = {**GOOD, **change}
    arguments = [given[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")]
    with pytest.raises(ValueError, match=message):
        network(CONFIG)(*arguments)


def altered(**changes):
    raw = {"model_type": "qwen2_5_vl", **TEXT_ENCODER}
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        if section:
            raw[section] = {**raw[section], key: value}
        else:
            raw[key] = value
    return raw


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="qwen3_vl"), "model_type is 'qwen3_vl', wanted 'qwen2_5_vl'"),
        (dict(vision_config=None), "lacks vision_config"),
        (dict(vision_config__in_chans=4), "in_chans is 4, wanted in_channels, 3"),
        (dict(vision_config__num_heads=3), r"hidden_size is 16, wanted a multiple of 4 \* num_heads = 12"),
        (dict(vision_config__window_size=8), "window_size is 8, wanted at least"),
        (dict(vision_config__out_hidden_size=8), "out_hidden_size of the vision tower is 8, wanted"),
        (dict(vision_config__hidden_act="gelu"), "vision_config: hidden_act is 'gelu', wanted 'silu'"),
        (dict(text_config__use_sliding_window=True), "use_sliding_window is True, wanted False"),
        (dict(text_config__rope_scaling={"type": "yarn", "factor": 4.0}), "wanted mrope_section"),
        (dict(text_config__rope_scaling={"mrope_section": [1, 1, 2]}), "sum to half the head dim, 3"),
        (dict(text_config__num_key_value_heads=3), "wanted each a multiple of the next"),
        (dict(text_config__layer_types=["sliding_attention"]), "wanted full_attention everywhere"),
        (dict(text_config=3), "text_config is 3, wanted an object"),
        (dict(text_config__rope_scaling="x"), "rope_scaling is 'x', wanted mrope_section"),
        (dict(text_config__layer_types=3), "layer_types is 3, wanted full_attention everywhere"),
        (dict(hidden_size=32), "hidden_size differ from those in text_config"),
        (dict(quantization_config={}), "unknown keys: quantization_config"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vision_language_config(altered(**changes), "text_encoder/config.json")


def test_text_keys_may_stand_flat():
    raw = altered()
    nested = raw.pop("text_config")
    assert vision_language_config({**raw, **nested}, "flat") == vision_language_config(altered(), "nested")
