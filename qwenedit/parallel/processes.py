"""The processes that share a run: who this one is, its groups, agreement before a run, and failures.

Processes are started by torchrun, or by whatever sets its variables: RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT. What they tell each other outside of tensors goes through torch's store, which waits
in short turns, so that it can say who is missing, and why.
"""

from __future__ import annotations

import atexit
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwenedit.checks import device_of
from qwenedit.foreign import shown
from qwenedit.memory.residency import Modes
from qwenedit.parallel.spec import AXES, ParallelSpec, checked_spec

__all__ = [
    "PATIENCE", "ProcessLost", "Processes", "ProcessesDiffer", "begin", "join", "leave", "meet", "own_device",
    "shared_store",
]  # fmt: skip

PATIENCE = 600.0  # seconds that a process waits for another, which may be loading weights
TURN = 0.02  # seconds between two looks into the store


class ProcessesDiffer(ValueError):
    """The processes were not given the same run. Each of them raises this, with the same message."""

    is_everyones = True  # one process need say it


class ProcessLost(ConnectionError):
    """Another process failed, ended or did not come."""

    is_everyones = True


def meet(
    parallel: str | None, device: torch.device, *, compile: bool, split_weights: bool, modes: Modes
) -> Processes | None:
    """Meet the other processes of a spec, like "cfg=2"; None without one. `device` is this process's own.

    A process group that the caller has started is used as it is.

    Raises:
        ValueError: as `checked_spec`; or a device that is neither the CPU nor CUDA's.
        ProcessLost: another process did not come.
    """
    spec = checked_spec(parallel, compile=compile, split_weights=split_weights, modes=modes)
    if spec is None:
        return None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"parallel '{spec}' on the device {device}, wanted cpu or cuda")
    return join(spec, device)


def own_device(device: torch.device | str | None) -> torch.device:
    """`device_of`, but of several GPUs of a machine the one with this process's number.

    No other GPU is touched: a process would keep some hundred megabytes on each that it has used.

    Raises:
        ValueError: as `device_of`; or this process's number is none of its GPUs'.
    """
    count = torch.cuda.device_count()
    if count and (device is None or str(device) == "cuda"):
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= count:
            raise ValueError(
                f"LOCAL_RANK is {number}, and this process sees {count} GPU{'s' * (count > 1)}: wanted no "
                'more processes on this machine, or device="cuda:0" if each of them sees a GPU of its own'
            )
        device = f"cuda:{number}"
    return device_of(device)


def join(spec: ParallelSpec, device: torch.device) -> Processes:
    """The processes that were started, in groups along the axes of the spec, whose number theirs is.

    Raises:
        ProcessLost: another process did not come.
    """
    begin(device, spec.processes)
    return Processes(spec, device)


def begin(device: torch.device, count: int) -> None:
    """Start torch's process group of all processes, unless the caller has. A GPU becomes torch's current one.

    Raises:
        ProcessLost: another process did not come.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # fully_shard takes the current one
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError) as error:
        raise ProcessLost(
            f"process {os.environ.get('RANK', '?')} of {count} did not meet the others at "
            f"{shown(os.environ.get('MASTER_ADDR', 'MASTER_ADDR, which is not set'))}: "
            f"{shown(str(error), 300)}"
        ) from error
    atexit.register(leave)


def leave() -> None:
    """End this process's part in the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The processes of a run, as this one sees them.

    Attributes:
        spec: how many there are along each axis.
        rank, count: this process's number, from 0, and how many there are.
        mesh: the processes as torch's `DeviceMesh`, with the axes' names.
    """

    # of all pipelines of this process
    agreed = 0  # how many agreements it has come to
    threads: ClassVar[list[int]] = []  # whose runs have begun and not ended

    def __init__(self, spec: ParallelSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        numbers = torch.arange(self.count).reshape(spec.sizes)
        self.mesh = DeviceMesh.from_group(
            [_own_group(numbers, axis) for axis in range(len(AXES))], device.type, numbers,
            mesh_dim_names=AXES,
        )  # fmt: skip

    def __getstate__(self) -> None:
        raise ValueError("a pipeline that processes share cannot be pickled: load it in each of them")

    def __deepcopy__(self, _memo: dict[int, Any]) -> Processes:
        return self

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one along an axis alone, itself included."""
        return self.mesh.get_group(axis)

    def place(self, axis: str) -> int:
        """This process's number along an axis."""
        return self.mesh.get_local_rank(axis)

    def agree(self, about: Mapping[str, Any], *, draws: bool) -> None:
        """Wait for all processes before a run, and require that they are about to do the same.

        Args:
            about: what must be equal, as JSON, by the name that a message gives it.
            draws: the run draws from torch's own generators: all processes then go on from process 0's state.

        Raises:
            ProcessesDiffer: it is not equal; the message names the process and the first such name.
            ProcessLost: a process failed before, or did not come.
        """
        self._require_group()
        Processes.agreed += 1
        mine = {name: json.dumps(value, sort_keys=True) for name, value in about.items()}
        self._tell(
            "run", json.dumps({"about": mine, "state": self._state() if draws and not self.rank else None})
        )
        told = [json.loads(self._hear("run", other)) for other in range(self.count)]
        first = told[0]["about"]
        for name, (other, one) in itertools.product(first, enumerate(told)):
            if one["about"].get(name) != first[name]:
                theirs, ours = _apart(one["about"].get(name, "nothing"), first[name])
                raise ProcessesDiffer(
                    f"the processes differ in {name}: process {other} has {shown(theirs, 300)}, process 0 "
                    f"{shown(ours, 300)}; all of them need the same call"
                )
        if draws:
            self._set_state(told[0]["state"])

    def _require_group(self) -> None:
        if not dist.is_initialized():
            raise ProcessLost(f"process {self.rank} left the others when a run failed: start again")

    def _state(self) -> list[list[int]]:
        """The states of torch's own generators, of the CPU and of this process's GPU."""
        states = [torch.get_rng_state()]
        states += [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [state.tolist() for state in states]

    def _set_state(self, states: list[list[int]]) -> None:
        first, *others = (torch.tensor(state, dtype=torch.uint8) for state in states)
        torch.set_rng_state(first)
        for state in others:
            torch.cuda.set_rng_state(state, self.device)

    def first(self, x: Tensor, what: str) -> Tensor:
        """Process 0's values of a tensor that has one shape in all processes.

        Raises:
            ProcessLost: another process failed, or did not come.
        """
        x = x.detach().clone(memory_format=torch.contiguous_format)
        with self.waiting(None, what):
            dist.broadcast(x.view(torch.uint8), 0)
        return x

    @contextmanager
    def in_one_run(self, *, agreed: bool = False) -> Iterator[None]:
        """Around a run: if it fails here alone, the others end with an error, and do not wait.

        Args:
            agreed: the processes have agreed already.

        Raises:
            ValueError: a run of another thread has not ended. The exchanges of both would get mixed up.
        """
        if any(thread != threading.get_ident() for thread in Processes.threads):
            raise ValueError("another thread's run has not ended: processes share one run at a time")
        Processes.threads.append(threading.get_ident())
        before = self.agreed - agreed
        try:
            yield
        except (GeneratorExit, ProcessLost, ProcessesDiffer):
            raise
        except BaseException as error:
            # The store may be gone with the process that held it, or since this process left the others.
            with suppress(RuntimeError, ValueError):
                if self.agreed == before:
                    Processes.agreed += 1
                    self._tell("failed", _in_a_line(error))
                else:
                    self._fail_in_a_run(error)
            raise
        finally:
            Processes.threads.pop()

    def _fail_in_a_run(self, error: BaseException) -> None:
        """Leave the others, unless all of them fail in this run, as with NaN: then nothing is on its way."""
        self._tell("stopped", _in_a_line(error))
        keys, until = [self._key("stopped", other) for other in range(self.count)], time.monotonic() + 2
        while not shared_store().check(keys):
            if time.monotonic() > until:
                self._leave(error)
                return
            time.sleep(TURN)

    def _leave(self, error: BaseException) -> None:
        """Say why the groups cannot be used any more, and close the connections, which the others notice.

        On GPUs an exchange does not notice: there torchrun ends all processes when one has ended.
        """
        with suppress(RuntimeError):  # the store may be gone with the process that held it
            shared_store().set(f"qwenedit/lost/{self.rank}", _in_a_line(error))
        if self.device.type == "cpu":
            leave()

    @contextmanager
    def waiting(self, axis: str | None, what: str) -> Iterator[None]:
        """Around an exchange along an axis, or of all; an error of it says who waited for whom.

        Raises:
            ProcessLost: the exchange failed, or this process has left the others.
        """
        self._require_group()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            together = dist.get_process_group_ranks(None if axis is None else self.group(axis))
            others = ", ".join(str(process) for process in together if process != self.rank)
            lost = ProcessLost(
                f"process {self.rank} waited for process {others} to exchange {what}: "
                f"{self._why() or shown(str(error), 300)}"
            )
            self._leave(lost)
            raise lost from error

    def _why(self) -> str:
        """What the process said that failed first, which it may say after its connections break."""
        until = time.monotonic() + 1
        while True:
            failed = {process: self._failure(process) for process in range(self.count)}
            said = [f"process {process} failed with {text}" for process, text in failed.items() if text]
            first = [text for text in said if ProcessLost.__name__ not in text]
            if first or time.monotonic() > until:
                return next(iter([*first, *said]), "")
            time.sleep(TURN)

    def _key(self, kind: str, process: int) -> str:
        return f"qwenedit/{kind}/{self.agreed}/{process}"

    def _tell(self, kind: str, text: str) -> None:
        shared_store().set(self._key(kind, self.rank), text)

    def _hear(self, kind: str, process: int) -> str:
        store, key, until = shared_store(), self._key(kind, process), time.monotonic() + PATIENCE
        while not store.check([key]):
            if (failed := self._failure(process)) is not None:
                raise ProcessLost(f"process {process} failed before the run: {failed}")
            if time.monotonic() > until:
                raise ProcessLost(
                    f"process {self.rank} waited {PATIENCE:g} s for process {process} to begin the same run: "
                    "it has ended, or does something else"
                )
            time.sleep(TURN)
        return store.get(key).decode()

    def _failure(self, process: int) -> str | None:
        """What a process said when it failed: before this run, or in any run, which is for good."""
        with suppress(RuntimeError):
            store = shared_store()
            for key in (self._key("failed", process), f"qwenedit/lost/{process}"):
                if store.check([key]):
                    return store.get(key).decode()
        return None


def shared_store() -> dist.Store:
    """The store of torch's process group, whoever has started the group. torch has no public name for it."""
    from torch.distributed.distributed_c10d import _get_default_store  # not in every torch

    return _get_default_store()


def _own_group(numbers: torch.Tensor, axis: int) -> dist.ProcessGroup:
    """This process's group along an axis. Every process makes every group, in the same order."""
    own = None
    rows = numbers.movedim(axis, -1).reshape(-1, numbers.shape[axis])
    for row in rows.tolist():
        group = dist.new_group(row, timeout=timedelta(seconds=PATIENCE), group_desc=f"qwenedit {AXES[axis]}")
        if dist.get_rank() in row:
            own = group
    assert own is not None and math.prod(rows.shape) == numbers.numel()
    return own


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two values as JSON; of two lists what only one of them has."""
    a, b = (json.loads(text) if text.startswith("[") else None for text in (one, other))
    if a is None or b is None or sorted(map(str, a)) == sorted(map(str, b)):
        return one, other
    return json.dumps([x for x in a if x not in b]), json.dumps([x for x in b if x not in a])


def _in_a_line(error: BaseException) -> str:
    return shown(" ".join(f"{type(error).__name__}: {error}".split()), 500)
