"""The commands of the command line, each a function of the options that options.py parsed.

Bad input is found before any weight is read. A ValueError's message is the one line that the user sees.
`plan`, `parity` and `ablate` import their part of the package when they run: other commands start faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwenedit.assembly import compare_controlnets, modes_of, other_files
from qwenedit.call import Call, sources_for
from qwenedit.checks import device_of, dtype_of, real_number
from qwenedit.cli.picture_files import check_alpha, output_files, save_pictures
from qwenedit.cli.process import say
from qwenedit.cli.workers import require_alone, work
from qwenedit.family import PRESETS, Sampling, preset_of
from qwenedit.foreign import shown
from qwenedit.inputs.controls import controls_of
from qwenedit.inputs.pictures import open_picture
from qwenedit.inputs.rows import rows_of
from qwenedit.layered import layer_rows, require_flat
from qwenedit.networks.mmdit import MMDiT
from qwenedit.parallel.processes import own_device
from qwenedit.parallel.spec import checked_spec, fitting_spec, processes_started, spec_of
from qwenedit.pipeline import QwenImageEdit, load
from qwenedit.sampling.compiling import require_compiler
from qwenedit.sampling.guidance import guidance_of
from qwenedit.sampling.scheduler import load_scheduler
from qwenedit.sampling.switched import require_controls, require_fitting, schedule
from qwenedit.switches import Switches
from qwenedit.verify import describe
from qwenedit.verify import verify as verify_checkpoint
from qwenedit.weights.checkpoints import find_preset, read_areas, read_variant, resolve
from qwenedit.weights.configs import network_config
from qwenedit.weights.controlnets import sources_of
from qwenedit.weights.lora_files import read_lora

__all__ = ["ablate", "decompose", "edit", "generate", "info", "parity", "plan", "verify"]

T = TypeVar("T")


def edit(options: argparse.Namespace) -> None:
    outputs = output_files(options.output, options.num_images)
    pictures = [open_picture(path) for path in options.pictures]
    masks = _masks(options)
    pipe, settings = _prepare(options, Call(image=pictures, **masks))
    _save(pipe, pipe.edit(pictures, options.prompt, **masks, **settings).images, outputs)


def generate(options: argparse.Namespace) -> None:
    outputs = output_files(options.output, options.num_images)
    image = None if options.image is None else open_picture(options.image)
    masks = _masks(options)
    pipe, settings = _prepare(options, Call(source=image, **masks))
    _save(pipe, pipe.generate(options.prompt, image=image, **masks, **settings).images, outputs)


def _masks(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call about its mask, where they are given."""
    if options.mask_crop is not None and options.mask is None:
        raise ValueError("--mask-crop is given without --mask, wanted both, or neither")
    mask = None if options.mask is None else open_picture(options.mask)
    all_of = {"mask_image": mask, "strength": options.strength, "padding_mask_crop": options.mask_crop}
    return {name: value for name, value in all_of.items() if value is not None}


def _prepare(options: argparse.Namespace, call: Call) -> tuple[QwenImageEdit, dict[str, Any]]:
    """The pipeline and the other arguments of its call, after all checks: weights may be many gigabytes."""
    folder, settings = _checked(options, call)
    return _load(options, folder, controlnet=options.controlnet), settings


def _checked(options: argparse.Namespace, call: Call) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's folder, and the other arguments of a call with its weights, after all checks."""
    switches, controls = _switches(options), _controls(options)
    folder = _folder(options)
    variant = read_variant(folder)
    require_flat(variant)
    preset = preset_of(folder) if options.preset is None else PRESETS[options.preset]
    run = preset.sampling(options.steps, options.true_cfg_scale, options.negative_prompt)
    size = {"height": options.height, "width": options.width}
    areas, prompts = read_areas(folder, variant), (options.prompt, run.negative_prompt)
    (row,) = rows = _silent(lambda: rows_of(*prompts, call.image, variant, areas, **size, starts=call.starts))
    call = dataclasses.replace(call, switches=switches)
    sources = _silent(lambda: sources_for(call, rows, variant, areas))
    _check_guidance(options, run)
    steps, blocks = run.num_inference_steps, network_config(folder, "transformer").num_layers
    strength = 1.0 if sources is None else sources.strength
    scheduler, tokens = load_scheduler(folder), math.prod(row.geometry.grid)
    sigmas = schedule(scheduler, switches.time, steps, tokens, None, strength, switches.mask.strength)
    pictures = [len(row.pictures)]
    require_fitting(switches, pictures=pictures, blocks=blocks, steps=len(sigmas) - 1, sources=sources)
    require_controls(switches, bool(controls))
    _check_controls(options, folder, controls, len(sigmas) - 1, row.geometry.size)
    count, generator = options.num_images, _generator(options)
    return folder, {
        **vars(run), **size, **controls, "num_images_per_prompt": count, "generator": generator,
        "switches": switches, "sampler": options.sampler,
    }  # fmt: skip


def _check_guidance(options: argparse.Namespace, run: Sampling) -> None:
    guidance = _silent(lambda: guidance_of(run.true_cfg_scale, run.negative_prompt))
    if (spec := spec_of(options.parallel)) is not None:
        spec.require_guidance(guidance is not None)


def _controls(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a call under control, where they are given, for ControlNets that are there."""
    sources_of(options.controlnet)
    given = {
        "control_mask": None if options.control_mask is None else open_picture(options.control_mask),
        "controlnet_conditioning_scale": options.control_scale,
        "control_guidance_start": options.control_start,
        "control_guidance_end": options.control_end,
    }
    given = {name: value for name, value in given.items() if value is not None}
    pictures = [open_picture(path) for path in options.control_image]
    if (given or options.controlnet) and not pictures:
        raise ValueError("a --control-image is missing: the ControlNet and its options act on one")
    if pictures and not options.controlnet:
        raise ValueError("--control-image is given without --controlnet, wanted both")
    return {"control_image": pictures, **given} if pictures else {}


def _check_controls(
    options: argparse.Namespace, folder: Path, controls: dict[str, Any], steps: int, size: tuple[int, int]
) -> None:
    """Compare the ControlNets with the transformer, and their pictures with them."""
    config, sources = network_config(folder, "transformer"), sources_of(options.controlnet)
    compared = compare_controlnets(sources, config, read_variant(folder), progress=not options.quiet)
    nets: list[Any] = [one.module for one in compared]
    call, count = Call(**controls), options.num_images
    _silent(
        lambda: controls_of(
            nets, call.control_image, call.control_mask,
            call.controlnet_conditioning_scale, call.control_guidance_start, call.control_guidance_end,
            config=config, batch=count, prompts=1, steps=steps, size=size,
        )
    )  # fmt: skip


def decompose(options: argparse.Namespace) -> None:
    preset = PRESETS["Qwen-Image-Layered"]
    assert preset.layering is not None
    given = {"layers": options.layers, "resolution": options.resolution}
    layering = dataclasses.replace(preset.layering, **{name: n for name, n in given.items() if n is not None})
    outputs = output_files(options.output, layering.layers)
    check_alpha(options.output)
    picture = open_picture(options.picture)
    run = preset.sampling(options.steps, options.true_cfg_scale, options.negative_prompt)
    _check_guidance(options, run)
    folder = _folder(options)
    variant, prompts = read_variant(folder), (options.prompt, run.negative_prompt)
    areas = read_areas(folder, variant)
    (row,) = layer_rows(picture, *prompts, variant, areas, layering.layers, layering.resolution)
    load_scheduler(folder).sigmas(run.num_inference_steps, math.prod(row.geometry.grid))
    generator, sampler = _generator(options), options.sampler
    settings = {**vars(run), **vars(layering), "generator": generator, "sampler": sampler}
    pipe = _load(options, folder)
    _save(pipe, pipe.decompose(picture, options.prompt, **settings).images, outputs)


def _save(pipe: QwenImageEdit, images: Iterable[Any], outputs: list[Path]) -> None:
    """Write the pictures; of several processes the first does."""
    if pipe.processes is None or pipe.processes.rank == 0:
        save_pictures(images, outputs)
        say(*outputs)


def info(options: argparse.Namespace) -> None:
    nets = sources_of(options.controlnet)
    say(describe(options.model, revision=options.revision, files=_files(options), controlnets=nets))
    if preset := find_preset(options.model, revision=options.revision):
        say(f"  {preset}")


def verify(options: argparse.Namespace) -> None:
    nets, files = sources_of(options.controlnet), _files(options)
    report = verify_checkpoint(options.model, revision=options.revision, files=files, controlnets=nets)
    say(report)
    if not report.ok:
        raise ValueError(
            f"{options.model or 'the embedded model'} does not fit the model: see the lines above"
        )


def plan(options: argparse.Namespace) -> None:
    from qwenedit.memory.plan import plan

    names = ("device_memory", "host_memory", "device", "dtype", "height", "width", "pictures", "revision")
    nets, files = sources_of(options.controlnet), _files(options)
    how = {
        name: x for name, x in _chosen(options, "rank", "targets", "batch", "ema").items() if x is not None
    }
    if options.train is None:
        if how:
            raise ValueError(f"--{next(iter(how))} is of a training, wanted --train beside it")
        spec = fitting_spec(options.parallel, split_weights=options.split_weights)
        say(plan(
            options.model, **_chosen(options, *names, "layers", "split_weights"), files=files,
            controlnets=nets, parallel=spec,
        ))  # fmt: skip
        return
    from qwenedit.memory.train_plan import Training, train_plan

    unread = ["--controlnet"] * bool(nets) + ["--parallel"] * bool(options.parallel)
    unread += ["--split-weights"] * options.split_weights
    if options.train == "whole":
        unread += [f"--{name}" for name in ("rank", "targets") if name in how]
    if unread:
        raise ValueError(f"{unread[0]} has no part in this training, wanted it left out")
    training = Training(lora=options.train == "lora", **how)
    say(train_plan(options.model, training, **_chosen(options, *names), files=files))


def parity(options: argparse.Namespace) -> int:
    from qwenedit.parity.compare import PROMPT, parity
    from qwenedit.parity.report import DTYPES

    result = parity(
        options.model,
        options.output,
        revision=options.revision,
        picture=None if options.picture is None else open_picture(options.picture),
        prompt=PROMPT if options.prompt is None else options.prompt,
        dtypes=DTYPES if options.dtype is None else [options.dtype],
        device=options.device,
        controlnets=sources_of(options.controlnet),
        progress=not options.quiet,
        against=options.against,
    )
    say(result, options.output)
    return 0 if result.ok else 1


def ablate(options: argparse.Namespace) -> None:
    from qwenedit.ablation.results import RESULTS
    from qwenedit.ablation.sweep import ablate, edits_left

    require_alone(options)
    folder = options.output or Path(options.spec.stem)
    chosen = {**_chosen(options, "device", "dtype", "yes"), "progress": not options.quiet}
    if options.workers > 1:
        work(options, edits_left(options.spec, folder, **chosen), folder, RESULTS)
    sweep = ablate(options.spec, folder, shard=options.shard, **chosen)
    say(folder / "report.html" if options.shard is None else folder)
    see = "see the report" if options.shard is None else f"see the records in {folder}"
    if sweep.failed:
        raise ValueError(
            f"{len(sweep.failed)} of {len(sweep.records)} edits failed, the first with "
            f"{shown(sweep.failed[0]['error'])}: {see}"
        )
    if sweep.failed_metrics:
        name, error = sweep.failed_metrics[0]
        count = sum(one == name for one, _ in sweep.failed_metrics)
        raise ValueError(
            f"the metric {name} failed for {count} of {len(sweep.records)} edits, the first with "
            f"{shown(error)}: {see}"
        )


def _switches(options: argparse.Namespace) -> Switches:
    preset = {} if options.preset is None else PRESETS[options.preset].switches.flat()
    flat = {**preset, **options.switch}
    for name in ("references.picture", "seen.other"):  # a missing picture is found before weights are read
        if isinstance(flat.get(name), str):
            flat[name] = open_picture(flat[name])
    return Switches.from_flat(flat)


def _folder(options: argparse.Namespace) -> Path:
    """The checkpoint's folder, downloaded if need be, once the options of loading are checked."""
    dtype_of(options.dtype, (device_of if options.parallel is None else own_device)(options.device))
    modes, split_weights = modes_of(**_modes(options)), options.split_weights
    count = processes_started()
    if options.parallel is None and count > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            f"torchrun started {count} processes, which would each make the whole: wanted --parallel, like "
            "cfg=2, or one process without torchrun"
        )
    checked_spec(options.parallel, compile=options.compile, split_weights=split_weights, modes=modes)
    if options.compile:
        require_compiler()
    return resolve(options.model, options.revision, progress=not options.quiet, without=_files(options))


def _load(options: argparse.Namespace, folder: Path, **others: Any) -> QwenImageEdit:
    """The pipeline with its LoRAs, whose files are checked first."""
    loras = _loras(options, folder)
    pipe = load(
        folder,
        progress=not options.quiet,
        text_encoder=options.text_encoder or True,
        **_chosen(options, "device", "dtype", "mmdit", "vae", "parallel", "split_weights"),
        **_modes(options),
        **others,
    )
    names = [f"lora-{number}" for number, _ in enumerate(loras, start=1)]
    for name, (path, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(path, name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    if pipe.processes is not None and pipe.processes.spec.tensor > 1:
        pipe.fuse_lora()  # into the parts of the weights: beside them they do not fit
    if options.model is None and (pipe.processes is None or pipe.processes.rank == 0):
        say("qwenedit: the embedded model knows drawn shapes only, not photographs", error=True)
    return pipe


def _loras(options: argparse.Namespace, folder: Path) -> list[tuple[Path, float]]:
    """The files and scales of --lora, each file compared with the transformer's config."""
    found = []
    for text in options.lora:
        path, scale = text, 1.0
        before, _, after = text.rpartition(":")
        if before and _is_number(after) and not os.path.isfile(text):  # a file's name may have a colon
            path, scale = before, real_number(f"the scale of --lora {shown(text)}", float(after))
        if not os.path.lexists(path):
            raise ValueError(f"no such LoRA: {shown(text)} (wanted FILE or FILE:SCALE)")
        found.append((Path(path), scale))
    if found:
        with torch.device("meta"):
            transformer = MMDiT(network_config(folder, "transformer"))
        for file, _ in found:
            read_lora(file, transformer)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _files(options: argparse.Namespace) -> dict[str, Path]:
    return other_files(**_chosen(options, "mmdit", "vae", "text_encoder"))


def _modes(options: argparse.Namespace) -> dict[str, Any]:
    return _chosen(options, "compile", "residency", "modulation", "storage")


def _chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _generator(options: argparse.Namespace) -> torch.Generator | None:
    return None if options.seed is None else torch.Generator().manual_seed(options.seed)


def _silent(check: Callable[[], T]) -> T:
    """The result of a check without its warnings: the run itself warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check()
