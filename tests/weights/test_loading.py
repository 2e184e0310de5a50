"""Loading: what is read where to, and every kind of broken checkpoint as one clear error."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import qwenedit
from qwenedit import mini
from qwenedit.files import component_headers, read_header
from qwenedit.verify import describe, verify
from qwenedit.weights.checkpoints import read_areas, read_variant, resolve
from qwenedit.weights.loading import load_network

CPU = torch.device("cpu")
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the embedded checkpoint."""
    return Path(shutil.copytree(mini.CHECKPOINT, tmp_path / "checkpoint"))


def weights(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    return file


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v != "DROP"}))


def change_tensors(folder, component, change):
    file = weights(folder, component)
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def shard(folder, component, parts=3):
    """Split a component's file into shards with an index, as the hub has them."""
    file = weights(folder, component)
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        own = {key: tensors[key] for key in sorted(tensors)[part::parts]}
        safetensors.torch.save_file(own, folder / component / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / component / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_tensor_is_in_its_place_and_owns_its_memory(folder, component, dtype):
    module = load_network(folder, component, device=CPU, dtype=dtype, progress=False)
    stored = safetensors.torch.load_file(weights(folder, component))
    state = module.state_dict()
    assert len(state) == len(stored)
    assert {x.dtype for x in state.values()} == {dtype or torch.bfloat16}
    assert sum(x.double().sum() for x in state.values()) == sum(x.double().sum() for x in stored.values())
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    before = {name: x.clone() for name, x in state.items()}
    file = weights(folder, component)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_loading_and_editing_do_not_import_torchs_compiler():
    """It would take longer than everything else."""
    script = """
import sys
from PIL import Image
import qwenedit
from qwenedit import mini
pipe = qwenedit.load(device="cpu", progress=False)
pipe.edit(Image.open(mini.EXAMPLE), "make the circle red", num_inference_steps=1)
print("torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_shards_equal_the_single_file(folder, component):
    whole = load_network(folder, component, device=CPU, progress=False).state_dict()
    shard(folder, component)
    sharded = load_network(folder, component, device=CPU, progress=False).state_dict()
    assert all(torch.equal(x, sharded[name]) for name, x in whole.items())


def test_both_namings_of_the_text_encoder_and_lm_head_skipped(folder):
    whole = load_network(folder, "text_encoder", device=CPU, progress=False).state_dict()

    def rename(tensors):
        for key in list(tensors):
            new = key.replace("visual.", "model.visual.", 1) if key.startswith("visual.") else key
            new = new.replace("model.", "model.language_model.", 1) if not key.startswith("visual.") else new
            tensors[new] = tensors.pop(key)
        tensors["lm_head.weight"] = torch.zeros(704, 128, dtype=torch.bfloat16)

    change_tensors(folder, "text_encoder", rename)
    again = load_network(folder, "text_encoder", device=CPU, progress=False).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    report = next(r for r in verify(folder).reports if r.component == "text_encoder")
    assert report.skipped == ["lm_head.weight"] and report.ok


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("proj_out.bias"), r"1 missing: proj_out\.bias"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), r"1 unexpected: extra\.weight"),
        (
            lambda t: t.update({"img_in.weight": torch.zeros(128, 60)}),
            r"1 misshapen: img_in\.weight \[128, 60\], wanted \[128, 64\]",
        ),
        (
            lambda t: t.update({"img_in.bias": torch.zeros(128, dtype=torch.int8)}),
            r"1 unreadable: img_in\.bias \(int8\)",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("transformer_blocks.3.")],
            r"32 missing: (transformer_blocks\.3\.\S+ ?){10}and 22 more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_one_error_that_names_them(folder, change, message):
    change_tensors(folder, "transformer", change)
    with pytest.raises(ValueError, match=message):
        qwenedit.load(folder, device="cpu", progress=False)
    assert not verify(folder).ok


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 bytes long: too short"),
        (b"1234", "4 bytes long: too short"),
        (struct.pack("<Q", 10**15) + b"{}", "truncated or no safetensors file"),
        (struct.pack("<Q", 2) + b"no", "header cannot be read as JSON"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "entry for a cannot be read"),
        (b"<html>Not found</html>" * 9, "truncated or no safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x.safetensors")


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, message",
    [
        ([1], "its header is a list"),
        ({"__metadata__": {"step": 3}, "a": entry(0, 4)}, r"__metadata__ is {'step': 3}, wanted texts"),
        ({"a": entry(0.0, 4.0)}, r"entry for a has 0\.0, wanted whole numbers from 0"),
        ({"a": entry(True, 5)}, "entry for a has True, wanted whole numbers"),
        ({"a": entry(0, 4, shape=(1.0,))}, r"entry for a has 1\.0, wanted whole numbers"),
        ({"a": entry(0, -4, shape=(-1,))}, "entry for a has -1, wanted whole numbers"),
        ({"a": entry(0, 4, shape=(2,))}, r"entry for a has 4 bytes, wanted 8 for F32 of shape \[2\]"),
        ({"a": entry(0, 4, dtype="F128")}, "entry for a cannot be read: KeyError"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "entry for a cannot be read"),
        ({"a": entry(4, 8)}, "a starts at byte 4, wanted 0: gaps or overlaps"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, "b starts at byte 6, wanted 4: gaps or overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "b starts at byte 0, wanted 4: gaps or overlaps"),
    ],
)
def test_headers_that_the_safetensors_library_refuses(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(10))
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / "x.safetensors", framework="pt")


def test_a_file_that_breaks_after_it_was_checked_is_named(folder, monkeypatch):
    def broken(_path, **_options):
        raise safetensors.SafetensorError("incomplete metadata")

    monkeypatch.setattr("qwenedit.weights.loading.safe_open", broken)
    with pytest.raises(ValueError, match=r"vae/\S+\.safetensors cannot be read: incomplete metadata"):
        load_network(folder, "vae", device=CPU, progress=False)


@pytest.mark.parametrize("victim", ["text_encoder", "transformer", "vae"])
def test_every_header_is_compared_before_any_weight_is_read(folder, victim, monkeypatch):
    monkeypatch.setattr(
        "qwenedit.weights.loading.safe_open", lambda *_, **__: pytest.fail("a weight was read")
    )
    weights(folder, victim).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{victim}/\S+ is 0 bytes long"):
        qwenedit.load(folder, device="cpu", progress=False)


@pytest.mark.parametrize("weight_map", [{"a": 1}, {"a": ["x.safetensors"]}, ["a"], None])
def test_an_index_without_names_of_files(folder, weight_map):
    shard(folder, "vae")
    edit_json(folder / "vae" / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match="has no weight_map, wanted the name of a file for each tensor"):
        component_headers(folder / "vae")


def test_truncated_and_overlong_files(folder):
    file = weights(folder, "vae")
    whole = file.read_bytes()
    for content, message in ((whole[:-1], "is truncated"), (whole + b"x", "is too long")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            qwenedit.load(folder, device="cpu", progress=False)


def test_shards_that_are_absent_or_lack_what_the_index_promises(folder):
    shard(folder, "transformer")
    victim = folder / "transformer" / "model-00002-of-00003.safetensors"
    tensors = safetensors.torch.load_file(victim)
    lost = sorted(tensors)[0]
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != lost}, victim)
    with pytest.raises(ValueError, match=rf"1 tensors are not in the file .*{lost}"):
        component_headers(folder / "transformer")
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        component_headers(folder / "transformer")
    victim.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 files .*model-00002-of-00003"):
        component_headers(folder / "transformer")


def test_no_weights_at_all_and_too_many_files(folder):
    file = weights(folder, "vae")
    shutil.copy(file, file.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"found diffusion_pytorch_model\.safetensors, other\.safetensors"):
        component_headers(folder / "vae")
    for one in (folder / "vae").glob("*.safetensors"):
        one.unlink()
    with pytest.raises(ValueError, match="found none"):
        component_headers(folder / "vae")


def test_sources_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        resolve(tmp_path / "absent")
    with pytest.raises(ValueError, match="no such folder"):
        resolve("./absent/model")
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match="neither a local folder nor in the hub's cache"):
        resolve("nobody/no-such-model")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.safetensors is a file, wanted a folder in the official layout"):
        resolve(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageControlNetModel"}')
    with pytest.raises(ValueError, match=r"is a single QwenImageControlNetModel \(a Qwen-Image ControlNet\)"):
        resolve(tmp_path)
    with pytest.raises(
        ValueError, match=r"is a single \w+2DModel \(one component of a checkpoint\), no check"
    ):
        resolve(mini.CHECKPOINT / "transformer")
    with pytest.raises(ValueError, match="source is int, wanted a hub id or a folder"):
        resolve(5)
    (tmp_path / "model_index.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, wanted a JSON object"):
        read_variant(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_variant(tmp_path)


@pytest.mark.parametrize(
    "name, what",
    [
        (
            "QwenImage21Pipeline",
            r"Qwen-Image 2\.1.*32 single-stream blocks, 4096 wide.*SwiGLU.*block-causal.*64 channels.*Qwen3",
        ),
        ("QwenImage3Pipeline", "not of this family"),
        ("QwenImageControlNetPipeline", "ControlNet"),
        ("QwenImageEditInpaintPipeline", "inpainting"),
        ("FluxPipeline", "not of this family"),
    ],
)
def test_other_pipelines_are_refused_by_name(folder, name, what):
    edit_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=rf"is a {name}: .*{what}.*supported are"):
        qwenedit.load(folder)


def test_a_single_component_of_qwen_image_2_1_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImage21Transformer2DModel"}')
    with pytest.raises(
        ValueError, match=r"a single QwenImage21Transformer2DModel \(Qwen-Image 2\.1, another"
    ):
        qwenedit.load(tmp_path)


def test_other_components_are_refused_by_name(folder):
    edit_json(folder / "model_index.json", text_encoder=["transformers", "Qwen3VLForConditionalGeneration"])
    with pytest.raises(
        ValueError, match="its text_encoder is a Qwen3VLForConditionalGeneration, wanted Qwen2_5"
    ):
        read_variant(folder)
    edit_json(
        folder / "model_index.json", text_encoder=["transformers", "Qwen2_5_VLForConditionalGeneration"]
    )
    edit_json(folder / "transformer" / "config.json", _class_name="QwenImageControlNetModel")
    with pytest.raises(ValueError, match="its transformer is a QwenImageControlNetModel"):
        read_variant(folder)


def test_broken_configs_name_their_file(folder):
    edit_json(folder / "transformer" / "config.json", num_layers="DROP")
    with pytest.raises(ValueError, match=r"transformer/config\.json lacks num_layers"):
        qwenedit.load(folder, device="cpu")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"no such file: .*scheduler_config\.json"):
        qwenedit.load(folder, device="cpu")


def test_areas_come_from_the_checkpoint(folder):
    variant = read_variant(folder)
    assert read_areas(folder, variant).vae == 4096 and read_areas(folder, variant).vl is None
    edit_json(folder / "model_index.json", _qwenedit={"vae_area": "big"})
    with pytest.raises(ValueError, match=r"vae_area is 'big', wanted a whole number"):
        read_areas(folder, variant)
    edit_json(folder / "model_index.json", _qwenedit={"area": 3})
    with pytest.raises(ValueError, match="wanted vae_area and vl_area"):
        read_areas(folder, variant)
    edit_json(folder / "model_index.json", _qwenedit="DROP")
    assert read_areas(folder, variant).vae == 1024 * 1024


def test_bad_devices_and_dtypes():
    for device in ("cuda:99", "bogus", "xpu", "meta"):
        with pytest.raises(ValueError, match=f"device is '{device}'"):
            qwenedit.load(device=device)
    for dtype in ("int8", "bogus", torch.int32, "nn"):
        with pytest.raises(ValueError, match=r"dtype is .*wanted float32"):
            qwenedit.load(device="cpu", dtype=dtype)


def test_float16_warns():
    with pytest.warns(UserWarning, match="float16 overflows"):
        qwenedit.load(device="cpu", dtype="float16", progress=False)


def test_describe_says_what_the_embedded_model_holds():
    text = describe()
    assert "Qwen-Image-Edit" in text and "parameters" in text and "transformer" in text


def test_a_folder_of_official_size_is_verified_from_headers_alone(tmp_path):
    """Files of the official sizes with the official names, as holes: 58 GB that are not there."""
    configs = json.loads((DATA / "official_configs.json").read_text())["Qwen-Image-Edit-2511"]
    for name, value in configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    total = 0
    for component, keys in (
        ("transformer", "transformer"),
        ("vae", "vae_rgb"),
        ("text_encoder", "text_encoder_hub"),
    ):
        shapes = json.loads((DATA / "keys" / f"{keys}.json").read_text())
        header, position = {}, 0
        for key, shape in shapes.items():
            size = 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header).encode()
        with (tmp_path / component / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)
        total += position
    assert total > 57e9
    report = verify(tmp_path)
    assert report.ok
    assert [r.parameters for r in report.reports] == [8292166656 - 544997376, 20430401088, 126892531]


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("processor/preprocessor_config.json", dict(patch_size=14), "processor's patch_size is 14, wanted"),
        ("processor/preprocessor_config.json", dict(merge_size=1), "processor's merge_size is 1, wanted"),
        (
            "text_encoder/config.json",
            dict(image_token_id=5),
            "text_encoder's image_token_id is 5, wanted the tok",
        ),
        (
            "transformer/config.json",
            dict(joint_attention_dim=64),
            "joint_attention_dim is 64, wanted the text_enc",
        ),
        (
            "transformer/config.json",
            dict(in_channels=32, out_channels=8),
            "out_channels is 8, wanted the vae's z_dim, 16",
        ),
    ],
)
def test_components_that_do_not_fit_each_other(folder, file, changes, message):
    edit_json(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        qwenedit.load(folder, device="cpu", progress=False)


def test_a_tokenizer_with_more_tokens_than_embeddings(folder):
    config = json.loads((folder / "text_encoder/config.json").read_text())
    config["text_config"]["vocab_size"] = 300
    (folder / "text_encoder/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the text_encoder 300"):
        qwenedit.load(folder, device="cpu", progress=False)
