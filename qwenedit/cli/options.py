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
from pathlib import Path
from typing import Any, NoReturn

from qwenedit.cli import commands
from qwenedit.cli.arguments import (
    Once,
    batch,
    checkpoint_options,
    controlnet_option,
    device_options,
    model_options,
    path,
    picture_options,
    quiet_option,
    run_options,
    side,
    whole,
)
from qwenedit.cli.process import INTERRUPTED, Interrupts, open_streams, say
from qwenedit.foreign import shown
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
    edit.add_argument("pictures", nargs="+", type=path, metavar="PICTURE", help="the picture(s) to edit")
    edit.add_argument("prompt", metavar="PROMPT", help="what to change")
    run_options(edit)
    picture_options(edit)

    generate = command(commands.generate, "make a picture from a prompt, alone or from another picture")
    generate.add_argument("prompt", metavar="PROMPT", help="what to show")
    generate.add_argument(
        "--image", action=Once, type=path, metavar="PICTURE", help="a picture to start from"
    )
    run_options(generate)
    picture_options(generate)

    decompose = command(
        commands.decompose, "take a picture apart into layers with alpha (Qwen-Image-Layered)"
    )
    add = decompose.add_argument
    add("picture", type=path, metavar="PICTURE", help="the picture to take apart")
    add("prompt", metavar="PROMPT", help="what the picture shows")
    run_options(decompose)
    add("--layers", type=batch, metavar="N", help="how many (default: 4): OUT-1.png, OUT-2.png, ...")
    add("--resolution", type=side, metavar="R", help="640 (default) or 1024: layers of R x R in area")

    checkpoint_options(command(commands.info, "what a checkpoint holds, or what would be downloaded"))
    checkpoint_options(
        command(commands.verify, "every tensor of a checkpoint against the model, from headers")
    )

    plan = command(commands.plan, "what memory a run takes, how it would fit, what it downloads")
    plan.description = "Headers of a hub id that is not on this machine are fetched, a megabyte or so."
    checkpoint_options(plan)
    for option, what in (("--device-memory", "an accelerator"), ("--host-memory", "the CPU")):
        plan.add_argument(option, metavar="SIZE", help=f"of {what}, like 24GiB (default: what is free)")
    for option in ("--height", "--width"):
        plan.add_argument(option, type=side, metavar="N", help="of the output (default: the model's)")
    plan.add_argument("--pictures", type=whole, metavar="N", help="how many are given (default: 1)")
    plan.add_argument("--layers", type=batch, default=4, metavar="N", help="of Layered (default: 4)")
    add = plan.add_argument
    add("--train", choices=("lora", "whole"), help="plan a training, of a LoRA or of all weights")
    add("--rank", type=whole, metavar="N", help="of the LoRA (default: 16)")
    add("--targets", metavar="T", help="the LoRA's layers, as in `add_lora` (default: attention)")
    add("--batch", type=batch, metavar="N", help="edits that train at a time (default: 1)")
    add("--ema", action="store_true", default=None, help="with a moving average of what trains")
    device_options(plan)

    parity = command(
        commands.parity,
        "a checkpoint through our modules and the reference's, one by one; nothing is downloaded",
        "rows that are done are kept: run it again to go on",
    )
    model_options(parity)
    add = parity.add_argument
    add(
        "-o",
        "--output",
        type=path,
        default=Path("parity.json"),
        metavar="OUT.json",
        help="for the results (default: parity.json); a run that was stopped goes on",
    )
    add(
        "--picture",
        type=path,
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
    controlnet_option(parity)
    device_options(parity, dtype=False)
    quiet_option(parity)

    ablate = command(
        commands.ablate,
        "run a grid of settings over pictures and seeds, and report",
        "edits that are done are kept: run it again to go on",
    )
    ablate.formatter_class = argparse.RawDescriptionHelpFormatter
    ablate.epilog = f"an example, in {EXAMPLE}:\n\n{EXAMPLE.read_text(encoding='utf-8')}"
    ablate.add_argument("spec", type=path, metavar="SPEC.toml", help="what to run: the example is below")
    ablate.add_argument(
        "-o", "--output", type=path, metavar="FOLDER", help="for the results (default: SPEC, here)"
    )
    ablate.add_argument("--yes", action="store_true", help="also run more than 200 edits")
    device_options(ablate)
    quiet_option(ablate)
    return parser
