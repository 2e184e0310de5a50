"""What two processes do, case by case: `test_two_processes.py` looks at the outcomes.

Each process also makes what one process makes, with a pipeline that is not shared, and compares the two.
Everything that changes a run is in `RUNS`; each is run under cfg=2 and under ulysses=2.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
import os
import pickle
import tempfile
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import qwenedit
from qwenedit.ablation.first_block_cache import first_block_cache
from qwenedit.instruments.inversion import invert, picture_latents
from qwenedit.networks.blockwise_controlnet import BlockwiseControlNet, BlockwiseControlNetConfig
from qwenedit.networks.controlnet import ControlNet, ControlNetConfig
from qwenedit.networks.mmdit import Block, MMDiT
from qwenedit.parallel.processes import join
from qwenedit.parallel.spec import ParallelSpec
from qwenedit.switches import Switches
from tests.parallel.cases_networks import *  # noqa: F403
from tests.parallel.cases_networks import CPU, difference
from tests.support import randomise_

FOLDERS = json.loads(os.environ.get("QWENEDIT_TEST_FOLDERS", "{}"))
PROMPT = "把圆变成红色"
LONG = "模糊，低画质, blurry"  # a single text token in a process takes another matrix kernel
MODES = ("cfg=2", "ulysses=2")
SPLIT = (("ulysses=2", {"split_weights": True}), ("tensor=2", {}))


def drawn(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (36,), dtype=torch.uint8, generator=generator)
    return Image.frombytes("RGB", (4, 3), bytes(coarse.tolist())).resize((width, height), 3)


PICTURE, OTHER = drawn(70, 50), drawn(40, 64, 1)
MASK = Image.new("L", (70, 50))
MASK.paste(255, (20, 10, 60, 40))
GREY = MASK.resize((70, 50)).point(lambda value: 90 + value // 3)


@functools.cache
def pipe(parallel=None, kind="plus", **options):
    return qwenedit.load(FOLDERS[kind], device="cpu", progress=False, parallel=parallel, **options)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def edited(system, **options):
    options = {
        "image": [PICTURE, OTHER], "prompt": PROMPT, "num_inference_steps": 2, "generator": seeded(),
        "output_type": "latent", **options,
    }  # fmt: skip
    if isinstance(options["generator"], int):
        options["generator"] = [seeded(5 + k) for k in range(options["generator"])]
    return system.edit(**options).images


def flat(**switches):
    return {"switches": Switches.from_flat({name.replace("__", "."): x for name, x in switches.items()})}


RUNS = {
    "plain": {},
    "one picture": {"image": OTHER, "kind": "edit"},
    "bfloat16": {"load": {"dtype": "bfloat16"}},
    "zero_cond_t": {"kind": "zero_cond_t"},
    "stage": {"load": {"residency": "stage"}},
    "stream": {"load": {"residency": "stream", "modulation": "precomputed"}},
    "float8": {"load": {"storage": "float8"}},
    "prompts of a batch": {"prompt": [PROMPT, "b"], "image": [[PICTURE, OTHER], [OTHER]], "generator": 2},
    "row by row": {"prompt": [PROMPT, "b"], "generator": 2, "micro_batch": 1},
    "several outputs": {"num_images_per_prompt": 2, "height": 48, "width": 80},
    "given latents": {"latents": torch.randn(1, 16, 64, generator=seeded(1)), "height": 64, "width": 64},
    **{name: {"sampler": name} for name in ("heun", "dpmpp_2m", "unipc", "stochastic", "flow_sde")},
    "mask": {"mask_image": MASK.resize(OTHER.size), "strength": 0.8, "num_inference_steps": 3},
    "crop": {"mask_image": MASK.resize(OTHER.size), "padding_mask_crop": 4, "output_type": "pil"},
    "mask by velocity, grey": {
        "mask_image": GREY.resize(OTHER.size), **flat(mask__preserve="x0", mask__grey="blended")
    },
    "controls": {"nets": "controlnet", "control_image": PICTURE},
    "controls of each branch": {
        "nets": "controlnet", "control_image": [PICTURE, OTHER], **flat(control__branches="each")
    },
    "blockwise control, half of the run": {
        "nets": "blockwise", "control_image": PICTURE, "control_guidance_end": 0.5
    },
    "lora": {"lora": True},
    "guided in one step": flat(guidance__steps=[1, 2]),
    "guidance with momentum": flat(guidance__momentum=-0.5, guidance__eta=0.0, guidance__norm="none"),
    "references in some steps": flat(references__steps=[0, 1]),
    "references in some blocks": flat(references__blocks=[1, 2]),
    "references in some blocks, a batch": {
        "prompt": [PROMPT, "b"], "generator": 2, **flat(references__blocks=[0, 1])
    },
    "references zeroed": flat(references__latents="zeroed", references__sigma=0.3),
    "references left out": flat(references__latents="left_out"),
    "references in another order": flat(references__order=[1, 0]),
    "references in the target's frame": flat(references__frame="target"),
    "RoPE and GELU": flat(
        transformer__rope="rounded", transformer__odd_grids="positive", transformer__text_start="target",
        transformer__gelu="sigmoid",
    ),
    "time": flat(time__zero_cond_t=True, time__rounding="exact", time__sigmas="lightning"),
    "time, rounded": flat(time__zero_cond_t=False, time__rounding="bfloat16"),
    "what is seen": flat(seen__picture="blank", seen__twice=True),
    "the VAE's path": flat(vae__posterior="sample"),
}  # fmt: skip


def nets_of(kind):
    if kind == "controlnet":
        config = ControlNetConfig(
            patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        return [randomise_(ControlNet(config), 8).requires_grad_(False)]
    config = BlockwiseControlNetConfig(num_layers=2, width=64, in_channels=64, extra_condition_channels=0)
    return [randomise_(BlockwiseControlNet(config), 8).requires_grad_(False)]


def run(parallel, *, kind="plus", load=None, nets=None, lora=False, micro_batch=None, **options):
    system = pipe(parallel, kind, **(load or {}))
    system.controlnets = [] if nets is None else nets_of(nets)
    system.micro_batch = micro_batch
    if lora:
        system.add_lora(rank=2, adapter_name="own")
        for number, x in enumerate(system.lora_parameters("own").values()):
            x.data = torch.randn(x.shape, generator=seeded(number)) / 4
    try:
        return edited(system, **options)
    finally:
        if lora:
            system.delete_adapters("own")


def close(one, other):
    """How far apart, as a share of the largest value; of pictures the mean, which rounding keeps."""
    if isinstance(one, list):
        return max(np.abs(np.int16(a) - np.int16(b)).mean() / 255 for a, b in zip(one, other, strict=True))
    return difference(one, other)


def case_runs():
    found = {}
    for name, options in RUNS.items():
        alone = run(None, **options)
        for mode in MODES:
            found[f"{name}: {mode}"] = close(alone, run(mode, **options))
    return found


def case_runs_with_split_weights():
    """Each by how far it is from one process's, or by the message that refuses it."""
    found = {}
    for name, options in RUNS.items():
        alone = run(None, **options)
        for mode, load in SPLIT:
            one = {**options, "load": {**options.get("load", {}), **load}}
            try:
                found[f"{name}: {mode}"] = close(alone, run(mode, **one))
            except ValueError as error:
                found[f"{name}: {mode}"] = str(error)
    found["rounding to bfloat16"] = close(run(None), run(None, **RUNS["bfloat16"]).float())
    return found


def case_memory_and_branches():
    """What is computed once a run or once a step is so in every mode; a branch's process runs it alone."""
    found, counts = {}, collections.Counter()
    counted = {MMDiT: ("step_invariant", "embed_time"), Block: ("modulate", "forward")}
    before = {(kind, name): getattr(kind, name) for kind, names in counted.items() for name in names}

    def counting(name, method):
        @functools.wraps(method)
        def call(*args, **options):
            counts[name] += 1
            return method(*args, **options)

        return call

    for mode in (None, *MODES):
        counts.clear()
        for (kind, name), method in before.items():
            setattr(kind, name, counting(name, method))
        try:
            run(mode, num_inference_steps=3)
        finally:
            for (kind, name), method in before.items():
                setattr(kind, name, method)
        found[str(mode)] = [counts[name] for _, name in before]
    return found


def case_first_block_cache():
    """Under cfg each branch decides by itself; the two of one run decide alike."""
    outputs = []
    for mode in (None, "cfg=2"):
        with first_block_cache(pipe(mode).mmdit, 5.0) as cache:
            outputs.append((edited(pipe(mode), num_inference_steps=4), cache.computed, cache.skipped))
    (alone, *counts), (shared, *own) = outputs
    return [difference(alone, shared), counts, own]


def case_layers():
    found = []
    for mode in (None, *MODES):
        options = {
            "num_inference_steps": 2,
            "generator": seeded(),
            "output_type": "latent",
            "layers": 2,
            "negative_prompt": LONG,
        }
        found.append(pipe(mode, "layered").decompose(OTHER, PROMPT, resolution=64, **options).images)
    return [difference(found[0], one) for one in found[1:]]


def case_mesh():
    own = join(ParallelSpec(cfg=2), CPU)
    total = torch.full((1,), float(own.rank))
    dist.all_reduce(total, group=own.group("cfg"))
    return [own.count, list(own.mesh.mesh.shape), total.item()]


def case_without_a_generator():
    """All draw process 0's noise, also a sampler that draws in every step."""
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        alone = run(None, generator=None, sampler="stochastic")
        torch.manual_seed(100 * dist.get_rank())
        found.append(difference(alone, run(mode, generator=None, sampler="stochastic")))
    return found


def case_parts():
    """Steps, a write among them; `sample`; `generate`; a call as in the reference, with a callback."""
    found = {}
    for mode in MODES:
        outputs = []
        for system in (pipe(), pipe(mode)):
            system.controlnets, system.micro_batch = [], None
            conditioning = system.condition([PICTURE, OTHER], PROMPT)
            made = []
            with torch.no_grad():
                for step in system.steps(conditioning, num_inference_steps=2, generator=seeded()):
                    if step.index == 0:
                        step.x0 = step.x0 * 0.9
                    made += [step.cond, step.uncond, step.velocity, step.after]
            made.append(
                system.sample(
                    conditioning, num_inference_steps=2, generator=seeded(), output_type="pt"
                ).images
            )
            size = {"height": 48, "width": 64, "negative_prompt": LONG}
            made.append(
                system.generate(
                    PROMPT, num_inference_steps=2, generator=seeded(), output_type="pt", **size
                ).images
            )
            called = []

            def callback(_pipe, index, _time, tensors, called=called):
                called.append(index)
                return {"latents": tensors["latents"] * 0.9}

            made.append(system(
                image=[PICTURE, OTHER], prompt=PROMPT, negative_prompt=" ", num_inference_steps=2,
                generator=seeded(), output_type="pt", callback_on_step_end=callback,
            ).images)  # fmt: skip
            with torch.no_grad():
                latents, grid = picture_latents(system, OTHER)
                size = {"height": 16 * grid[1], "width": 16 * grid[2]}
                own = system.condition([OTHER], PROMPT, **size)
                made += [step.after for step in invert(system, own, latents, num_inference_steps=2,
                                                       true_cfg_scale=2.0)]  # fmt: skip
            assert called == [0, 1]
            outputs.append(made)
        found[mode] = [difference(a, b) for a, b in zip(*outputs, strict=True)]
    return found


def case_instruments():
    """A recorder, attention maps, a patch from records and functions that change; in every mode."""
    found = {}
    for mode in (None, *MODES):
        system = pipe(mode)
        recorder, labels = qwenedit.Recorder(), set()

        def note(_x, site, labels=labels):
            labels.add(site.labels["branch"])

        maps = qwenedit.AttentionMaps("target", ["text", "reference 2"], steps=[0])
        with maps.attached(system.mmdit), qwenedit.taps(system.mmdit, {
            "blocks.*.img_attn_add": recorder, "blocks.1.txt_out": note,
        }):  # fmt: skip
            plain = edited(system)
        patch = qwenedit.patch_from(recorder, tokens="reference 1")
        with qwenedit.taps(system.mmdit, {"blocks.0.img_attn_add": patch}):
            patched = edited(system, prompt="b")
        direction = torch.randn(64, generator=seeded())
        changes = {
            "blocks.0.img_out": qwenedit.add(direction, tokens="target", steps=[1]),
            "blocks.1.attn.img_heads": qwenedit.scale_by(0.5, branch="uncond"),
        }
        with qwenedit.taps(system.mmdit, changes, strict=False):
            changed = edited(system)
        found[mode] = plain, patched, changed, recorder, maps, labels
    one = found.pop(None)
    outcome = {}
    for mode, other in found.items():
        images = [difference(a, b) for a, b in zip(one[:3], other[:3], strict=True)]
        records = [difference(one[k][key], other[k][key]) for k in (3, 4) for key in other[k]]
        counts = [len(other[k]) / len(one[k]) for k in (3, 4)]
        assert not torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])
        outcome[mode] = [max(images), max(records), *counts, len(other[5])]
    return outcome


def case_maps_of_one_branch():
    """Under cfg the process that runs the branch has them; the others have none, and that is no mistake."""
    counts = []
    for mode in (None, *MODES):
        maps = qwenedit.AttentionMaps(branch="uncond")
        with maps.attached(pipe(mode).mmdit):
            edited(pipe(mode))
        counts.append(len(maps))
    alone, cfg, ulysses = counts
    return [cfg == (alone if dist.get_rank() else 0), ulysses == alone > 0]


def case_copies():
    """A copy shares its tokens with the copies in other processes; a pickle would share them with none."""
    with_copy = difference(run(None), edited(copy.deepcopy(pipe("ulysses=2"))))
    return [with_copy, refused(lambda: pickle.dumps(pipe("ulysses=2")))]


def refused(action):
    begun = time.monotonic()
    try:
        action()
    except Exception as error:
        assert time.monotonic() - begun < 10, "it took too long"
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


@contextlib.contextmanager
def changed(weight):
    before = weight[0].clone()
    weight[0] += 1
    try:
        yield
    finally:
        weight[0] = before


def here(process, context):
    """The context in one process alone."""
    return context if dist.get_rank() == process else contextlib.nullcontext()


def case_refusals():
    cfg, ulysses = pipe("cfg=2"), pipe("ulysses=2")
    cfg.controlnets = ulysses.controlnets = []
    rank, identity = dist.get_rank(), {"blocks.0.img_out": lambda _x, _site: None}

    def tapped(system):
        every = {"*.img_mid": lambda _x, _site: None}
        with qwenedit.taps(system.mmdit, every), here(1, qwenedit.taps(system.mmdit, identity)):
            edited(system)

    def other_weights(system):
        with here(0, changed(system.mmdit.blocks[1].img_mlp.up.bias)):
            edited(system)

    def cached():
        with first_block_cache(ulysses.mmdit, 0.1):
            edited(ulysses)

    def anothers_net():
        (net,) = ulysses.controlnets = nets_of("controlnet")
        edited(ulysses, control_image=OTHER)
        alone = pipe()
        alone.controlnets, ulysses.controlnets = [net], []
        edited(alone, control_image=OTHER)

    def threaded():
        conditioning = cfg.condition([OTHER], PROMPT)
        with torch.no_grad():
            steps = cfg.steps(conditioning, num_inference_steps=2, generator=seeded())
            next(steps)
        told = []
        thread = threading.Thread(target=lambda: told.append(refused(lambda: edited(cfg))))
        thread.start()
        thread.join()
        list(steps)
        raise RuntimeError(told[0])

    folder = tempfile.mkdtemp()
    return {
        "two threads": refused(threaded),
        "another's net": refused(anothers_net),
        "explore": refused(lambda: qwenedit.explore(cfg, OTHER, PROMPT, f"{folder}/page.html")),
        "batch": refused(lambda: qwenedit.batch([], folder, pipe=ulysses)),
        "no guidance": refused(lambda: edited(cfg, true_cfg_scale=1.0)),
        "no guidance in one": refused(lambda: edited(cfg, negative_prompt=" " if rank else None)),
        "a tap in one": refused(lambda: tapped(ulysses)),
        "a tap in one, cfg": refused(lambda: tapped(cfg)),
        "other seeds": refused(lambda: edited(cfg, generator=seeded(rank))),
        "other steps": refused(lambda: edited(ulysses, num_inference_steps=2 + rank)),
        "other parts of a batch": refused(lambda: run("ulysses=2", micro_batch=1 + rank)),
        "other weights": refused(lambda: other_weights(ulysses)),
        "other pictures": refused(lambda: edited(ulysses, image=[PICTURE, drawn(40, 64, rank)])),
        "bad input in one": refused(lambda: edited(ulysses, prompt=PROMPT if rank else 3)),
        "heads": refused(lambda: qwenedit.load(FOLDERS["three heads"], device="cpu", parallel="ulysses=2")),
        "first block": refused(cached),
        "and then a run is equal": difference(run(None), run("ulysses=2")),
    }


def case_z_a_failure_in_a_run():
    """The last case: the groups end with it."""

    def fail(_x, site):
        if dist.get_rank() == 1 and site.labels["step"] == 1:
            raise ArithmeticError("of this process alone")

    def failing():
        with qwenedit.taps(pipe("ulysses=2").mmdit, {"blocks.1.img_mid": fail}):
            edited(pipe("ulysses=2"))

    together = refused(lambda: edited(pipe("cfg=2"), sampler=lambda *_: 1 / 0))
    return [together, refused(failing), refused(lambda: edited(pipe("ulysses=2")))]
