"""LoRA files in every layout change the weights that they must, and leave no trace when they go."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import qwenedit
from qwenedit import mini
from qwenedit.networks.mmdit import KEY_TABLE
from qwenedit.weights.keys import ours_to_official
from qwenedit.weights.lora_files import read_lora
from tests.support import EPS, assert_as_close_as, assert_close

LAYERS = ("blocks.0.attn.img_q", "blocks.1.attn.img_out", "blocks.1.attn.txt_out", "blocks.2.img_mlp.up",
          "blocks.3.txt_mlp.down", "blocks.4.img_mod.linear", "proj_out")  # fmt: skip
RANK = 4


def official(name):
    return ours_to_official(KEY_TABLE, f"{name}.weight").removesuffix(".weight")


@pytest.fixture
def pipe():
    return qwenedit.load(device="cpu", progress=False)


@pytest.fixture(scope="module")
def matrices():
    """layer -> down, up"""
    mmdit = qwenedit.load(device="cpu", progress=False, text_encoder=False).mmdit
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in LAYERS:
        layer = mmdit.get_submodule(name)
        down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
        made[name] = down, torch.randn(layer.out_features, RANK, generator=generator) / 4
    return made


def state(matrices, template, alpha=None, flat=False):
    """A state dict in a layout: `template` has {module} and {part}."""
    words = ("lora_down", "lora_up") if "down" in template else ("lora_A", "lora_B")
    template = template.replace("down", "")
    tensors = {}
    for name, (down, up) in matrices.items():
        module = official(name).replace(".", "_") if flat else official(name)
        for word, x in zip(words, (down, up), strict=True):
            tensors[template.format(module=module, part=word) + ".weight"] = x.clone()
        if alpha is not None:
            tensors[template.partition("{part}")[0].format(module=module) + "alpha"] = alpha.clone()
    return tensors


LAYOUTS = {
    "peft": ("transformer.{module}.{part}", None, False, 1.0),
    "raw peft": ("base_model.model.{module}.{part}.default", None, False, 1.0),
    "ai-toolkit": ("diffusion_model.{module}.{part}", None, False, 1.0),
    "DiffSynth": ("{module}.{part}.default", None, False, 1.0),
    "DiffSynth with its prefix": ("pipe.dit.{module}.{part}.default", None, False, 1.0),
    "Lightning": ("{module}.{part}down", torch.tensor(8.0, dtype=torch.bfloat16), False, 8 / RANK),
    "Lightning fp32": ("{module}.{part}down", torch.tensor(8.0, dtype=torch.float64), False, 8 / RANK),
    "ComfyUI": ("diffusion_model.{module}.{part}down", torch.tensor(2.0), False, 2 / RANK),
    "kohya": ("lora_unet_{module}.{part}down", torch.tensor(1.0), True, 1 / RANK),
    "LyCORIS's names": ("lycoris_{module}.{part}down", torch.tensor([1]), True, 1 / RANK),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_changes(pipe, matrices, tmp_path, layout):
    template, alpha, flat, factor = LAYOUTS[layout]
    save_file(state(matrices, template, alpha, flat), tmp_path / "lora.safetensors")
    deltas = read_lora(tmp_path / "lora.safetensors", pipe.mmdit)
    assert deltas.keys() == matrices.keys()
    for name, (down, up) in matrices.items():
        assert torch.equal(deltas[name].down, down) and torch.equal(deltas[name].up, up)
        assert deltas[name].factor == factor


def test_alpha_from_the_metadata_of_diffusers(pipe, matrices, tmp_path):
    config = {
        "transformer.lora_alpha": 8,
        "transformer.r": RANK,
        "transformer.alpha_pattern": {"proj_out": 2},
    }
    for extra, factors in (({}, (2.0, 0.5)), ({"transformer.use_rslora": True}, (4.0, 1.0))):
        metadata = {"lora_adapter_metadata": json.dumps(config | extra)}
        save_file(state(matrices, "transformer.{module}.{part}"), tmp_path / "x.safetensors", metadata)
        deltas = read_lora(tmp_path / "x.safetensors", pipe.mmdit)
        assert (deltas[LAYERS[0]].factor, deltas["proj_out"].factor) == factors


def run(pipe):
    condition = pipe.condition(picture(), "make the circle red")
    with torch.no_grad():
        return next(iter(pipe.steps(condition, generator=torch.Generator().manual_seed(0)))).cond


def picture():
    return Image.open(mini.EXAMPLE)


def test_kept_apart_it_adds_up_and_leaves_no_trace(pipe, matrices, tmp_path):
    modules = dict(pipe.mmdit.named_modules())
    plain, keys = run(pipe), list(pipe.mmdit.state_dict())
    lora = state(matrices, "{module}.{part}down", torch.tensor(2.0))
    save_file(lora, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors", scale=0.5)
    half = run(pipe)
    assert pipe.loras == {"style": 0.5}
    pipe.load_lora_weights(lora, adapter_name="again", scale=0.5)
    assert pipe.loras == {"style": 0.0, "again": 0.5} and torch.equal(run(pipe), half)
    pipe.set_adapters(["style", "again"], [0.5, 0.5])
    whole = run(pipe)
    assert not torch.equal(plain, half) and not torch.equal(half, whole)

    pipe.set_adapters("style", 1.0)
    assert pipe.loras == {"style": 1.0, "again": 0.0}
    assert (run(pipe) - whole).abs().max() < 1e-4  # half and half is one
    pipe.set_adapters(["style", "again"], [0.0, 0.0])
    assert torch.equal(run(pipe), plain)

    pipe.unload_lora_weights("again")
    assert pipe.loras == {"style": 0.0}
    pipe.unload_lora_weights()
    assert pipe.loras == {} and torch.equal(run(pipe), plain)
    assert list(pipe.mmdit.state_dict()) == keys
    assert all(modules[name] is module for name, module in pipe.mmdit.named_modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_kept_apart_and_the_formula(pipe, matrices, dtype):
    pipe.to(dtype)
    conditioning = pipe.condition(picture(), "make the circle red")
    latents = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    def velocity():
        as_weights = conditioning.to(dtype=pipe.dtype), latents.to(pipe.dtype)
        with torch.no_grad():
            return next(iter(pipe.steps(as_weights[0], latents=as_weights[1]))).cond

    before = pipe.mmdit.get_submodule(LAYERS[0]).weight.clone()
    lora = state(matrices, "transformer.{module}.{part}", None)
    pipe.load_lora_weights(lora, scale=0.25)
    pipe.load_lora_weights(lora, scale=-0.1)
    pipe.set_adapters(["lora-1", "lora-2"], [0.25, -0.1])
    assert pipe.loras == {"lora-1": 0.25, "lora-2": -0.1}
    apart = velocity()
    exact = pipe.to(torch.float64) and velocity()
    pipe.to(dtype)
    pipe.fuse_lora()
    assert pipe.loras == {} and isinstance(pipe.mmdit.get_submodule(LAYERS[0]), nn.Linear)
    assert_as_close_as(velocity(), apart, exact)
    down, up = (x.to(dtype).float() for x in matrices[LAYERS[0]])
    wanted = before.float() + 0.25 * up @ down - 0.1 * up @ down
    made = pipe.mmdit.get_submodule(LAYERS[0]).weight
    # Here the sum is made in float32, too, in another order, and the weight is rounded once.
    assert_close(made, wanted, torch.finfo(dtype).eps / 2 + 8 * EPS)
    with pytest.raises(ValueError, match="a fused one is for good"):
        pipe.unload_lora_weights("lora-1")


def test_what_is_no_lora_of_this_model_is_listed_and_nothing_changes(pipe, matrices, tmp_path):
    good = state(matrices, "{module}.{part}down", torch.tensor(2.0))
    module = official(LAYERS[0])
    wrong = {
        "transformer_blocks.99": {"transformer_blocks.99.attn.to_q.lora_down.weight": torch.ones(1, 1)},
        "lokr_t2": {f"{module}.lokr_t2": torch.ones(1, 1)},  # of a convolution
        "diff_b": {f"{module}.diff_b": torch.ones(1)},
        f"{module}.lora_A.weight": {f"{module}.lora_A.weight": torch.ones(1, 1)},  # a second down
    }
    plain = run(pipe)
    for message, extra in wrong.items():
        with pytest.raises(ValueError, match=f"1 of {len(good) + 1} tensors are not: .*{message}"):
            pipe.load_lora_weights({**good, **extra})
    for cut, message in (
        ({**good, f"{module}.lokr_w1": torch.ones(1, 1)}, "is changed in several ways: down, lokr_w1, up"),
        ({**good, f"{module}.dora_scale": torch.ones(1)}, r"magnitude of shape \(1,\)"),
        ({**good, f"{module}.lora_B.bias": torch.ones(1)}, r"a bias of shape \(1,\)"),
        ({k: x for k, x in good.items() if "up" not in k}, "has no up matrix"),
        ({**good, f"{module}.lora_up.weight": torch.ones(3, RANK)}, r"are .* and \(3, 4\), wanted"),
        ({**good, f"{module}.alpha": torch.ones(2)}, "wanted one number"),
        ({}, "it has none"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(cut)
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "more.safetensors").write_text("hello")
    for source, options, message in (
        (tmp_path / "gone.safetensors", {}, "no such file"),
        (tmp_path, {}, "give weight_name"),
        (tmp_path, {"weight_name": "gone.safetensors"}, "no such LoRA"),
        (tmp_path / "text.safetensors", {}, "too short for a safetensors file"),
        ("somebody/style", {"weight_name": "x.safetensors"}, "no LoRA x.safetensors at somebody/style"),
        (good, {"scale": math.inf}, "wanted a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source, **options)
    assert pipe.loras == {} and torch.equal(run(pipe), plain)


def test_names(pipe, matrices):
    lora = state(matrices, "{module}.{part}down")
    pipe.load_lora_weights(lora, adapter_name="a")
    with pytest.raises(ValueError, match="'a' is loaded already"):
        pipe.load_lora_weights(lora, adapter_name="a")
    with pytest.raises(ValueError, match="no LoRA called 'b': loaded are a"):
        pipe.set_adapters("b")
    with pytest.raises(ValueError, match="2 adapter_weights for 1"):
        pipe.set_adapters(["a"], [1.0, 2.0])


def test_gradients_and_moves(pipe, matrices):
    """Buffers follow the module; base weights and inputs keep their gradients."""
    pipe.load_lora_weights(state(matrices, "{module}.{part}down"))
    pipe.to(torch.float64)
    layer = pipe.mmdit.get_submodule(LAYERS[0])
    assert layer.changes[0].down.dtype == torch.float64
    x = torch.randn(2, layer.base.in_features, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    down, up = (m.double() for m in matrices[LAYERS[0]])
    wanted = layer.base.weight.sum(0) + up.sum(0) @ down
    assert torch.allclose(x.grad, wanted.expand_as(x))
