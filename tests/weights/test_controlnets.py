"""ControlNets' files: what is recognised, where tensors go, and what is refused before weights are read."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import qwenedit
from qwenedit import mini
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet, BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNet, ControlNetConfig
from qwenedit.networks.mmdit import MMDiTConfig
from qwenedit.verify import verify
from qwenedit.weights.configs import config_from
from qwenedit.weights.controlnets import compare_controlnet
from qwenedit.weights.keys import BLOCKWISE_CONTROLNET, CONTROLNET, official_to_ours, ours_to_official
from tests.sparse import no_holes, write_holes
from tests.tiny import checkpoint
from tests.tiny_controlnet import blockwise, controlnet
from tests.weights.test_loading import shard

DATA = Path(__file__).parents[1] / "data"
OFFICIAL = json.loads((DATA / "controlnets.json").read_text())
CONFIGS = OFFICIAL["configs"]
TRANSFORMER = config_from(
    MMDiTConfig,
    json.loads((DATA / "official_configs.json").read_text())["Qwen-Image"]["transformer/config.json"],
    "transformer",
)
FILES = {
    "Qwen-Image-ControlNet-Union": ("controlnet_union", 3.54e9, 1_768_003_584),
    "Qwen-Image-ControlNet-Inpainting": ("controlnet_inpainting", 4.23e9, 2_117_287_424),
}
LOADED = {"official": controlnet, "blockwise": blockwise}


def keys(name):
    return json.loads((DATA / "keys" / f"{name}.json").read_text())


def blockwise_keys(extra):
    width, channels = (official := keys("blockwise_controlnet"))["img_in.weight"]
    return official | {"img_in.weight": [width, channels + extra]}


def load(**options):
    return qwenedit.load(checkpoint("edit"), device="cpu", progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of an inpainting net's folder."""
    return Path(shutil.copytree(controlnet(extra_condition_channels=4), tmp_path / "net"))


@pytest.fixture
def file(tmp_path):
    """A writable copy of a blockwise net's file."""
    return Path(shutil.copy(blockwise(), tmp_path / "model.safetensors"))


@pytest.fixture
def unread(monkeypatch):
    """From here on, no weight may be read."""
    for place in ("assembly.read_networks", "weights.loading._read"):
        monkeypatch.setattr(f"qwenedit.{place}", lambda *_, **__: pytest.fail("weights were read"))


def weights_of(path):
    return path if path.is_file() else next(path.glob("*.safetensors"))


def change_tensors(path, change):
    path = weights_of(path)
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v != "DROP"}))


def is_bijection(network, module, official):
    ours = {name: list(x.shape) for name, x in module.state_dict().items()}
    renamed = {key: official_to_ours(network.table, key) for key in official}
    assert sorted(renamed.values()) == sorted(ours)
    assert all(ours[name] == official[key] for key, name in renamed.items())
    assert all(ours_to_official(network.table, name) == key for key, name in renamed.items())
    for rule in network.table:
        assert any(official_to_ours((rule,), key) for key in official), f"{rule} renames nothing"


# --- the official nets


@pytest.mark.parametrize("name", FILES)
def test_the_table_is_a_bijection_onto_instantxs_tensors(name):
    config = config_from(ControlNetConfig, CONFIGS[name], "config.json")
    with torch.device("meta"):
        is_bijection(CONTROLNET, ControlNet(config), keys(FILES[name][0]))


@pytest.mark.parametrize("name", OFFICIAL["blockwise"])
def test_the_table_is_a_bijection_onto_diffsynths_tensors(name):
    """Whose names and shapes have the hash by which DiffSynth recognises the published file."""
    net = OFFICIAL["blockwise"][name]
    official = blockwise_keys(net["extra_condition_channels"])
    both = [text for key, shape in official.items() for text in (key, f"{key}:{'_'.join(map(str, shape))}")]
    assert hashlib.md5(",".join(sorted(both)).encode()).hexdigest() == net["md5"]
    config = BlockwiseControlNetConfig(
        num_layers=60, width=3072, in_channels=64, extra_condition_channels=net["extra_condition_channels"]
    )
    with torch.device("meta"):
        is_bijection(BLOCKWISE_CONTROLNET, BlockwiseControlNet(config), official)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_an_official_net_is_verified_from_headers(tmp_path, name, with_config):
    if reason := no_holes(tmp_path):
        pytest.skip(reason)
    stem, size, parameters = FILES[name]
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    write_holes(path, keys(stem))
    assert path.stat().st_size == pytest.approx(size, abs=5e6)  # as the hub's page rounds it
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    compared = compare_controlnet(tmp_path if with_config else path, TRANSFORMER)
    assert compared.report.ok and compared.report.parameters == parameters
    assert compared.module.config == config_from(ControlNetConfig, CONFIGS[name], "config.json")


@pytest.mark.parametrize("extra", [0, 4])
def test_a_blockwise_net_is_verified_from_headers(tmp_path, extra):
    if reason := no_holes(tmp_path):
        pytest.skip(reason)
    write_holes(tmp_path / "model.safetensors", blockwise_keys(extra))
    (tmp_path / "configuration.json").write_text('{"framework": "pytorch"}')  # ModelScope's
    for path in (tmp_path, tmp_path / "model.safetensors"):
        compared = compare_controlnet(path, TRANSFORMER)
        assert compared.report.ok and compared.report.tensors == 362
        assert isinstance(compared.module, BlockwiseControlNet)
        assert compared.module.config.condition_channels == 64 + extra


# --- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.parametrize("extra", [0, 4])
def test_every_tensor_is_in_its_place(tmp_path, kind, extra, stored, dtype):
    source = LOADED[kind](extra_condition_channels=extra)
    path = Path((shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name))
    change_tensors(path, lambda tensors: tensors.update({k: x.to(stored) for k, x in tensors.items()}))
    tensors = safetensors.torch.load_file(weights_of(path))
    (net,) = load(controlnet=path, dtype=dtype).controlnets
    table = (CONTROLNET if kind == "official" else BLOCKWISE_CONTROLNET).table
    state = net.state_dict()
    assert len(state) == len(tensors)
    for name, x in state.items():
        assert x.dtype == dtype and torch.equal(x, tensors[ours_to_official(table, name)].to(dtype)), name
    assert not net.training and not any(x.requires_grad for x in net.parameters())
    assert net.config.extra_condition_channels == extra


def test_shards_and_a_file_without_its_config_are_the_same_net(folder):
    (whole,) = load(controlnet=folder).controlnets
    (bare,) = load(controlnet=next(folder.glob("*.safetensors"))).controlnets
    shard(folder.parent, "net")
    (sharded,) = load(controlnet=folder).controlnets
    for net in (bare, sharded):
        assert net.config == whole.config
        assert all(torch.equal(x, whole.state_dict()[name]) for name, x in net.state_dict().items())


def test_links_to_folders_and_files_are_followed(tmp_path, folder, file):
    (tmp_path / "folder").symlink_to(folder)
    (tmp_path / "file.safetensors").symlink_to(file)
    kinds = [
        type(net) for net in load(controlnet=[tmp_path / "folder", tmp_path / "file.safetensors"]).controlnets
    ]
    assert kinds == [ControlNet, BlockwiseControlNet]


def test_nets_are_added_in_order_and_stay_when_one_is_refused(folder, file):
    pipe = load(dtype=torch.bfloat16)
    assert pipe.controlnets == []
    nets = [pipe.load_controlnet(str(folder)), pipe.load_controlnet(file)]
    assert pipe.controlnets == nets and {x.dtype for net in nets for x in net.parameters()} == {
        torch.bfloat16
    }
    for wrong in (controlnet(heads=3), file.parent / "absent", [file]):
        with pytest.raises(ValueError):
            pipe.load_controlnet(wrong)
    assert pipe.controlnets == nets
    pipe.to(torch.float32)
    assert {x.dtype for net in nets for x in net.parameters()} == {torch.float32}


def test_a_net_runs_in_the_transformers_dtype_whatever_its_own(monkeypatch):
    """On an accelerator, where weights keep their stored dtype."""
    monkeypatch.setattr("qwenedit.pipeline.dtype_of", lambda *_: None)
    pipe = qwenedit.load(device="cpu", progress=False)  # the embedded model is stored in bfloat16
    config = json.loads((mini.CHECKPOINT / "transformer/config.json").read_text())
    heads, axes = config["num_attention_heads"], tuple(config["axes_dims_rope"])
    net = pipe.load_controlnet(
        controlnet(heads=heads, axes=axes, joint_attention_dim=config["joint_attention_dim"])
    )
    assert pipe.dtype == torch.bfloat16 == next(net.parameters()).dtype


# --- refused


def others(tmp_path):
    """Files of something else, by what is said of them."""
    lora, flux, canny = (tmp_path / f"{name}.safetensors" for name in ("lora", "flux", "canny"))
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    base = "transformer_blocks.0.attn.to_q"
    safetensors.torch.save_file({f"{base}.lora_A.weight": a, f"{base}.lora_B.weight": b}, lora)
    names = ("controlnet_x_embedder.weight", "controlnet_blocks.0.weight", "context_embedder.weight")
    safetensors.torch.save_file({name: b.clone() for name in names}, flux)
    safetensors.torch.save_file({"controlnet_cond_embedding.conv_in.weight": b}, canny)
    base = checkpoint("edit")
    return {
        "holds a LoRA": lora,
        "holds Flux or another transformer, wanted a ControlNet": flux,
        "holds a ControlNet of Stable Diffusion, wanted a ControlNet": canny,
        "holds a Qwen-Image transformer, wanted a ControlNet": weights_of(base / "transformer"),
        "holds a VAE, wanted a ControlNet": weights_of(base / "vae"),
        "holds a Qwen2.5-VL text encoder, wanted a ControlNet": weights_of(base / "text_encoder"),
        "is a QwenImageTransformer2DModel, wanted a QwenImageControlNetModel": base / "transformer",
        "is a whole checkpoint, a QwenImageEditPipeline, wanted a ControlNet": base,
    }


@pytest.mark.usefixtures("unread")
def test_files_of_something_else_are_named(tmp_path):
    for message, path in others(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            load(controlnet=path)
        with pytest.raises(ValueError, match=message):
            verify(checkpoint("edit"), controlnets=[path])


@pytest.mark.usefixtures("unread")
def test_what_is_no_file_or_folder_of_a_net(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "lost").symlink_to(tmp_path / "absent")
    (tmp_path / "text.safetensors").write_text("not a header at all, but long enough to look like one")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)
    for name, message in (
        ("empty", r"wants one \*\.safetensors file, or an index of several; found none"),
        ("pipe", "is a pipe, a device or a socket, wanted a file"),
        ("lost", "no such file"),
        ("absent", "no ControlNet at .*: no such file or folder, and it is no hub id"),
        ("absent.safetensors", "no ControlNet at .*: no such file or folder"),
        ("text.safetensors", "is truncated or no safetensors file"),
        ("pickle.safetensors", "is a pickle, which can run code"),
    ):
        with pytest.raises(ValueError, match=message):
            load(controlnet=tmp_path / name)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("wrong", [3, True, {"a": 1}, torch.nn.Linear(1, 1), [None], b"net"])
def test_what_is_no_source(wrong):
    with pytest.raises(ValueError, match=r"controlnet is \w+, wanted a hub id, a folder, a file or a list"):
        load(controlnet=wrong)


@pytest.mark.usefixtures("unread")
def test_a_truncated_file_says_so(folder, file):
    for path in (weights_of(folder), file):
        path.write_bytes(path.read_bytes()[:-5])
    for path in (folder, file):
        with pytest.raises(ValueError, match=r"is truncated: it has .* bytes, its header asks for"):
            load(controlnet=path)


CHANGES = {
    "official": [
        (lambda t: t.pop("controlnet_x_embedder.bias"), r"1 missing: controlnet_x_embedder\.bias"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(1)}), r"1 unexpected: proj_out\.bias"),
        (
            lambda t: t.update({"txt_in.bias": torch.zeros(3)}),
            r"1 misshapen: txt_in\.bias \[3\], wanted \[32\]",
        ),
        (
            lambda t: t.update({"img_in.bias": torch.zeros(32, dtype=torch.int8)}),
            r"1 unreadable: img_in\.bias \(int8\)",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith("transformer_blocks.1.")],
            r"32 missing: (transformer_blocks\.1\.\S+ ?){10}and 22 more",
        ),
    ],
    "blockwise": [
        (
            lambda t: t.pop("controlnet_blocks.1.y_rms.weight"),
            r"1 missing: controlnet_blocks\.1\.y_rms\.weig",
        ),
        (lambda t: t.update({"txt_in.bias": torch.zeros(1)}), r"1 unexpected: txt_in\.bias"),
        (
            lambda t: t.update({"controlnet_blocks.0.input_proj.weight": torch.zeros(32, 16)}),
            r"1 misshapen: controlnet_blocks\.0\.input_proj\.weight \[32, 16\], wanted \[32, 32\]",
        ),
        (
            lambda t: t.update({"img_in.bias": torch.zeros(32, dtype=torch.int8)}),
            r"1 unreadable: img_in\.bias \(int8\)",
        ),
        (lambda t: t.pop("controlnet_blocks.0.x_rms.weight"), r"1 missing: controlnet_blocks\.0\.x_rms\.wei"),
    ],
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "kind, number", [(kind, n) for kind, changes in CHANGES.items() for n in range(len(changes))]
)
def test_tensors_that_do_not_fit_are_one_error_that_names_them(folder, file, kind, number):
    change, message = CHANGES[kind][number]
    path = folder if kind == "official" else file
    change_tensors(path, change)
    with pytest.raises(ValueError, match=f"does not fit the controlnet: {message}"):
        load(controlnet=path)
    report = verify(checkpoint("edit"), controlnets=[path])
    assert not report.ok and report.reports[-1].component == "controlnet"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("official", "txt_norm.weight", r"is no whole ControlNet: txt_norm\.weight is missing"),
        ("official", "controlnet_x_embedder.weight", r"controlnet_x_embedder\.weight is missing"),
        ("official", "transformer_blocks.0.attn.norm_q.weight", r"attn\.norm_q\.weight is missing"),
        ("official", "img_in.weight", r"img_in\.weight is missing"),
        ("blockwise", "img_in.weight", r"img_in\.weight is missing"),
    ],
)
def test_a_file_whose_config_cannot_be_told(folder, file, kind, name, message):
    path = weights_of(folder) if kind == "official" else file
    change_tensors(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=message):
        load(controlnet=path)
    change_tensors(path, lambda tensors: tensors.update({name: torch.zeros(2, 2, 2)}))
    with pytest.raises(
        ValueError,
        match=rf"has the shape \[2, 2, 2\], wanted {1 if 'norm' in name else 2} axes",
    ):
        load(controlnet=path)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "kind, sizes, message",
    [
        ("official", {"heads": 3}, "its num_attention_heads is 3, wanted the transformer's, 2"),
        (
            "official",
            {"axes": (4, 8, 8)},
            "(its attention_head_dim is 20, wanted|sum to attention_head_dim 20)",
        ),
        ("official", {"channels": 32}, "its in_channels is 32, wanted the transformer's, 64"),
        (
            "official",
            {"joint_attention_dim": 16},
            "its joint_attention_dim is 16, wanted the transformer's, 24",
        ),
        ("official", {"layers": 3}, "has 3 blocks, wanted at most those of the transformer, 2"),
        ("official", {"extra_condition_channels": 3}, "has 67 channels, wanted 64, or with a mask 68"),
        ("blockwise", {"width": 48}, "its width is 48, wanted the transformer's, 32"),
        ("blockwise", {"layers": 1}, "its num_layers is 1, wanted the transformer's, 2"),
        ("blockwise", {"layers": 3}, "its num_layers is 3, wanted the transformer's, 2"),
        ("blockwise", {"channels": 32}, "has 32 channels, wanted 64, or with a mask 68"),
        ("blockwise", {"channels": 72}, "has 72 channels, wanted 64, or with a mask 68"),
    ],
)
def test_a_net_for_another_transformer_is_refused(kind, sizes, message):
    net = LOADED[kind](**sizes)
    for path in (net, weights_of(net)):
        for call in (lambda: load(controlnet=path), lambda: verify(checkpoint("edit"), controlnets=[path])):  # noqa: B023
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.usefixtures("unread")
def test_configs_of_other_nets_are_named(folder):
    config = folder / "config.json"
    for changes, message in (
        (
            {"_class_name": "FluxControlNetModel"},
            "is a FluxControlNetModel, wanted a QwenImageControlNetModel",
        ),
        ({"num_layers": "2"}, r"config\.json: num_layers is '2', wanted int"),
        ({"new": 1}, r"config\.json has unknown keys: new"),
        ({"patch_size": "DROP"}, r"config\.json lacks patch_size"),
    ):
        before = config.read_text()
        edit_json(config, **changes)
        with pytest.raises(ValueError, match=message):
            load(controlnet=folder)
        config.write_text(before)
    (folder.parent / "model_index.json").write_text('{"_class_name": "QwenImageControlNetPipeline"}')
    folder.rename(folder.parent / "controlnet")
    with pytest.raises(
        ValueError, match=r"a whole checkpoint, a QwenImageControlNetPipeline.*folder controlnet\?"
    ):
        load(controlnet=folder.parent)


@pytest.mark.usefixtures("unread")
def test_a_net_is_no_other_component_and_no_checkpoint(folder, file):
    for path, what in ((weights_of(folder), "a ControlNet"), (file, "a blockwise ControlNet of DiffSynth")):
        for component in ("mmdit", "vae", "text_encoder"):
            with pytest.raises(ValueError, match=f"holds {what}, wanted the "):
                load(**{component: path})
    with pytest.raises(ValueError, match=r"is a single QwenImageControlNetModel \(a Qwen-Image ControlNet\)"):
        qwenedit.load(folder, device="cpu")


def test_layered_takes_none(folder):
    with pytest.raises(ValueError, match="Qwen-Image-Layered takes no control pictures"):
        qwenedit.load(checkpoint("layered"), controlnet=folder, device="cpu", progress=False)


def test_loras_leave_a_net_alone(folder, file, tmp_path):
    pipe = load(controlnet=[folder, file])
    before = [{name: x.clone() for name, x in net.state_dict().items()} for net in pipe.controlnets]
    layers = [f"transformer_blocks.{n}.attn.to_q" for n in (0, 1)]
    parts = {"lora_A": (2, 32), "lora_B": (32, 2)}
    state = {f"{layer}.{part}.weight": torch.ones(shape) for layer in layers for part, shape in parts.items()}
    safetensors.torch.save_file(state, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora()
    for net, kept in zip(pipe.controlnets, before, strict=True):
        assert net.state_dict().keys() == kept.keys()
        assert all(torch.equal(x, kept[name]) for name, x in net.state_dict().items())
