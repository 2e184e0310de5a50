"""LoRAs that train: which layers, what starts, what gets gradients, and files in every layout."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import qwenedit
from qwenedit import mini
from qwenedit.instruments.inversion import picture_latents
from qwenedit.networks.low_rank import LowRankLinear
from qwenedit.training.conventions import convention
from qwenedit.training.loss import TrainingBatch, flow_matching_loss, freeze_unreached
from qwenedit.weights.lora_files import read_lora
from qwenedit.weights.lora_saving import LAYOUTS
from qwenedit.weights.lora_targets import TARGETS, linear_layers
from tests.test_lora import LAYERS, official, state

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
BLOCKS = 6
# As the trainers list them: ends of official names, in every block.
CHOICES = {
    "attention": [f"attn.{name}" for name in ATTENTION],
    "diffusers": ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"],
    "musubi": [*(f"attn.{name}" for name in ATTENTION), *MLP],
    "diffsynth": [
        *(f"attn.{name}" for name in ATTENTION),
        "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
    ],
    "ai_toolkit": [*(f"attn.{name}" for name in ATTENTION), *MLP, "img_mod.1", "txt_mod.1"],
}  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe():
    return qwenedit.load(device="cpu", progress=False)


@pytest.fixture(scope="module")
def conditioning():
    pipe = qwenedit.load(device="cpu", progress=False)
    clean, _ = picture_latents(pipe, Image.open(mini.EXAMPLE))
    return pipe.condition(Image.open(mini.EXAMPLE), "make the circle red", negative_prompt=None), clean


def batch(pipe, conditioning, seed=1):
    given, clean = conditioning
    levels = convention("qwenedit").levels
    return TrainingBatch.draw(given, clean.to(pipe.dtype), seeded(seed), levels)


def trained(pipe, conditioning, steps=3, **options):
    """A LoRA after some steps; only a few layers, for speed, unless given others."""
    name = pipe.add_lora(**{"rank": 4, "alpha": 6.0, "generator": seeded(), **options})
    freeze_unreached(pipe.mmdit)
    optimiser = torch.optim.AdamW(
        [x for x in pipe.lora_parameters(name).values() if x.requires_grad], lr=1e-2
    )
    losses = []
    for _ in range(steps):
        loss = flow_matching_loss(pipe, batch(pipe, conditioning))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return name, losses


def velocity(pipe, conditioning):
    with torch.no_grad():
        return next(iter(pipe.steps(conditioning[0], generator=seeded(), true_cfg_scale=1.0))).cond


@pytest.mark.parametrize("targets", CHOICES)
def test_targets_are_the_trainers_layers(pipe, targets):
    pipe.add_lora(rank=1, targets=targets)
    wanted = {f"transformer_blocks.{n}.{end}" for n in range(BLOCKS) for end in CHOICES[targets]}
    changed = {path for path, module in pipe.mmdit.named_modules() if isinstance(module, LowRankLinear)}
    assert {official(path) for path in changed} == wanted
    assert CHOICES.keys() == TARGETS.keys()


def test_a_pattern_matches_whole_official_names(pipe):
    pipe.add_lora(targets=r"transformer_blocks\.[24]\.attn\.to_q|proj_out|time_text_embed.*linear_1")
    layers = {path.rpartition(".")[0] for path in pipe.lora_parameters()}
    assert layers == {"blocks.2.attn.img_q", "blocks.4.attn.img_q", "proj_out", "time_embed.linear_1"}


def test_it_starts_without_effect_and_as_peft_draws(pipe, conditioning):
    plain = velocity(pipe, conditioning)
    name = pipe.add_lora(rank=8, alpha=4, generator=seeded())
    assert name == "lora" and pipe.loras == {"lora": 1.0}
    parameters = pipe.lora_parameters()
    assert len(parameters) == 2 * 8 * BLOCKS
    for path, x in parameters.items():
        layer = pipe.mmdit.get_submodule(path.rpartition(".")[0]).base
        if path.endswith(".up"):
            assert x.shape == (layer.out_features, 8) and not x.any()
        else:  # Kaiming's bound is sqrt(6 / (1 + 5) / inputs); of a uniform distribution
            bound = 1 / math.sqrt(layer.in_features)
            assert x.shape == (8, layer.in_features) and x.abs().max() <= bound
            assert abs(float(x.detach().std()) * math.sqrt(3) / bound - 1) < 5 / math.sqrt(x.numel())
    assert torch.equal(velocity(pipe, conditioning), plain)
    other = qwenedit.load(device="cpu", progress=False)
    other.add_lora("again", rank=8, alpha=4, generator=seeded())
    assert all(torch.equal(x, parameters[path]) for path, x in other.lora_parameters().items())


def test_only_its_parameters_get_gradients_and_training_changes_only_them(pipe, conditioning):
    before = {key: x.clone() for key, x in pipe.mmdit.state_dict().items()}
    plain = velocity(pipe, conditioning)
    pipe.mmdit.requires_grad_(True)
    name, losses = trained(pipe, conditioning, steps=6)
    wanting = {path for path, x in pipe.mmdit.named_parameters() if x.requires_grad}
    assert all(".held.0." in path for path in wanting) and len(wanting) == 2 * (8 * BLOCKS - 1)
    assert not any("blocks.5.attn.txt_out" in path for path in wanting)  # which no gradient reaches
    assert all(pipe.mmdit.get_parameter(path).grad is not None for path in wanting)
    assert losses[-1] < 0.9 * losses[0], losses
    assert not torch.equal(velocity(pipe, conditioning), plain)
    pipe.disable_lora()
    assert torch.equal(velocity(pipe, conditioning), plain)
    pipe.unload_lora_weights(name)
    after = pipe.mmdit.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[key]) for key, x in before.items())


def test_what_is_not_frozen_gets_a_gradient_with_every_choice_of_layers(pipe, conditioning):
    for targets, unreached in (("diffusers", 0), ("musubi", 3), ("ai_toolkit", 3), (r".*", 3)):
        name = pipe.add_lora(rank=1, targets=targets, generator=seeded())
        freeze_unreached(pipe.mmdit)
        flow_matching_loss(pipe, batch(pipe, conditioning)).backward()
        parameters = pipe.lora_parameters(name).values()
        assert all((x.grad is not None) == x.requires_grad for x in parameters)
        assert sum(not x.requires_grad for x in parameters) == 2 * unreached
        pipe.unload_lora_weights(name)


def test_beside_bfloat16_weights_it_is_float32_and_learns(pipe, conditioning):
    pipe.to(torch.bfloat16)
    name, losses = trained(pipe, conditioning, steps=6)
    assert {x.dtype for x in pipe.lora_parameters(name).values()} == {torch.float32}
    assert losses[-1] < 0.9 * losses[0], losses
    assert velocity(pipe, conditioning).dtype == torch.bfloat16


def test_checkpointing_gives_the_same_gradients(pipe, conditioning):
    found = []
    pipe.add_lora(rank=4, dropout=0.3, generator=seeded())
    pipe.mmdit.train()
    with torch.no_grad():
        for path, x in pipe.lora_parameters().items():
            x.add_(0.01 * path.endswith("up"))
    for checkpointing in (False, True):
        pipe.mmdit.checkpointing = checkpointing
        torch.manual_seed(5)
        flow_matching_loss(pipe, batch(pipe, conditioning)).backward()
        found.append([x.grad for x in pipe.lora_parameters().values() if x.grad is not None])
        pipe.mmdit.zero_grad()
    assert len(found[0]) > 90 and all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_dropout_is_of_the_inputs_and_in_training_mode_only(pipe):
    pipe.add_lora(rank=4, alpha=6, dropout=0.5, targets="proj_out")
    layer = pipe.mmdit.proj_out
    (change,) = layer.changes
    torch.nn.init.normal_(change.up)
    x = torch.randn(3, layer.base.in_features)
    plain = change.up @ change.down * 1.5
    assert torch.allclose(layer(x) - layer.base(x), x @ plain.T, atol=1e-5)
    pipe.mmdit.train()
    torch.manual_seed(1)
    got = layer(x) - layer.base(x)
    torch.manual_seed(1)
    kept = (torch.nn.functional.dropout(torch.ones_like(x), 0.5)) * x
    assert torch.allclose(got, kept @ plain.T, atol=1e-5) and not torch.allclose(got, x @ plain.T, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_comes_back_bit_by_bit(pipe, conditioning, tmp_path, layout, dtype):
    pipe.to(dtype)
    name, _ = trained(pipe, conditioning, targets="ai_toolkit")
    pipe.save_lora_weights(tmp_path / "mine.safetensors", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    deltas = read_lora(tmp_path / "mine.safetensors", pipe.mmdit)
    for path, x in pipe.lora_parameters(name).items():
        layer, _, part = path.rpartition(".")
        assert torch.equal(getattr(deltas[layer], part), x) and deltas[layer].factor == 1.5
    assert len(deltas) == 14 * BLOCKS
    with_it = velocity(pipe, conditioning)
    again = qwenedit.load(device="cpu", progress=False, dtype=dtype)
    again.load_lora_weights(tmp_path / "mine.safetensors")
    if dtype == torch.float32:  # a loaded LoRA runs in the weights' dtype
        assert torch.equal(velocity(again, conditioning), with_it)


def test_the_keys_of_each_layout(pipe, tmp_path):
    pipe.add_lora(rank=2, alpha=3, targets=r"transformer_blocks\.0\.attn\.to_out\.0|proj_out", dropout=0.1)
    keys = {}
    for layout in LAYOUTS:
        pipe.save_lora_weights(tmp_path / layout, layout=layout)
        keys[layout] = sorted(load_file(tmp_path / layout))
    block = "transformer_blocks.0.attn.to_out.0"
    assert keys["diffusers"] == [
        f"transformer.{name}.lora_{part}.weight" for name in ("proj_out", block) for part in "AB"
    ]
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert keys["comfyui"] == [
        f"diffusion_model.{name}.{part}" for name in ("proj_out", block) for part in parts
    ]
    flat = ("lora_unet_proj_out", "lora_unet_transformer_blocks_0_attn_to_out_0")
    assert keys["kohya"] == [f"{name}.{part}" for name in flat for part in parts]
    with safe_open(tmp_path / "diffusers", framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 2 and config["transformer.lora_alpha"] == 3
    assert config["transformer.target_modules"] == [block, "proj_out"]
    assert config["transformer.lora_dropout"] == 0.1 and config["transformer.peft_type"] == "LORA"
    assert load_file(tmp_path / "kohya")[f"{flat[0]}.alpha"] == 3


def test_a_loaded_lora_is_saved_too_with_its_own_ranks_and_alphas(pipe, tmp_path):
    generator = seeded()
    tensors = {}
    for number, name in enumerate(LAYERS, start=1):
        layer = pipe.mmdit.get_submodule(name)
        tensors[f"{official(name)}.lora_A.weight"] = torch.randn(
            number, layer.in_features, generator=generator
        )
        tensors[f"{official(name)}.lora_B.weight"] = torch.randn(
            layer.out_features, number, generator=generator
        )
        tensors[f"{official(name)}.alpha"] = torch.tensor(0.3 * number)
    pipe.load_lora_weights(tensors, adapter_name="mixed", scale=0.5)
    wanted = read_lora(tensors, pipe.mmdit)
    for layout in LAYOUTS:
        pipe.save_lora_weights(tmp_path / layout, "mixed", layout=layout)
        got = read_lora(tmp_path / layout, pipe.mmdit)
        assert got.keys() == wanted.keys()
        for name, delta in got.items():
            assert torch.equal(delta.down, wanted[name].down) and torch.equal(delta.up, wanted[name].up)
            assert delta.factor == pytest.approx(wanted[name].factor, rel=1e-6)


def test_what_layouts_hold_of_dora_bias_and_lokr(pipe, tmp_path):
    layer = pipe.mmdit.proj_out
    key = "transformer.proj_out"
    lora = {
        f"{key}.lora_A.weight": torch.randn(2, layer.in_features, generator=seeded()),
        f"{key}.lora_B.weight": torch.randn(layer.out_features, 2, generator=seeded(1)),
    }
    magnitude = torch.rand(layer.out_features) + 0.5
    bias = torch.rand(layer.out_features)
    kinds = {
        "dora": {**lora, f"{key}.lora_magnitude_vector": magnitude},
        "bias": {**lora, f"{key}.lora_B.bias": bias},
        "lokr": {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": layer.weight[::2, ::2].clone()},
    }
    for name, tensors in kinds.items():
        pipe.load_lora_weights(tensors, adapter_name=name)
    for layout in LAYOUTS:
        pipe.save_lora_weights(tmp_path / "dora", "dora", layout=layout)
        assert torch.equal(read_lora(tmp_path / "dora", pipe.mmdit)["proj_out"].magnitude, magnitude)
        with pytest.raises(
            ValueError, match="'lokr' changes proj_out by a Kronecker product, which no layout"
        ):
            pipe.save_lora_weights(tmp_path / "lokr", "lokr", layout=layout)
    pipe.save_lora_weights(tmp_path / "bias", "bias")
    assert torch.equal(read_lora(tmp_path / "bias", pipe.mmdit)["proj_out"].bias, bias)
    for layout in ("comfyui", "kohya"):
        with pytest.raises(
            ValueError, match="'bias' has a bias of lora_B, which only the layout 'diffusers'"
        ):
            pipe.save_lora_weights(tmp_path / "no", "bias", layout=layout)
    plain = {name.replace("proj_out", "img_in"): x for name, x in lora.items()}
    plain["transformer.img_in.lora_A.weight"] = torch.ones(2, pipe.mmdit.img_in.in_features)
    plain["transformer.img_in.lora_B.weight"] = torch.ones(pipe.mmdit.img_in.out_features, 2)
    for part in ("dora", "bias"):
        pipe.load_lora_weights({**kinds[part], **plain}, adapter_name=f"some {part}")
        with pytest.raises(ValueError, match="in some layers only, which the layout 'diffusers' cannot hold"):
            pipe.save_lora_weights(tmp_path / "no", f"some {part}")
    assert {path.name for path in tmp_path.iterdir()} == {"dora", "bias"}


def test_two_loras_one_loaded_one_trained(pipe, conditioning, tmp_path):
    """The base of a new LoRA may have another one; names, switching and files stay apart."""
    matrices = {}
    for name in LAYERS:
        layer = pipe.mmdit.get_submodule(name)
        matrices[name] = torch.randn(2, layer.in_features) / 9, torch.randn(layer.out_features, 2) / 9
    pipe.load_lora_weights(state(matrices, "{module}.{part}down"), adapter_name="style")
    pipe.add_lora("mine", targets="musubi", rank=2)
    assert pipe.loras == {"style": 0.0, "mine": 1.0} and pipe.add_lora() == "lora"
    pipe.set_adapters(["style", "mine"])
    assert not any(x.requires_grad for x in pipe.lora_parameters("style").values())
    assert pipe.lora_parameters("style").keys() == {
        f"{name}.{part}" for name in LAYERS for part in ("down", "up")
    }
    pipe.save_lora_weights(tmp_path / "style.safetensors", "style")
    assert read_lora(tmp_path / "style.safetensors", pipe.mmdit).keys() == matrices.keys()
    with pytest.raises(
        ValueError, match="2 LoRAs are active, so adapter_name is wanted; loaded are style, mine"
    ):
        pipe.save_lora_weights(tmp_path / "x.safetensors")
    # a loaded one trains further, once its parameters require a gradient
    pipe.set_adapters("style")
    pipe.mmdit.requires_grad_(False)
    for x in pipe.lora_parameters().values():
        x.requires_grad_(True)
    flow_matching_loss(pipe, batch(pipe, conditioning)).backward()
    assert all(x.grad is not None for x in pipe.lora_parameters().values())


def test_fused_it_equals_apart(pipe, conditioning):
    trained(pipe, conditioning)
    apart = velocity(pipe, conditioning)
    pipe.fuse_lora()
    assert pipe.loras == {} and (velocity(pipe, conditioning) - apart).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"targets": "to_q"},
            r"targets are 'to_q', which matches no layer of \d+, wanted one of attention, diff",
        ),
        ({"targets": "attn.("}, r"targets are 'attn\.\(' \(.*\), wanted one of attention"),
        ({"targets": ["to_q"]}, r"targets are .*to_q.*, wanted one of attention"),
        ({"rank": 0}, "rank is 0, wanted a whole number of at least 1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": math.nan}, "alpha is nan, wanted a finite number"),
        ({"alpha": 0}, r"alpha is 0\.0, wanted above 0"),
        ({"generator": 3}, r"generator is 3, wanted a torch\.Generator of the CPU"),
        ({"dropout": 1.0}, "dropout is 1.0, wanted at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"adapter_name": "two\nlines"}, "wanted a name of printable characters"),
    ],
)
def test_bad_arguments_change_nothing(edit, options, message):
    modules = dict(edit.mmdit.named_modules())
    with pytest.raises(ValueError, match=message):
        edit.add_lora(**options)
    assert dict(edit.mmdit.named_modules()) == modules and edit.loras == {}


def test_bad_files_and_names(pipe, tmp_path):
    with pytest.raises(ValueError, match="0 LoRAs are active, so adapter_name is wanted; loaded are none"):
        pipe.lora_parameters()
    pipe.add_lora("a", rank=1)
    with pytest.raises(ValueError, match="'a' is loaded already"):
        pipe.add_lora("a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'r'"):
        pipe.add_lora(r=4)
    with pytest.raises(ValueError, match="no LoRA called 'b'"):
        pipe.save_lora_weights(tmp_path / "b.safetensors", "b")
    with pytest.raises(ValueError, match="layout is 'webui', wanted one of diffusers, comfyui, kohya"):
        pipe.save_lora_weights(tmp_path / "b.safetensors", layout="webui")
    with pytest.raises(ValueError, match="is a folder, wanted the name of a file"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        pipe.save_lora_weights(tmp_path / "no" / "b.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "modes",
    [{"residency": "stage"}, {"residency": "stream"}, {"modulation": "precomputed"}, {"storage": "float8"}],
)
def test_training_wants_weights_that_stay(modes, conditioning):
    pipe = qwenedit.load(device="cpu", progress=False, **modes)
    with pytest.raises(
        ValueError, match=r"add_lora trains beside weights, but .* load with residency='resident'"
    ):
        pipe.add_lora()
    assert pipe.loras == {}
    with torch.no_grad():  # a loss that is only measured runs in every mode
        loss = flow_matching_loss(pipe, batch(pipe, conditioning))
    resident = qwenedit.load(device="cpu", progress=False)
    with torch.no_grad():
        plain = flow_matching_loss(resident, batch(resident, conditioning))
    assert torch.equal(loss, plain) or "storage" in modes


def test_a_new_lora_does_not_hinder_reading_weights_when_needed(pipe, conditioning):
    """It is kept beside weights that come from the files, as a loaded one is."""
    trained(pipe, conditioning)
    with_it = velocity(pipe, conditioning)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(velocity(pipe, conditioning), with_it)


def test_every_linear_layer_has_its_official_name(edit):
    assert len(linear_layers(edit.mmdit)) == 14 * BLOCKS + 6
