"""The memory that this machine has free, and sizes in bytes as texts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from qwenedit.checks import device_of

__all__ = ["device_free", "gib", "host_free", "parse_bytes", "peak_lines", "planned"]

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from a number or a text such as "24GiB", "24GB" or "24g", all of which are 24 * 2**30.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(value), re.IGNORECASE)
    size = 0 if match is None or isinstance(value, bool) else float(match[1]) * 2 ** _UNITS[match[2].lower()]
    if size < 1:
        raise ValueError(f"{name} is {value!r}, wanted a size such as 24GiB")
    return round(size)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def peak_lines(stages: Sequence[str], rows: Iterable[tuple[str, Mapping[str, int], str]]) -> Iterator[str]:
    """The lines of a table of peaks by stage; a row is a name, bytes by stage, and a remark."""
    yield f"  {'peak in GiB':<32}" + "".join(f"{stage:>15}" for stage in stages)
    for name, peaks, mark in rows:
        yield f"  {name:<32}" + "".join(f"{peaks[stage] / 2**30:15.2f}" for stage in stages) + f"   {mark}"


def planned(
    device: torch.device | str | None, device_memory: int | str | None, host_memory: int | str | None
) -> tuple[torch.device, int]:
    """The device of something planned, and its bytes: those that were given, or what is free.

    With `device_memory` it is an accelerator, which need not exist; "cuda" stands for any.

    Raises:
        ValueError: sizes that are none, or no such device.
    """
    given = None if device_memory is None else parse_bytes("device_memory", device_memory)
    host = host_free() if host_memory is None else parse_bytes("host_memory", host_memory)
    place = torch.device("cuda") if device is None and given is not None else device_of(device)
    if place.type == "cpu":
        return place, host
    return place, device_free(place) if given is None else given


def device_free(device: torch.device) -> int:
    """Free bytes of an accelerator; the host's for devices that do not say, which may share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_free()


def host_free() -> int:
    """Bytes of memory that this process can still take, within the limit of its container."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    if not found:
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, ValueError, OSError):
            found.append(8 << 30)  # Windows does not say: assume a modest machine
    for limit, used in _CGROUPS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(0, min(found))
