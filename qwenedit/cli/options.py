"""The command line: `qwenedit edit | generate | decompose | explore | info | verify | plan | parity |
ablate | batch | train | completion`.

Exit status 0 on success; 1 where `parity` finds a difference, or an edit of a `batch` fails; 2 on bad usage
or bad input, with one line on stderr and no traceback (`--debug` shows it). Each picture is written whole
or not at all.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwenedit.cli import batch as batches
from qwenedit.cli import commands
from qwenedit.cli.arguments import (
    Once,
    Switch,
    batch,
    checkpoint_options,
    common_options,
    controlnet_option,
    device_options,
    model_options,
    parallel_options,
    path,
    picture_options,
    quiet_option,
    run_options,
    sampling_options,
    seed,
    shard_options,
    side,
    whole,
)
from qwenedit.cli.batch import LANGUAGES, LAYOUTS
from qwenedit.cli.completion import SHELLS, completion
from qwenedit.cli.explore import explore
from qwenedit.cli.process import INTERRUPTED, Interrupts, open_streams, say
from qwenedit.cli.train import train
from qwenedit.foreign import shown
from qwenedit.version import __version__

__all__ = ["main"]

EXAMPLE = Path(__file__).parents[1] / "ablation" / "example.toml"
TRAINING = Path(__file__).parents[1] / "training" / "example.toml"
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
            options.words = list(sys.argv[1:] if arguments is None else arguments)  # for its workers
            warnings.showwarning = _warn if _process(options) == 0 else _ignore
            return options.run(options) or 0  # `parity` returns its own status
    except (Exception, KeyboardInterrupt) as error:
        if interrupts.came or isinstance(error, KeyboardInterrupt):
            say(f"qwenedit: interrupted; {options.left if options else _LEFT}", error=True)
            return INTERRUPTED
        if options is None or options.debug:
            raise
        number = _process(options)
        if number == 0:
            say(f"qwenedit: {_one_line(error)}", error=True)
        elif not getattr(error, "is_everyones", False):  # process 0 says it
            say(f"qwenedit: process {number}: {_one_line(error)}", error=True)
        return 2


def _process(options: argparse.Namespace) -> int:
    """The number of this process among those that share the run; 0 for one that is alone."""
    shares = options.run is train or getattr(options, "parallel", None)
    number = os.environ.get("RANK", "0") if shares else "0"
    return int(number) if number.isdecimal() else 0


def _warn(message: Warning | str, *_where: Any, **_source: Any) -> None:
    """A warning in one line, without its place in the code."""
    say(f"qwenedit: warning: {shown(' '.join(str(message).split()), _LINE)}", error=True)


def _ignore(*_where: Any, **_source: Any) -> None:
    """A warning that process 0 says, too."""


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

    look = command(explore, "look inside an edit: a page for a browser, of one run or two beside each other")
    add = look.add_argument
    what = "the picture(s) to edit; none to make one from the prompt alone"
    add("pictures", nargs="*", type=path, metavar="PICTURE", help=what)
    add("prompt", metavar="PROMPT", help="what to change, or to show")
    run_options(look, "OUT.html", "where the page goes")
    picture_options(look)
    add("--second-seed", type=seed, metavar="N", help="another run beside it, from another seed")
    add("--second-prompt", metavar="T", help="another run with another prompt")
    add(
        "--second-switch",
        action=Switch,
        default={},
        metavar="NAME=VALUE",
        help="another run with a switch, added to those of --switch; repeatable",
    )

    checkpoint_options(command(commands.info, "what a checkpoint holds, or what would be downloaded"))
    checkpoint_options(
        command(commands.verify, "every tensor of a checkpoint against the model, from headers")
    )

    plan = command(commands.plan, "what memory a run takes, how it would fit, what it downloads")
    plan.description = "Headers of a hub id that is not on this machine are fetched, a megabyte or so."
    checkpoint_options(plan)
    parallel_options(plan)
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
    shard_options(ablate)
    device_options(ablate)
    quiet_option(ablate)

    trained = command(
        train,
        "train a LoRA or all weights on pairs of pictures",
        "the last saved state is kept: run it again to go on",
    )
    trained.formatter_class = argparse.RawDescriptionHelpFormatter
    trained.epilog = f"an example, in {TRAINING}:\n\n{TRAINING.read_text(encoding='utf-8')}"
    trained.add_argument("spec", type=path, metavar="SPEC.toml", help="what to train: the example is below")
    device_options(trained, dtype=False)
    quiet_option(trained)

    many = command(
        batches.batch,
        "make any list of edits, or those of a public benchmark",
        "edits that are done are kept: run it again to go on",
    )
    many.description = "Options about the edit are for lines of the list that do not say it themselves."
    add = many.add_argument
    add("edits", type=path, metavar="EDITS", help="a JSON Lines file; with --layout the benchmark's folder")
    add("--layout", choices=LAYOUTS, help="of a public benchmark, for whose scorer results are named")
    help = "make the edits in this language only (default: those that the benchmark's authors make)"
    add("--language", choices=LANGUAGES, help=help)
    help = "for the results; it may have some already"
    add("-o", "--output", type=path, required=True, metavar="FOLDER", help=help)
    add("--seed", type=seed, metavar="N", help="seed of the noise (default: 0)")
    sampling_options(many)
    common_options(many)
    shard_options(many)
    many.set_defaults(parallel=None, split_weights=False)  # edits are shared out, not each of them

    script = command(completion, "a script that completes this command line in a shell")
    script.description = (
        "For bash: qwenedit completion bash > ~/.local/share/bash-completion/completions/qwenedit"
    )
    script.add_argument("shell", choices=SHELLS, help="whose language the script is in")
    script.set_defaults(commands=subparsers.choices)
    return parser
