"""The key tables and configs of the official checkpoints: names and shapes at full size, on meta."""

import json
from pathlib import Path

import pytest
import torch

from qwenedit.family import VARIANTS
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.networks.vae import VAEConfig
from qwenedit.sampling.scheduler import FlowMatchScheduler
from qwenedit.weights.configs import config_from, network_config, vision_language_config
from qwenedit.weights.keys import NETWORKS, official_to_ours, ours_to_official

DATA = Path(__file__).parents[1] / "data"
CONFIGS = json.loads((DATA / "official_configs.json").read_text())
LAYERED = "Qwen-Image-Layered"


def official_tensors(component, model="Qwen-Image-Edit-2511"):
    """Names and shapes; of Layered, those of the others with what it has of its own."""
    file = {"transformer": "transformer", "vae": "vae_rgb", "text_encoder": "text_encoder_hub"}[component]
    tensors = json.loads((DATA / "keys" / f"{file}.json").read_text())
    if model == LAYERED:
        tensors |= json.loads((DATA / "keys" / "layered.json").read_text()).get(component, {})
    return tensors


def full_size(component, model="Qwen-Image-Edit-2511"):
    raw = CONFIGS[model][f"{component}/config.json"]
    if component == "text_encoder":
        config = vision_language_config(raw, component)
    else:
        config = config_from(MMDiTConfig if component == "transformer" else VAEConfig, raw, component)
    with torch.device("meta"):
        return NETWORKS[component].module(config)


@pytest.mark.parametrize("model", ["Qwen-Image-Edit-2511", LAYERED])
@pytest.mark.parametrize("component", NETWORKS)
def test_the_table_is_a_bijection_onto_the_official_tensors(component, model):
    network = NETWORKS[component]
    official = official_tensors(component, model)
    used = {key: shape for key, shape in official.items() if key not in network.skipped}
    assert set(official) - set(used) == set(network.skipped)
    ours = {name: list(x.shape) for name, x in full_size(component, model).state_dict().items()}
    renamed = {key: official_to_ours(network.table, key) for key in used}
    assert sorted(renamed.values()) == sorted(ours)  # onto, and no two to one
    assert all(ours[name] == used[key] for key, name in renamed.items())
    assert all(ours_to_official(network.table, name) == key for key, name in renamed.items())


def test_the_naming_of_transformers_5_is_the_same_tensors():
    network = NETWORKS["text_encoder"]
    hub, other = (
        json.loads((DATA / "keys" / f"text_encoder_{name}.json").read_text())
        for name in ("hub", "transformers5")
    )
    assert set(other) & set(hub) == set(network.skipped)  # everything else has another name
    assert {network.hub_key(key): shape for key, shape in other.items()} == hub
    assert all(network.hub_key(key) == key for key in hub)


def test_every_rule_of_every_table_is_used():
    for component, network in NETWORKS.items():
        official = official_tensors(component, LAYERED)
        for rule in network.table:
            assert any(official_to_ours((rule,), key) for key in official), (
                f"{component}: {rule} renames nothing"
            )


def test_unknown_names_are_unknown():
    table = NETWORKS["transformer"].table
    assert official_to_ours(table, "transformer_blocks.0.attn.to_q.weight_scale") is None
    assert official_to_ours(table, "transformer_blocks.x.attn.to_q.weight") is None
    with pytest.raises(KeyError):
        ours_to_official(table, "blocks.0.attn.q.weight")


@pytest.mark.parametrize("model", CONFIGS)
def test_every_official_config_is_read(tmp_path, model):
    for name, raw in CONFIGS[model].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(raw))
    transformer, vae = network_config(tmp_path, "transformer"), network_config(tmp_path, "vae")
    assert transformer.zero_cond_t == (model == "Qwen-Image-Edit-2511")
    assert transformer.use_additional_t_cond == transformer.use_layer3d_rope == (model == LAYERED)
    assert transformer.num_layers == 60
    assert vae.base_dim == 96
    assert vae.input_channels == (4 if model == LAYERED else 3)
    assert network_config(tmp_path, "text_encoder").text_config.num_hidden_layers == 28
    scheduler = config_from(
        FlowMatchScheduler, CONFIGS[model]["scheduler/scheduler_config.json"], "scheduler"
    )
    assert scheduler.shift_terminal == (None if model == LAYERED else 0.02)
    assert scheduler.time_shift_type == ("linear" if model == LAYERED else "exponential")
    assert VARIANTS[CONFIGS[model]["model_index.json"]["_class_name"]].layered == (model == LAYERED)


BASE = CONFIGS["Qwen-Image-Edit"]["transformer/config.json"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": "60"}, r"num_layers is '60', wanted int"),
        ({"num_layers": True}, r"num_layers is True, wanted int"),
        ({"axes_dims_rope": [16, 56]}, r"axes_dims_rope is \[16, 56\], wanted 3 values"),
        ({"axes_dims_rope": [16, 56, 55]}, "sum to attention_head_dim 128"),
        ({"guidance_embeds": True}, "config.json: guidance_embeds is True, wanted False"),
        ({"use_layer3d_rope": 1}, "use_layer3d_rope is 1, wanted bool"),
        ({"new_key": 1, "another": 2}, "has unknown keys: another, new_key"),
        ({"num_layers": None}, "num_layers is None"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from(MMDiTConfig, {**BASE, **changes}, "config.json")


def test_missing_and_inert_keys():
    with pytest.raises(ValueError, match=r"config.json lacks num_layers, joint_attention_dim"):
        short = {k: v for k, v in BASE.items() if k not in ("num_layers", "joint_attention_dim")}
        config_from(MMDiTConfig, short, "config.json")
    inert = {"pooled_projection_dim": 768, "use_layer3d_rope": False, "_name_or_path": "x"}
    assert config_from(MMDiTConfig, {**BASE, **inert}, "c") == config_from(MMDiTConfig, BASE, "c")
