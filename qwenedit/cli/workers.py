"""Several processes for one command: `--workers N` starts N shards of it, one for each device."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import IO

import torch

from qwenedit.checks import device_of, progress_bar
from qwenedit.cli.process import ended_by_sigterm, say
from qwenedit.foreign import shown
from qwenedit.shards import shard_files

__all__ = ["device_words", "require_alone", "work"]


def require_alone(options: argparse.Namespace) -> None:
    """Raise a ValueError for `--workers` beside `--shard`: a shard is the work of one process."""
    if options.workers > 1 and options.shard is not None:
        raise ValueError("--workers and --shard are given, wanted one of them")


def work(options: argparse.Namespace, edits: int, folder: Path, stem: str) -> None:
    """Make `edits` edits by as many processes as `--workers` says, and wait for them.

    Each process is this command with `--shard`. What a process that ends early leaves is made by the run that
    follows, which ties the shards together; a warning says why it ended.

    Raises:
        ValueError: more workers than devices.
    """
    words = device_words(options.workers, options.device)
    words = words[:edits]
    if len(words) < 2:
        return
    threads = str(max(1, torch.get_num_threads() // len(words)))
    shared = {"OMP_NUM_THREADS": threads} if words[0][-1] == "cpu" else {}
    folder.mkdir(parents=True, exist_ok=True)
    given = options.words
    end = given.index("--") if "--" in given else len(given)
    with ended_by_sigterm(), ExitStack() as files:
        outputs, started = [], []
        try:
            for number, device in enumerate(words):
                own = ["--workers", "1", "--shard", f"{number}/{len(words)}", "--quiet", *device]
                output = files.enter_context(tempfile.TemporaryFile())
                outputs.append(output)
                started.append(
                    Popen(
                        [sys.executable, "-m", "qwenedit", *given[:end], *own, *given[end:]],
                        env={**os.environ, **shared}, stdin=DEVNULL, stdout=DEVNULL,
                        stderr=output,
                    )
                )  # fmt: skip
            _wait(started, edits, folder, stem, progress=not options.quiet)
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()
        for number, (process, output) in enumerate(zip(started, outputs, strict=True)):
            if process.returncode != 0:
                _say_why(number, process.returncode, output)


def device_words(workers: int, device: str | None) -> list[list[str]]:
    """The options that give each of the workers its device.

    Raises:
        ValueError: more workers than devices of an accelerator, or one device for several.
    """
    where = device_of(device)
    if where.type == "cpu":
        return [["--device", "cpu"]] * workers
    if workers > 1 and where.index is not None:
        raise ValueError(f"--workers is {workers} with --device {device}, wanted --device {where.type}")
    there = torch.accelerator.device_count()
    if workers > there:
        raise ValueError(f"--workers is {workers}, wanted at most {there}, one for each {where.type} device")
    return [["--device", f"{where.type}:{number}"] for number in range(workers)]


def _wait(started: list[Popen[bytes]], edits: int, folder: Path, stem: str, *, progress: bool) -> None:
    read: dict[Path, int] = {}

    def new_lines() -> int:
        count = 0
        for path in shard_files(folder, stem):
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                count += file.read().count(b"\n")
                read[path] = file.tell()
        return count

    new_lines()  # of earlier runs
    with progress_bar(progress=progress, total=edits, desc=f"{len(started)} workers", unit="edit") as bar:
        while any(process.poll() is None for process in started):
            time.sleep(0.2)
            bar.update(new_lines())


def _say_why(number: int, status: int, output: IO[bytes]) -> None:
    output.seek(0)
    last = (output.read().decode(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
    last = last.removeprefix("qwenedit: ")
    say(f"qwenedit: warning: worker {number} ended with status {status}: {shown(last)}", error=True)
