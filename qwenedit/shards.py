"""One job of many edits in several processes: whose part is whose, the files of their records, and locks.

Nothing is sent between processes. Each makes its own shard of the edits into the same folder and writes its
own records; a last run without a shard makes what is missing and ties all together.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwenedit.foreign import shown

__all__ = ["Shard", "only_one", "record_file", "shard_files", "shard_of"]

T = TypeVar("T")
_LOCK = ".lock"  # the names of shards' lock files are those of leftovers, which a run without a shard removes
_HELD = (errno.EAGAIN, errno.EACCES)  # of a lock that another process has


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`; the first is 0."""

    index: int
    count: int

    def part_of(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th item: those of all shards are all items, each once.

        >>> Shard(1, 3).part_of("abcdefgh")
        ['b', 'e', 'h']
        """
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def shard_of(text: str) -> Shard:
    """The shard that "i/n" names, i from 0 to n - 1, as job arrays and ranks are counted.

    Raises:
        ValueError: another text, or a number outside of the range.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text) if isinstance(text, str) else None
    if found is None or (count := int(found[2])) < 1:
        raise ValueError(f"the shard is {shown(repr(text))}, wanted i/n, like 0/4")
    if int(found[1]) >= count:
        raise ValueError(f"the shard is {text}, wanted 0/{count} to {count - 1}/{count}: the first is 0")
    return Shard(int(found[1]), count)


def record_file(folder: Path, stem: str, shard: Shard | None = None) -> Path:
    """Where a process writes its records: STEM.jsonl, or STEM-0-of-4.jsonl of a shard."""
    return folder / f"{stem}{_suffix(shard)}.jsonl"


def shard_files(folder: Path, stem: str) -> list[Path]:
    """The records that shards have written into a folder."""
    named = re.compile(rf"{re.escape(stem)}-[0-9]+-of-[0-9]+\.jsonl")
    return sorted(path for path in folder.glob(f"{stem}-*.jsonl") if named.fullmatch(path.name))


def _suffix(shard: Shard | None) -> str:
    return "" if shard is None else f"-{shard.index}-of-{shard.count}"


@contextmanager
def only_one(folder: Path, what: str, shard: Shard | None = None) -> Iterator[bool]:
    """Lock a folder that a `what` writes into, or one shard of it; yields True if it is this process's alone.

    Shards run side by side; a run without a shard runs alone. A lock ends with its process. Without `fcntl`,
    and where the file system has no locks, nothing is locked: two processes then make the same files twice.

    Raises:
        ValueError: another process has the lock.
    """
    where = shown(folder)
    other = f"another {what} runs in {where}: wait for it, or take another folder"
    with _locked(folder / _LOCK, other, shared=shard is not None) as locked:
        if shard is None:
            yield locked
            return
        other = f"another process makes shard {shard} in {where}: wait for it, or make another shard"
        with _locked(folder / f".qwenedit{_suffix(shard)}{_LOCK}", other, shared=False):
            yield False


@contextmanager
def _locked(path: Path, message: str, *, shared: bool) -> Iterator[bool]:
    """Hold a lock file; yields False where there are no locks. Who holds it alone removes it at the end."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # network file systems lock what is open to write
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in _HELD:
                os.close(file)
                raise ValueError(message) from None
            locked = False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)  # its last holder has removed it since it was opened
    try:
        yield locked
    finally:
        if not shared:
            path.unlink(missing_ok=True)
        os.close(file)
