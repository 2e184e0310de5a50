"""What a GPU can check and measure, within twelve minutes: `make gpu`.

Runs tests/gpu, then `python -m benchmarks --device cuda`, whose tables it leaves in build/gpu/speed.md, ready
for docs/. Without a CUDA device it says so in one line.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

OUT = Path("build") / "gpu"
MINUTES = 12
TESTS = 4  # of these minutes, at most
LONGEST = 2.5  # minutes of a case, at most: none starts later than so much before the end
CASES = ("encode", "decode", "text", "block", "last-block", "edit", "full", "full-compiled")


def main() -> int:
    if not torch.cuda.is_available():
        print(f"no CUDA device here; on one, `make gpu` would run tests/gpu and the benchmarks into {OUT}")
        return 0
    start = time.monotonic()
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    passed = ran(tests, TESTS)
    left = MINUTES - (time.monotonic() - start) / 60
    only = [word for name in CASES for word in ("--only", name)]
    measure = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--rounds", "3", "--out", str(OUT)]
    measured = ran([*measure, *only, "--minutes", f"{left - LONGEST:.2f}"], left)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; tables in {OUT / 'speed.md'}")
    return 0 if passed and measured else 1


def ran(command: list[str], minutes: float) -> bool:
    """True if the command succeeded in time."""
    try:
        return subprocess.run(command, timeout=60 * minutes).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {minutes:.1f} minutes: {' '.join(command)}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(main())
