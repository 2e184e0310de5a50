"""The command line: `qwenedit edit | generate | decompose | info | verify | ablate`.

Exit status 0 on success; 2 on bad usage or bad input, with one line on stderr and no traceback (`--debug`
shows it). Pictures are written whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qwenedit import __version__
from qwenedit.outputs import check_outputs, save_pictures

if TYPE_CHECKING:
    from PIL import Image
    from torch import Generator

    from qwenedit.ablation import Switches
    from qwenedit.mmdit import MMDiTConfig
    from qwenedit.pipeline import QwenImageEdit, Result
    from qwenedit.presets import Sampling

__all__ = ["main"]

_LIGHTNING = ("lightning-4", "lightning-8")  # presets.LIGHTNING, which help must not import torch for


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line that the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse prints the usage first; one line is enough, and `--help` has the rest."""
        self.exit(2, f"qwenedit: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be printable here
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            options.run(options)
    except KeyboardInterrupt:
        print("qwenedit: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"qwenedit: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _warn(message: Warning | str, *_where: Any, **_source: Any) -> None:
    """A warning in one line, without the line of Python that it came from."""
    print(f"qwenedit: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, (ValueError, ArithmeticError, OSError))
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qwenedit", description="Qwen-Image-Edit in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"qwenedit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    edit = commands.add_parser("edit", help="change a picture as a prompt says")
    edit.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="the picture(s) to edit")
    edit.add_argument("prompt", metavar="PROMPT", help="what to change")
    _sampling_options(edit)
    edit.set_defaults(run=_edit)

    generate = commands.add_parser("generate", help="make a picture from a prompt alone")
    generate.add_argument("prompt", metavar="PROMPT", help="what to show")
    _sampling_options(generate)
    generate.set_defaults(run=_generate)

    decompose = commands.add_parser("decompose", help="take a picture apart into layers with alpha")
    add = decompose.add_argument
    add("picture", type=Path, metavar="PICTURE", help="the picture to take apart")
    add("prompt", metavar="PROMPT", help="what the picture shows")
    _run_options(decompose)
    add("--layers", type=_batch, metavar="N", help="how many (default: 4): OUT-1.png, OUT-2.png, ...")
    add("--resolution", type=_positive, metavar="R", help="640 (default) or 1024: layers of R x R in area")
    decompose.set_defaults(run=_decompose)

    info = commands.add_parser("info", help="what a checkpoint holds, or what would be downloaded")
    verify = commands.add_parser(
        "verify", help="every tensor of a checkpoint against the model, from headers"
    )
    for command, run in ((info, _info), (verify, _verify)):
        command.add_argument(
            "model", nargs="?", metavar="MODEL", help="hub id or folder (default: the embedded model)"
        )
        command.add_argument("--revision", help="branch, tag or commit on the hub")
        _file_options(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=run)

    ablate = commands.add_parser("ablate", help="run a grid of settings over pictures and seeds, and report")
    ablate.add_argument("spec", type=Path, metavar="SPEC.toml", help="what to run: see examples/")
    ablate.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="for the results (default: SPEC, here)"
    )
    ablate.add_argument("--yes", action="store_true", help="also run more than 200 edits")
    _machine_options(ablate)
    ablate.set_defaults(run=_ablate)
    return parser


def _run_options(command: argparse.ArgumentParser) -> None:
    """Of every command that samples."""
    add = command.add_argument
    add("-o", "--output", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    add("--model", metavar="ID_OR_FOLDER", help="hub id or local folder (default: the embedded model)")
    add("--revision", help="branch, tag or commit on the hub")
    _file_options(command)
    add("--steps", type=_positive, metavar="N", help="Euler steps (default: the preset's, 50 for Edit)")
    add("--true-cfg-scale", type=float, metavar="X", help="guidance scale (default: the preset's, 4.0)")
    add("--negative-prompt", metavar="T", help="what to steer away from (default: the preset's, a space)")
    add("--seed", type=_seed, metavar="N", help="seed of the noise (default: another picture every time)")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA for the transformer, in any trainer's layout; repeatable",
    )
    _machine_options(command)


def _sampling_options(command: argparse.ArgumentParser) -> None:
    _run_options(command)
    add = command.add_argument
    add("--preset", choices=_LIGHTNING, help="defaults for a distilled LoRA (default: the checkpoint's own)")
    add(
        "--height", type=_whole, metavar="H", help="of the output, a multiple of 16 (default: as the picture)"
    )
    add("--width", type=_whole, metavar="W", help="of the output, a multiple of 16 (default: as the picture)")
    add(
        "--num-images",
        type=_batch,
        default=1,
        metavar="N",
        help="how many; OUT-1.png, OUT-2.png, ... if several",
    )
    add(
        "--switch",
        action=_Switch,
        default={},
        metavar="NAME=VALUE",
        help="change the system, like references.steps=[0,10]; repeatable, see qwenedit.ablation.switches",
    )


def _file_options(command: argparse.ArgumentParser) -> None:
    """Networks from files of their own; None in the options where the checkpoint's is wanted."""
    for option, what in (("--mmdit", "transformer"), ("--vae", "VAE"), ("--text-encoder", "text encoder")):
        command.add_argument(
            option,
            metavar="FILE",
            help=f"the {what}'s weights, official, ComfyUI's (also fp8){' or GGUF' * (option == '--mmdit')}",
        )


def _machine_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--device", metavar="D", help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16 or float16 (default: as stored; float32 on the CPU)")
    add("--quiet", action="store_true", help="no progress bars")
    add("--debug", action="store_true", help="show tracebacks")


class _Switch(argparse.Action):
    """NAME=VALUE into a dict; a value is JSON where it reads as JSON, else a word."""

    def __call__(
        self, _parser: Any, options: argparse.Namespace, text: Any, _name: str | None = None
    ) -> None:
        name, equals, value = text.partition("=")
        if not equals:
            raise argparse.ArgumentError(self, f"{text!r} is not NAME=VALUE")
        with suppress(ValueError):
            value = json.loads(value)
        setattr(options, self.dest, {**getattr(options, self.dest), name: value})


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _batch(text: str) -> int:
    value = _positive(text)
    if value > 1000:  # they are made together, in one batch
        raise argparse.ArgumentTypeError(f"{value} is more than 1000")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**64 - 1")
    return value


def _edit(options: argparse.Namespace) -> None:
    from qwenedit.inputs import open_picture

    outputs, switches = check_outputs(options.output, options.num_images), _switches(options)
    pictures = [open_picture(path) for path in options.pictures]
    pipe, sampling = _load(options, pictures, switches)
    _finish(pipe.edit(pictures, options.prompt, **sampling), outputs)


def _generate(options: argparse.Namespace) -> None:
    outputs, switches = check_outputs(options.output, options.num_images), _switches(options)
    pipe, sampling = _load(options, None, switches)
    _finish(pipe.generate(options.prompt, **sampling), outputs)


def _decompose(options: argparse.Namespace) -> None:
    """As for `_edit`, all that can be wrong shows before weights are read."""
    from qwenedit.checkpoints import read_variant
    from qwenedit.inputs import open_picture
    from qwenedit.layered import check_alpha, layer_rows
    from qwenedit.loading import load_scheduler, network_config
    from qwenedit.presets import PRESETS

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


def _info(options: argparse.Namespace) -> None:
    from qwenedit.loading import describe
    from qwenedit.presets import find_preset

    print(describe(options.model, revision=options.revision, files=_files(options)))
    if preset := find_preset(options.model, revision=options.revision):
        print(f"  {preset}")


def _verify(options: argparse.Namespace) -> None:
    from qwenedit.loading import verify

    report = verify(options.model, revision=options.revision, files=_files(options))
    print(report)
    if not report.ok:
        raise InputError(
            f"{options.model or 'the embedded model'} does not fit the model: see the lines above"
        )


def _files(options: argparse.Namespace) -> dict[str, Path]:
    from qwenedit.assembly import other_files

    return other_files(mmdit=options.mmdit, vae=options.vae, text_encoder=options.text_encoder)


def _ablate(options: argparse.Namespace) -> None:
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
        raise InputError(
            f"{len(sweep.failed)} of {len(sweep.records)} edits failed, the first with "
            f"{sweep.failed[0]['error']}: see the report"
        )


def _switches(options: argparse.Namespace) -> Switches:
    from qwenedit.ablation import Switches
    from qwenedit.inputs import open_picture
    from qwenedit.presets import PRESETS

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
    from qwenedit.ablation.running import require_fitting, schedule
    from qwenedit.checkpoints import read_areas, read_variant
    from qwenedit.inputs import rows_of
    from qwenedit.layered import require_flat
    from qwenedit.loading import load_scheduler, network_config
    from qwenedit.presets import PRESETS, preset_of

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
    from qwenedit import mini
    from qwenedit.checkpoints import resolve

    if options.model is None:
        return mini.CHECKPOINT
    return resolve(options.model, options.revision, progress=not options.quiet)


def _check_guidance(run: Sampling) -> None:
    from qwenedit.inputs import guidance_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        guidance_of(run.true_cfg_scale, run.negative_prompt)


def _generator(options: argparse.Namespace) -> Generator | None:
    import torch

    return None if options.seed is None else torch.Generator().manual_seed(options.seed)


def _pipe(options: argparse.Namespace, folder: Path, config: MMDiTConfig) -> QwenImageEdit:
    """The pipeline of a folder and of files of their own, with its LoRAs, which are checked first."""
    from qwenedit.assembly import load

    loras = _loras(options, config)
    pipe = load(
        folder,
        device=options.device,
        dtype=options.dtype,
        progress=not options.quiet,
        mmdit=options.mmdit,
        vae=options.vae,
        text_encoder=options.text_encoder or True,
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
    from qwenedit.mmdit import MMDiT

    found = []
    for text in options.lora:
        path, colon, scale = text.rpartition(":")
        if not colon or Path(text).is_file():  # a file's name may have a colon
            path, scale = text, "1"
        try:
            found.append((Path(path), float(scale)))
        except ValueError:
            raise InputError(f"--lora is {text!r}, wanted FILE or FILE:SCALE") from None
    if found:
        with torch.device("meta"):
            transformer = MMDiT(config)
        for file, _ in found:
            read_lora(file, transformer)
    return found


if __name__ == "__main__":
    sys.exit(main())
