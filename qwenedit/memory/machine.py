"""The memory that this machine has free, and sizes in bytes as texts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

__all__ = ["device_free", "host_free", "parse_bytes"]

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
