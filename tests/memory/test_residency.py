"""Memory modes: the resident run's results bit by bit, from weights that are there in their turn only."""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shutil
import threading
import warnings
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import qwenedit
from qwenedit import files, mini
from qwenedit.ablation.first_block_cache import first_block_cache
from qwenedit.cli import options as cli
from qwenedit.instruments.inversion import invert, picture_latents
from qwenedit.instruments.trace import trace_ops
from qwenedit.memory import reading
from qwenedit.memory.residency import Modes, home, present
from qwenedit.memory.streaming import Absent, Source, Streamed, _shrunk
from qwenedit.networks.mmdit import RunCache
from qwenedit.sampling.predictor import predictor
from qwenedit.switches import Switches
from qwenedit.taps import observed as looked_at
from qwenedit.taps import swapped, tap_names, taps
from qwenedit.weights import formats
from tests.test_lora import official
from tests.tiny import checkpoint, embedded_plus, picture
from tests.weights.test_formats import as_published, needs_gguf, scaled, tensors_of, wide, write_gguf

MODES = [
    {"residency": residency, "modulation": modulation}
    for residency, modulation in itertools.product(("resident", "stage", "stream"), ("live", "precomputed"))
][1:]
COMING_AND_GOING = [modes for modes in MODES if modes["residency"] != "resident"]
TWO = [picture(60, 44), picture(40, 70, seed=1)]


def named(modes):
    return "-".join(str(value) for value in modes.values())


every_mode = pytest.mark.parametrize("modes", MODES, ids=named)
every_residency = pytest.mark.parametrize("residency", ["stage", "stream"])


def load(folder=None, **options):
    return qwenedit.load(folder, **{"device": "cpu", "progress": False, **options})


CASES = {
    "embedded": (None, Image.open(mini.EXAMPLE), "make the circle red"),
    "edit": (lambda: checkpoint("edit", layers=3), TWO[0], "turn left"),
    "plus": (lambda: checkpoint("plus"), TWO, "turn left"),
    "embedded plus, ragged": (embedded_plus, [TWO[1:], TWO], ["a red circle", "make it a blue star"]),
    "2511, a batch": (lambda: checkpoint("plus", zero_cond_t=True), TWO, ["turn left", "a blue circle"]),
}


def run(pipe, case, **options):
    _, image, prompt = CASES[case]
    noise = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the size, and of float16
        return pipe.edit(image, prompt, **{**noise, "output_type": "latent", **options}).images


def source_of(case):
    return CASES[case][0] and CASES[case][0]()


def gone(*networks):
    return all(isinstance(x, Absent) and x.is_meta for net in networks for x in net.parameters())


@pytest.fixture
def reads(monkeypatch):
    """The official names of the weights that are read, in order."""
    names, read = [], reading.WeightFiles.read

    def counted(self, wanted, **options):
        names.extend(stored.name for stored in wanted)
        return read(self, wanted, **options)

    monkeypatch.setattr(reading.WeightFiles, "read", counted)
    return names


@pytest.fixture
def forms(monkeypatch):
    """How often the transformer ran with a cache."""
    ran, make = [], RunCache.step_invariant
    monkeypatch.setattr(RunCache, "step_invariant", lambda *args: ran.append(1) or make(*args))
    return ran


@functools.cache
def resident(case):
    """The run's latents without and with taps, and what the taps saw."""
    return observed(load(source_of(case)), case)


def observed(pipe, case):
    seen = {}

    def keep(x, site):
        seen.setdefault(site.full, x.clone())

    plain = run(pipe, case)
    with taps(pipe.mmdit, {"blocks.*_mod": keep}), taps(pipe.vision_language, {"*.out": keep}):
        return plain, run(pipe, case), seen


@every_mode
@pytest.mark.parametrize("case", CASES)
def test_the_resident_runs_result(case, modes, forms):
    wanted = resident(case)
    before, pipe = len(forms), load(source_of(case), **modes)
    plain, tapped, seen = observed(pipe, case)
    assert len(forms) - before == (4 if case != "embedded plus, ragged" else 8)  # 2 steps, branches, groups
    assert torch.equal(plain, wanted[0]) and torch.equal(tapped, wanted[1])
    assert seen.keys() == wanted[2].keys() and len(seen) >= 8
    assert all(torch.equal(x, wanted[2][name]) for name, x in seen.items())
    if modes["residency"] != "resident":
        assert gone(pipe.mmdit, pipe.vision_language, pipe.vae)


@every_mode
def test_in_another_dtype(modes, dtype=torch.bfloat16):
    whole, parted = (load(dtype=dtype, **how) for how in ({}, modes))
    assert parted.dtype == dtype and parted.device == torch.device("cpu")
    assert torch.equal(run(parted, "embedded"), run(whole, "embedded"))


@every_mode
def test_text_to_image_micro_batches_and_the_shared_prefix(modes):
    results = []
    for pipe in (load(), load(**modes)):
        pipe.micro_batch, pipe.share_prefix = 1, True
        generator = torch.Generator().manual_seed(0)
        made = pipe.generate(["a red circle", "a star"], generator=generator, num_inference_steps=2)
        results.append([picture.tobytes() for picture in made.images] + [run(pipe, "embedded")])
    assert results[0][:2] == results[1][:2] and torch.equal(results[0][2], results[1][2])


@every_mode
def test_switches_and_the_first_block_cache(modes):
    flat = {"references.steps": [0, 1], "references.blocks": [1, 3], "time.rounding": "exact"}
    results = []
    for pipe in (load(), load(**modes)):
        latents = [run(pipe, "embedded", switches=Switches.from_flat(flat))]
        latents.append(run(pipe, "embedded", switches=Switches.from_flat({"references.steps": [0, 1]})))
        with first_block_cache(pipe.mmdit, 10.0) as cache:
            latents.append(run(pipe, "embedded"))
        assert cache.skipped == 2 and cache.computed == 2
        results.append(latents)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def lora(pipe, layers):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in layers:
        layer = pipe.mmdit.get_submodule(name)
        tensors[f"{official(name)}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=generator)
        tensors[f"{official(name)}.lora_up.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    return tensors


@every_mode
def test_loras(modes, forms):
    """Beside weights that are absent when they are loaded, on the modulation too; scales change in a run."""
    results = []
    for pipe in (load(), load(**modes)):
        layers = ("blocks.0.attn.img_q", "blocks.1.img_mod.linear", "blocks.3.txt_mlp.down", "proj_out")
        latents = [run(pipe, "embedded")]
        pipe.load_lora_weights(lora(pipe, layers), adapter_name="one", scale=0.1)
        latents.append(run(pipe, "embedded"))
        with taps(pipe.mmdit, {"velocity": lambda x, site: None}):
            latents.append(run(pipe, "embedded"))
        conditioning = pipe.condition(CASES["embedded"][1], "make the circle red")
        with torch.no_grad():
            noise = torch.Generator().manual_seed(0)
            for step in pipe.steps(conditioning, num_inference_steps=2, generator=noise):
                pipe.set_adapters("one", 0.02 * step.index)
        latents.append(step.after)
        pipe.unload_lora_weights()
        latents.append(run(pipe, "embedded"))
        assert torch.equal(latents[0], latents[-1]) and not torch.equal(latents[0], latents[1])
        results.append(latents)
    assert forms and all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize(
    "layer, passes", [("blocks.0.img_mod.linear", 2), ("norm_out.linear", 1), ("blocks.0.attn.img_q", 1)]
)
def test_modulation_follows_what_it_is_made_of(layer, passes, reads):
    """A LoRA on a block's modulation is part of it; one on the last norm's or on a query is not."""
    whole, parted = load(), load(modulation="precomputed")
    conditioning = whole.condition(CASES["embedded"][1], "make the circle red")
    latents = []
    for pipe in (whole, parted):
        pipe.load_lora_weights(lora(pipe, [layer]), adapter_name="one", scale=0.1)
        reads.clear()
        with torch.no_grad():
            noise = torch.Generator().manual_seed(0)
            for step in pipe.steps(conditioning, num_inference_steps=2, generator=noise):
                pipe.set_adapters("one", 0.02 * step.index)
        latents.append(step.after)
    assert torch.equal(*latents)
    assert len([name for name in reads if "_mod." in name]) == passes * 4 * whole.mmdit.config.num_layers


@every_mode
def test_weights_that_come_and_go_are_not_trained(modes):
    pipe = load(**modes)
    with pytest.raises(ValueError, match=r"transformer are in its files.*modulation='live'"):
        pipe.mmdit.requires_grad_(True)
    absent = [x for x in pipe.mmdit.parameters() if isinstance(x, Absent)]
    with pytest.raises(ValueError, match="transformer are in its files"):
        absent[0].requires_grad = True
    assert absent and not any(x.requires_grad for x in absent)
    pipe.mmdit.requires_grad_(False)


def test_a_block_in_the_place_of_another_has_its_turn_too():
    blocks = load(modulation="precomputed").mmdit.blocks
    blocks[3] = blocks[2]
    with blocks.without_modulation():
        assert list(blocks) == [blocks[number] for number in range(6)]


@every_mode
def test_fusing_needs_weights_that_stay(modes):
    pipe = load(**modes)
    pipe.load_lora_weights(lora(pipe, ["blocks.1.img_mod.linear"]), adapter_name="one")
    with pytest.raises(
        ValueError, match=r"fuse_lora changes weights, but those of the transformer come from"
    ):
        pipe.fuse_lora()
    assert pipe.loras == {"one": 1.0}
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora(pipe, ["blocks.1.attn.img_q"]), adapter_name="one")
    if modes["residency"] == "resident":
        pipe.fuse_lora()
    else:
        with present(pipe.mmdit), pytest.raises(ValueError, match="fuse_lora"):  # they would not last
            pipe.fuse_lora()


@pytest.fixture
def alive(monkeypatch):
    """Which blocks' weights are in memory, after each reading."""
    weights, counts, read = {}, [], Source.read

    def counted(self, places, bar=None):
        made = read(self, places, bar)
        for place, weight in zip(places, made, strict=True):
            if block := re.match(
                r"(transformer_blocks|model\.layers|visual\.blocks)\.\d+", place.stored.name
            ):
                weights.setdefault(block[0], []).append(weakref.ref(weight))
        counts.append(
            sorted(name for name, refs in weights.items() if any(ref() is not None for ref in refs))
        )
        return made

    monkeypatch.setattr(Source, "read", counted)
    return counts


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("modulation", ["live", "precomputed"])
def test_two_blocks_are_in_memory_at_most(alive, modulation, tapped):
    pipe = load(residency="stream", modulation=modulation)
    placed = set()

    def look(_x, site):
        real = [i for i, block in enumerate(pipe.mmdit.blocks.children()) if not gone(block)]
        assert real == [int(site.full.split(".")[1])]
        placed.update(real)

    with taps(pipe.mmdit, {"blocks.*.img_out": look} if tapped else {}, strict=False):
        latents = run(pipe, "embedded")
    assert placed == (set(range(len(pipe.mmdit.blocks))) if tapped else set())
    assert max(map(len, alive)) <= 2 and len(alive) > 30
    assert gone(pipe.mmdit, pipe.vision_language, pipe.vae) and torch.equal(latents, resident("embedded")[0])
    assert not [thread for thread in threading.enumerate() if "qwenedit" in thread.name]


def test_the_next_block_is_read_while_one_has_its_turn(monkeypatch):
    read, ended = Source.read, {}

    def seen(self, places, bar=None):
        made = read(self, places, bar)
        for place in places:
            if place.stored.name.startswith("transformer_blocks."):
                ended[int(place.stored.name.split(".")[1])].set()
        return made

    pipe = load(residency="stream")
    ended.update((number, threading.Event()) for number in range(len(pipe.mmdit.blocks)))
    monkeypatch.setattr(Source, "read", seen)
    with torch.no_grad(), present(pipe.mmdit):
        for number, _ in enumerate(pipe.mmdit.blocks):
            following = ended.get(number + 1)
            assert following is None or following.wait(timeout=600)  # long, against hanging alone


def test_a_schedules_modulation_is_read_once(reads):
    pipe = load(modulation="precomputed")
    layers = pipe.mmdit.config.num_layers
    assert len([x for x in pipe.mmdit.parameters() if isinstance(x, Absent)]) == 4 * layers
    assert not [name for name in reads if "_mod." in name] and len(reads) == len(set(reads))
    reads.clear()
    run(pipe, "embedded", num_inference_steps=5)
    assert len(reads) == len(set(reads)) == 4 * layers and all("_mod." in name for name in reads)


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("case", ["embedded", "2511, a batch"])
def test_a_sigma_that_is_not_of_the_schedule(case, residency, reads):
    folder = source_of(case)
    whole, parted = load(folder), load(folder, residency=residency, modulation="precomputed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the size
        conditioning = whole.condition(CASES[case][1], CASES[case][2], height=64, width=64)
    latents = torch.randn(conditioning.batch, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), present(parted.mmdit):
        theirs, ours = (
            predictor(pipe.mmdit, conditioning, guided=True, sigmas=[1.0, 0.5]) for pipe in (whole, parted)
        )
        for sigma, passes in ((0.5, 1), (1.0, 0), (0.333, 1), (0.333, 0)):
            reads.clear()
            results = [predict(latents, sigma) for predict in (theirs, ours)]
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
            mods = [name for name in reads if "_mod." in name]
            assert len(mods) == passes * 4 * parted.mmdit.config.num_layers


def test_a_run_in_inference_mode_reads_modulation_once_too(reads):
    pipe = load(residency="stage", modulation="precomputed")
    with torch.inference_mode():
        latents = run(pipe, "embedded")
    assert len([name for name in reads if "_mod." in name]) == 4 * pipe.mmdit.config.num_layers
    assert torch.equal(latents, resident("embedded")[0])


@every_residency
def test_one_network_at_a_time(residency):
    pipe = load(residency=residency)
    networks = {"text": pipe.vision_language, "vae": pipe.vae, "transformer": pipe.mmdit}
    seen = {}
    for name, network in networks.items():
        leaf = next(
            part for part in network.modules() if isinstance(part, (nn.Embedding, nn.Linear, nn.Conv3d))
        )
        if name == "vae":
            leaf = network.decoder.conv_in

        def look(*_, name=name):
            seen.setdefault(name, [other for other, net in networks.items() if not gone(net)])

        leaf.register_forward_hook(look)
    run(pipe, "embedded", output_type="pt")
    assert seen == {name: [name] for name in networks}


@every_residency
@pytest.mark.parametrize("modulation", ["live", "precomputed"])
def test_a_run_that_ends_early_leaves_nothing(residency, modulation):
    pipe = load(residency=residency, modulation=modulation)
    conditioning = pipe.condition(CASES["embedded"][1], "make the circle red")
    with torch.no_grad():
        steps = pipe.steps(conditioning, num_inference_steps=3)
        assert gone(pipe.mmdit)
        step = next(steps)
        assert not gone(pipe.mmdit)
        assert pipe.decode(step.x0, conditioning.target_grid).isfinite().all()  # beside the transformer
        steps.close()
        assert gone(pipe.mmdit, pipe.vae)

    def fail(_x, _site):
        raise RuntimeError("a disk on fire")

    for network, name in ((pipe.mmdit, "blocks.2.img_mid"), (pipe.vision_language, "language.blocks.1.mid")):
        with (
            pytest.raises(RuntimeError, match="on fire") as caught,
            taps(network, {name: fail}, strict=False),
        ):
            run(pipe, "embedded")
        assert gone(pipe.mmdit, pipe.vision_language, pipe.vae), caught  # while the traceback lives
        assert not [thread for thread in threading.enumerate() if "qwenedit" in thread.name]
    failing = taps(pipe.mmdit, {"*.2.img_mid": fail}, strict=False)
    with pytest.raises(RuntimeError, match="on fire") as caught, first_block_cache(pipe.mmdit, 0.1), failing:
        run(pipe, "embedded")
    assert gone(pipe.mmdit), caught  # whose traceback has the cache's own iterator


def copied(tmp_path):
    return shutil.copytree(mini.CHECKPOINT, tmp_path / "checkpoint")


@every_residency
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_files_that_change_or_vanish_are_named(tmp_path, residency, component):
    folder = copied(tmp_path)
    (file,) = (folder / component).glob("*.safetensors")
    pipe = load(folder, residency=residency)
    run(pipe, "embedded", output_type="pt")
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match=f"{file.name} has changed since the checkpoint was loaded"):
        run(pipe, "embedded", output_type="pt")
    pipe = load(folder, residency=residency)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}, which weights are read from, is gone"):
        run(pipe, "embedded", output_type="pt")
    assert gone(pipe.mmdit, pipe.vision_language, pipe.vae)


def test_a_file_that_vanishes_within_a_run(tmp_path):
    folder = copied(tmp_path)
    pipe = load(folder, residency="stream")
    conditioning = pipe.condition(CASES["embedded"][1], "make the circle red")
    with torch.no_grad():
        steps = pipe.steps(conditioning, num_inference_steps=3)
        next(steps)
        next((folder / "transformer").glob("*.safetensors")).unlink()
        with pytest.raises(ValueError, match="is gone"):
            next(steps)
    assert gone(pipe.mmdit)


def test_files_are_only_read(tmp_path):
    folder = copied(tmp_path)

    def state():
        return {
            path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
            for path in folder.rglob("*")
            if path.is_file()
        }

    before = state()
    for modes in [*MODES, {"storage": "float8"}]:
        run(load(folder, **modes), "embedded", num_inference_steps=1)
    with pytest.raises(ValueError, match="no LoRA"):
        load(folder, residency="stream").load_lora_weights(folder / "nothing")
    with pytest.raises(RuntimeError, match="killed"), pytest.MonkeyPatch.context() as patch:

        def killed(*_):
            raise RuntimeError("killed")

        patch.setattr(reading.SafetensorsFile, "get_tensor", killed)
        load(folder, modulation="precomputed")
    assert state() == before


@every_residency
def test_calling_by_hand(residency):
    whole, parted = load(), load(residency=residency)
    inputs = torch.randn(1, 4, 64), torch.randn(1, 3, whole.mmdit.config.joint_attention_dim)
    rest = torch.tensor([0.5]), [(1, 2, 2)]
    with pytest.raises(ValueError, match=r"transformer are in its files.*present\(pipe\.mmdit\)"):
        parted.mmdit(*inputs, *rest)
    with pytest.raises(ValueError, match=r"present\(pipe\.vision_language\)"):
        parted.vision_language(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"present\(pipe\.vae\)"):
        parted.vae.encode(torch.zeros(1, 3, 1, 16, 16))
    with torch.no_grad(), present(parted.mmdit):
        wanted = whole.mmdit(*inputs, *rest)
        with present(parted.mmdit):
            assert torch.equal(parted.mmdit(*inputs, *rest), wanted)
        assert torch.equal(parted.mmdit(*inputs, *rest), wanted)
    assert gone(parted.mmdit)


@every_residency
def test_a_network_within_its_own_loop(residency):
    """What runs while a block's turn is, and again, does not take the weights away."""
    pipe = load(residency=residency)
    inputs = torch.randn(1, 4, 64), torch.randn(1, 3, pipe.mmdit.config.joint_attention_dim)
    rest = torch.tensor([0.5]), [(1, 2, 2)]
    results = []

    def again(_x, _site):
        if not results:
            results.append(None)
            results.append(pipe.mmdit(*inputs, *rest))

    with torch.no_grad(), present(pipe.mmdit), taps(pipe.mmdit, {"blocks.1.img_attn_in": again}):
        outer = pipe.mmdit(*inputs, *rest)
    assert torch.equal(outer, results[1]) and gone(pipe.mmdit)


@every_mode
def test_looking_reads_nothing(reads, modes):
    pipe = load(**modes)
    reads.clear()
    whole = load()
    assert tap_names(pipe.mmdit) == tap_names(whole.mmdit)
    assert [name for name, _ in pipe.mmdit.named_parameters()] == [
        name for name, _ in whole.mmdit.named_parameters()
    ]
    assert repr(pipe.mmdit).replace("Streamed", "ModuleList") == repr(whole.mmdit)
    for ours, theirs in zip(pipe.mmdit.parameters(), whole.mmdit.parameters(), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and not ours.requires_grad
    assert len(pipe.mmdit.blocks) == 6 and isinstance(pipe.mmdit.blocks[-1], type(whole.mmdit.blocks[0]))
    assert pipe.mmdit.blocks[1] in list(pipe.mmdit.children())[5].children()
    with swapped(pipe.mmdit, "blocks.1.img_mlp", lambda old: nn.Sequential(old)):
        pass
    with torch.no_grad():
        assert not looked_at(pipe.mmdit)
    assert not reads


@every_residency
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_saving_weights_that_are_absent(tmp_path, residency):
    pipe = load(residency=residency)
    with pytest.raises(ValueError, match="transformer are in its files"):
        save_file(pipe.mmdit.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="transformer are in its files"):
        pipe.mmdit.load_state_dict(load().mmdit.state_dict())
    assert not list(tmp_path.iterdir()) and gone(pipe.mmdit)


@every_residency
def test_operations_are_traced_as_ever(residency):
    made = []
    for pipe in (load(), load(residency=residency)):
        conditioning = pipe.condition(CASES["embedded"][1], "make the circle red")
        with torch.no_grad():
            steps = pipe.steps(conditioning, num_inference_steps=1)
            with trace_ops(pipe.mmdit) as ops:
                list(steps)
        made.append(ops)
    assert made[0] == made[1] and len(made[0]) > 100


@every_residency
@pytest.mark.parametrize("modulation", ["live", "precomputed"])
def test_gradients(residency, modulation):
    wanted = None
    for pipe in (load(), load(residency=residency, modulation=modulation)):
        conditioning = pipe.condition(CASES["embedded"][1], "make the circle red")
        x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        *_, step = pipe.steps(conditioning, num_inference_steps=2, latents=x)
        step.after.square().sum().backward()
        wanted = x.grad if wanted is None else wanted
    assert torch.equal(x.grad, wanted) and x.grad.abs().max() > 0
    pipe.mmdit.checkpointing = True  # blocks are run again, when their turn is over
    x.grad = None
    (step,) = pipe.steps(conditioning, num_inference_steps=1, latents=x)
    with pytest.raises(ValueError, match="weights of the transformer are in its files"):
        step.after.sum().backward()


def test_inversion():
    results = []
    for pipe in (load(), load(residency="stage", modulation="precomputed")):
        latents, _ = picture_latents(pipe, CASES["embedded"][1])
        conditioning = pipe.condition(None, "a red circle", height=64, width=64)
        with torch.no_grad():
            *_, step = invert(pipe, conditioning, latents, num_inference_steps=3, iterations=1)
        results.append(step.after)
    assert torch.equal(*results) and gone(pipe.mmdit, pipe.vae)


@every_mode
def test_moving(modes):
    pipe = load(**modes)
    pipe.load_lora_weights(lora(pipe, ["blocks.0.attn.img_q"]))
    wanted = run(pipe, "embedded")
    assert torch.equal(run(pipe.to("cpu").to(torch.float32), "embedded"), wanted)
    with pytest.raises(ValueError, match=r"read from its files.*in torch\.float64 pass it there"):
        pipe.to(torch.float64)
    assert home(pipe.mmdit) == torch.device("cpu") and torch.equal(run(pipe, "embedded"), wanted)


def test_bad_modes_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("qwenedit.assembly.resolve", lambda *_, **__: pytest.fail("it went on"))
    for options, message in (
        ({"residency": "swap"}, "residency is 'swap', wanted one of auto, resident, stage, stream"),
        ({"modulation": None}, "modulation is None, wanted one of live, precomputed"),
        ({"storage": "int4"}, "storage is 'int4', wanted one of None, float8"),
        ({"storage": "float8", "residency": "stream"}, "keeps weights in memory"),
        ({"compile": True, "residency": "stage"}, "compile=True needs weights that stay"),
        ({"compile": True, "modulation": "precomputed"}, "compile=True needs weights that stay"),
    ):
        with pytest.raises(ValueError, match=message):
            load("no/such", **options)


def test_auto_asks_the_plan(monkeypatch):
    asked = []

    def choose(modes, folder, found, nets, *, device, dtype):
        assert nets == []
        asked.append((modes, folder, list(found), device, dtype))
        return dataclasses.replace(modes, residency="stage")

    monkeypatch.setattr("qwenedit.assembly.choose", choose)
    pipe = load(mini.CHECKPOINT, text_encoder=False, modulation="precomputed")
    modes, names = Modes("auto", "precomputed"), ["vae", "transformer"]
    wanted = (modes, mini.CHECKPOINT, names, torch.device("cpu"), torch.float32)
    assert gone(pipe.mmdit) and asked == [wanted]
    assert not gone(load(residency="resident").mmdit) and asked == [wanted]


def test_headers_are_read_once(monkeypatch):
    names, read = [], files.read_header
    for module in (files, formats):
        monkeypatch.setattr(module, "read_header", lambda path: names.append(path) or read(path))
    for modes in ({}, {"residency": "stream", "modulation": "precomputed"}):
        names.clear()
        load(mini.CHECKPOINT, **modes)
        assert len(names) == len(set(names)) == 3


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["edit", str(mini.EXAMPLE), "make the circle red", "--seed", "1", "--steps", "1", "--quiet"]
    arguments += ["--device", "cpu"]
    for name, options in (
        ("plain", []),
        ("stage", ["--residency", "stage"]),
        ("stream", ["--residency", "stream", "--modulation", "precomputed"]),
        ("float8", ["--storage", "float8"]),
    ):
        assert cli.main([*arguments, "-o", f"{name}.png", *options]) == 0
    plain, stage, stream, float8 = (
        (tmp_path / f"{name}.png").read_bytes() for name in ("plain", "stage", "stream", "float8")
    )
    assert plain == stage == stream != float8
    capsys.readouterr()
    assert cli.main([*arguments, "-o", "x.png", "--storage", "float8", "--residency", "stream"]) == 2
    assert "keeps weights in memory" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("residency", ["resident", "stage"])
def test_float8_is_close_and_small(residency):
    whole, parted = load(), load(residency=residency, storage="float8")
    plain, got = run(whole, "embedded"), run(parted, "embedded")
    with torch.no_grad():
        encoder = whole.vision_language
        lists = [whole.mmdit.blocks, encoder.language.blocks, encoder.vision.blocks]
        for weight in nn.ModuleList(lists).parameters():
            if weight.ndim == 2:  # 3 bits of mantissa, below each row's own largest value
                scale = weight.abs().amax(dim=1, keepdim=True) / 448
                weight.copy_((weight / scale).to(torch.float8_e4m3fn).float() * scale)
    assert torch.equal(got, run(whole, "embedded")) and not torch.equal(got, plain)
    network = parted.mmdit.__dict__["_managed"]
    matrices = [x for x in parted.mmdit.blocks.parameters() if x.ndim == 2]
    assert all(isinstance(x, Absent) for x in matrices) and len(matrices) == 6 * 14
    held = [weight for part in network.blocks for weight, _ in part.held]
    assert len(held) == (len(matrices) if residency == "resident" else 0)
    assert all(x.dtype == torch.float8_e4m3fn for x in held)


def test_float8_is_the_same_in_a_loop_by_hand():
    staged = load(residency="stage", storage="float8").mmdit
    kept = load(residency="resident", storage="float8").mmdit
    for ours, theirs in zip(staged.blocks, kept.blocks, strict=True):
        assert torch.equal(ours.img_mlp.up.weight, theirs.img_mlp.up.weight)


def test_float8_rounds_each_row_to_its_own_largest_value():
    weight = (
        torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 6)[:, None]
    )
    weight[3] = 0
    again = formats.dequantise(*_shrunk(weight))
    error = (again - weight).abs().amax(dim=1) / weight.abs().amax(dim=1).clamp_min(1e-30)
    assert torch.equal(again[3], weight[3]) and error.max() < 2**-4 and again.isfinite().all()


FP8_MODES = [
    *MODES,
    {"residency": "resident", "storage": "float8"},
    {"residency": "stage", "storage": "float8"},
]


@pytest.mark.parametrize("modes", FP8_MODES, ids=named)
@pytest.mark.parametrize("scales", [True, False])
def test_fp8_files(tmp_path_factory, modes, scales):
    """Streamed as any others; and kept in 8 bits as they are, without another rounding."""
    folder, tmp_path = checkpoint("edit"), tmp_path_factory.mktemp("fp8")
    given = {}
    for component, argument in (("transformer", "mmdit"), ("text_encoder", "text_encoder")):
        tensors = tensors_of(folder, component)
        if scales:
            tensors, _ = scaled(tensors)
        else:
            tensors = {key: x.to(torch.float8_e4m3fn) for key, x in tensors.items()}
        given[argument] = tmp_path / f"{component}.safetensors"
        save_file(tensors, given[argument])
    whole, parted = (load(folder, dtype="bfloat16", **given, **how) for how in ({}, modes))
    assert torch.equal(run(parted, "edit"), run(whole, "edit"))


@needs_gguf
@every_mode
def test_gguf_files(tmp_path, modes):
    folder = wide()
    write_gguf(tmp_path / "x.gguf", tensors_of(folder, "transformer"), as_published("Q8_0"))
    whole, parted = (load(folder, mmdit=tmp_path / "x.gguf", **how) for how in ({}, modes))
    conditioning = whole.condition(TWO[0], "turn left")
    latents = [
        pipe.sample(
            conditioning,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        for pipe in (whole, parted)
    ]
    assert torch.equal(*latents)


def test_streamed_lists_say_what_they_do_not_do():
    pipe = load(residency="stream")
    assert isinstance(pipe.mmdit.blocks, Streamed) and isinstance(
        pipe.vision_language.vision.blocks, Streamed
    )
    with pytest.raises(ValueError, match="weights for 0 blocks, but the list has 2"):
        list(pipe.mmdit.blocks[:2])
    seen = [next(block.parameters()).is_meta for block in pipe.mmdit.blocks]
    assert seen == [False] * 6 and gone(pipe.mmdit)
