"""Weights in other layouts: each is written here with random values, and loads to exactly what it says."""

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenedit
from qwenedit import mini
from qwenedit.assembly import other_files
from qwenedit.cli import options as cli
from qwenedit.verify import verify
from qwenedit.weights.formats import official_vae_names, read_weights
from qwenedit.weights.keys import NETWORKS, official_to_ours
from qwenedit.weights.loading import compare_networks, load_network, read_networks
from tests.tiny import checkpoint

try:
    import gguf
except ImportError:
    gguf = None
needs_gguf = pytest.mark.skipif(gguf is None, reason="the gguf package (extra `gguf`) is not installed")

CPU = torch.device("cpu")
KEYS = Path(__file__).parents[1] / "data" / "keys"
WAN = json.loads((KEYS / "vae_wan_to_diffusers.json").read_text())
FP8 = torch.float8_e4m3fn


def tensors_of(folder, component):
    """The checkpoint's tensors by their official names, in bfloat16."""
    (file,) = (folder / component).glob("*.safetensors")
    network = NETWORKS[component]
    return {network.hub_key(key): x.bfloat16() for key, x in load_file(file).items()}


def load(folder, component, file, dtype=None):
    """What a file loads to, by official name."""
    compared = compare_networks(folder, [component], {component: Path(file)})
    (module,) = read_networks(compared, device=CPU, dtype=dtype, progress=False)
    state, table = module.state_dict(), NETWORKS[component].table
    named = {official_to_ours(table, key): key for key in tensors_of(folder, component)}
    return {named[name]: x for name, x in state.items()}, module


def assert_equal(loaded, wanted):
    wanted = {key: x for key, x in wanted.items() if key in loaded or key != "lm_head.weight"}
    assert loaded.keys() == wanted.keys()
    for key, x in wanted.items():
        assert loaded[key].dtype == x.dtype and torch.equal(loaded[key], x), key


def wan_name(official, blocks):
    """Wan's name of a VAE's tensor, for `blocks` residual blocks a level in the decoder."""
    side, _, rest = official.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if side == 'quant_conv' else 'conv2'}.{rest}"
    if rest.startswith("up_blocks."):
        _, level, kind, place, tail = rest.split(".", 4)
        rest = (
            f"upsamples.{int(level) * (blocks + 1) + (blocks if kind == 'upsamplers' else int(place))}.{tail}"
        )
    for new, wan in (
        ("down_blocks", "downsamples"), ("mid_block.attentions.0", "middle.1"),
        ("mid_block.resnets.0", "middle.0"), ("mid_block.resnets.1", "middle.2"),
        ("norm_out", "head.0"), ("conv_out", "head.2"),
        ("conv_in", "conv1"), ("norm1", "residual.0"), ("norm2", "residual.3"), ("conv_shortcut", "shortcut"),
    ):  # fmt: skip
        rest = rest.replace(new, wan)
    if "samples" in rest or "middle" in rest:
        rest = rest.replace(".conv1.", ".residual.2.").replace(".conv2.", ".residual.6.")
    return f"{side}.{rest}"


def wan_names(folder):
    """The checkpoint's VAE in Wan's naming."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    blocks = config["num_res_blocks"] + 1
    return {wan_name(key, blocks): x for key, x in tensors_of(folder, "vae").items()}


def quantised(weight):
    """An fp8 weight, its scale, and what they stand for."""
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(FP8)
    return stored, scale, stored.to(torch.float32) * scale


def scaled(tensors, suffix="scale_weight"):
    """ComfyUI's fp8_scaled: the matrices of linear layers in fp8; and what each tensor stands for, in
    float32.
    """
    stored, meaning = {}, {}
    for key, x in tensors.items():
        meaning[key] = x.float()
        if x.ndim == 2 and key.endswith(".weight") and "embed" not in key and "lm_head" not in key:
            stored[key], scale, meaning[key] = quantised(x)
            layer = key.removesuffix(".weight")
            stored[f"{layer}.{suffix}"] = scale
            other = {"scale_weight": "scale_input", "weight_scale": "input_scale"}[suffix]
            stored[f"{layer}.{other}"] = torch.tensor(1.0)
        else:
            stored[key] = x
    return stored, meaning


def test_wans_names_by_rule_are_those_of_the_table():
    assert official_vae_names(WAN) == WAN and len(WAN) == 194
    official = json.loads((KEYS / "vae_rgb.json").read_text())
    assert set(WAN.values()) == set(official)
    assert official_vae_names(official) == {key: key for key in official}
    assert {wan_name(key, 3): key for key in official} == WAN
    assert official_vae_names(["decoder.strange.1.weight"]) == {
        "decoder.strange.1.weight": "decoder.strange.1.weight"
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("marked", [False, True])
def test_comfy_transformer_in_bfloat16(tmp_path, prefix, marked):
    folder = checkpoint("plus")
    tensors = tensors_of(folder, "transformer")
    stored = {prefix + key: x for key, x in tensors.items()}
    if marked:
        stored[f"{prefix}__index_timestep_zero__"] = torch.zeros(0)
    save_file(stored, tmp_path / "x.safetensors")
    loaded, module = load(folder, "transformer", tmp_path / "x.safetensors")
    assert_equal(loaded, tensors)
    assert module.config.zero_cond_t is marked


def test_a_checkpoint_with_zero_cond_t_keeps_it_without_the_marker(tmp_path):
    folder = checkpoint("plus", zero_cond_t=True)
    save_file(tensors_of(folder, "transformer"), tmp_path / "x.safetensors")
    assert load(folder, "transformer", tmp_path / "x.safetensors")[1].config.zero_cond_t


@pytest.mark.parametrize("dtype, runs_in", [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_fp8_without_scales_is_every_tensor_rounded(tmp_path, dtype, runs_in):
    folder = checkpoint("edit")
    stored = {key: x.to(FP8) for key, x in tensors_of(folder, "transformer").items()}
    save_file(stored, tmp_path / "x.safetensors")
    loaded, _ = load(folder, "transformer", tmp_path / "x.safetensors", dtype)
    assert_equal(loaded, {key: x.to(runs_in) for key, x in stored.items()})


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize("dtype, runs_in", [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_fp8_with_scales_is_weight_times_scale(tmp_path, component, suffix, dtype, runs_in):
    folder = checkpoint("edit")
    stored, meaning = scaled(tensors_of(folder, component), suffix)
    if suffix == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    else:
        for key in [key for key in stored if key.endswith(".weight_scale")]:
            text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
            stored[key.replace("weight_scale", "comfy_quant")] = torch.tensor(list(text), dtype=torch.uint8)
    assert sum(x.dtype == FP8 and x.ndim == 2 for x in stored.values()) > 10
    save_file(stored, tmp_path / "x.safetensors")
    loaded, _ = load(folder, component, tmp_path / "x.safetensors", dtype)
    assert_equal(loaded, {key: x.to(runs_in) for key, x in meaning.items()})


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_scale_for_each_row(tmp_path, shape):
    folder = checkpoint("edit")
    tensors = tensors_of(folder, "transformer")
    weight = tensors["img_in.weight"].to(FP8)
    scale = torch.rand(len(weight)) + 0.5
    stored = tensors | {"img_in.weight": weight, "img_in.weight_scale": scale.reshape(shape)}
    save_file(stored, tmp_path / "x.safetensors")
    loaded, _ = load(folder, "transformer", tmp_path / "x.safetensors", torch.float32)
    wanted = torch.stack([row.float() * factor for row, factor in zip(weight, scale, strict=True)])
    assert torch.equal(loaded["img_in.weight"], wanted)


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_vae_in_wans_naming(tmp_path, prefix):
    for folder in (checkpoint("edit"), mini.CHECKPOINT):
        tensors = tensors_of(folder, "vae")
        stored = {prefix + key: x for key, x in wan_names(folder).items()}
        save_file(stored, tmp_path / "x.safetensors")
        loaded, module = load(folder, "vae", tmp_path / "x.safetensors")
        assert_equal(loaded, {key: x for key, x in tensors.items() if key in loaded})
        assert len(loaded) == len(module.state_dict())


def test_one_file_with_all_three_is_each_of_them(tmp_path):
    folder = checkpoint("edit")
    vae = wan_names(folder)
    stored = {
        **{f"model.diffusion_model.{key}": x for key, x in tensors_of(folder, "transformer").items()},
        **{f"vae.{key}": x for key, x in vae.items()},
        **{
            f"text_encoders.qwen25_7b.transformer.{key}": x
            for key, x in tensors_of(folder, "text_encoder").items()
        },
        "text_encoders.qwen25_7b.logit_scale": torch.tensor(4.6),
    }
    file = tmp_path / "all.safetensors"
    save_file({key: x.clone() for key, x in stored.items()}, file)
    for component in NETWORKS:
        loaded, _ = load(folder, component, file)
        tensors = tensors_of(folder, component)
        assert_equal(loaded, {key: x for key, x in tensors.items() if key in loaded})
    files = dict.fromkeys(NETWORKS, file)
    assert verify(folder, files=files).ok


def test_load_takes_each_component_from_its_file(tmp_path):
    """Also where the checkpoint has only configs for it."""
    base, other = checkpoint("edit"), checkpoint("edit", seed=7)
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    files = {"mmdit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
    for argument, component in files.items():
        tensors = wan_names(other) if component == "vae" else tensors_of(other, component)
        save_file(tensors, tmp_path / f"{argument}.st")
        (file,) = (folder / component).glob("*.safetensors")
        file.unlink()
        files[argument] = str(tmp_path / f"{argument}.st")
    pipe = qwenedit.load(folder, device="cpu", dtype="bfloat16", progress=False, **files)
    wanted = qwenedit.load(other, device="cpu", dtype="bfloat16", progress=False)
    for name in ("mmdit", "vae", "vision_language"):
        want = getattr(wanted, name).state_dict()
        got = getattr(pipe, name).state_dict()
        assert all(torch.equal(x, want[key]) for key, x in got.items()) and got.keys() == want.keys()
    folders = {"mmdit": other / "transformer", "vae": other / "vae", "text_encoder": False}
    pipe = qwenedit.load(folder, device="cpu", dtype="bfloat16", progress=False, **folders)
    assert pipe.vision_language is None
    assert torch.equal(pipe.mmdit.img_in.weight, wanted.mmdit.img_in.weight)


def official(name):
    return json.loads((KEYS / f"{name}.json").read_text())


def holes(path, tensors):
    """A safetensors file as its library lays it out, without the numbers: (dtype, shape) by key."""
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    header, end = {}, 0
    for key, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-sizes[item[1][0]], item[0])):
        start, end = end, end + sizes[dtype] * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def official_folder(folder):
    """Edit's configs, without any weights."""
    configs = json.loads((KEYS.parent / "official_configs.json").read_text())["Qwen-Image-Edit"]
    for name, value in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def fp8_scaled():
    """The text encoder's: all linear layers but lm_head."""
    tensors = {"scaled_fp8": ("F8_E4M3", [0])}
    for key, shape in official("text_encoder_hub").items():
        linear = len(shape) == 2 and "embed" not in key and key != "lm_head.weight"
        tensors[key] = ("F8_E4M3" if linear else "BF16", shape)
        if linear:
            layer = key.removesuffix(".weight")
            tensors |= {f"{layer}.scale_weight": ("F32", []), f"{layer}.scale_input": ("F32", [])}
    return tensors


def test_the_published_comfy_files_fit_to_the_byte(tmp_path):
    """Headers written as we believe them to be give the published sizes, and are all accepted."""
    folder = official_folder(tmp_path)
    transformer, vae = official("transformer"), official("vae_rgb")
    wan = {new: old for old, new in WAN.items()}
    marked = {"__index_timestep_zero__": ("F32", [0])}
    published = [
        ("transformer", {key: ("BF16", x) for key, x in transformer.items()}, 40_861_031_488),
        ("transformer", {key: ("BF16", x) for key, x in transformer.items()} | marked, 40_861_031_560),
        ("transformer", {key: ("F8_E4M3", x) for key, x in transformer.items()}, 20_430_635_136),
        ("text_encoder", {k: ("BF16", x) for k, x in official("text_encoder_hub").items()}, 16_584_415_576),
        ("text_encoder", fp8_scaled(), 9_384_670_680),
        ("vae", {wan[key]: ("BF16", x) for key, x in vae.items()}, 253_806_246),
    ]
    files = {}
    for number, (component, tensors, size) in enumerate(reversed(published)):
        files[component] = holes(tmp_path / f"{number}.safetensors", tensors)
        assert files[component].stat().st_size == size
        if len(files) == 3:
            report = verify(folder, files=files)
            assert report.ok, report
            assert report.reports[1].parameters == 20430401088


def test_what_is_no_path():
    assert other_files(text_encoder=True) == other_files(text_encoder=False) == other_files() == {}
    with pytest.raises(ValueError, match="mmdit is int, wanted a file"):
        qwenedit.load(mmdit=3)
    with pytest.raises(ValueError, match="text_encoder is int, wanted a file, True or False"):
        qwenedit.load(text_encoder=3)
    with pytest.raises(ValueError, match=r"no weights at absent\.safetensors: no such file or folder"):
        qwenedit.load(device="cpu", mmdit="absent.safetensors")


@pytest.mark.parametrize(
    "names, component, message",
    [
        (
            ["encoder.downsamples.0.residual.0.gamma"],
            "transformer",
            "holds a VAE in Wan's naming, wanted the tr",
        ),
        (["vae.conv1.weight"], "transformer", "holds nothing that is known of the transformer: 0 tensors"),
        (["transformer_blocks.0.attn.to_q.weight"], "vae", "holds a Qwen-Image transformer, wanted the vae"),
        (["visual.blocks.0.attn.qkv.weight"], "vae", r"holds a Qwen2\.5-VL text encoder"),
        (
            ["transformer_blocks.0.attn.to_q.lora_down.weight"],
            "transformer",
            "holds a LoRA.*load_lora_weights",
        ),
        (["transformer_blocks.0.attn.to_qkv.qweight"], "transformer", "holds Nunchaku's SVDQuant"),
        (["double_blocks.0.img_mod.lin.weight"], "transformer", "holds Flux or another transformer"),
        (
            ["a", "b", "c", "d"],
            "transformer",
            "nothing that is known .* 4 tensors, like a, b, c; wanted the off",
        ),
    ],
)
def test_another_component_or_layout_is_named(tmp_path, names, component, message):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "x.safetensors", component)


def test_pickles_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is a pickle, which can run code: wanted safetensors or GGUF"):
        read_weights(tmp_path / "x.pt", "vae")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("img_in.bias"), r"1 missing: img_in\.bias"),
        (lambda t: t.update({"extra.weight_scale": torch.ones(1)}), r"1 unexpected: extra\.weight_scale"),
        (
            lambda t: t.update({"img_in.bias": torch.zeros(5)}),
            r"1 misshapen: img_in\.bias \[5\], wanted \[32\]",
        ),
        (
            lambda t: t.update({"img_in.weight_scale": torch.ones(2, 4)}),
            r"1 unreadable: img_in\.weight \(float8_e4m3fn with img_in\.weight_scale of float32\[2, 4\]\)",
        ),
        (
            lambda t: t.update({"img_in.weight": torch.zeros(32, 64), "img_in.weight_scale": torch.ones(1)}),
            r"1 unreadable: img_in\.weight \(float32 with img_in\.weight_scale of float32\[1\]\)",
        ),
        (
            lambda t: t.update({"img_in.weight": torch.zeros(32, 64, dtype=torch.int8)}),
            r"1 unreadable: img_in\.weight \(int8\)",
        ),
        (
            lambda t: t.update({"img_in.comfy_quant": text({"format": "float8_e4m3fn", "convrot": True})}),
            r'1 unreadable: img_in\.weight \(comfy_quant {"format": "float8_e4m3fn", "convrot": true}\)',
        ),
        (lambda t: t.update({"img_in.comfy_quant": text({"format": "mxfp8"})}), "comfy_quant .*mxfp8"),
        (lambda t: t.update({"img_in.comfy_quant": text([1])}), r"comfy_quant \[1\]"),
    ],
)
def test_files_that_do_not_fit_are_one_error_before_any_weight_is_read(
    tmp_path, monkeypatch, change, message
):
    folder = checkpoint("edit")
    stored = {key: x.to(FP8) for key, x in tensors_of(folder, "transformer").items()}
    change(stored)
    save_file(stored, tmp_path / "x.safetensors")
    monkeypatch.setattr(
        "qwenedit.weights.loading.safe_open", lambda *_, **__: pytest.fail("a weight was read")
    )
    with pytest.raises(ValueError, match=message):
        qwenedit.load(folder, device="cpu", mmdit=tmp_path / "x.safetensors", progress=False)
    report = verify(folder, files={"transformer": tmp_path / "x.safetensors"})
    assert not report.ok and "a Qwen-Image transformer, safetensors, fp8" in str(report)


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"img_in": {"format": "float8_e4m3fn"}}, None),
        ({"img_in": {"format": "nvfp4"}}, r"1 unreadable: img_in\.weight \(comfy_quant .*nvfp4"),
        ([1], "_quantization_metadata cannot be read"),
    ],
)
def test_the_description_in_the_metadata(tmp_path, layers, message):
    folder = checkpoint("edit")
    stored, meaning = scaled(tensors_of(folder, "transformer"), "weight_scale")
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, tmp_path / "x.safetensors", metadata)
    if message is None:
        assert_equal(load(folder, "transformer", tmp_path / "x.safetensors", torch.float32)[0], meaning)
        return
    with pytest.raises(ValueError, match=message):
        load(folder, "transformer", tmp_path / "x.safetensors")


def test_an_fp8_file_in_the_checkpoints_own_folder(tmp_path):
    folder = Path(shutil.copytree(checkpoint("edit"), tmp_path / "checkpoint"))
    stored, meaning = scaled(tensors_of(folder, "transformer"))
    (file,) = (folder / "transformer").glob("*.safetensors")
    save_file(stored, file)
    state = load_network(folder, "transformer", device=CPU, progress=False).state_dict()
    table = NETWORKS["transformer"].table
    for key, x in meaning.items():
        assert torch.equal(state[official_to_ours(table, key)], x.bfloat16())


def test_an_fp8_transformer_edits(tmp_path):
    folder = mini.CHECKPOINT
    stored, _ = scaled(tensors_of(folder, "transformer"))
    save_file(stored, tmp_path / "x.safetensors")
    made = []
    for file in (None, tmp_path / "x.safetensors"):
        pipe = qwenedit.load(device="cpu", mmdit=file, progress=False)
        noise = torch.Generator().manual_seed(0)
        made.append(
            pipe.generate("a red circle", num_inference_steps=2, generator=noise, output_type="pt").images
        )
    difference = (made[0] - made[1]).abs().mean()
    assert 0 < difference < 0.05  # rounding to fp8, and no more


# GGUF


def wide():
    """A checkpoint whose widths are multiples of 256, the blocks of the K types."""
    return checkpoint("edit", layers=1, heads=4, axes=(16, 24, 24))


def write_gguf(path, tensors, kinds, architecture="qwen_image"):
    """Under official names; `kinds` gives a type's name by key, None for float32. Returns what is meant."""
    writer, meaning = gguf.GGUFWriter(path, architecture), {}
    generator = torch.Generator().manual_seed(0)
    for key, x in tensors.items():
        kind = kinds(key, x)
        if kind is None:
            writer.add_tensor(key, x.float().numpy())
            meaning[key] = x.float()
            continue
        kind = gguf.GGMLQuantizationType[kind]
        if kind.name.endswith("_K"):  # the package cannot make these: any bytes, scales kept finite
            rows, columns = x.shape
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = torch.randint(0, 256, (rows, columns // block * size), generator=generator)
            data = (data & 0xBF).to(torch.uint8).numpy()
        else:
            data = gguf.quants.quantize(x.float().numpy(), kind)
        writer.add_tensor(key, data, raw_dtype=kind)
        meaning[key] = torch.tensor(gguf.quants.dequantize(data, kind)).reshape(x.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def as_published(kind):
    """Vectors in float32, the ends in 16 bits, all other matrices in `kind`."""
    ends = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")

    def kinds(key, x):
        if x.ndim == 1:
            return None
        return "BF16" if key.startswith(ends) else kind

    return kinds


@needs_gguf
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "kind",
    ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1"],
)
def test_gguf_in_every_type(tmp_path, kind):
    folder = wide()
    meaning = write_gguf(tmp_path / "x.gguf", tensors_of(folder, "transformer"), as_published(kind))
    assert all(x.isfinite().all() for x in meaning.values())
    loaded, module = load(folder, "transformer", tmp_path / "x.gguf", torch.float32)
    assert_equal(loaded, meaning)
    loaded, _ = load(folder, "transformer", tmp_path / "x.gguf")
    assert_equal(loaded, {key: x.bfloat16() for key, x in meaning.items()})
    assert not module.config.zero_cond_t
    report = verify(folder, files={"transformer": tmp_path / "x.gguf"})
    assert report.ok and f" {kind}" in str(report) and "a Qwen-Image transformer, GGUF" in str(report)


@needs_gguf
@pytest.mark.parametrize("kind, number, size", [("Q8_0", 7, 21_761_817_120), ("Q6_K", 18, 16_824_990_240)])
def test_the_published_gguf_files_fit_to_the_byte(tmp_path, kind, number, size):
    folder = official_folder(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen_image")
    writer.add_quantization_version(2)
    writer.add_file_type(number)
    end = 0
    for key, shape in official("transformer").items():
        type_ = gguf.GGMLQuantizationType[as_published(kind)(key, torch.empty(shape, device="meta")) or "F32"]
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        count = torch.Size(shape).numel() // block * block_bytes
        writer.add_tensor_info(key, shape, None, count, raw_dtype=type_)
        end += (count + 31) // 32 * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.truncate((file.seek(0, 2) + 31) // 32 * 32 + end)
    assert (tmp_path / "x.gguf").stat().st_size == size
    files = {"transformer": tmp_path / "x.gguf"}
    for component, keys in (("vae", "vae_rgb"), ("text_encoder", "text_encoder_hub")):
        tensors = {key: ("BF16", shape) for key, shape in official(keys).items()}
        files[component] = holes(tmp_path / f"{component}.safetensors", tensors)
    report = verify(folder, files=files)
    assert report.ok and f"840 {kind}" in str(report)


@needs_gguf
def test_q8_0_by_its_formula(tmp_path):
    """Blocks of 32: a float16 scale, then 32 signed bytes."""
    folder = wide()
    tensors = tensors_of(folder, "transformer")
    write_gguf(tmp_path / "x.gguf", tensors, as_published("Q8_0"))
    key = "transformer_blocks.0.img_mlp.net.0.proj.weight"
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    (raw,) = [bytes(tensor.data) for tensor in reader.tensors if tensor.name == key]
    values = []
    for start in range(0, len(raw), 34):
        scale, *numbers = struct.unpack("<e32b", raw[start : start + 34])
        values.append(torch.tensor(numbers, dtype=torch.float32) * scale)
    loaded, _ = load(folder, "transformer", tmp_path / "x.gguf", torch.float32)
    assert torch.equal(loaded[key], torch.cat(values).reshape(1024, 256))


@needs_gguf
def test_gguf_with_the_marker_and_a_mixture_of_types(tmp_path):
    folder = wide()
    tensors = tensors_of(folder, "transformer") | {"__index_timestep_zero__": torch.zeros(0)}
    mixture = iter(["Q4_K", "Q6_K", "Q5_K"] * 100)
    plain = as_published("Q8_0")

    def kinds(key, x):
        kind = plain(key, x)
        return next(mixture) if kind == "Q8_0" else kind

    meaning = write_gguf(tmp_path / "x.gguf", tensors, kinds)
    meaning.pop("__index_timestep_zero__")
    loaded, module = load(folder, "transformer", tmp_path / "x.gguf", torch.float32)
    assert_equal(loaded, meaning)
    assert module.config.zero_cond_t


@needs_gguf
def test_gguf_files_that_do_not_fit(tmp_path):
    folder = wide()
    tensors = tensors_of(folder, "transformer")
    lacking = {key: x for key, x in tensors.items() if key != "proj_out.bias"}
    write_gguf(tmp_path / "x.gguf", lacking, as_published("Q8_0"))
    with pytest.raises(ValueError, match=r"x\.gguf does not fit the transformer: 1 missing: proj_out\.bias"):
        load(folder, "transformer", tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for size in (5, 1000, len(whole) - 5000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf is truncated or no GGUF file"):
            load(folder, "transformer", tmp_path / "cut.gguf")
    write_gguf(
        tmp_path / "y.gguf", {"blk.0.attn_q.weight": torch.zeros(32, 32)}, as_published("Q8_0"), "qwen2vl"
    )
    with pytest.raises(
        ValueError, match=r"y\.gguf holds llama\.cpp's language model, wanted the text_encoder"
    ):
        load(folder, "text_encoder", tmp_path / "y.gguf")


def test_gguf_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"x\.gguf is a GGUF file, wanted .*pip install 'qwenedit\[gguf\]'"):
        qwenedit.load(device="cpu", mmdit=tmp_path / "x.gguf")


def test_the_command_line(tmp_path, capsys):
    tensors = tensors_of(mini.CHECKPOINT, "transformer")
    save_file({key: x.to(FP8) for key, x in tensors.items()}, tmp_path / "fp8.safetensors")
    save_file(wan_names(mini.CHECKPOINT), tmp_path / "vae.safetensors")
    options = ["--mmdit", str(tmp_path / "fp8.safetensors"), "--vae", str(tmp_path / "vae.safetensors")]
    assert cli.main(["verify", *options]) == 0
    printed = capsys.readouterr().out
    assert "a Qwen-Image transformer, safetensors, fp8 without scales" in printed
    assert "a VAE in Wan's naming, safetensors" in printed and printed.count("all names, shapes") == 3
    quick = ["--steps", "1", "--quiet", "--device", "cpu", "-o", str(tmp_path / "out.png")]
    assert cli.main(["generate", "a red circle", *quick, *options]) == 0
    assert (tmp_path / "out.png").is_file()
    assert cli.main(["generate", "x", *quick, "--text-encoder", options[1]]) == 2
    assert "holds a Qwen-Image transformer, wanted the text_encoder" in capsys.readouterr().err
