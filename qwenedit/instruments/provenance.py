"""Where a result comes from: the code, versions and device that made it, and what time it took."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from qwenedit.instruments.determinism import environment
from qwenedit.pipeline import QwenImageEdit

__all__ = ["made_by", "seconds"]


def made_by(pipe: QwenImageEdit) -> dict[str, Any]:
    """For a record: versions, dtype, threads, device, and the commit of this package's code.

    The commit ends with "-dirty" where files differ, and is None outside of a repository.
    """
    found = environment(pipe)
    device = f"{found['device']} ({found['device_name']})" if found["device_name"] else found["device"]
    names = ("qwenedit", "torch", "python", "dtype", "threads")
    return {**{name: found[name] for name in names}, "commit": _commit(), "device": device}


def _commit() -> str | None:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails in another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def seconds(device: torch.device) -> float:
    """A clock, once a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
