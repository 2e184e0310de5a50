"""The command line: `qwenedit edit | generate | decompose | info | verify | plan | parity | ablate`.

Exit status 0 on success; 1 where `parity` finds a difference; 2 on bad usage or bad input, with one line on
stderr and no traceback (`--debug` shows it). Each picture is written whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from qwenedit.cli import commands
from qwenedit.cli.process import INTERRUPTED, Interrupts, open_streams, say
from qwenedit.family import LIGHTNING
from qwenedit.foreign import parse_json, shown
from qwenedit.memory.residency import MODULATIONS, RESIDENCIES, STORAGES
from qwenedit.sampling.samplers import SAMPLERS
from qwenedit.sampling.scheduler import MAX_STEPS
from qwenedit.switches import switch_lines
from qwenedit.version import __version__

__all__ = ["main"]

EXAMPLE = Path(__file__).parents[1] / "ablation" / "example.toml"
_LINE = 3000  # characters of a message, which may list names
_LEFT = "no file is half written"  # by a command that was interrupted


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse prints first."""
        say(f"qwenedit: {shown(message, _LINE)} (see {self.prog} --help)", error=True)
        sys.exit(2)

    def _print_message(self, message: str, _file: Any = None) -> None:
        """Of --help and --version."""
        try:
            say(message.rstrip("\n"))
        except ValueError as error:
            self.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be printable here
    options, interrupts = None, Interrupts()
    try:
        with interrupts, warnings.catch_warnings():
            options = _parser().parse_args(arguments)
            warnings.showwarning = _warn
            return options.run(options) or 0  # `parity` returns its own status
    except (Exception, KeyboardInterrupt) as error:
        if interrupts.came or isinstance(error, KeyboardInterrupt):
            say(f"qwenedit: interrupted; {options.left if options else _LEFT}", error=True)
            return INTERRUPTED
        if options is None or options.debug:
            raise
        say(f"qwenedit: {_one_line(error)}", error=True)
        return 2


def _warn(message: Warning | str, *_where: Any, **_source: Any) -> None:
    """A warning in one line, without its place in the code."""
    say(f"qwenedit: warning: {shown(' '.join(str(message).split()), _LINE)}", error=True)


def _one_line(error: BaseException) -> str:
    text = shown(" ".join(str(error).split()), _LINE) or type(error).__name__
    expected = isinstance(error, (ValueError, ArithmeticError, OSError))
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qwenedit", description="Qwen-Image-Edit in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"qwenedit {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int | None], help: str, left: str = _LEFT
    ) -> argparse.ArgumentParser:
        added = subparsers.add_parser(run.__name__, help=help)
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        added.set_defaults(run=run, left=left)
        return added

    edit = command(commands.edit, "change a picture as a prompt says")
    edit.add_argument("pictures", nargs="+", type=_path, metavar="PICTURE", help="the picture(s) to edit")
    edit.add_argument("prompt", metavar="PROMPT", help="what to change")
    _run_options(edit)
    _picture_options(edit)

    generate = command(commands.generate, "make a picture from a prompt, alone or from another picture")
    generate.add_argument("prompt", metavar="PROMPT", help="what to show")
    generate.add_argument(
        "--image", action=_Once, type=_path, metavar="PICTURE", help="a picture to start from"
    )
    _run_options(generate)
    _picture_options(generate)

    decompose = command(
        commands.decompose, "take a picture apart into layers with alpha (Qwen-Image-Layered)"
    )
    add = decompose.add_argument
    add("picture", type=_path, metavar="PICTURE", help="the picture to take apart")
    add("prompt", metavar="PROMPT", help="what the picture shows")
    _run_options(decompose)
    add("--layers", type=_batch, metavar="N", help="how many (default: 4): OUT-1.png, OUT-2.png, ...")
    add("--resolution", type=_side, metavar="R", help="640 (default) or 1024: layers of R x R in area")

    _checkpoint_options(command(commands.info, "what a checkpoint holds, or what would be downloaded"))
    _checkpoint_options(
        command(commands.verify, "every tensor of a checkpoint against the model, from headers")
    )

    plan = command(commands.plan, "what memory a run takes, how it would fit, what it downloads")
    plan.description = "Headers of a hub id that is not on this machine are fetched, a megabyte or so."
    _checkpoint_options(plan)
    for option, what in (("--device-memory", "an accelerator"), ("--host-memory", "the CPU")):
        plan.add_argument(option, metavar="SIZE", help=f"of {what}, like 24GiB (default: what is free)")
    for option in ("--height", "--width"):
        plan.add_argument(option, type=_side, metavar="N", help="of the output (default: the model's)")
    plan.add_argument("--pictures", type=_whole, metavar="N", help="how many are given (default: 1)")
    plan.add_argument("--layers", type=_batch, default=4, metavar="N", help="of Layered (default: 4)")
    _device_options(plan)

    parity = command(
        commands.parity,
        "a checkpoint through our modules and the reference's, one by one; nothing is downloaded",
        "rows that are done are kept: run it again to go on",
    )
    _model_options(parity)
    add = parity.add_argument
    add(
        "-o",
        "--output",
        type=_path,
        default=Path("parity.json"),
        metavar="OUT.json",
        help="for the results (default: parity.json); a run that was stopped goes on",
    )
    add(
        "--picture",
        type=_path,
        metavar="PICTURE",
        help="what to edit, at a small size (default: a drawn one)",
    )
    add("--prompt", metavar="T", help="what to ask for (default: a fixed one, in English and Chinese)")
    add("--dtype", choices=("float32", "bfloat16"), help="compare in this one only (default: in both)")
    add(
        "--against",
        choices=("diffusers", "diffsynth", "diffsynth-engine"),
        default="diffusers",
        help="whose networks: transformer and VAE are diffsynth's, the text encoder diffsynth-engine's",
    )
    _controlnet_option(parity)
    _device_options(parity, dtype=False)
    _quiet_option(parity)

    ablate = command(
        commands.ablate,
        "run a grid of settings over pictures and seeds, and report",
        "edits that are done are kept: run it again to go on",
    )
    ablate.formatter_class = argparse.RawDescriptionHelpFormatter
    ablate.epilog = f"an example, in {EXAMPLE}:\n\n{EXAMPLE.read_text(encoding='utf-8')}"
    ablate.add_argument("spec", type=_path, metavar="SPEC.toml", help="what to run: the example is below")
    ablate.add_argument(
        "-o", "--output", type=_path, metavar="FOLDER", help="for the results (default: SPEC, here)"
    )
    ablate.add_argument("--yes", action="store_true", help="also run more than 200 edits")
    _device_options(ablate)
    _quiet_option(ablate)
    return parser


def _run_options(command: argparse.ArgumentParser) -> None:
    """Of every command that samples."""
    add = command.add_argument
    add("-o", "--output", type=_path, required=True, metavar="OUT.png", help="where the picture goes")
    add("--model", metavar="ID_OR_FOLDER", help="hub id or local folder (default: the embedded model)")
    add("--revision", help="branch, tag or commit on the hub")
    _file_options(command)
    add("--steps", type=_steps, metavar="N", help="of the sampler (default: the preset's, 50 for Edit)")
    add("--sampler", choices=SAMPLERS, help="from noise to the picture (default: the checkpoint's, euler)")
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
    add(
        "--residency",
        choices=RESIDENCIES,
        default="auto",
        help="keep all weights in memory, one network's, or two blocks' (same picture, more reading); "
        "auto, the default: the first of these that fits",
    )
    add(
        "--modulation",
        choices=MODULATIONS,
        default="live",
        help="precomputed: read a third of the transformer once a run (same picture, less memory)",
    )
    add(
        "--storage",
        choices=[storage for storage in STORAGES if storage],
        help="keep weights in 8 bits (half the memory of bfloat16, an approximation)",
    )
    add("--compile", action="store_true", help="compile the transformer's blocks on their first run")
    _device_options(command)
    _quiet_option(command)


def _picture_options(command: argparse.ArgumentParser) -> None:
    """Of `edit` and `generate`."""
    add = command.add_argument
    add("--preset", choices=LIGHTNING, help="defaults for a distilled LoRA (default: the checkpoint's own)")
    for option, letter in (("--height", "H"), ("--width", "W")):
        help = "of the output, a multiple of a token's side, mostly 16 (default: as the picture)"
        add(option, type=_side, metavar=letter, help=help)
    add(
        "--mask",
        action=_Once,
        type=_path,
        metavar="PICTURE",
        help="white where the (last) picture may change, else black",
    )
    help = "share of the steps that run, from the picture under noise (default: 1 for edit, 0.6 for --image)"
    add("--strength", type=float, metavar="X", help=help)
    help = "make only what is around the mask's white, with N pixels about it, at the whole size"
    add("--mask-crop", type=_whole, metavar="N", help=help)
    add(
        "--num-images",
        type=_batch,
        default=1,
        metavar="N",
        help="how many; OUT-1.png, OUT-2.png, ... if several",
    )
    _controlnet_option(command)
    add(
        "--control-image",
        action="append",
        default=[],
        type=_path,
        metavar="PICTURE",
        help="what a ControlNet reads, for each net, or several for one; repeatable",
    )
    add(
        "--control-mask",
        action=_Once,
        type=_path,
        metavar="PICTURE",
        help="for inpainting nets: white is hidden from them",
    )
    add("--control-scale", type=float, metavar="X", help="factor on what the nets add (default: 1.0)")
    for option, which, default in (("--control-start", "start", 0.0), ("--control-end", "end", 1.0)):
        help = f"the {which} of the run under control, in shares of it (default: {default})"
        add(option, type=float, metavar="X", help=help)
    add(
        "--switch",
        action=_Switch,
        default={},
        metavar="NAME=VALUE",
        help="change the system, like references.steps=[0,10]; repeatable; --switch help lists all names",
    )


def _checkpoint_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    _file_options(command)
    _controlnet_option(command)


def _model_options(command: argparse.ArgumentParser) -> None:
    model = "hub id or folder (default: the embedded model)"
    command.add_argument("model", nargs="?", metavar="MODEL", help=model)
    command.add_argument("--revision", help="branch, tag or commit on the hub")


def _file_options(command: argparse.ArgumentParser) -> None:
    """Files with weights that replace the checkpoint's."""
    for option, what in (("--mmdit", "transformer"), ("--vae", "VAE"), ("--text-encoder", "text encoder")):
        command.add_argument(
            option,
            metavar="FILE",
            help=f"the {what}'s weights, official, ComfyUI's (also fp8){' or GGUF' * (option == '--mmdit')}",
        )


def _controlnet_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="ID_FOLDER_OR_FILE",
        help="a ControlNet for the transformer, InstantX's or DiffSynth's blockwise kind; repeatable",
    )


def _device_options(command: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    add = command.add_argument
    add("--device", metavar="D", help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    if dtype:
        default = "as stored; float32 on the CPU"
        add("--dtype", metavar="T", help=f"float32, bfloat16 or float16 (default: {default})")


def _quiet_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="no progress bars")


class _Switch(argparse.Action):
    """NAME=VALUE into a dict; a value that is not JSON is a word. "help" lists the names."""

    def __call__(self, parser: Any, options: argparse.Namespace, text: Any, _name: str | None = None) -> None:
        if text == "help":
            say("\n".join(switch_lines()))
            parser.exit()
        name, equals, value = text.partition("=")
        if not equals:
            raise argparse.ArgumentError(self, f"{text!r} is not NAME=VALUE")
        with suppress(ValueError):
            value = parse_json(value, "a switch")
        setattr(options, self.dest, {**getattr(options, self.dest), name: value})


class _Once(argparse.Action):
    """A value that may be given once: of two, the first would have no effect."""

    def __call__(
        self, _parser: Any, options: argparse.Namespace, value: Any, _name: str | None = None
    ) -> None:
        if getattr(options, self.dest) is not None:
            raise argparse.ArgumentError(self, "it is given twice, wanted one")
        setattr(options, self.dest, value)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty, wanted a path")
    return Path(text)  # of an empty text this folder


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{shown(text, 50)}' is not a whole number") from None


def _count(text: str, most: int) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    if value > most:
        raise argparse.ArgumentTypeError(f"{value} is more than {most}")
    return value


def _steps(text: str) -> int:
    return _count(text, MAX_STEPS)


def _batch(text: str) -> int:
    return _count(text, 1000)  # all run in one batch


def _side(text: str) -> int:
    return _count(text, 16384)  # more pixels than any memory is enough for


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**64 - 1")
    return value
