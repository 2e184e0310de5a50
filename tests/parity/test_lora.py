"""LoRAs against diffusers with peft: files in both directions, and one training step."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import qwenedit
from qwenedit.networks.low_rank import Delta, LowRank, LowRankLinear
from qwenedit.training.conventions import CONVENTIONS
from qwenedit.training.loss import flow_matching_loss
from qwenedit.weights.lora_saving import LAYOUTS
from tests import oracles
from tests.parity.test_training import drawn, our_batch, their_step
from tests.support import FP32, assert_close
from tests.test_lora import official
from tests.tiny import checkpoint, reference_pipeline

peft = oracles.peft()

CLOSE = 1e-6
EVERYWHERE = r"transformer_blocks\..*|proj_out|img_in|txt_in|norm_out\.linear|time_text_embed\..*"
GRIDS = ((1, 2, 3), (1, 3, 2))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ours(kind, targets=EVERYWHERE, **options):
    """A pipeline with a LoRA that does something."""
    pipe = qwenedit.load(checkpoint(kind), device="cpu", progress=False)
    pipe.add_lora("mine", rank=4, alpha=6.0, targets=targets, generator=seeded(), **options)
    with torch.no_grad():
        for x in pipe.lora_parameters().values():
            x.add_(torch.randn(x.shape, generator=seeded(1)), alpha=0.1)
    return pipe


def inputs(layered=False):
    generator = seeded(2)
    img = torch.randn(2, 12, 64, generator=generator)
    txt = torch.randn(2, 5, 24, generator=generator)
    return img, txt, torch.tensor([0.3, 0.8]), torch.zeros(2, dtype=torch.long) if layered else None


@torch.no_grad()
def our_velocity(pipe):
    img, txt, timestep, addition = inputs(pipe.variant.layered)
    return pipe.mmdit(img, txt, timestep, GRIDS, None, addition)


@torch.no_grad()
def their_velocity(transformer, layered=False):
    img, txt, timestep, addition = inputs(layered)
    extra = {"additional_t_cond": addition} if layered else {}
    return transformer(
        hidden_states=img, encoder_hidden_states=txt, timestep=timestep, img_shapes=[list(GRIDS)] * 2,
        encoder_hidden_states_mask=torch.ones(txt.shape[:2], dtype=torch.bool), return_dict=False, **extra,
    )[0]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["edit", "layered"])
def test_diffusers_loads_our_files(kind, layout, tmp_path):
    pipe, reference = ours(kind), reference_pipeline(checkpoint(kind))
    plain = their_velocity(reference.transformer, kind == "layered")
    pipe.save_lora_weights(tmp_path / "lora.safetensors", layout=layout)
    reference.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    got = their_velocity(reference.transformer, kind == "layered")
    wanted = our_velocity(pipe)
    assert (got - plain).abs().max() > 0.05 * got.abs().max()
    assert_close(wanted, got, FP32)
    (config,) = reference.transformer.peft_config.values()
    if layout == "diffusers":  # the others' alpha is multiplied into the matrices
        assert config.lora_alpha == 6 and config.r == 4
    layers = [name for name, module in reference.transformer.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == len(pipe.lora_parameters()) // 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 3, 4, 5)])
def test_ranks_and_alphas_of_layers_come_along(layout, ranks, tmp_path):
    """Of a LoRA that was loaded from a file of another trainer.

    Where a file has no metadata, diffusers takes one layer's rank for the alpha of all (`get_peft_kwargs`),
    which is wrong for layers of another rank: only the first layout serves it there.
    """
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", progress=False)
    tensors, layers_of_blocks = {}, []
    layers = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "txt_mod.1")
    for rank, name in zip(ranks, layers, strict=True):
        for block in range(2):
            layer = f"transformer_blocks.{block}.{name}"
            out, into = reference_shape(layer)
            tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, into, generator=seeded(rank)) / 4
            tensors[f"{layer}.lora_up.weight"] = torch.randn(out, rank, generator=seeded(rank + 9)) / 4
            tensors[f"{layer}.alpha"] = torch.tensor(1.5 * rank + block)
            layers_of_blocks.append(layer)
    pipe.load_lora_weights(tensors)
    pipe.save_lora_weights(tmp_path / "lora.safetensors", layout=layout)
    reference = reference_pipeline(checkpoint("edit"))
    reference.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    if layout == "diffusers" or len(set(ranks)) == 1:
        assert_close(our_velocity(pipe), their_velocity(reference.transformer), FP32)
    else:
        adapters = [reference.transformer.get_submodule(layer) for layer in layers_of_blocks]
        assert len({one.scaling["default_0"] * one.r["default_0"] for one in adapters}) == 1


def reference_shape(layer):
    weights = reference_pipeline(checkpoint("edit")).transformer.state_dict()
    return tuple(weights[f"{layer}.weight"].shape)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_what_peft_trains_loads_here_and_is_saved_again_for_peft(options, tmp_path):
    reference = reference_pipeline(checkpoint("edit"))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.2"], **options
    )
    reference.transformer.add_adapter(config)
    with torch.no_grad():
        for name, x in reference.transformer.named_parameters():
            if "lora_" in name:
                x.add_(torch.randn(x.shape, generator=seeded(len(name))), alpha=0.1)
    state = peft.get_peft_model_state_dict(reference.transformer)
    metadata = reference.transformer.peft_config["default"].to_dict()
    reference.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
    )
    pipe = qwenedit.load(checkpoint("edit"), device="cpu", progress=False)
    pipe.load_lora_weights(tmp_path)
    wanted = their_velocity(reference.transformer)
    assert_close(our_velocity(pipe), wanted, FP32)

    pipe.save_lora_weights(tmp_path / "again.safetensors")
    theirs, again = (
        load_file(tmp_path / name) for name in ("pytorch_lora_weights.safetensors", "again.safetensors")
    )
    assert theirs.keys() == again.keys() and all(torch.equal(x, again[key]) for key, x in theirs.items())
    other = reference_pipeline(checkpoint("edit"))
    other.load_lora_weights(tmp_path, weight_name="again.safetensors")
    assert_close(their_velocity(other.transformer), wanted, FP32)


def test_the_metadata_has_pefts_keys_and_values(tmp_path):
    pipe = ours("edit", "diffusers", dropout=0.25)
    pipe.save_lora_weights(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        got = json.loads(file.metadata()["lora_adapter_metadata"])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    wanted = {f"transformer.{key}": value for key, value in config.to_dict().items()}
    assert got.pop("transformer.inference_mode") is False
    targets = got.pop("transformer.target_modules")
    assert {name.rpartition("attn.")[2] for name in targets} == set(wanted.pop("transformer.target_modules"))
    assert got.items() <= {**wanted, "transformer.peft_type": "LORA"}.items()


@pytest.mark.parametrize("references", [(), ((1, 3, 2),)])
def test_a_step_gives_pefts_gradients(references):
    """The example's loss with peft's adapter in diffusers' transformer, from the same matrices."""
    pipe = ours("edit", "diffusers")
    transformer = reference_pipeline(checkpoint("edit")).transformer.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    theirs = dict(transformer.named_parameters())
    pairs = {}
    with torch.no_grad():
        for path, x in pipe.lora_parameters().items():
            layer, _, part = path.rpartition(".")
            name = f"{official(layer)}.lora_{'A' if part == 'down' else 'B'}.default.weight"
            theirs[name].copy_(x)
            pairs[path] = x, theirs[name]
    assert len(pairs) == sum(x.requires_grad for x in theirs.values()) == 16

    data, convention = drawn(2, 6, 4, references), CONVENTIONS["diffusers"]
    wanted = their_step(
        transformer, data, "none", torch.cat(data["references"], dim=1) if references else None
    )
    wanted.backward()
    loss = flow_matching_loss(pipe, our_batch(data, convention.levels), convention)
    loss.backward()
    assert_close(loss.detach(), wanted.detach(), CLOSE)
    scale = max(float(x.grad.abs().max()) for _, x in pairs.values())
    for path, (mine, their) in pairs.items():
        assert (mine.grad - their.grad).abs().max() <= CLOSE * scale, path
    assert all(x.grad is None for x in transformer.parameters() if not x.requires_grad)


def test_a_layer_drops_and_rounds_as_pefts_does():
    """In training mode, beside bfloat16 weights, from the same state of torch's generator."""
    base = torch.nn.Linear(24, 8, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.4, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, torch.nn.Sequential(base))[0]
    for adapter in (theirs.lora_A, theirs.lora_B):
        adapter.float()  # as diffusers' example does with `cast_training_params`
        torch.nn.init.normal_(adapter["default"].weight)
    delta = Delta(theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, 1.5)
    mine = LowRankLinear(theirs.base_layer)
    mine.held.append(LowRank("mine", delta, torch.empty(0), dropout=0.4))
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    for mode in (True, False):
        results = []
        for layer in (mine.train(mode), theirs.train(mode)):
            torch.manual_seed(3)
            results.append(layer(x))
        assert results[0].dtype == torch.bfloat16 and torch.equal(*results)
