"""Training by several processes, as torchrun starts them: each has a part of the weights, and its rows.

    torchrun --nproc-per-node 2 -m qwenedit train SPEC.toml

The transformer is split by torch's `fully_shard`; masters, averages and moments are split with it. A LoRA is
whole in every process. The micro-batches of a step are dealt out, so that the steps, and what they learn, are
those of one process, up to the order of sums. The state is saved by `torch.distributed.checkpoint`: each
process writes its own part, and another number of processes may go on.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qwenedit.assembly import assemble
from qwenedit.checks import dtype_of
from qwenedit.foreign import read_json, shown
from qwenedit.memory.residency import Modes
from qwenedit.parallel.processes import ProcessLost, begin, own_device, shared_store
from qwenedit.parallel.spec import processes_started
from qwenedit.parallel.split import require_plain, split_weights
from qwenedit.pipeline import QwenImageEdit
from qwenedit.training.loop import Run
from qwenedit.training.loss import TrainingBatch
from qwenedit.weights.report import Compared
from qwenedit.weights.slices import is_split_weight

__all__ = ["SplitRun", "Together"]

STATE = "state-"  # how names of saved states begin; the number of steps follows
_META = "run.json"  # beside the tensors: what is the same in all processes


class Together:
    """The processes that train, as this one sees them.

    Attributes:
        rank, count: this process's number, from 0, and how many there are.
        first: whether this is the one that encodes, and writes what is not split.

    Raises:
        ProcessLost: another process did not come.
    """

    turns = 0  # of the first process alone, in all of this process's trainings

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = own_device(device)
        begin(self.device, processes_started())
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0
        self.mesh = init_device_mesh(self.device.type, (self.count,))
        # torch warns that the velocity is a view, which nothing here writes to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")

    def load(self, model: str | None, dtype: str | None, *, progress: bool) -> QwenImageEdit:
        """A pipeline without its text encoder, of whose transformer this process reads its own part."""

        def split(compared: Sequence[Compared]) -> None:
            for module, found, report in compared:
                if report.component == "transformer":
                    require_plain(found)
                    split_weights(module, "transformer", self.mesh, keep_rest=False)

        return assemble(
            QwenImageEdit, model, revision=None, device=self.device, dtype=dtype_of(dtype, self.device),
            modes=Modes(), files={}, text_encoder=False, controlnets=(), progress=progress, split=split,
        )  # fmt: skip

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """A block whose work the first process does, for which it is True, while the others wait for its end.

        Raises:
            ProcessLost: the first process failed.
        """
        Together.turns += 1
        key, store = f"qwenedit/train/{Together.turns}", shared_store()
        if self.first:
            try:
                yield True
            except BaseException as error:
                store.set(key, f"failed with {type(error).__name__}: {error}")
                raise
            store.set(key, "done")
            return
        while not store.check([key]):  # however long it takes; without that process the store is gone
            time.sleep(0.05)
        if (told := store.get(key).decode()) != "done":
            raise ProcessLost(f"process 0 {shown(told, 500)}")
        yield False

    def own(self, batches: Sequence[tuple[TrainingBatch, float]]) -> list[tuple[TrainingBatch, float]]:
        """This process's micro-batches of a step, each of references of one size, and their shares.

        Every process gets as many, since each forward waits for all of them: some have one again, with a
        share of 0. Gradients are means over the processes, so shares are times their number.
        """
        dealt = [
            [part for batch, share in batches[rank :: self.count] for part in _by_groups(batch, share)]
            for rank in range(self.count)
        ]
        own = dealt[self.rank] or [(dealt[0][0][0], 0.0)]
        most = max(map(len, dealt))
        padded = own + [(own[0][0], 0.0)] * (most - len(own))
        return [(batch, share * self.count) for batch, share in padded]

    def run(self, *args: Any, **options: Any) -> SplitRun:
        """A `Run` of these processes."""
        return SplitRun(self, *args, **options)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The means over the processes."""
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, (sums / self.count).tolist(), strict=True))


def _by_groups(batch: TrainingBatch, share: float) -> Iterator[tuple[TrainingBatch, float]]:
    """The rows of a batch whose references have the same sizes, and each part's share."""
    for group in batch.conditioning.groups():
        rows, weight = group.index.tolist(), batch.weight
        part = len(rows) / len(batch.latents)
        if weight is not None:
            part = float(weight[rows].sum() / weight.sum())
        own = TrainingBatch(
            conditioning=batch.conditioning.rows(rows),
            latents=batch.latents[rows],
            sigma=batch.sigma[rows],
            noise=batch.noise[rows],
            weight=None if weight is None else weight[rows],
        )
        yield own, share * part


class SplitRun(Run):
    """A `Run` of several processes. Its state after N steps is a folder `state-N`, with everyone's parts."""

    def __init__(self, together: Together, *args: Any, **options: Any) -> None:
        self.together = together
        super().__init__(*args, **options)

    def update(self) -> None:
        for master in self.weights.masters.values():
            if not is_split_weight(master):  # of a LoRA; of others fully_shard has done it
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                dist.all_reduce(master.grad)
                master.grad /= self.together.count
        self.parts = self.together.mean(self.parts)
        super().update()

    def log(self, **values: Any) -> None:
        if self.together.first:
            super().log(**values)

    def _cut_log(self, last: int) -> None:
        if self.together.first:
            super()._cut_log(last)

    def save_due(self, saved: float) -> bool:
        return bool(self.together.mean({"due": float(super().save_due(saved))})["due"])

    def save(self) -> None:
        """Write the state, whole or not at all; older ones go then."""
        final, temporary = self._state(self.step), self.folder / f"{STATE}unfinished"
        with self.together.first_alone() as alone:
            if alone:
                shutil.rmtree(temporary, ignore_errors=True)
        dcp.save(cast(dict[str, Any], self.weights.state()), checkpoint_id=temporary)
        with self.together.first_alone() as alone:
            if alone:
                meta = {"step": self.step, "seconds": self.elapsed(), "pending": self.pending}
                (temporary / _META).write_text(json.dumps(meta), encoding="utf-8")
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                for older in self._states():
                    if older != final:
                        shutil.rmtree(older, ignore_errors=True)

    def _state(self, step: int) -> Path:
        return self.folder / f"{STATE}{step:08d}"

    def _states(self) -> list[Path]:
        found = self.folder.glob(f"{STATE}*")
        return sorted(path for path in found if path.name.removeprefix(STATE).isdigit())

    def _saved(self) -> dict[str, Any] | None:
        if (self.folder / "state.pt").exists():
            raise ValueError(
                f"{shown(self.folder)} has a state of one process: go on with one, or give another output"
            )
        if not (states := self._states()):
            return None
        state: dict[str, Any] = {**self._template(states[-1]), **read_json(states[-1] / _META)}
        try:
            dcp.load(state["tensors"], checkpoint_id=states[-1])
        except Exception as error:  # torch raises many kinds
            raise ValueError(f"{shown(states[-1])} is no saved state of this training: {error}") from error
        return {**state, **state.pop("tensors")}

    def _template(self, folder: Path) -> dict[str, Any]:
        """Tensors to read a state into, each split like its master."""
        weights, metadata = self.weights, dcp.FileSystemReader(folder).read_metadata()
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights.masters}
        for key, stored in metadata.state_dict_metadata.items():
            what, _, rest = key.partition(".")
            name, _, moment = rest.rpartition(".")
            if what == "moments" and name in moments:
                master, size = weights.masters[name], getattr(stored, "size", torch.Size())
                like = torch.zeros_like(master.detach()) if size == master.shape else torch.zeros(size)
                moments[name][moment] = like
        masters = {name: torch.empty_like(x.detach()) for name, x in weights.masters.items()}
        average = {name: torch.empty_like(x) for name, x in (weights.average or {}).items()}
        return {"tensors": {"masters": masters, "average": average, "moments": moments}}
