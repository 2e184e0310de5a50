"""Small valid files, mutated: every reader gives a right result or a ValueError, soon, in little memory.

A few examples of each in a plain run; `pytest tests/faults/test_fuzz.py --fuzz 1000` for a long one.
"""

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import signal
import struct
import tempfile
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from qwenedit import mini
from qwenedit.ablation.results import read_results
from qwenedit.ablation.spec import read_spec
from qwenedit.encoding.conditioning import Conditioning, Prompt
from qwenedit.files import component_headers, read_header, read_tensors
from qwenedit.inputs.pictures import open_picture
from qwenedit.inputs.processor import Processor
from qwenedit.instruments.records import Recorder, Records
from qwenedit.lora import read_lora
from qwenedit.networks.mmdit import MMDiT
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.taps import scope, taps
from qwenedit.verify import verify
from qwenedit.weights.configs import network_config
from qwenedit.weights.formats import read_weights
from qwenedit.weights.gguf_file import GGUFFile
from qwenedit.weights.hub import HubError
from tests.faults.test_doors import RECORD
from tests.tiny import checkpoint, temporary

SECONDS, MEGABYTES = 2, 500  # of the processor, which a busy machine does not change


class TooSlow(BaseException):
    """Passes every `except Exception`."""


@contextlib.contextmanager
def limits():
    """Stop what takes too long, and refuse what takes too much memory."""
    resource = pytest.importorskip("resource")

    def stop(*_):
        raise TooSlow(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + MEGABYTES * 10**6, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGVTALRM, handler)


def listing(folder):
    return {path: path.stat().st_size for path in Path(folder).rglob("*")}


def read(folder, reader, *arguments):
    """What the reader gives, or None after a clear error; nothing was written into the folder."""
    before = listing(folder)
    result = None
    with warnings.catch_warnings(), limits():
        warnings.simplefilter("ignore")
        try:
            result = reader(*arguments)
        except ValueError as error:
            assert type(error) in (ValueError, HubError), f"a raw {type(error).__name__}: {error}"
            assert str(error) and len(str(error)) < 10_000 and "\x1b" not in str(error)
    assert listing(folder) == before
    return result


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**30, 10**400]
TEXTS = ["", "\x1b[31m", "../../x", "/etc/passwd", "C:\\x", "\ud800", "x" * 300, "1", "nan", "\x00", "[", "é́"]
VALUES = [
    None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], {"": {}}, [1, "a"],
    *NUMBERS, *TEXTS,
]  # fmt: skip


@st.composite
def bytes_of(draw, original):
    """The bytes with a few of them changed, left out, doubled, or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = at + draw(st.sampled_from([1, 2, 4, 8, 40, 1000]))
        how = draw(st.sampled_from(["change", "change", "number", "leave out", "double", "put in", "cut"]))
        if how == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "number":
            kind = draw(st.sampled_from("<I <Q >I >H <H".split()))
            size = struct.calcsize(kind)
            number = draw(st.sampled_from(NUMBERS)) % 256**size
            data[at : at + size] = struct.pack(kind, number)
        elif how == "leave out":
            del data[at:end]
        elif how == "double":
            data[at:at] = data[at:end]
        elif how == "put in":
            data[at:at] = draw(st.binary(max_size=20))
        elif how == "cut":
            del data[at:]
    return bytes(data)


def places(value, path=()):
    """The path of every part of a JSON value."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, part in entries:
        yield from places(part, (*path, key))


@st.composite
def values_of(draw, original):
    """A JSON value with parts of it replaced, left out, renamed, doubled, or with other numbers."""
    value = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        found = [path for path in places(value) if path]
        *outer, key = draw(st.sampled_from(found))
        parent = functools.reduce(lambda part, name: part[name], outer, value)
        part = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "leave out", "rename", "double", "number"]))
        if how == "number" and isinstance(part, (int, float)):
            parent[key] = part * draw(st.sampled_from([-1, 2, 1000, 0])) + draw(st.sampled_from([0, 1]))
        elif how == "leave out" and outer:
            del parent[key]
        elif how == "rename" and outer and isinstance(parent, dict):
            parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
        elif how == "double" and isinstance(part, list):
            part += copy.deepcopy(part)
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))  # which later changes leave as it is
    return value[""]


@st.composite
def json_of(draw, original):
    """A JSON text, mutated as a value or as bytes; now and then nested without end."""
    how = draw(st.sampled_from(["value"] * 6 + ["bytes"] * 3 + ["deep"]))
    if how == "deep":
        return draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000]))
    if how == "value":
        return json.dumps(draw(values_of(original))).encode()
    return draw(bytes_of(json.dumps(original).encode()))


@st.composite
def safetensors_of(draw, original):
    """A safetensors file, with its header or any of its bytes mutated."""
    if draw(st.booleans()):
        return draw(bytes_of(original))
    (length,) = struct.unpack("<Q", original[:8])
    header = draw(json_of(json.loads(original[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + original[8 + length :]


TENSORS = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, {"note": "x"})


@given(safetensors_of(TENSORS))
def test_safetensors(folder, data):
    home = folder / "safetensors"
    home.mkdir(exist_ok=True)
    path = home / "model.safetensors"
    path.write_bytes(data)
    header = read(home, read_header, path)
    whole = read(home, read_tensors, path)
    assert (header is None) == (whole is None)
    assert header is None or {key: x.shape for key, x in whole[0].items()} == {
        key: info.shape for key, info in header.items()
    }
    read(home, component_headers, home)
    for component in ("transformer", "vae", "text_encoder"):
        read(home, read_weights, path, component)


@given(json_of({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
def test_an_index(folder, data):
    home = folder / "index"
    home.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, home / "1.safetensors")
    save_file({"b": torch.ones(1)}, home / "2.safetensors")
    (home / "model.safetensors.index.json").write_bytes(data)
    read(home, component_headers, home)


CONFIGS = [
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "transformer/config.json", "vae/config.json", "processor/preprocessor_config.json",
    "tokenizer/tokenizer_config.json", "tokenizer/added_tokens.json", "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
]  # fmt: skip


@functools.cache
def small_checkpoint(kind):
    return shutil.copytree(checkpoint(kind), temporary() / "checkpoint")


def read_checkpoint(home):
    """What a run reads before the weights."""
    verify(home)
    Processor.from_folder(home)
    scheduler = load_scheduler(home)
    return scheduler.sigmas(4, 100)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["edit", "layered"])
@given(st.data())
def test_a_config(kind, name, data):
    home = small_checkpoint(kind)
    original = (home / name).read_bytes()
    try:
        (home / name).write_bytes(data.draw(json_of(json.loads(original))))
        sigmas = read(home, read_checkpoint, home)
        assert sigmas is None or (len(sigmas) == 5 and sigmas[-1] == 0)
    finally:
        (home / name).write_bytes(original)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
@given(st.data())
def test_a_tokenizers_bytes(form, data):
    home = small_checkpoint("edit")
    (home / "tokenizer" / "tokenizer.json").rename(home / "tokenizer.json")
    try:
        name = data.draw(st.sampled_from(["vocab.json", "merges.txt"])) if form == "vocab.json" else form
        if form == "tokenizer.json":
            shutil.copy(home / "tokenizer.json", home / "tokenizer" / form)
        original = (home / "tokenizer" / name).read_bytes()
        (home / "tokenizer" / name).write_bytes(data.draw(bytes_of(original)))
        try:
            read(home, Processor.from_folder, home)
        finally:
            (home / "tokenizer" / name).write_bytes(original)
    finally:
        (home / "tokenizer.json").rename(home / "tokenizer" / "tokenizer.json")


@functools.cache
def meta_mmdit():
    with torch.device("meta"):
        return MMDiT(network_config(mini.CHECKPOINT, "transformer"))


LORA = save(
    {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 128),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(128, 2),
        "transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(4.0),
    },
    {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})},
)


@given(st.data())
def test_a_lora(folder, data):
    home = folder / "lora"
    home.mkdir(exist_ok=True)
    whole = data.draw(safetensors_of(LORA))
    if data.draw(st.booleans()):  # the text within the metadata
        original = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 2}}
        text = data.draw(json_of(original)).decode(errors="replace")
        whole = save({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 128),
                      "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(128, 2)},
                     {"lora_adapter_metadata": text, "rank": text[:10], "alpha": text[-10:]})  # fmt: skip
    (home / "lora.safetensors").write_bytes(whole)
    read(home, read_lora, home / "lora.safetensors", meta_mmdit())


@functools.cache
def gguf_bytes():
    with tempfile.TemporaryDirectory() as name:
        writer = gguf.GGUFWriter(Path(name) / "x.gguf", "qwen_image")
        writer.add_uint32("general.x", 3)
        writer.add_array("general.list", [1, 2, 3])
        writer.add_string("general.text", "text")
        writer.add_tensor("transformer_blocks.0.attn.to_q.weight", np.ones((4, 32), np.float32))
        quantised = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("img_in.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(name) / "x.gguf").read_bytes()


def read_gguf(path):
    with GGUFFile(path) as file:
        for key in file.keys():
            dtype, _, _, size = file.info(key)
            if dtype in ("F32", "Q8_0") and size < 10_000:
                file.get_tensor(key)


@given(st.data())
def test_gguf(folder, data):
    home = folder / "gguf"
    home.mkdir(exist_ok=True)
    (home / "x.gguf").write_bytes(data.draw(bytes_of(gguf_bytes())))
    read(home, read_gguf, home / "x.gguf")
    read(home, read_weights, home / "x.gguf", "transformer")


GOOD = "f" * 20


@given(st.lists(json_of(RECORD), min_size=1, max_size=2), st.booleans())
def test_results(folder, lines, first):
    home = folder / "results"
    home.mkdir(exist_ok=True)
    good = json.dumps({**RECORD, "key": GOOD, "file": f"pictures/{GOOD}.png"}).encode()
    whole = [good, *lines] if first else [*lines, good]
    (home / "results.jsonl").write_bytes(b"\n".join(whole) + b"\n")
    found = read(home, read_results, home / "results.jsonl")
    assert found is None or GOOD in found or RECORD["key"] in found


@functools.cache
def conditioning_bytes():
    embeds, mask = torch.ones(2, 3, 8), torch.tensor([[True, True, False], [True, True, True]])
    latents = ((torch.ones(4, 16), torch.ones(2, 16)), (torch.ones(4, 16), torch.ones(2, 16)))
    grids = (((1, 2, 2), (1, 1, 2)),) * 2
    conditioning = Conditioning(
        prompt=Prompt(embeds, mask), negative=Prompt(embeds), target_grid=(1, 2, 2),
        reference_latents=latents, reference_grids=grids, provenance={"prompts": "a"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        conditioning.save(Path(name) / "x.safetensors")
        return (Path(name) / "x.safetensors").read_bytes()


@functools.cache
def record_bytes():
    layer = mini_layer()
    with tempfile.TemporaryDirectory() as name:
        with taps(layer, {"*": Recorder(to=Path(name) / "r")}), scope(step=1, branch="cond", rows=[0]):
            layer(torch.ones(1, 2, 4))
        (path,) = (Path(name) / "r").iterdir()
        return path.read_bytes()


def mini_layer():
    from qwenedit.networks.mmdit_layers import MLP

    return MLP(4)


@st.composite
def metadata_of(draw, original):
    """A safetensors file with one of the JSON texts in its metadata mutated."""
    (length,) = struct.unpack("<Q", original[:8])
    header = json.loads(original[8 : 8 + length])
    texts = header["__metadata__"]
    name = draw(st.sampled_from([key for key in sorted(texts) if key != "format"]))
    texts[name] = draw(json_of(json.loads(texts[name]))).decode(errors="replace")
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + original[8 + length :]


@given(st.data(), st.booleans())
def test_a_conditioning(folder, data, in_metadata):
    home = folder / "conditioning"
    home.mkdir(exist_ok=True)
    mutate = metadata_of if in_metadata else safetensors_of
    (home / "x.safetensors").write_bytes(data.draw(mutate(conditioning_bytes())))
    found = read(home, Conditioning.load, home / "x.safetensors")
    if found is not None:
        assert sum(len(group.rows) for group in found.groups()) == found.batch


@given(st.data(), st.booleans())
def test_a_record(folder, data, in_metadata):
    home = folder / "records"
    home.mkdir(exist_ok=True)
    mutate = metadata_of if in_metadata else safetensors_of
    (home / "0.safetensors").write_bytes(data.draw(mutate(record_bytes())))
    found = read(home, Records.load, home)
    if found is not None:
        assert all(isinstance(found[key], torch.Tensor) for key in found)


SPEC = {
    "model": "a/b", "pictures": ["mini:0", "cat.png", ["cat.png", "cat.png"]], "prompts": ["a", "b"],
    "pairing": "each", "seeds": [0, 1], "true_cfg_scale": 4.0, "steps": 2, "attention": True, "height": 64,
    "deterministic": False, "switches": {"seen.size": [32, 32]},
    "grid": {"references.latents": ["concatenated", "left_out"], "true_cfg_scale": [1, 4]},
}  # fmt: skip


def toml(value):
    """A value in TOML, tables inline; what JSON writes alike is left to it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return (
        "1979-05-27" if value is None else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
    )


@given(st.data())
def test_a_spec(folder, data):
    home = folder / "spec"
    home.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(home / "cat.png")
    spec = SPEC if data.draw(st.booleans()) else data.draw(values_of(SPEC))
    lines = (
        [f"{json.dumps(key)} = {toml(part)}" for key, part in spec.items()] if isinstance(spec, dict) else []
    )
    text = "\n".join(lines).encode(errors="replace")
    (home / "spec.toml").write_bytes(text if spec is not SPEC else data.draw(bytes_of(text)))
    read(home, read_spec, home / "spec.toml")


@functools.cache
def picture_bytes(kind):
    picture = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    mode, _, kind = kind.rpartition(" ")
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind)
    return file.getvalue()


KINDS = ["PNG", "P PNG", "I;16 PNG", "RGBA PNG", "JPEG", "CMYK JPEG", "WEBP", "GIF", "TIFF", "F TIFF", "BMP"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "I;16 PNG"])
@given(st.data())
def test_a_picture(folder, kind, data):
    home = folder / "picture"
    home.mkdir(exist_ok=True)
    (home / "x.png").write_bytes(data.draw(bytes_of(picture_bytes(kind))))
    picture = read(home, open_picture, home / "x.png")
    assert picture is None or min(picture.size) > 0


def test_what_is_not_mutated_is_read(folder):
    home = folder / "whole"
    home.mkdir()
    assert read_checkpoint(small_checkpoint("edit")) and read_checkpoint(small_checkpoint("layered"))
    for name, data in (("c", conditioning_bytes()), ("l", LORA), ("g", gguf_bytes())):
        (home / name).write_bytes(data)
    assert Conditioning.load(home / "c").batch == 2 and read_lora(home / "l", meta_mmdit())
    read_gguf(home / "g")
    (home / "records").mkdir()
    (home / "records" / "0.safetensors").write_bytes(record_bytes())
    assert len(Records.load(home / "records")) == 1
    (home / "results.jsonl").write_text(json.dumps(RECORD) + "\n")
    assert read_results(home / "results.jsonl") == {RECORD["key"]: RECORD}
    Image.new("RGB", (40, 30)).save(home / "cat.png")
    lines = [f"{json.dumps(key)} = {toml(part)}" for key, part in SPEC.items()]
    (home / "spec.toml").write_text("\n".join(lines).replace('["cat.png", "cat.png"]', '["cat.png"]'))
    with contextlib.suppress(ValueError):
        read_spec(home / "spec.toml")
    assert os.listdir(home / "records") == ["0.safetensors"]
