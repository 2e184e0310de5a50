"""What each command of the command line does, with the options that options.py read.

Bad input is found before any weight is read. A ValueError is the one line that the user sees.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenedit.cli.outputs import check_outputs, save_pictures

if TYPE_CHECKING:
    from PIL import Image
    from torch import Generator

    from qwenedit.family import Sampling
    from qwenedit.networks.mmdit import MMDiTConfig
    from qwenedit.pipeline import QwenImageEdit
    from qwenedit.switches import Switches
    from qwenedit.system import Result

__all__ = ["ablate", "decompose", "edit", "generate", "info", "parity", "plan", "verify"]


def edit(options: argparse.Namespace) -> None:
    from qwenedit.inputs.pictures import open_picture

    outputs, switches = check_outputs(options.output, options.num_images), _switches(options)
    pictures = [open_picture(path) for path in options.pictures]
    pipe, sampling = _load(options, pictures, switches)
    _finish(pipe.edit(pictures, options.prompt, **sampling), outputs)


def generate(options: argparse.Namespace) -> None:
    outputs, switches = check_outputs(options.output, options.num_images), _switches(options)
    pipe, sampling = _load(options, None, switches)
    _finish(pipe.generate(options.prompt, **sampling), outputs)


def decompose(options: argparse.Namespace) -> None:
    """As for `edit`, all that can be wrong shows before weights are read."""
    from qwenedit.family import PRESETS
    from qwenedit.inputs.pictures import open_picture
    from qwenedit.layered import check_alpha, layer_rows
    from qwenedit.sampling.scheduler import load_scheduler
    from qwenedit.weights.checkpoints import read_variant
    from qwenedit.weights.configs import network_config

    preset = PRESETS["Qwen-Image-Layered"]
    assert preset.layering is not None
    layers = options.layers or preset.layering.layers
    resolution = options.resolution or preset.layering.resolution
    outputs = check_outputs(options.output, layers)
    check_alpha(options.output)
    picture = open_picture(options.picture)
    run = preset.sampling(options.steps, options.true_cfg_scale, options.negative_prompt)
    _check_guidance(run)
    folder = _folder(options)
    variant, prompts = read_variant(folder), (options.prompt, run.negative_prompt)
    (row,) = layer_rows(picture, *prompts, variant, layers, resolution)
    load_scheduler(folder).sigmas(run.num_inference_steps, math.prod(row.geometry.grid))
    pipe = _pipe(options, folder, network_config(folder, "transformer"))
    result = pipe.decompose(
        picture,
        options.prompt,
        negative_prompt=run.negative_prompt,
        true_cfg_scale=run.true_cfg_scale,
        num_inference_steps=run.num_inference_steps,
        layers=layers,
        resolution=resolution,
        cfg_normalize=preset.layering.cfg_normalize,
        generator=_generator(options),
    )
    _finish(result, outputs)


def _finish(result: Result, outputs: list[Path]) -> None:
    save_pictures(result.images, outputs)
    print(*outputs, sep="\n")


def info(options: argparse.Namespace) -> None:
    from qwenedit.verify import describe
    from qwenedit.weights.checkpoints import find_preset

    print(describe(options.model, revision=options.revision, files=_files(options)))
    if preset := find_preset(options.model, revision=options.revision):
        print(f"  {preset}")


def verify(options: argparse.Namespace) -> None:
    from qwenedit.verify import verify

    report = verify(options.model, revision=options.revision, files=_files(options))
    print(report)
    if not report.ok:
        raise ValueError(
            f"{options.model or 'the embedded model'} does not fit the model: see the lines above"
        )


def plan(options: argparse.Namespace) -> None:
    from qwenedit.memory.plan import plan

    print(
        plan(
            options.model,
            device_memory=options.device_memory,
            host_memory=options.host_memory,
            device=options.device,
            dtype=options.dtype,
            height=options.height,
            width=options.width,
            pictures=options.pictures,
            layers=options.layers,
            revision=options.revision,
            files=_files(options),
        )
    )


def _files(options: argparse.Namespace) -> dict[str, Path]:
    from qwenedit.assembly import other_files

    return other_files(mmdit=options.mmdit, vae=options.vae, text_encoder=options.text_encoder)


def parity(options: argparse.Namespace) -> int:
    from qwenedit.inputs.pictures import open_picture
    from qwenedit.parity.compare import PROMPT, parity
    from qwenedit.parity.report import DTYPES

    try:
        result = parity(
            options.model,
            options.output,
            revision=options.revision,
            picture=None if options.picture is None else open_picture(options.picture),
            prompt=PROMPT if options.prompt is None else options.prompt,
            dtypes=DTYPES if options.dtype is None else [options.dtype],
            device=options.device,
            progress=not options.quiet,
        )
    except KeyboardInterrupt:
        print("qwenedit: interrupted; rows that are done are kept: run it again to go on", file=sys.stderr)
        return 130
    print(result, options.output, sep="\n")
    return 0 if result.ok else 1


def ablate(options: argparse.Namespace) -> None:
    from qwenedit.ablation.sweep import ablate

    folder = options.output or Path(options.spec.stem)
    try:
        sweep = ablate(
            options.spec,
            folder,
            device=options.device,
            dtype=options.dtype,
            yes=options.yes,
            progress=not options.quiet,
        )
    except KeyboardInterrupt:
        print("qwenedit: interrupted; edits that are done are kept: run it again to go on", file=sys.stderr)
        sys.exit(130)
    print(folder / "report.html")
    if sweep.failed:
        raise ValueError(
            f"{len(sweep.failed)} of {len(sweep.records)} edits failed, the first with "
            f"{sweep.failed[0]['error']}: see the report"
        )


def _switches(options: argparse.Namespace) -> Switches:
    from qwenedit.family import PRESETS
    from qwenedit.inputs.pictures import open_picture
    from qwenedit.switches import Switches

    preset = {} if options.preset is None else PRESETS[options.preset].switches.flat()
    flat = {**preset, **options.switch}
    for name in ("references.picture", "seen.other"):  # read now, before any weight is
        if isinstance(flat.get(name), str):
            flat[name] = open_picture(flat[name])
    return Switches.from_flat(flat)


def _load(
    options: argparse.Namespace, pictures: list[Image.Image] | None, switches: Switches
) -> tuple[QwenImageEdit, dict[str, Any]]:
    """The pipeline and what to call it with, once it is clear that it can do what is asked: weights may be
    many gigabytes.
    """
    from qwenedit.family import PRESETS, preset_of
    from qwenedit.inputs.rows import rows_of
    from qwenedit.layered import require_flat
    from qwenedit.sampling.scheduler import load_scheduler
    from qwenedit.sampling.switched import require_fitting, schedule
    from qwenedit.weights.checkpoints import read_areas, read_variant
    from qwenedit.weights.configs import network_config

    folder = _folder(options)
    variant = read_variant(folder)
    require_flat(variant)
    preset = preset_of(folder) if options.preset is None else PRESETS[options.preset]
    run = preset.sampling(options.steps, options.true_cfg_scale, options.negative_prompt)
    areas, prompts = read_areas(folder, variant), (options.prompt, run.negative_prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        (row,) = rows_of(*prompts, pictures, variant, areas, options.height, options.width)
    _check_guidance(run)
    steps = run.num_inference_steps
    schedule(load_scheduler(folder), switches.time, steps, math.prod(row.geometry.grid))
    config = network_config(folder, "transformer")
    require_fitting(switches, pictures=[len(row.pictures)], blocks=config.num_layers, steps=steps)
    return _pipe(options, folder, config), {
        "negative_prompt": run.negative_prompt,
        "true_cfg_scale": run.true_cfg_scale,
        "num_inference_steps": steps,
        "height": options.height,
        "width": options.width,
        "num_images_per_prompt": options.num_images,
        "generator": _generator(options),
        "switches": switches,
    }


def _folder(options: argparse.Namespace) -> Path:
    """The checkpoint's, downloaded if need be, once it is clear that it can be loaded as is asked."""
    from qwenedit.assembly import modes_of
    from qwenedit.checks import device_of, dtype_of
    from qwenedit.sampling.compiling import require_compiler
    from qwenedit.weights.checkpoints import resolve

    dtype_of(options.dtype, device_of(options.device))
    modes_of(compile=options.compile, **_memory(options))
    if options.compile:
        require_compiler()
    return resolve(options.model, options.revision, progress=not options.quiet, without=_files(options))


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    names = ("residency", "modulation", "storage")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _check_guidance(run: Sampling) -> None:
    from qwenedit.sampling.guidance import guidance_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        guidance_of(run.true_cfg_scale, run.negative_prompt)


def _generator(options: argparse.Namespace) -> Generator | None:
    import torch

    return None if options.seed is None else torch.Generator().manual_seed(options.seed)


def _pipe(options: argparse.Namespace, folder: Path, config: MMDiTConfig) -> QwenImageEdit:
    """The pipeline of a folder and of files of their own, with its LoRAs, which are checked first."""
    from qwenedit.pipeline import load

    loras = _loras(options, config)
    pipe = load(
        folder,
        device=options.device,
        dtype=options.dtype,
        progress=not options.quiet,
        mmdit=options.mmdit,
        vae=options.vae,
        text_encoder=options.text_encoder or True,
        compile=options.compile,
        **_memory(options),
    )
    for path, scale in loras:
        pipe.load_lora_weights(path, scale=scale)
    if options.model is None:
        print("qwenedit: the embedded model knows drawn shapes only, not photographs", file=sys.stderr)
    return pipe


def _loras(options: argparse.Namespace, config: MMDiTConfig) -> list[tuple[Path, float]]:
    """The files and scales of --lora, each file compared with the transformer that is to be loaded."""
    import torch

    from qwenedit.lora import read_lora
    from qwenedit.networks.mmdit import MMDiT

    found = []
    for text in options.lora:
        path, colon, scale = text.rpartition(":")
        if not colon or Path(text).is_file():  # a file's name may have a colon
            path, scale = text, "1"
        try:
            found.append((Path(path), float(scale)))
        except ValueError:
            raise ValueError(f"--lora is {text!r}, wanted FILE or FILE:SCALE") from None
    if found:
        with torch.device("meta"):
            transformer = MMDiT(config)
        for file, _ in found:
            read_lora(file, transformer)
    return found
