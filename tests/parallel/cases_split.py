"""What two processes do whose weights are split: `test_split.py` looks at the outcomes."""

from __future__ import annotations

import functools
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

import qwenedit
from qwenedit import mini
from qwenedit.memory.sharing import own_parts
from qwenedit.memory.sizes import network_sizes
from qwenedit.networks.mmdit import MMDiT, MMDiTConfig, RunCache
from qwenedit.parallel.spec import spec_of
from qwenedit.parallel.split import split_heads, split_weights
from qwenedit.taps import observed, tap_names, taps
from qwenedit.weights import loading
from qwenedit.weights.lora_targets import linear_layers
from qwenedit.weights.slices import is_split, own_part, placed_like, whole
from tests.parallel.cases_networks import difference
from tests.support import randomise_, relative_error

PICTURE = Image.linear_gradient("L").resize((80, 64)).convert("RGB")
CONFIG = {
    "patch_size": 2, "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 6,
    "num_attention_heads": 6, "joint_attention_dim": 7, "guidance_embeds": False, "axes_dims_rope": (2, 2, 2),
}  # fmt: skip
# Sizes that two does not divide, in the network and in what it is given.
CALLS = {
    "uneven": ({}, [(1, 3, 5), (1, 3, 3)], 5, None),
    "masked": ({}, [(1, 3, 4), (1, 1, 1)], 6, 2),
    "zero_cond_t": ({"zero_cond_t": True}, [(1, 3, 5), (1, 2, 3), (1, 1, 2)], 5, 3),
    "one text token": ({"zero_cond_t": True}, [(1, 1, 1), (1, 1, 2)], 1, None),
    "text alone": ({}, [(1, 3, 3)], 4, None),
    "layered": ({"use_additional_t_cond": True, "use_layer3d_rope": True}, [(3, 2, 3), (1, 2, 3)], 5, None),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def network(dtype=torch.float32, **changes):
    made = MMDiT(MMDiTConfig(**{**CONFIG, **changes}))
    return randomise_(made).to(dtype).requires_grad_(False)


def inputs(name, dtype):
    changes, grids, length, padded = CALLS[name]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = sum(frames * rows * columns for frames, rows, columns in grids)
    mask = None
    if padded is not None:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, length - padded :] = False
    time = torch.tensor([0.3, 0.9], dtype=dtype)
    addition = torch.zeros(2, dtype=torch.int64) if "use_additional_t_cond" in changes else None
    img, txt = draw(2, tokens, 12).to(dtype), draw(2, length, 7).to(dtype)
    return (img, txt, time, grids, mask, addition), changes


def parts_of(network, splitting):
    """A copy of a network of which this process holds its own part."""
    with torch.device("meta"):
        copy = MMDiT(network.config)
    splitting(copy)
    for name, value in network.named_parameters():
        parent, _, leaf = name.rpartition(".")
        weight = copy.get_parameter(name)
        part = own_part(weight)
        own = placed_like(value if part is None else value[part].clone(), weight)
        setattr(copy.get_submodule(parent), leaf, own)
    return copy.eval()


def by_weights(mmdit):
    split_weights(mmdit, "transformer", init_device_mesh("cpu", (2,)))


def by_heads(mmdit):
    split_heads(mmdit, init_device_mesh("cpu", (2,)))


@torch.no_grad()
def outputs(mmdit, call):
    """Of a plain forward, and of two that share a cache and leave out what is not needed."""
    cache, last = RunCache(), [mmdit(*call)]
    for _ in range(2):
        last.append(mmdit(*call, cache=cache, target_only=True))
    return last


def case_every_call_with_split_weights():
    equal = {}
    for name in CALLS:
        for dtype in DTYPES:
            call, changes = inputs(name, dtype)
            plain = network(dtype, **changes)
            pairs = zip(outputs(parts_of(plain, by_weights), call), outputs(plain, call), strict=True)
            equal[f"{name} {dtype}"] = all(torch.equal(*pair) for pair in pairs)
    return equal


def case_every_call_with_split_heads():
    errors = {}
    for name in CALLS:
        call, changes = inputs(name, torch.float64)
        plain = network(torch.float64, **changes)
        pairs = zip(outputs(parts_of(plain, by_heads), call), outputs(plain, call), strict=True)
        errors[name] = max(relative_error(*pair) for pair in pairs)
    return errors


class Counted:
    """An open file that counts the bytes of what is taken out of it."""

    def __init__(self, file, counts, path):
        self.file, self.counts, self.path = file, counts, path

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def get_tensor(self, key):
        return self.counted(key, self.file.get_tensor(key))

    def get_slice(self, key):
        one, counted = self.file.get_slice(key), self.counted

        class Slice:
            def __getitem__(self, part):
                return counted(key, one[part])

        return Slice()

    def counted(self, key, value):
        self.counts[f"{self.path.parent.name}/{key}"] = value.nbytes
        return value


@contextmanager
def counting():
    """The bytes that loading takes out of files, by component and key."""
    counts, original = {}, loading.safe_open
    loading.safe_open = lambda path, **options: Counted(original(path, **options), counts, path)
    try:
        yield counts
    finally:
        loading.safe_open = original


def load(**options):
    return qwenedit.load(device="cpu", progress=False, **options)


def weights(pipe):
    networks = (pipe.mmdit, pipe.vision_language, pipe.vae)
    return [(name, x) for network in networks for name, x in network.named_parameters()]


def read_by(**options):
    """Whether the weights of a pipeline equal one process's, and the share of the bytes that were read."""
    with counting() as all_of:
        plain = load()
    with counting() as own:
        pipe = load(**options)
    pairs = zip(weights(pipe), weights(plain), strict=True)
    equal = all(one == other and torch.equal(whole(x), y) for (one, x), (other, y) in pairs)
    return equal, own, all_of


def planned_by(parallel, **options):
    """The bytes of the networks' own weights, and those that are planned."""
    pipe = load(parallel=parallel, **options)
    compared = loading.compare_networks(mini.CHECKPOINT, ["transformer", "text_encoder", "vae"])
    found = {one.report.component: one.found for one in compared}
    parts = own_parts(found, spec_of(parallel), split_weights=bool(options))
    sizes = network_sizes(parts, torch.float32)
    held = sum(getattr(x, "_local_tensor", x).nbytes for _, x in weights(pipe))
    return [held, sum(one.all for one in sizes.values())]


def case_planned():
    return [planned_by("cfg=2", split_weights=True), planned_by("tensor=2")]


def share(own, all_of, *start):
    return sum(own[key] for key in own if key.startswith(start)) / sum(
        all_of[key] for key in all_of if key.startswith(start)
    )


def case_read_with_split_weights():
    equal, own, all_of = read_by(parallel="cfg=2", split_weights=True)
    blocks = "text_encoder/model.layers", "text_encoder/visual.blocks"
    return [equal, share(own, all_of, "transformer"), share(own, all_of, *blocks)]


def case_read_with_split_heads():
    equal, own, all_of = read_by(parallel="tensor=2")
    return [equal, share(own, all_of, "transformer/transformer_blocks")]


def edit(pipe, **options):
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(3)
    return pipe.edit(PICTURE, "make it 蓝色", generator=generator, **options).images


@contextmanager
def computed():
    """How often a run computes what it needs once: step-invariant tensors, and a block's modulation."""
    from qwenedit.networks.mmdit import Block

    counts = {"step_invariant": 0, "modulate": 0}
    plain = MMDiT.step_invariant, Block.modulate

    def counted(name, method):
        def call(*args):
            counts[name] += 1
            return method(*args)

        return call

    MMDiT.step_invariant, Block.modulate = map(counted, counts, plain)
    try:
        yield counts
    finally:
        MMDiT.step_invariant, Block.modulate = plain


def case_edit_with_split_weights():
    apart = {}
    for dtype in DTYPES:
        for parallel in ("cfg=2", "ulysses=2"):
            pipe = load(dtype=dtype, parallel=parallel, split_weights=True)
            apart[f"{dtype} {parallel}"] = difference(edit(load(dtype=dtype)), edit(pipe))
    return apart


def case_edit_with_split_heads():
    pipe, plain = load(dtype="float64", parallel="tensor=2"), load(dtype="float64")
    unguided = {"true_cfg_scale": 1.0, "num_images_per_prompt": 2}
    return [relative_error(edit(pipe, **one), edit(plain, **one)) for one in ({}, unguided)]


def case_what_is_computed_once():
    """With parallel and alone, unguided, so that all processes compute the same."""
    counts = []
    for options in ({"parallel": "ulysses=2", "split_weights": True}, {"parallel": "tensor=2"}, {}):
        pipe = load(**options)
        with torch.no_grad():
            seen = observed(pipe.mmdit), observed(pipe.vision_language)
        with computed() as count:
            edit(pipe, true_cfg_scale=1.0)
        counts.append([*seen, count])
    return counts


def case_taps_with_split_weights():
    """Every tap sees the whole tensor, and what one writes acts."""
    call, changes = inputs("masked", torch.float32)
    plain = network(**changes)
    parts, seen = parts_of(plain, by_weights), []
    for mmdit in (parts, plain):
        seen.append({})
        keep = {
            name: lambda x, site, into=seen[-1]: into.update({site.full: x.clone()})
            for name in tap_names(mmdit)
        }
        with taps(mmdit, keep, strict=False), torch.no_grad():
            mmdit(*call)
    halved = []
    for mmdit in (parts, plain):
        with taps(mmdit, {"blocks.0.img_mid": lambda x, site: x / 2}), torch.no_grad():
            halved.append(mmdit(*call))
    unchanged = torch.equal(halved[0], outputs(plain, call)[0])
    equal = [name for name in seen[0] if torch.equal(seen[0][name], seen[1][name])]
    return [len(seen[1]), len(equal), torch.equal(*halved), unchanged]


def lora(mmdit, folder):
    """The file of a LoRA of layers inside the blocks and outside of them."""
    chosen = (
        "blocks.0.attn.img_q",
        "blocks.1.attn.txt_out",
        "blocks.2.img_mlp.down",
        "blocks.3.img_mod.linear",
    )
    tensors = {}
    for official, ours in linear_layers(mmdit).items():
        if ours in (*chosen, "img_in"):
            layer = mmdit.get_submodule(ours)
            generator = torch.Generator().manual_seed(len(tensors))
            down = torch.randn(3, layer.in_features, generator=generator) / layer.in_features**0.5
            up = torch.randn(layer.out_features, 3, generator=generator) / 4
            tensors |= {f"transformer.{official}.lora_A.weight": down}
            tensors |= {f"transformer.{official}.lora_B.weight": up}
    file = Path(folder) / "lora.safetensors"
    save_file(tensors, file)
    return file


def case_lora_beside_split_weights_and_fused():
    """Fused before a run and after one, which has gathered the weights outside of the blocks."""
    plain, fresh, used = load(), *(load(parallel="ulysses=2", split_weights=True) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        file = lora(plain.mmdit, folder)
        for pipe in (plain, fresh, used):
            pipe.load_lora_weights(file)
    before = edit(load())
    beside = [edit(plain), edit(used)]
    for pipe in (plain, fresh, used):
        pipe.fuse_lora(safe_fusing=True)
    fused = [edit(pipe) for pipe in (plain, fresh, used)]
    pairs = zip(weights(plain), weights(used), strict=True)
    return {
        "acts": not torch.equal(before, beside[0]),
        "beside": difference(*beside),
        "fused": max(difference(fused[0], one) for one in fused[1:]),
        "weights": all(torch.equal(x, whole(y)) for (_, x), (_, y) in pairs),
    }


def case_lora_fused_into_split_heads():
    plain, pipe = load(dtype="float64"), load(dtype="float64", parallel="tensor=2")
    with tempfile.TemporaryDirectory() as folder:
        file = lora(plain.mmdit, folder)
        for one in (plain, pipe):
            one.load_lora_weights(file)
    refused = message(lambda: edit(pipe))
    for one in (plain, pipe):
        one.fuse_lora()
    return [relative_error(edit(pipe), edit(plain)), refused]


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def fp8(folder):
    """A file of the transformer's weights of which one is fp8."""
    (file,) = (mini.CHECKPOINT / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    key = "transformer_blocks.1.attn.to_q.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, Path(folder) / "fp8.safetensors")
    return Path(folder) / "fp8.safetensors"


def everyones(make):
    """What the first process makes, in all of them."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def case_saved():
    """Each process calls, the first one writes; a folder that is not empty is refused by each."""
    told, plain = {}, dict(weights(load()))
    for how in (
        {"parallel": "cfg=2", "split_weights": True},
        {"parallel": "tensor=2"},
        {"parallel": "cfg=2"},
    ):
        pipe, folder = load(**how), everyones(lambda: tempfile.mkdtemp())
        pipe.save_pretrained(Path(folder) / "saved")
        dist.barrier()
        saved = dict(weights(qwenedit.load(Path(folder) / "saved", device="cpu", progress=False)))
        equal = saved.keys() == plain.keys() and all(torch.equal(x, plain[name]) for name, x in saved.items())
        refused = None
        if is_split(pipe.mmdit):  # else only the first process looks at the folder
            refused = message(lambda pipe=pipe, folder=folder: pipe.save_pretrained(folder))
        told[str(how)] = [equal, refused and refused.replace(folder, "FOLDER")]
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    return told


def case_what_is_refused():
    pipe, told = load(parallel="cfg=2", split_weights=True), {}
    with tempfile.TemporaryDirectory() as folder:
        file = fp8(folder)
        for name, options in {
            "fp8": {"parallel": "cfg=2", "split_weights": True, "mmdit": file},
            "fp8 in heads": {"parallel": "tensor=2", "mmdit": file},
            "stage": {"parallel": "cfg=2", "split_weights": True, "residency": "stage"},
            "float8": {"parallel": "tensor=2", "storage": "float8"},
            "precomputed": {"parallel": "tensor=2", "modulation": "precomputed"},
            "compile": {"parallel": "cfg=2", "split_weights": True, "compile": True},
            "both": {"parallel": "tensor=2", "split_weights": True},
            "alone": {"split_weights": True},
        }.items():
            told[name] = message(functools.partial(load, **options))
            told[name] = told[name] and told[name].replace(folder, "FOLDER")
    told["offload"] = message(lambda: pipe.enable_model_cpu_offload(device="cpu"))
    told["move"] = message(lambda: pipe.to(torch.bfloat16))
    pipe.to("cpu")  # where it is
    return told


def case_gradients_with_split_heads():
    """Of what is given, and of weights."""
    errors = {}
    for name in ("masked", "zero_cond_t"):
        (img, *others), changes = inputs(name, torch.float64)
        plain, made = network(torch.float64, **changes), []
        for mmdit in (parts_of(plain, by_heads), plain):
            given = img.clone().requires_grad_()
            weights = [mmdit.get_parameter(f"blocks.0.{x}.weight") for x in ("attn.img_out", "txt_mlp.up")]
            for weight in weights:
                weight.requires_grad_()
            mmdit(given, *others).square().mean().backward()
            made.append([given.grad, *(whole(weight.grad) for weight in weights)])
            for weight in weights:
                weight.requires_grad_(False)
        errors[name] = max(relative_error(x, y) for x, y in zip(*made, strict=True))
    return errors
