"""Weights and LoRAs from outside: nothing is misread in silence, and what is wrong is named on reading."""

import json
import math
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import qwenedit
from qwenedit import mini
from qwenedit.cli import options as cli
from qwenedit.files import component_headers, read_header
from qwenedit.networks.mmdit import MMDiT
from qwenedit.weights.checkpoints import EMBEDDED
from qwenedit.weights.configs import network_config
from qwenedit.weights.formats import read_weights
from qwenedit.weights.lora_files import read_lora
from tests.support import EPS, assert_close

QUERY, OTHER = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k"
OURS = {QUERY: "blocks.0.attn.img_q", OTHER: "blocks.1.attn.img_k"}
WIDTH, RANK = 128, 4


def load(**options):
    return qwenedit.load(device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def mmdit():
    with torch.device("meta"):
        return MMDiT(network_config(EMBEDDED, "transformer"))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / shape[-1] ** 0.5


def matrices(*modules, rank=RANK, seed=0):
    return {
        f"{module}.lora_{letter}.weight": random(*shape, seed=seed)
        for module in modules or (QUERY,)
        for letter, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank)))
    }


def write(path, tensors, metadata=None, config=None):
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


def factors(path, mmdit):
    deltas = read_lora(path, mmdit)
    return [deltas[OURS[module]].factor for module in (QUERY, OTHER) if OURS[module] in deltas]


def peft(**more):
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, **more}


def in_header(**config):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": x for key, x in config.items()})}


# Checkpoints


@pytest.mark.parametrize("first, second", [(0x80, 0x02), (0x80, 0x3E), (0x80, 0x04)])
def test_a2_a_long_header_is_no_pickle(tmp_path, first, second):
    """Its length in bytes begins the file."""
    tensors = load_file(next((EMBEDDED / "vae").glob("*.safetensors")))
    file, wanted = tmp_path / "v.safetensors", first + 256 * second
    save_file(tensors, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    while wanted < length:
        wanted += 0x10000
    padded = content[8 : 8 + length] + b" " * (wanted - length)  # the format pads headers with spaces
    file.write_bytes(wanted.to_bytes(8, "little") + padded + content[8 + length :])
    assert file.read_bytes()[:2] == bytes((first, second))
    assert read_header(file).keys() == tensors.keys()
    assert len(read_weights(file, "vae").tensors) == len(tensors)
    assert load(vae=file, text_encoder=False).vae is not None


@pytest.mark.parametrize("legacy", [False, True])
def test_a2_pickles_are_named_at_every_entrance(tmp_path, legacy):
    file = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(100)}, file, _use_new_zipfile_serialization=not legacy)
    for reader in (lambda: read_weights(file, "vae"), lambda: load().load_lora_weights(file)):
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            reader()


@pytest.fixture
def transformer(tmp_path):
    return shutil.copytree(EMBEDDED / "transformer", tmp_path / "transformer")


def shard(folder, variant="", names=("a", "b"), metadata=None):
    """The folder's file as two shards with an index."""
    tensors, weight_map = load_file(EMBEDDED / "transformer/diffusion_pytorch_model.safetensors"), {}
    for part, name in enumerate(names):
        own = dict(sorted(tensors.items())[part::2])
        (folder / f"{name}{variant}.safetensors").parent.mkdir(parents=True, exist_ok=True)
        save_file(own, folder / f"{name}{variant}.safetensors", metadata if part else None)
        weight_map |= dict.fromkeys(own, f"{name}{variant}.safetensors")
    index = folder / f"model{variant}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_a13_a_folders_quantisation_is_read_as_a_files(transformer, sharded):
    (file,) = transformer.glob("*.safetensors")
    layers = {"layers": {"img_in": {"format": "float8_e4m3fn", "convrot": True}}}
    metadata = {"_quantization_metadata": json.dumps(layers)}
    if sharded:
        file.unlink()
        shard(transformer, metadata=metadata)
    else:
        save_file(load_file(file), file, metadata)
    (strange,) = [x for x in read_weights(transformer, "transformer").tensors.values() if not x.readable]
    assert strange.name == "img_in.weight" and "convrot" in strange.dtype


def test_a13_a_description_that_cannot_be_read(transformer):
    (file,) = transformer.glob("*.safetensors")
    for text in ("[" * 100_000, "[]", '{"layers": 3}'):
        save_file(load_file(file), file, {"_quantization_metadata": text})
        for path in (transformer, file):
            with pytest.raises(ValueError, match="_quantization_metadata cannot be read"):
                read_weights(path, "transformer")


def test_a14_the_plain_index_before_a_variants(transformer):
    next(transformer.glob("*.safetensors")).unlink()
    shard(transformer, names=("x", "y"))
    shard(transformer, variant=".fp16")
    found = {path.name for path, _ in component_headers(transformer).values()}
    assert found == {"x.safetensors", "y.safetensors"}
    for name in ("model.safetensors.index.json", "x.safetensors", "y.safetensors"):
        (transformer / name).unlink()
    found = {path.name for path, _ in component_headers(transformer).values()}
    assert found == {"a.fp16.safetensors", "b.fp16.safetensors"}


def test_a14_the_plain_file_before_a_variants(transformer):
    (file,) = transformer.glob("*.safetensors")
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert {path for path, _ in component_headers(transformer).values()} == {file}


def test_a14_the_plain_file_before_a_variants_index(transformer):
    (file,) = transformer.glob("*.safetensors")
    shard(transformer, variant=".fp16")
    assert {path for path, _ in component_headers(transformer).values()} == {file}


def test_a14_an_index_of_a_single_file(transformer):
    """As some tools write it: the index names the file beside it."""
    (file,) = transformer.glob("*.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(file), file.name)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    assert {path for path, _ in component_headers(transformer).values()} == {file}


def test_a14_two_of_equal_right_are_an_error(transformer):
    (file,) = transformer.glob("*.safetensors")
    shard(transformer)
    file.rename(transformer / "model.safetensors")
    with pytest.raises(ValueError, match=r"found model\.safetensors\.index\.json, model\.safetensors"):
        component_headers(transformer)
    (transformer / "model.safetensors").unlink()
    shutil.copy(transformer / "model.safetensors.index.json", transformer / "b.safetensors.index.json")
    with pytest.raises(ValueError, match=r"found b\.safetensors\.index\.json, model\.s"):
        component_headers(transformer)


@pytest.mark.parametrize("where", ["../", "sub/", "{folder}/", "C:/", "..\\"])
def test_b8_shards_outside_of_the_folder_are_refused(transformer, where):
    next(transformer.glob("*.safetensors")).unlink()
    where = where.format(folder=transformer.parent)
    shard(transformer, names=(f"{where}a", f"{where}b"))
    with pytest.raises(
        ValueError, match=r"wanted (names of files in its own folder|the name of a file inside)"
    ):
        component_headers(transformer)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\u202eb", ""])
def test_b6_an_index_with_names_that_cannot_be_shown_is_refused(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    index = {"weight_map": {name: "y.safetensors", "a": "y.safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the name of a tensor in .*wanted a name of printable") as error:
        component_headers(tmp_path)
    assert str(error.value).isprintable()


# What a LoRA is multiplied by


@pytest.mark.parametrize(
    "config, wanted",
    [
        (peft(), [2, 2]),
        (peft(use_rslora=True), [4, 4]),
        (peft(alpha_pattern={"to_k": 2}), [2, 0.5]),
        (peft(alpha_pattern={"attn.to_q": 2, ".*": 12}), [0.5, 3]),
        (peft(alpha_pattern={f"^{QUERY}": 2}), [0.5, 2]),
        (peft(alpha_pattern={"transformer_blocks.*attn.*k": 4}), [2, 1]),
        (peft(alpha_pattern={r"1\.attn\.to_k$": 4, "o_q": 4}), [2, 1]),
        (peft(r=8, rank_pattern={"to_q": RANK, "to_k": RANK}, use_rslora=True), [4, 4]),
        ({"r": RANK}, [1, 1]),
    ],
)
def test_a3_alpha_of_pefts_config_wherever_it_is(tmp_path, mmdit, config, wanted):
    tensors = matrices(QUERY, OTHER)
    beside = write(tmp_path / "a" / "adapter_model.safetensors", tensors, config=config)
    header = write(tmp_path / "b" / "x.safetensors", tensors, in_header(**config))
    assert factors(beside, mmdit) == factors(header, mmdit) == wanted


@pytest.mark.parametrize(
    "metadata, wanted",
    [
        ({"rank": "4", "alpha": "1"}, 0.25),
        ({"alpha": "6.0"}, 1.5),
        ({"rank": "4"}, 1),
        ({"alpha": "None", "format": "pt"}, 1),
        ({"ss_network_alpha": "1", "ss_network_dim": "4"}, 1),  # kept by conversions that apply it
    ],
)
def test_a4_alpha_of_the_header(tmp_path, mmdit, metadata, wanted):
    assert factors(write(tmp_path / "x.safetensors", matrices(), metadata), mmdit) == [wanted]


def test_a4_places_that_contradict_each_other_are_both_named(tmp_path, mmdit):
    with_alpha = {**matrices(), f"{QUERY}.alpha": torch.tensor(1.0)}
    for number, (tensors, metadata, config, first, second) in enumerate(
        (
            (with_alpha, {"alpha": "2"}, None, "in its tensors", "the metadata"),
            (with_alpha, in_header(**peft()), None, "in its tensors", "lora_adapter_metadata"),
            (with_alpha, None, peft(), "in its tensors", "adapter_config"),
            (matrices(), {"alpha": "2"}, peft(), "the metadata", "adapter_config"),
            (
                matrices(),
                {"alpha": "2", **in_header(**peft())},
                None,
                "the metadata",
                "lora_adapter_metadata",
            ),
            (matrices(), {"rank": "8", "alpha": "8"}, None, "metadata .* states rank 8", "matrices have 4"),
            (matrices(), None, peft(rank_pattern={"to_q": 2}), "states rank 2", "have 4"),
        )
    ):
        file = write(tmp_path / str(number) / "x.safetensors", tensors, metadata, config)
        with pytest.raises(ValueError, match=f"{first}.*{second}"):
            read_lora(file, mmdit)
    agreeing = write(tmp_path / "y" / "x.safetensors", with_alpha, {"alpha": "1"}, peft(lora_alpha=1))
    assert factors(agreeing, mmdit) == [0.25]


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("alpha", torch.tensor(math.nan), "alpha is nan"),
        ("alpha", torch.tensor([-math.inf]), "alpha is -inf"),
        ("alpha", torch.tensor(True), "alpha is of torch.bool"),
        ("lora_A.weight", torch.ones(RANK, WIDTH, dtype=torch.int32), "down of torch.int32"),
        ("lora_B.weight", torch.ones(WIDTH, RANK, dtype=torch.bool), "up of torch.bool"),
        ("lora_B.bias", torch.ones(WIDTH, dtype=torch.int64), "bias of torch.int64"),
        ("lora_B.weight", torch.full((WIDTH, RANK), math.inf), "NaN or infinity in up"),
        ("lora_magnitude_vector", torch.full((WIDTH,), math.nan), "NaN or infinity in magnitude"),
    ],
)
def test_a15_what_is_no_finite_float_is_refused_on_reading(tmp_path, mmdit, name, tensor, message):
    file = write(tmp_path / "x.safetensors", {**matrices(), f"{QUERY}.{name}": tensor})
    with pytest.raises(ValueError, match=message):
        read_lora(file, mmdit)


def test_a15_in_a_state_dict_too(mmdit):
    for wrong in (torch.ones(RANK, WIDTH, dtype=torch.complex64), [[1.0]]):
        with pytest.raises(ValueError, match=r"down of (torch\.complex64|list), wanted floats"):
            read_lora({**matrices(), f"{QUERY}.lora_A.weight": wrong}, mmdit)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "much"}, {"lora_alpha": [8]}, {"lora_alpha": True}, {"lora_alpha": math.nan}, {"r": 0},
        {"r": 4.5}, {"use_rslora": "yes"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"to_q": None, "a+": 1}},
        {"alpha_pattern": {"to_q": "x"}}, {"rank_pattern": {"to_q": -1}}, {"fan_in_fan_out": True},
        {"rank_pattern": "to_q"}, {"alpha_pattern": {"(a*)*b": 1}},
    ],
)  # fmt: skip
def test_b13_metadata_of_wrong_types_is_refused(tmp_path, mmdit, config):
    beside = write(tmp_path / "a" / "x.safetensors", matrices(), config=peft() | config)
    header = write(tmp_path / "b" / "x.safetensors", matrices(), in_header(**(peft() | config)))
    for file, place in ((beside, "adapter_config.json beside"), (header, "lora_adapter_metadata of")):
        with pytest.raises(ValueError, match=f"{place}.* (wanted|not supported)"):
            read_lora(file, mmdit)


def test_b13_a_description_that_is_no_object(tmp_path, mmdit):
    for text in ("[1]", "3", "{", "[" * 100_000):
        file = write(tmp_path / "x.safetensors", matrices(), {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match="lora_adapter_metadata of"):
            read_lora(file, mmdit)
    file = write(tmp_path / "x.safetensors", matrices())
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json holds a list"):
        read_lora(file, mmdit)


def test_b13_patterns_are_names_and_bounded(tmp_path, mmdit):
    stars = ".*a" * 90
    file = write(tmp_path / "x.safetensors", matrices(), config=peft(alpha_pattern={stars: 1, "to_q": 2}))
    assert factors(file, mmdit) == [0.5]  # an expression with 90 stars, searched by trial, would not end
    for pattern in ("(a|a)*$", "[a-z]+", "(?:x+x+)+y", "a" * 400, ""):
        write(file, matrices(), config=peft(alpha_pattern={pattern: 1}))
        with pytest.raises(ValueError, match=r"alpha_pattern has the pattern .* wanted names"):
            read_lora(file, mmdit)
    write(file, matrices(), config=peft(rank_pattern={f"a{n}": 1 for n in range(10_001)}))
    with pytest.raises(ValueError, match="rank_pattern is"):
        read_lora(file, mmdit)


# DoRA, biases, LoKr, LoHa


def kinds():
    magnitude = random(WIDTH).abs() + 0.5
    lokr = {"lokr_w1": random(4, 8), "lokr_w2_a": random(32, 3), "lokr_w2_b": random(3, 16)}
    hada = {f"hada_w{n}_{x}": random(*((WIDTH, 3) if x == "a" else (3, WIDTH)), seed=int(n))
            for n in "12" for x in "ab"}  # fmt: skip
    low_rank = {key.removeprefix(f"{QUERY}."): x for key, x in matrices().items()}
    product = low_rank["lora_B.weight"] @ low_rank["lora_A.weight"]
    kron = torch.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"])
    whole = {"lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 8), "lokr_w2": random(32, 16)}
    pairs = hada["hada_w1_a"] @ hada["hada_w1_b"], hada["hada_w2_a"] @ hada["hada_w2_b"]
    alpha = {"alpha": torch.tensor(6.0)}
    return {  # tensors; the change of the weight; the rows' norms; the change of the bias
        "DoRA of peft": (
            {**low_rank, **alpha, "lora_magnitude_vector": magnitude}, 1.5 * product, magnitude, 0
        ),
        "DoRA of LyCORIS": ({**low_rank, "dora_scale": magnitude[:, None]}, product, magnitude, 0),
        "a bias": (
            {**low_rank, **alpha, "lora_B.bias": random(WIDTH)}, 1.5 * product, None, 1.5 * random(WIDTH)
        ),
        "LoKr": ({**lokr, **alpha}, 2 * kron, None, 0),
        "LoKr, the other whole": (
            {**whole, **alpha}, 3 * torch.kron(whole["lokr_w1_a"] @ whole["lokr_w1_b"], whole["lokr_w2"]),
            None, 0,
        ),
        "LoKr, both whole": (  # there alpha has no meaning
            {"lokr_w1": random(4, 8), "lokr_w2": random(32, 16), "alpha": torch.tensor(9e9)},
            torch.kron(random(4, 8), random(32, 16)), None, 0,
        ),
        "LoKr with DoRA": ({**lokr, **alpha, "dora_scale": magnitude}, 2 * kron, magnitude, 0),
        "LoHa": ({**hada, **alpha}, 2 * pairs[0] * pairs[1], None, 0),
        "LoHa with DoRA": (
            {**hada, **alpha, "dora_scale": magnitude[:, None]}, 2 * pairs[0] * pairs[1], magnitude, 0
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
@torch.no_grad()
def test_c13_every_kind_is_its_formula_beside_the_weight_and_fused(kind):
    parts, change, magnitude, bias = kinds()[kind]
    pipe = load(text_encoder=False).to(torch.float64)
    tensors = {f"diffusion_model.{QUERY}.{part}": x for part, x in parts.items()}
    base = pipe.mmdit.get_submodule(OURS[QUERY])
    for scale in (1.0, 0.3):
        pipe.load_lora_weights(tensors, "one", scale=scale)
        weight = base.weight + scale * change
        if magnitude is not None:
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        wanted = x @ weight.T + base.bias + scale * bias
        assert_close(pipe.mmdit.get_submodule(OURS[QUERY])(x), wanted, 8 * EPS)  # matrices are float32's
        if scale == 1:
            pipe.unload_lora_weights()
            assert pipe.mmdit.get_submodule(OURS[QUERY]) is base
    pipe.fuse_lora()
    fused = pipe.mmdit.get_submodule(OURS[QUERY])
    assert fused is base and pipe.loras == {}
    assert_close(fused(x), wanted, 8 * EPS)


@torch.no_grad()
def test_c13_fusing_several_kinds_equals_them_beside_the_weight():
    """In float64, in both orders; a DoRA scales what comes before it, as in peft."""
    pipe = load(text_encoder=False).to(torch.float64)
    chosen = [kinds()[kind][0] for kind in ("a bias", "DoRA of peft", "LoKr")]
    for number, parts in enumerate(chosen):
        pipe.load_lora_weights({f"{QUERY}.{part}": x for part, x in parts.items()}, f"lora{number}")
    pipe.set_adapters(["lora0", "lora1", "lora2"], [0.5, 0.7, -0.2])
    x = torch.randn(7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = pipe.mmdit.get_submodule(OURS[QUERY])(x)
    pipe.fuse_lora()
    assert isinstance(pipe.mmdit.get_submodule(OURS[QUERY]), nn.Linear)
    assert_close(pipe.mmdit.get_submodule(OURS[QUERY])(x), wanted, 8 * EPS)


MODES = [
    {"residency": "stage"}, {"residency": "stream", "modulation": "precomputed"},
    {"residency": "resident", "modulation": "precomputed"}, {"storage": "float8"},
]  # fmt: skip


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(modes.values()))
def test_c13_in_every_memory_mode(modes):
    """On a query and on the modulation, whose weights are read once a run if precomputed."""
    pipes = load(), load(**modes)
    conditioning = pipes[0].condition(Image.open(mini.EXAMPLE), "make the circle red")
    mod, wide = "transformer_blocks.2.img_mod.1", 6 * WIDTH
    extra = {
        f"{mod}.lora_A.weight": random(RANK, WIDTH), f"{mod}.lora_B.weight": random(wide, RANK),
        f"{mod}.dora_scale": random(wide).abs(),
    }  # fmt: skip
    results = []
    for pipe in pipes:
        for kind in ("DoRA of peft", "LoKr", "LoHa"):
            parts = {f"{QUERY}.{part}": x for part, x in kinds()[kind][0].items()}
            pipe.load_lora_weights({**parts, **(extra if kind == "LoKr" else {})})
        plain = list(pipe.loras)
        made = []
        for names in ([], plain):
            pipe.set_adapters(names)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(0)
                steps = list(pipe.steps(conditioning, num_inference_steps=2, generator=generator))
            made.append(steps[-1].after)
        results.append(made)
    for ours, wanted in zip(*reversed(results), strict=True):
        if "storage" not in modes:
            assert torch.equal(ours, wanted)
        assert ours.isfinite().all()
    changes = [made[1] - made[0] for made in results]
    assert all(change.abs().max() > 0.05 for change in changes)
    if "storage" in modes:  # rounding to 8 bits changes less than the LoRAs do
        assert (changes[0] - changes[1]).norm() < changes[0].norm() / 2


@torch.no_grad()
def test_c13_a_doras_magnitude_has_no_scale_and_is_switched_off_by_name():
    pipe = load(text_encoder=False)
    parts, _, magnitude, _ = kinds()["DoRA of peft"]
    pipe.load_lora_weights({f"{QUERY}.{part}": x for part, x in parts.items()}, "dora", scale=0)
    layer, x = pipe.mmdit.get_submodule(OURS[QUERY]), torch.ones(1, WIDTH)
    weight = layer.base.weight * (magnitude / layer.base.weight.norm(dim=1))[:, None]
    assert_close(layer(x), x @ weight.T + layer.base.bias, 64 * EPS)
    pipe.set_adapters([])
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"lokr_w1": random(4, 8)}, "wanted matrices lokr_w2_a and lokr_w2_b, or lokr_w2"),
        ({"lokr_w1": random(4, 8), "lokr_w2": random(8, 8)}, r"LoKr of 32 x 64, wanted 128 x 128"),
        ({"lokr_w1": random(4, 8), "lokr_w1_a": random(4, 1), "lokr_w2": random(32, 16)}, "lokr_w1_a and"),
        ({"hada_w1_a": random(WIDTH, 2), "hada_w1_b": random(2, WIDTH)}, "hada_w2_a and hada_w2_b"),
        ({"lokr_w1": random(4, 8), "hada_w1_a": random(4, 8)}, "several ways"),
        ({"dora_scale": random(WIDTH)}, "has no down and no up matrix"),
        ({"alpha": torch.tensor(1.0)}, "has no down and no up matrix"),
    ],
)
def test_c13_incomplete_or_misshapen_parts_are_named(mmdit, parts, message):
    with pytest.raises(ValueError, match=message):
        read_lora({f"{QUERY}.{part}": x for part, x in parts.items()}, mmdit)
    both = {**matrices(), f"{QUERY}.lora_B.bias": random(WIDTH), f"{QUERY}.dora_scale": random(WIDTH)}
    with pytest.raises(ValueError, match="a bias of lora_B with DoRA"):
        read_lora(both, mmdit)
    with pytest.raises(ValueError, match="one for each input"):
        read_lora({**matrices(), f"{QUERY}.dora_scale": random(1, WIDTH)}, mmdit)


# Which LoRAs act, and their names


@torch.no_grad()
def velocity(pipe):
    conditioning = pipe.condition(Image.open(mini.EXAMPLE), "make the circle red")
    return next(iter(pipe.steps(conditioning, generator=torch.Generator().manual_seed(0)))).cond


def test_a5_the_last_one_loaded_is_the_active_one():
    pipe = load()
    alone = []
    for seed in (0, 1):
        pipe.load_lora_weights(matrices(QUERY, seed=seed), f"l{seed}")
        alone.append(velocity(pipe))
        pipe.unload_lora_weights()
    pipe.load_lora_weights(matrices(QUERY, seed=0), "l0")
    pipe.set_adapters("l0")
    pipe.load_lora_weights(matrices(QUERY, seed=1), "l1")
    assert pipe.get_active_adapters() == ["l1"] and pipe.loras == {"l0": 0.0, "l1": 1.0}
    assert torch.equal(velocity(pipe), alone[1])
    pipe.set_adapters(["l0", "l1"])
    assert pipe.get_active_adapters() == ["l0", "l1"]
    assert not any(torch.equal(velocity(pipe), one) for one in alone)
    pipe.set_adapters("l0")
    assert pipe.get_active_adapters() == ["l0"] and torch.equal(velocity(pipe), alone[0])
    assert pipe.get_list_adapters() == {"transformer": ["l0", "l1"]}


def test_a5_a_loras_memory_is_its_own():
    """What becomes of the caller's tensors does not change a LoRA that is loaded."""
    pipe, tensors = load(text_encoder=False), matrices()
    pipe.load_lora_weights(tensors)
    before = pipe.mmdit.get_submodule(OURS[QUERY])(torch.ones(1, WIDTH))
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(pipe.mmdit.get_submodule(OURS[QUERY])(torch.ones(1, WIDTH)), before)


def test_a5_several_on_the_command_line_all_act(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(mini.EXAMPLE).save("in.png")
    for seed in (0, 1):
        write(tmp_path / str(seed) / "x.safetensors", matrices(QUERY, seed=seed))
    made = {}
    for name, options in {
        "0": ["--lora", "0/x.safetensors"],
        "1": ["--lora", "1/x.safetensors"],
        "both": ["--lora", "0/x.safetensors", "--lora", "1/x.safetensors:0.5"],
        "order": ["--lora", "1/x.safetensors:.5", "--lora", "0/x.safetensors:1"],
    }.items():
        done = cli.main(
            ["edit", "in.png", "x", "-o", f"{name}.png", "--seed", "1", "--steps", "1", "--quiet", *options]
        )
        assert done == 0
        made[name] = np.asarray(Image.open(f"{name}.png")).astype(int)
    assert (made["both"] != made["0"]).any() and (made["both"] != made["1"]).any()
    assert abs(made["both"] - made["order"]).max() <= 1  # the sums are rounded in another order


def test_c3_a_free_name_after_one_has_gone():
    pipe = load(text_encoder=False)
    for _ in range(2):
        pipe.load_lora_weights(matrices())
    pipe.unload_lora_weights("lora-1")
    for _ in range(2):
        pipe.load_lora_weights(matrices())
    assert set(pipe.loras) == {"lora-1", "lora-2", "lora-3"}


def test_c4_files_of_one_name_get_names_of_their_own(tmp_path):
    pipe = load(text_encoder=False)
    for folder in "aba":
        pipe.load_lora_weights(write(tmp_path / folder / "x.safetensors", matrices()))
    assert set(pipe.loras) == {"x", "x-2", "x-3"}
    with pytest.raises(ValueError, match="'x' is loaded already"):
        pipe.load_lora_weights(matrices(), "x")
    with pytest.raises(ValueError, match="adapter_name is"):
        pipe.load_lora_weights(matrices(), "red\x1b[31m")


@pytest.mark.parametrize("name", [r"C:\loras\x.safetensors", r"C:\x.safetensors:0.5", "x.safetensors:0,5"])
def test_c5_a_file_that_is_not_there(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Image.open(mini.EXAMPLE).save("in.png")
    assert cli.main(["edit", "in.png", "x", "-o", "o.png", "--steps", "1", "--quiet", "--lora", name]) == 2
    assert "no such LoRA: " in (line := capsys.readouterr().err.splitlines()[-1]) and "Traceback" not in line
    assert name.replace("\\", "") in line.replace("\\", "")


def test_c5_a_scale_that_is_not_finite_is_found_before_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open(mini.EXAMPLE).save("in.png")
    write(tmp_path / "x.safetensors", matrices())
    monkeypatch.setattr("qwenedit.cli.commands.load", lambda *_, **__: pytest.fail("weights were read"))
    for scale in ("nan", "-inf"):
        options = ["--steps", "1", "--quiet", "--lora", f"x.safetensors:{scale}"]
        assert cli.main(["edit", "in.png", "x", "-o", "o.png", *options]) == 2
        assert "wanted a finite number" in capsys.readouterr().err


# The reference's idioms


def test_c8_disable_and_enable():
    pipe = load()
    plain = velocity(pipe)
    pipe.load_lora_weights(matrices(), "one", scale=0.5)
    changed = velocity(pipe)
    pipe.disable_lora()
    assert torch.equal(velocity(pipe), plain) and pipe.loras == {"one": 0.0}
    assert pipe.get_active_adapters() == ["one"]
    pipe.enable_lora()
    assert torch.equal(velocity(pipe), changed) and pipe.loras == {"one": 0.5}
    pipe.disable_lora()
    pipe.load_lora_weights(matrices(OTHER), "two")
    assert pipe.loras == {"one": 0.0, "two": 1.0}


def test_c8_delete_adapters():
    pipe = load(text_encoder=False)
    for name in "abc":
        pipe.load_lora_weights(matrices(), name)
    with pytest.raises(ValueError, match="no LoRA called 'd'"):
        pipe.delete_adapters(["a", "d"])
    assert set(pipe.loras) == set("abc")
    pipe.delete_adapters(["a", "c"])
    assert pipe.loras == {"b": 0.0}
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {} and isinstance(pipe.mmdit.get_submodule(OURS[QUERY]), nn.Linear)


@torch.no_grad()
def test_c8_fuse_lora_with_its_arguments():
    pipe = load(text_encoder=False)
    for seed, name in enumerate("ab"):
        pipe.load_lora_weights(matrices(seed=seed), name, scale=0.5)
    layer = pipe.mmdit.get_submodule(OURS[QUERY])
    base, up, down = layer.base.weight.clone(), *(getattr(layer.changes[0], x) for x in ("up", "down"))
    for options, message in (
        ({"components": ["transformer", "text_encoder"]}, r"wanted \['transformer'\]"),
        ({"lora_scale": math.nan}, "lora_scale is nan"),
        ({"adapter_names": ["c"]}, "no LoRA called 'c'"),
        ({"lora_scale": 1e39, "safe_fusing": True}, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.fuse_lora(**options)
    assert torch.equal(layer.base.weight, base)
    pipe.fuse_lora(["transformer"], lora_scale=0.25, adapter_names=["a"])
    assert_close(layer.base.weight, base + 0.125 * up @ down, 8 * EPS)
    assert pipe.loras == {"b": 0.5}  # still beside the weight
    with pytest.raises(ValueError, match=r"load the model again.*set_adapters"):
        pipe.unfuse_lora()


def test_c8_load_lora_weights_with_the_options_that_people_pass(tmp_path):
    pipe = load(text_encoder=False)
    file = write(tmp_path / "checkpoint" / "x.safetensors", matrices())
    known = {"low_cpu_mem_usage": True, "use_safetensors": True, "local_files_only": True, "proxies": None}
    pipe.load_lora_weights(tmp_path, weight_name=file.name, subfolder="checkpoint", **known)
    pipe.load_lora_weights(file.parent, "alone")
    write(tmp_path / "checkpoint" / "y.safetensors", matrices())
    with pytest.raises(ValueError, match=r"give weight_name, its file; one of x\.safetensors, y\.s"):
        pipe.load_lora_weights(file.parent)
    shutil.copy(file, file.with_name("pytorch_lora_weights.safetensors"))
    pipe.load_lora_weights(file.parent)
    assert set(pipe.loras) == {"x", "alone", "pytorch_lora_weights"}
    both = {f"{prefix}.{key}": x for prefix in ("mine", "text_encoder") for key, x in matrices().items()}
    with pytest.raises(ValueError, match="tensors are not: mine"):
        pipe.load_lora_weights(both)
    pipe.load_lora_weights(both, "mine", prefix="mine")
    with pytest.raises(ValueError, match="it has none"):
        pipe.load_lora_weights(both, prefix="other")
    for option, message in (
        ({"hotswap": True}, "unload_lora_weights first"),
        ({"proxies": {}}, "HTTPS_PROXY"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(file, **option)
    with pytest.raises(TypeError, match="no option scael"):
        pipe.load_lora_weights(file, scael=1)


def test_c8_a_hub_id_brings_the_config_beside_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "snapshot"
    write(folder / "adapter_model.safetensors", matrices(), config=peft())
    asked = []

    def download(repo, name, subfolder=None, **options):
        asked.append((repo, name, subfolder, options))
        if not (folder / name).exists():
            raise EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pipe, options = load(text_encoder=False), {"revision": "abc", "token": "t"}
    how = {"weight_name": "adapter_model.safetensors", "subfolder": "s"}
    pipe.load_lora_weights("somebody/style", **how, **options)
    assert pipe.mmdit.get_submodule(OURS[QUERY]).changes[0].factor == 2
    assert asked == [
        ("somebody/style", name, "s", options) for name in (how["weight_name"], "adapter_config.json")
    ]
    (folder / "adapter_config.json").unlink()
    pipe.load_lora_weights("somebody/style", "again", **how)
    assert pipe.mmdit.get_submodule(OURS[QUERY]).changes[1].factor == 1


def test_c8_set_adapters_takes_numbers_of_every_library():
    pipe = load(text_encoder=False)
    pipe.load_lora_weights(matrices(), "a", scale=np.float32(0.5))
    pipe.load_lora_weights(matrices(), "b", scale=torch.tensor(2.0))
    assert pipe.loras == {"a": 0.0, "b": 2.0}
    pipe.set_adapters(["a", "b"], np.array([0.25, 3]))
    assert pipe.loras == {"a": 0.25, "b": 3.0}
    pipe.set_adapters(["a", "b"], [None, np.int64(2)])
    assert pipe.loras == {"a": 1.0, "b": 2.0}
    for wrong in ({"blocks": 1}, "1", [True, 1], [math.nan, 1]):
        with pytest.raises(ValueError, match="a LoRA's scale is"):
            pipe.set_adapters(["a", "b"], wrong)
    assert pipe.loras == {"a": 1.0, "b": 2.0}
