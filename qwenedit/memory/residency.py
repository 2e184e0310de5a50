"""Memory modes: where weights are while nobody computes with them. `load` sets them; results do not change.

    residency   resident     all weights stay in memory
                stage        those of one network at a time: text encoder, transformer, VAE
                stream       of that network's blocks, the one that computes and the one that comes next
    modulation  precomputed  the transformer's adaLN layers, a third of it, are read once a run, for all steps
    storage     float8       blocks' matrices are kept in 8 bits, and widened block by block: an approximation

What does not stay is read from the checkpoint's files each time its turn comes. The files are only read, and
must not change. A weight that is not there is an `Absent`, on the meta device. `present` brings a network in
for the length of a `with` block, and whatever runs a network here does so in one; blocks come one by one
(`Streamed`), so that a forward reads as ever:

    with present(pipe.mmdit):
        for block in pipe.mmdit.blocks: ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qwenedit.memory.reading import Files
from qwenedit.memory.streaming import Part, Place, Source, Streamed, Turn
from qwenedit.weights.formats import Stored
from qwenedit.weights.loading import progress_bar

__all__ = [
    "MODULATIONS", "RESIDENCIES", "STORAGES", "Modes", "home", "move", "present", "require_staying",
    "while_present",
]  # fmt: skip

RESIDENCIES = ("auto", "resident", "stage", "stream")
MODULATIONS = ("live", "precomputed")
STORAGES = (None, "float8")

# Blocks that can come and go, by network; of the transformer's, the layers that see the timestep alone.
_LISTS = {"text_encoder": ("vision.blocks", "language.blocks"), "transformer": ("blocks",), "vae": ()}
_MODULATION = ("img_mod.", "txt_mod.")

T = TypeVar("T")


@dataclass(frozen=True)
class Modes:
    """The memory modes of a pipeline.

    Raises:
        ValueError: there is no such mode, or two that exclude each other.

    "auto" stands for the first residency that fits, which is for `load` to find.
    """

    residency: str = "resident"
    modulation: str = "live"
    storage: str | None = None

    def __post_init__(self) -> None:
        for name, wanted in (
            ("residency", RESIDENCIES), ("modulation", MODULATIONS), ("storage", STORAGES)
        ):  # fmt: skip
            if (got := getattr(self, name)) not in wanted:
                raise ValueError(f"{name} is {got!r}, wanted one of {', '.join(map(str, wanted))}")
        if self.storage is not None and self.residency == "stream":
            raise ValueError(
                "storage='float8' keeps weights in memory, residency='stream' does not: wanted one of them"
            )

    @property
    def plain(self) -> bool:
        return self == Modes()

    def manage(
        self,
        component: str,
        module: nn.Module,
        found: Mapping[str, Stored],
        device: torch.device,
        dtype: torch.dtype | None,
        progress: bool,
    ) -> bool:
        """Take over a network on the meta device whose weights are `found` in files; False: it is not for
        these modes, and is to be loaded as ever.
        """
        precomputed = component == "transformer" and self.modulation == "precomputed"
        shrunk = component != "vae" and self.storage is not None
        if self.residency == "resident" and not precomputed and not shrunk:
            return False
        source = Source(Files(found.values()), device, dtype)
        base = {name: Place.of(module, name, stored, dtype) for name, stored in found.items()}
        lists = []
        for path in _LISTS[component]:
            of_list: list[Turn] = []
            blocks: Any = module.get_submodule(path)
            for number in range(len(blocks)):
                start = f"{path}.{number}."
                own = [name for name in base if name.startswith(start)]
                mod = [name for name in own if precomputed and name[len(start) :].startswith(_MODULATION)]
                rest = [name for name in own if name not in mod]
                if shrunk:
                    rest = [name for name in rest if len(found[name].shape) == 2]
                elif self.residency != "stream":
                    rest = []
                kept, gone = ([base.pop(name) for name in names] for names in (rest, mod))
                of_list.append(Turn(Part(source, kept, shrunk=shrunk), Part(source, gone)))
            if any(part.places for turn in of_list for part in (turn.rest, turn.modulation)):
                streamed = Streamed(blocks, of_list, precomputed=precomputed)
                parent, _, leaf = path.rpartition(".")
                setattr(module.get_submodule(parent), leaf, streamed)
                lists.append(streamed)
        network = _Network(component, source, list(base.values()), lists, progress)
        module.__dict__["_comes_and_goes"] = network
        if self.residency == "resident":
            network.__enter__()  # and it stays
        network.stays = self.residency == "resident"
        return True


def _network(module: nn.Module) -> _Network | None:
    return module.__dict__.get("_comes_and_goes")


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """Have the weights of networks in memory for the length of a `with` block, of nested ones for the outer.

    It does nothing for a network whose weights stay. Who calls a network by hand, like `pipe.mmdit(...)`,
    needs it under residency="stage" and "stream".

    Raises:
        ValueError: a file of the checkpoint has changed or is gone.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_network(module) or nullcontext())
        yield


def while_present(module: nn.Module, items: Iterator[T]) -> Iterator[T]:
    """The items, with the network's weights in memory from the first on until there are no more, or the
    generator is closed.
    """
    with present(module):
        yield from items


def home(module: nn.Module) -> torch.device:
    """Where a network computes, whether or not its weights are there."""
    network = _network(module)
    return next(module.parameters()).device if network is None else network.source.device


def move(modules: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
    """`module.to(...)` of each, also where weights come and go.

    Raises:
        ValueError: for a network whose weights do, another dtype: they are read as `load` was asked to.
            Nothing has moved then.
    """
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for network in map(_network, modules):
        if network and dtype is not None and any(one.dtype != dtype for one in network.absent):
            raise ValueError(
                f"weights of the {network.component} are read from its files again and again, in the dtype "
                f"that load was given: to have them in {dtype} pass it there"
            )
    for module in modules:
        network = _network(module)
        if network is None:
            module.to(*args, **kwargs)
            continue
        if device is None:
            continue
        network.source.device = device
        module._apply(lambda x: x if x.is_meta else x.to(device))
        for part in network.blocks:
            part.held = [(weight.to(device), scale.to(device)) for weight, scale in part.held]


def require_staying(module: nn.Module, weights: Sequence[Tensor], what: str) -> None:
    """Will changes of these weights last?

    Raises:
        ValueError: no, since they are read from the files again.
    """
    network = _network(module)
    if network is not None and (not network.stays or any(weight.is_meta for weight in weights)):
        raise ValueError(
            f"{what} changes weights, but those of the {network.component} come from the files again and "
            "again: load with residency='resident', modulation='live' and storage=None"
        )


class _Network:
    """A network whose weights come and go: a context in which those are there that no list streams."""

    def __init__(
        self,
        component: str,
        source: Source,
        base: list[Place],
        lists: list[Streamed],
        progress: bool,
    ) -> None:
        self.component = component
        self.source = source
        self.base = Part(source, base)
        self.lists = lists
        self.progress = progress
        self.stays = False
        turns = [turn for streamed in lists for turn in streamed.turns]
        self.blocks = [turn.rest for turn in turns]  # read again and again, or kept in 8 bits
        parts = (self.base, *self.blocks, *(turn.modulation for turn in turns))
        self.absent = [place.absent for part in parts for place in part.places]
        for one in self.absent:
            one.component = component

    def __enter__(self) -> None:
        if self.base.depth:
            self.base.put([])
            return
        held = [part for part in self.blocks if part.shrunk]
        stored = [place.stored for part in (self.base, *held) for place in part.places]
        total = sum(one.bytes for one in stored)
        try:  # weights are nobody's in particular: not of an inference mode that the caller may be in
            with torch.inference_mode(False), progress_bar(self.component, total, self.progress) as bar:
                for part in held:
                    part.hold(bar)
                self.base.put(self.source.read(self.base.places, bar))
        except BaseException:
            self._let_go()
            raise

    def __exit__(self, *_error: object) -> None:
        self.base.drop()
        if self.base.depth == 0:
            self._let_go()

    def _let_go(self) -> None:
        for streamed in self.lists:
            streamed.stop()
        for part in self.blocks:
            part.held = []
