"""What the commands of the command line have in common: groups of options, their types and actions."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwenedit.cli.process import say
from qwenedit.family import LIGHTNING
from qwenedit.foreign import parse_json, shown
from qwenedit.memory.residency import MODULATIONS, RESIDENCIES, STORAGES
from qwenedit.sampling.samplers import SAMPLERS
from qwenedit.sampling.scheduler import MAX_STEPS
from qwenedit.switches import switch_lines

__all__ = [
    "Once", "Switch", "batch", "checkpoint_options", "common_options", "controlnet_option", "count",
    "device_options", "model_options", "parallel_options", "path", "picture_options", "quiet_option",
    "run_options", "sampling_options", "seed", "shard_options", "side", "steps", "whole", "workers",
]  # fmt: skip


def run_options(
    command: argparse.ArgumentParser, output: str = "OUT.png", what: str = "where the picture goes"
) -> None:
    """Of every command that makes one edit; `output` and `what` describe what it writes."""
    add = command.add_argument
    add("-o", "--output", type=path, required=True, metavar=output, help=what)
    add("--seed", type=seed, metavar="N", help="seed of the noise (default: another picture every time)")
    sampling_options(command)
    parallel_options(command)


def sampling_options(command: argparse.ArgumentParser) -> None:
    """Of every command that samples."""
    add = command.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="hub id or local folder (default: the embedded model)")
    add("--revision", help="branch, tag or commit on the hub")
    _file_options(command)
    add("--steps", type=steps, metavar="N", help="of the sampler (default: the preset's, 50 for Edit)")
    add("--sampler", choices=SAMPLERS, help="from noise to the picture (default: the checkpoint's, euler)")
    add("--true-cfg-scale", type=float, metavar="X", help="guidance scale (default: the preset's, 4.0)")
    add("--negative-prompt", metavar="T", help="what to steer away from (default: the preset's, a space)")
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
    device_options(command)
    quiet_option(command)


def parallel_options(command: argparse.ArgumentParser) -> None:
    """Of commands that several processes share."""
    add = command.add_argument
    add(
        "--parallel",
        metavar="AXIS=N,...",
        help="share the run out among the processes that torchrun started, like cfg=2,ulysses=4",
    )
    add(
        "--split-weights",
        action="store_true",
        help="each of these processes keeps its part of the weights (same picture, less memory)",
    )


def picture_options(command: argparse.ArgumentParser) -> None:
    """Of `edit` and `generate`."""
    common_options(command)
    add = command.add_argument
    add(
        "--mask",
        action=Once,
        type=path,
        metavar="PICTURE",
        help="white where the (last) picture may change, else black",
    )
    help = "share of the steps that run, from the picture under noise (default: 1 for edit, 0.6 for --image)"
    add("--strength", type=float, metavar="X", help=help)
    help = "make only what is around the mask's white, with N pixels about it, at the whole size"
    add("--mask-crop", type=whole, metavar="N", help=help)
    add(
        "--num-images",
        type=batch,
        default=1,
        metavar="N",
        help="how many; OUT-1.png, OUT-2.png, ... if several",
    )
    controlnet_option(command)
    add(
        "--control-image",
        action="append",
        default=[],
        type=path,
        metavar="PICTURE",
        help="what a ControlNet reads, for each net, or several for one; repeatable",
    )
    add(
        "--control-mask",
        action=Once,
        type=path,
        metavar="PICTURE",
        help="for inpainting nets: white is hidden from them",
    )
    add("--control-scale", type=float, metavar="X", help="factor on what the nets add (default: 1.0)")
    for option, which, default in (("--control-start", "start", 0.0), ("--control-end", "end", 1.0)):
        help = f"the {which} of the run under control, in shares of it (default: {default})"
        add(option, type=float, metavar="X", help=help)


def common_options(command: argparse.ArgumentParser) -> None:
    """Of `edit`, `generate` and `batch`."""
    add = command.add_argument
    add("--preset", choices=LIGHTNING, help="defaults for a distilled LoRA (default: the checkpoint's own)")
    for option, letter in (("--height", "H"), ("--width", "W")):
        help = "of the output, a multiple of a token's side, mostly 16 (default: as the picture)"
        add(option, type=side, metavar=letter, help=help)
    add(
        "--switch",
        action=Switch,
        default={},
        metavar="NAME=VALUE",
        help="change the system, like references.steps=[0,10]; repeatable; --switch help lists all names",
    )


def checkpoint_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    _file_options(command)
    controlnet_option(command)


def model_options(command: argparse.ArgumentParser) -> None:
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


def controlnet_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="ID_FOLDER_OR_FILE",
        help="a ControlNet for the transformer, InstantX's or DiffSynth's blockwise kind; repeatable",
    )


def device_options(command: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    add = command.add_argument
    add("--device", metavar="D", help="cpu, cuda, mps, ... (default: the accelerator if there is one)")
    if dtype:
        default = "as stored; float32 on the CPU"
        add("--dtype", metavar="T", help=f"float32, bfloat16 or float16 (default: {default})")


def shard_options(command: argparse.ArgumentParser) -> None:
    """Of commands whose edits several processes may share."""
    help = "make part I of N only, I from 0 to N - 1; a run without --shard then ties the parts together"
    command.add_argument("--shard", metavar="I/N", help=help)
    help = "processes on this machine, one for each GPU, or on the CPU with its threads shared out"
    command.add_argument("--workers", type=workers, default=1, metavar="N", help=help)


def quiet_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="no progress bars")


class Switch(argparse.Action):
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


class Once(argparse.Action):
    """A value that may be given once: of two, the first would have no effect."""

    def __call__(
        self, _parser: Any, options: argparse.Namespace, value: Any, _name: str | None = None
    ) -> None:
        if getattr(options, self.dest) is not None:
            raise argparse.ArgumentError(self, "it is given twice, wanted one")
        setattr(options, self.dest, value)


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty, wanted a path")
    return Path(text)  # of an empty text this folder


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{shown(text, 50)}' is not a whole number") from None


def count(text: str, most: int) -> int:
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    if value > most:
        raise argparse.ArgumentTypeError(f"{value} is more than {most}")
    return value


def steps(text: str) -> int:
    return count(text, MAX_STEPS)


def batch(text: str) -> int:
    return count(text, 1000)  # all run in one batch


def workers(text: str) -> int:
    return count(text, 256)  # processes with a model each


def side(text: str) -> int:
    return count(text, 16384)  # more pixels than any memory is enough for


def seed(text: str) -> int:
    value = whole(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**64 - 1")
    return value
