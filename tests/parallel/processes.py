"""Start processes that run the named cases of a file, and collect what the cases say.

Starting costs seconds, so that one start serves all cases of a test file. A file of cases is a module of
this folder with functions `case_...`, which every process calls in the same order. What a case returns, as
JSON, or the error that it raised, is in `Outcome`s.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START, PATIENCE = 180.0, 60.0  # seconds that a process waits for another: to start, then in each exchange
LIMIT = 400.0  # seconds for all cases of a file
# What sums in another order make of a guided float32 run of two or three steps: a share of its largest value.
RUN = 1e-5


@dataclass
class Outcome:
    """What a case did in one process."""

    value: Any = None
    error: str | None = None
    trace: str = ""


def environment(count: int) -> list[dict[str, str]]:
    """The variables that torchrun would set for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return [{**common, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(count)]


def run_cases(file: str, count: int, folders: Mapping[str, Path] | None = None) -> dict[str, list[Outcome]]:
    """The outcomes of all cases of tests/parallel/FILE.py, by name, for each of `count` processes.

    `folders` are checkpoints, which the cases find by their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.parallel.processes", file, folder]
        known = {
            "QWENEDIT_TEST_FOLDERS": json.dumps({name: str(one) for name, one in (folders or {}).items()})
        }
        started = [subprocess.Popen(command, env=one | known, cwd=ROOT) for one in environment(count)]
        try:
            for process in started:
                process.wait(LIMIT)
        finally:
            for process in started:
                process.kill()
        assert not any(process.returncode for process in started), "a process of the tests has ended early"
        told = [json.loads((Path(folder) / f"{k}.json").read_text()) for k in range(count)]
    return {name: [Outcome(**one[name]) for one in told] for name in told[0]}


def value(outcomes: dict[str, list[Outcome]], name: str) -> Any:
    """What a case returned, which must be the same in all processes."""
    own = outcomes[name]
    for number, outcome in enumerate(own):
        assert outcome.error is None, f"process {number}: {outcome.error}\n{outcome.trace}"
        assert outcome.value == own[0].value, f"process {number} returned something else"
    return own[0].value


def off_by_parts(outcomes: dict[str, list[Outcome]], bound: float = RUN) -> float:
    """How far a run by parts of the tokens may be off: 0, or `bound` where parts of a product round apart."""
    return 0 if value(outcomes, "rows_round_alike") else bound


def rows_round_alike() -> bool:
    """Whether rows of a matrix product have the same bits however many they are, from two on.

    On some processors they have not. A process that holds a part of the tokens then has other last digits.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    for width in (16, 32, 48, 64, 128):
        weight = torch.randn(width, width, generator=generator)
        for half in range(2, 17):
            rows = torch.randn(2 * half, width, generator=generator)
            if not torch.equal((rows @ weight.T)[:half], rows[:half] @ weight.T):
                return False
    return True


def main(file: str, folder: str) -> None:
    import torch

    from qwenedit.parallel import processes
    from qwenedit.parallel.spec import ParallelSpec

    torch.set_num_threads(1)
    processes.PATIENCE = START
    processes.join(ParallelSpec(ulysses=int(os.environ["WORLD_SIZE"])), torch.device("cpu"))
    processes.PATIENCE = PATIENCE
    cases = importlib.import_module(f"tests.parallel.{file}")
    told = {"rows_round_alike": vars(Outcome(rows_round_alike()))}
    for name, case in list(vars(cases).items()):
        if not name.startswith("case_"):
            continue
        outcome = Outcome()
        try:
            outcome.value = case()
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"
            outcome.trace = traceback.format_exc()
        told[name.removeprefix("case_")] = vars(outcome)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
