"""Fetch the headers of weights from the hub, without data: a hundred-thousandth of the bytes.

The hub's cache is left alone. huggingface_hub is imported in the functions, as in hub.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwenedit.files import MAX_HEADER
from qwenedit.weights.hub import HubError, HubFile, Listing, explained, list_files, of_the_network

__all__ = ["fetch_headers"]

_CHUNK = 1 << 20  # bytes that are read at a time
_HOLE = 1 << 24  # bytes of the hole that tests the file system
_AT_ONCE = 8  # headers fetched at a time


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
        if isinstance(error, OSError) and not of_the_network(error):
            raise HubError(f"they cannot be written: {error}; set TMPDIR", unreached=True) from error
        raise explained(repo, revision, error) from error


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
