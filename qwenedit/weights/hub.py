"""Download files from the hub into its cache: only missing files, each checked after its download.

huggingface_hub does the transfer; it resumes interrupted files, also in the next run. Added here are a check
of the disk space before the first byte, a check of size and hash (a wrong file is fetched once more), and
errors that say in one line why it failed and what helps. Names and hashes from a hub or mirror are checked
before a path is made of them. A file that the user has linked into the cache is neither removed nor replaced.

`fetch_headers` fetches headers without data, a hundred-thousandth of the bytes, and leaves the cache alone.

huggingface_hub is imported in the functions: local checkpoints do not need it, and it takes half a second.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qwenedit.checks import progress_bar, warn, whole_number
from qwenedit.files import MAX_HEADER
from qwenedit.foreign import MAX_TEXT, inner_name, read_text, shown

__all__ = ["HubError", "HubFile", "Listing", "cached_snapshot", "download", "fetch_headers", "list_files"]

_CHUNK = 1 << 20  # bytes hashed at a time
_HOLE = 1 << 24  # bytes of the hole that tests the file system
_AT_ONCE = 8  # headers fetched at a time
_MAX_BYTES = 1 << 50  # of a file


class HubError(ValueError):
    """The hub does not list or give a repository's files. Cached files may still be usable.

    `unreached` is True unless the fault is known to be the repository's or the user's.
    """

    def __init__(self, message: str, *, unreached: bool = False) -> None:
        super().__init__(message)
        self.unreached = unreached


@dataclass(frozen=True)
class HubFile:
    """A file on the hub, and its place in the cache.

    Attributes:
        size: in bytes; None if the hub does not say.
        sha256: the hash of large files (LFS).
        git_sha1: the hash of other files, over git's header and the content.
        pointer, blob: the file by its name and, on file systems with links, by its hash.
    """

    name: str
    size: int | None
    sha256: str | None
    git_sha1: str | None
    pointer: Path
    blob: Path | None

    def is_users(self) -> bool:
        """True if a link of the user's leads out of the repository's folder in the cache."""
        root = next(path.parent for path in self.pointer.parents if path.name == "snapshots")
        inside = (root.resolve(), (root / "blobs").resolve())
        return not any(os.path.realpath(self.pointer).startswith(f"{folder}{os.sep}") for folder in inside)

    def cached(self) -> bool:
        """True if the cache has the file in its full size, or the user's own file in its place."""
        if self.is_users():
            return self.pointer.exists()
        found = self.pointer if self.pointer.exists() or self.blob is None else self.blob
        return found.exists() and self.size in (None, found.stat().st_size)

    def to_come(self) -> int:
        """Bytes that are still to be downloaded of a file that is not cached."""
        started = self.blob and self.blob.with_name(f"{self.blob.name}.incomplete")
        arrived = started.stat().st_size if started and started.exists() else 0
        return max(0, (self.size or 0) - arrived)

    def remove(self) -> None:
        if self.is_users():
            raise ValueError(
                f"{shown(self.pointer)} leads to {shown(os.path.realpath(self.pointer))}, outside of the "
                "hub's cache, where nothing is removed or written: remove the link, or put the file there"
            )
        for path in (self.pointer.resolve(), self.pointer, self.blob):
            if path is not None:
                path.unlink(missing_ok=True)

    def fault(self) -> str | None:
        """Read the cached file and say what is wrong with it; None if nothing is."""
        size = self.pointer.stat().st_size
        if self.size is not None and size != self.size:
            return f"{self.name} has {size:,} bytes, wanted {self.size:,}"
        wanted = self.sha256 or self.git_sha1
        if wanted is None:
            return None
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with self.pointer.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        got = digest.hexdigest()
        return None if got == wanted else f"{self.name} has the hash {got[:12]}..., wanted {wanted[:12]}..."


@dataclass(frozen=True)
class Listing:
    """The wanted files of a repository, and their folder in the cache."""

    repo: str
    revision: str | None
    files: list[HubFile]
    folder: Path

    @property
    def at(self) -> str:
        return _at(self.repo, self.revision)


def _at(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo} at revision {revision}"


def list_files(repo: str, revision: str | None, patterns: Sequence[str]) -> Listing:
    """Ask the hub which files match the patterns, whose * stands for a name, not for folders.

    Raises:
        HubError: the reason why it does not say.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        raise _explained(repo, revision, error) from error
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        folder = root / "snapshots" / _single(info.sha, "the commit")
        named = [(one, str(one.rfilename)) for one in info.siblings or []]
        wanted = [one for one, name in named if any(_matches(name, pattern) for pattern in patterns)]
        files = [_hub_file(one, root, folder) for one in wanted]
    except ValueError as error:
        raise HubError(
            f"{_at(repo, revision)}: the hub's list of its files cannot be used: {error}"
        ) from error
    return Listing(repo, revision, files, folder)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")


def _hub_file(listed: Any, root: Path, folder: Path) -> HubFile:
    """A file of the hub's list. Raises a ValueError for what cannot be a name, a hash or a size."""
    name = inner_name(listed.rfilename, "a file")
    sha256 = None if listed.lfs is None else _single(listed.lfs.sha256, f"the hash of {name}")
    etag = sha256
    if listed.lfs is None and listed.blob_id is not None:
        etag = _single(listed.blob_id, f"the hash of {name}")
    most = _MAX_BYTES if name.endswith(".safetensors") else MAX_TEXT
    size = (
        None if listed.size is None else whole_number(f"the size of {name}", listed.size, least=0, most=most)
    )
    blob = None if etag is None else root / "blobs" / etag
    return HubFile(name, size, sha256, None if sha256 else etag, folder / name, blob)


def _single(name: object, what: str) -> str:
    """The name, if it is that of a file inside of any folder, and not of one in a folder of that folder."""
    if "/" in inner_name(name, what):
        raise ValueError(f"{what} is {shown(name)!r}, wanted a name without slashes")
    return str(name)


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The cached snapshot of a repository, complete or not; the hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def download(
    repo: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    progress: bool,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Download the files that match the patterns and are not cached; returns their folder.

    Weights come last, once `check` has accepted the folder with all other files.

    Raises:
        HubError: the hub does not list its files.
        ValueError: no disk space, an interrupted download, or a file that is wrong after a second attempt; or
            as `check`.
    """
    with _hub_bars(progress):
        listing = list_files(repo, revision, patterns)
        _warn_of_users(listing)
        _require_room(listing, [file for file in listing.files if not file.cached()])
        weights = [file for file in listing.files if file.name.endswith(".safetensors")]
        _complete(listing, [file for file in listing.files if file not in weights], progress)
        if check is not None:
            check(listing.folder)
        _complete(listing, weights, progress)
    return listing.folder


def _complete(listing: Listing, files: Sequence[HubFile], progress: bool) -> None:
    """Download the files that are not cached, and check them. Raises as `download`."""
    missing = [file for file in files if not file.cached()]
    faults: dict[HubFile, str] = {}
    try:
        for file in missing:
            file.remove()  # a file of another size, or a dangling link
        unchecked = listing.folder.parent.parent / f"unchecked-{listing.folder.name}"
        names = {file.name for file in missing}
        if unchecked.exists():  # an earlier run was killed before it had checked them
            names |= set(read_text(unchecked).splitlines())
        fresh = [file for file in files if file.name in names and not file.is_users()]
        if fresh:
            _note(unchecked, names)
        _fetch(listing, files)
        if faults := _faults(fresh, progress):
            _fetch(listing, list(faults))
            faults = _faults(list(faults), progress)
        if fresh and not faults:
            _note(
                unchecked, names - {file.name for file in fresh}
            )  # the others are not needed, or come later
    except Exception as error:
        raise _broken_off(listing, error) from error
    if faults:
        raise ValueError(
            f"{listing.at} arrived damaged twice, and what is damaged was removed: "
            f"{'; '.join(faults.values())}; check the disk and the network, then run it again"
        )


def _warn_of_users(listing: Listing) -> None:
    """Warn of the user's own files in place of the hub's whose sizes differ."""
    for file in listing.files:
        if file.is_users() and file.cached() and file.size not in (None, size := file.pointer.stat().st_size):
            warn(
                f"{listing.at}: {file.name} is a link to your {os.path.realpath(file.pointer)}, of {size:,} "
                f"bytes; the hub's has {file.size:,}. Yours is used"
            )


def _note(path: Path, names: Collection[str]) -> None:
    """Write the names into a file, one a line; without names, remove the file."""
    if not names:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")


def _require_room(listing: Listing, missing: Sequence[HubFile]) -> None:
    wanted = sum({file.blob or file.pointer: file.to_come() for file in missing}.values())
    there = next(path for path in (listing.folder, *listing.folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise ValueError(
            f"{listing.at} needs {wanted / 1e9:,.1f} GB more on the disk of {there}, which has "
            f"{free / 1e9:,.1f} GB free: make room, or set HF_HOME to a folder on a larger disk"
        )


def _fetch(listing: Listing, files: Sequence[HubFile]) -> None:
    """Download the files that are not cached, resuming partial ones."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    for file in files:
        if not file.cached():  # huggingface_hub makes paths of what this answer holds
            found = get_hf_file_metadata(hf_hub_url(listing.repo, file.name, revision=listing.folder.name))
            for value, what in ((found.etag, "the ETag"), (found.commit_hash, "the commit")):
                if value is not None:
                    _single(value, f"{what} of {file.name}")
    names = [glob.escape(file.name) for file in files]
    snapshot_download(listing.repo, revision=listing.revision, allow_patterns=names)


def _faults(files: Sequence[HubFile], progress: bool) -> dict[HubFile, str]:
    """Check all of the files. Wrong ones are removed and returned, each with what is wrong."""
    faults = {}
    for file in progress_bar(files, progress=progress, desc="checking files"):
        if fault := file.fault():
            faults[file] = fault
            file.remove()
    return faults


def fetch_headers(repo: str, revision: str | None, patterns: Sequence[str], folder: Path) -> None:
    """Download the files that match the patterns into a folder; of *.safetensors files, only the headers.

    The data of such a file is a hole of the same length, so that everything but the weights can be read.
    Nothing is kept in the hub's cache.

    Raises:
        HubError: the reason why the hub does not give them, or a file system without sparse files.
    """
    listing = list_files(repo, revision, patterns)
    try:
        if not _has_holes(folder):
            raise HubError(f"the file system of {folder} has no sparse files: set TMPDIR", unreached=True)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(lambda file: _fetch_head(listing, file, folder / file.name), listing.files):
                pass  # errors are raised
    except HubError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not _of_the_network(error):
            raise HubError(f"they cannot be written: {error}; set TMPDIR", unreached=True) from error
        raise _explained(repo, revision, error) from error


def _has_holes(folder: Path) -> bool:
    """True if the file system keeps files sparse; Windows, for one, fills them up with zeros."""
    path = folder / "hole"
    try:
        with path.open("wb") as file:
            file.truncate(_HOLE)
        blocks = getattr(path.stat(), "st_blocks", None)  # of 512 bytes
    finally:
        path.unlink(missing_ok=True)
    return blocks is not None and blocks * 512 < _HOLE // 2


def _fetch_head(listing: Listing, file: HubFile, path: Path) -> None:
    """Download a small file, or a safetensors header with a hole. Their readers report broken content."""
    if file.size is None:
        raise HubError(f"{listing.at}: the hub does not say how long {file.name} is")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        path.write_bytes(_part(listing, file.name, 0, file.size))
        return
    head = _part(listing, file.name, 0, min(8, file.size))
    end = 8 + int.from_bytes(head, "little")
    if end <= min(file.size, MAX_HEADER):
        head += _part(listing, file.name, 8, end)
    with path.open("wb") as opened:
        opened.write(head)
        opened.truncate(file.size)


def _part(listing: Listing, name: str, start: int, end: int) -> bytes:
    """Download the bytes of a file from start to end. No more are read, even if the hub sends more."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if start == end:
        return b""
    url = hf_hub_url(listing.repo, name, revision=listing.folder.name)
    asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options = {"headers": {**build_hf_headers(), **asked}, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    session: Any = get_session()
    is_httpx = callable(session.stream)  # from 1.0 on; requests, before, has a flag of this name
    opened = session.stream("GET", url, **options) if is_httpx else session.get(url, stream=True, **options)
    arrived = b""
    with opened as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes() if is_httpx else response.iter_content(_CHUNK):
            arrived += chunk
            if len(arrived) > end - start:
                raise HubError(
                    f"{listing.at}: the hub or a proxy sends files as wholes only: {name} was asked "
                    f"for from byte {start} to {end} (`qwenedit info` says what a download takes)"
                )
    if len(arrived) < end - start:
        raise HubError(f"{name}: {len(arrived)} bytes came of {end - start}", unreached=True)
    return arrived


def _explained(repo: str, revision: str | None, error: Exception) -> HubError:
    """The reason why the hub does not list its files, and what helps. Faults in the code are raised."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    at, status = _at(repo, revision), _status(error)
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return HubError(f"{at} is gated: accept its terms at {page}, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"{at} is not on the hub, or is private and you are not logged in: check the id")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision} on the hub")
    if status in (401, 403):
        return HubError(
            f"{at} may not be read with your token ({status}): run `hf auth login` with one that may"
        )
    if status is not None:
        return HubError(f"the hub answers with an error ({status}): try again later", unreached=True)
    if _of_the_network(error):
        return HubError("the hub cannot be reached: check the id and the network", unreached=True)
    if not isinstance(error, (OSError, ValueError)):
        raise error  # a fault in the code
    return HubError(f"{at} cannot be downloaded: {error}")


def _broken_off(listing: Listing, error: Exception) -> ValueError:
    """The reason why a download failed after the hub had listed the files, and what helps."""
    if _status(error) is None and _of_the_network(error):
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return ValueError(
            f"the download of {listing.at} broke off: run it again, it goes on where it stopped ({line})"
        )
    if isinstance(error, OSError) and error.errno is not None and not _of_the_network(error):
        return ValueError(f"{listing.at} cannot be downloaded: {error}")  # an error of the disk
    return _explained(listing.repo, listing.revision, error)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or of its causes."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def _of_the_network(error: Exception) -> bool:
    """True for connection errors: huggingface_hub's, and of the libraries that its versions use.

    They are requests (until 0.36), httpx (from 1.0) and httpx2 (from 2.0); base classes tell.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    own = (ConnectionError, TimeoutError, socket.gaierror, HfHubHTTPError, LocalEntryNotFoundError)
    libraries = ("requests", "urllib3", "httpx", "httpcore")
    cut = isinstance(error, OSError) and "Consistency check failed" in str(error)  # too few bytes came
    return (
        isinstance(error, own)
        or cut
        or any(
            base.__module__.startswith(libraries) or base.__name__ in ("HTTPError", "RequestException")
            for base in type(error).__mro__
        )
    )


@contextmanager
def _hub_bars(shown: bool) -> Iterator[None]:
    """Show or hide the hub's progress bars during a block. Bars that the user has disabled stay hidden."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
