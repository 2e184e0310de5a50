"""The process of a command: its standard streams, and Ctrl-C.

The package imports this file before torch, whose import takes seconds: nothing heavy is imported here.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from qwenedit.foreign import shown

__all__ = [
    "INTERRUPTED", "Interrupts", "ended_by_interrupts", "ended_by_sigterm", "ignore_interrupts",
    "open_streams", "say",
]  # fmt: skip

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended, as shells have it


def open_streams() -> None:
    """Open the null device in place of closed standard streams (`2>&-`).

    Otherwise the next file that is opened gets the stream's number, and what is meant for the stream is
    written into it; and Python's `print` takes a `sys.stderr` of None for the standard output.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def say(*texts: object, error: bool = False) -> None:
    """Print texts to the standard output, or to the standard error, at once; but for new lines as `shown`.

    A reader that has gone (`| head`) is no failure. Nothing can be said about a standard error that fails.

    Raises:
        ValueError: the standard output cannot be written, as on a full disk.
    """
    stream = sys.stderr if error else sys.stdout
    lines = [line for text in texts for line in str(text).split("\n")]
    try:
        print(*(shown(line, len(line)) for line in lines), sep="\n", file=stream, flush=True)
    except OSError as problem:
        with suppress(OSError, ValueError):  # what is still buffered goes nowhere, also at the exit
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        if not error and not isinstance(problem, BrokenPipeError):
            raise ValueError(f"the standard output cannot be written: {problem.strerror}") from problem


def _is_command() -> bool:
    """Whether this process is `qwenedit`, or `python -m qwenedit`, whose name is "-m" while it imports."""
    name = sys.argv[0] if sys.argv else ""
    return name == "-m" or Path(name).stem == "qwenedit"


@contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Ctrl-C during this block, which imports and writes nothing, ends a command at once and in one line."""

    def end(_number: int, _frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, b"qwenedit: interrupted; nothing was written\n")
        os._exit(INTERRUPTED)

    if not (_is_command() and _in_main_thread()) or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM during this block ends the process as an exception does, so that what it started ends, too."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)  # as shells have it

    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_interrupts() -> None:
    """Ctrl-C while the interpreter ends would turn a command that is done into a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupts:
    """Ctrl-C during this block is a KeyboardInterrupt, which is raised again until the block ends.

    Once is not enough: Python drops an exception that is raised in a finaliser or a closing generator, torch
    replaces some by its own, and a sweep goes on after an edit that fails. `came` says whether there was an
    interrupt.
    """

    def __init__(self) -> None:
        self.came = False
        self._again: list[threading.Timer] = []

    def __enter__(self) -> Interrupts:
        self._hook = sys.unraisablehook
        self._ours = _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            sys.unraisablehook = self._dropped
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._hook
        for timer in self._again:
            timer.cancel()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        self._repeat(1.0)  # seconds; cleaning up takes less
        raise KeyboardInterrupt

    def _dropped(self, error: sys.UnraisableHookArgs) -> None:
        """Called by Python in place of an exception that cannot be raised."""
        if issubclass(error.exc_type, KeyboardInterrupt):
            self._repeat(0.01)  # not here, where it would be dropped again
        else:
            self._hook(error)

    def _repeat(self, seconds: float) -> None:
        timer = threading.Timer(seconds, _interrupt_main_thread)
        timer.daemon = True
        self._again.append(timer)
        timer.start()


def _interrupt_main_thread() -> None:
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:  # a signal also ends a call that waits, as for the network
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
