"""What comes from outside: files, JSON, TOML, names and texts, each accepted only as what it is meant to be.

Checkpoints, LoRAs, specs and results come from anywhere. Every reader in the package opens them through these
functions, so that a pipe, a device, a broken text or a name with escape sequences is one clear error at the
entrance. Limits are far above anything in use.
"""

from __future__ import annotations

import importlib
import json
import os
import stat
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

__all__ = [
    "MAX_TEXT", "inner_name", "parse_json", "plain_file", "printable_name", "read_json", "read_text",
    "read_toml", "shown",
]  # fmt: skip

MAX_TEXT = 100_000_000  # bytes of a JSON, TOML or text file that is read whole
_MAX_NAME = 255  # bytes of a part of a path, on all common file systems
TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"  # the parser


def shown(text: object, most: int = 300) -> str:
    r"""A foreign text for a message or a table: control and invisible characters escaped, cut to `most`.

    >>> shown("red\x1b[31m")
    'red\\x1b[31m'
    >>> shown("一只猫.png")
    '一只猫.png'
    """
    text = str(text)
    cut = text if len(text) <= most else f"{text[:most]}..."
    return "".join(
        c if c.isprintable() or c == "\u3000" else c.encode("unicode_escape").decode() for c in cut
    )


def printable_name(name: object, what: str) -> str:
    """The name, if it is a text of printable characters; `what` says what it names.

    Raises:
        ValueError: another type, an empty text, or control or invisible characters.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{what} is {shown(repr(name))}, wanted a name of printable characters")
    return name


def inner_name(name: object, what: str) -> str:
    """The name, if it stays inside of any folder that it is joined to, on every system.

    Raises:
        ValueError: an absolute path, one with "..", a drive or a backslash, a part of over 255 bytes, or as
            `printable_name`.
    """
    name = printable_name(name, what)
    parts = name.split("/")
    outside = "\\" in name or PureWindowsPath(name).drive or any(part in ("", ".", "..") for part in parts)
    if outside or any(len(part.encode()) > _MAX_NAME for part in parts):
        raise ValueError(f"{what} is {shown(name)!r}, wanted the name of a file inside its folder")
    return name


def plain_file(path: str | os.PathLike[str], what: str = "file") -> Path:
    """The path, if it leads to a plain file; `what` says what the file holds.

    Raises:
        ValueError: nothing there, a folder, a pipe or a device, or a path that the system refuses.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no such {what}: {shown(path)}") from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a null byte, no permission
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{what} {shown(path)} cannot be read: {reason}") from None
    if not stat.S_ISREG(mode):
        got = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise ValueError(f"{what} {shown(path)} is {got}, wanted a file")
    return Path(path)


def read_text(path: str | os.PathLike[str], what: str = "file") -> str:
    """The text of a plain file in UTF-8.

    Raises:
        ValueError: as `plain_file`; over 100 MB; another encoding.
    """
    path = plain_file(path, what)
    if (size := path.stat().st_size) > MAX_TEXT:
        raise ValueError(f"{what} {shown(path)} has {size:,} bytes, wanted at most {MAX_TEXT:,}")
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before the text
    except OSError as error:
        raise ValueError(f"{what} {shown(path)} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {shown(path)} is not text in UTF-8: {error}") from error


def parse_json(text: str | bytes, what: str, *, unique: bool = False) -> Any:
    """The value of a JSON text; `what` begins the message of an error. `unique` refuses keys that come twice.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"{what} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} cannot be read as JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file; `optional` makes an absent file an empty object.

    Raises:
        ValueError: as `read_text` and `parse_json`; or the file holds something else.
    """
    if optional and not os.path.lexists(path):
        return {}
    value = parse_json(read_text(path), shown(path))
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} holds a {type(value).__name__}, wanted a JSON object")
    return value


def read_toml(path: Path, what: str = "file") -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: as `read_text`; not TOML, or nested too deeply; Python 3.10 without tomli.
    """
    try:
        toml = importlib.import_module(TOML)
    except ImportError:
        raise ValueError(
            "reading TOML needs Python 3.11, or tomli (pip install 'qwenedit[report]')"
        ) from None
    text = read_text(path, what)
    try:
        content: dict[str, Any] = toml.loads(text)
    except RecursionError:
        raise ValueError(f"{shown(path)} is not a TOML file: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{shown(path)} is not a TOML file: {error}") from error
    return content
