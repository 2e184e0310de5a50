"""Memory modes: where weights are while no computation needs them. `load` sets them; results do not change.

    residency   resident     all weights stay in memory
                stage        one network's weights at a time: text encoder, VAE, transformer with ControlNets
                stream       of that network's blocks, only the running one and the next one
    modulation  precomputed  the transformer's adaLN layers, a third of it, are read once a run, for all steps
    storage     float8       blocks' matrices are kept in 8 bits and widened block by block: an approximation

Weights that do not stay are read from the checkpoint's files each time they are needed. The files must not
change. A network with such weights is *managed*: a weight that is not in memory is an `Absent`, on the meta
device; `present` loads the network for the length of a `with` block. Everything in this package that runs a
network does so in such a block. Blocks are loaded one by one by an ordinary loop (`Streamed`):

    with present(pipe.mmdit):
        for block in pipe.mmdit.blocks: ...

Threads may share a pipeline: several runs at once give the same bits as one after another, in every mode (on
CUDA if they share the current stream). What changes the networks acts on all threads meanwhile: `taps`,
`swapped`, LoRAs, `move`, torch's own settings. Labels of `scope` belong to a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qwenedit.memory.reading import WeightFiles
from qwenedit.memory.streaming import Absent, BlockParts, Lock, Part, Place, Source, Streamed
from qwenedit.weights.formats import Stored
from qwenedit.weights.loading import loading_bar
from qwenedit.weights.slices import is_split, whole

__all__ = [
    "BLOCK_LISTS", "MODULATIONS", "MODULATION_LAYERS", "RESIDENCIES", "STORAGES", "Modes", "as_loaded",
    "current_modes", "files_of", "home", "move", "origin_of", "present", "read_when_needed", "remember",
    "require_staying", "weight_value", "while_present",
]  # fmt: skip

RESIDENCIES = ("auto", "resident", "stage", "stream")  # from the fastest to the smallest
MODULATIONS = ("live", "precomputed")
STORAGES = (None, "float8")

BLOCK_LISTS = {
    "text_encoder": ("vision.blocks", "language.blocks"),
    "transformer": ("blocks",),
    "vae": (),
    "controlnet": ("blocks",),
}
MODULATION_LAYERS = ("img_mod.", "txt_mod.")  # layers of a transformer block whose only input is the timestep

T = TypeVar("T")


@dataclass(frozen=True)
class Modes:
    """The memory modes of a run; `str()` of it names those that are not the default.

    "auto" stands for the first residency that fits. `load` replaces it with that residency.

    Raises:
        ValueError: there is no such mode, or two exclude each other.
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

    def __str__(self) -> str:
        modulation = None if self.modulation == "live" else self.modulation
        return ", ".join(filter(None, (self.residency, modulation, self.storage)))

    def manage(
        self,
        component: str,
        module: nn.Module,
        found: Mapping[str, Stored],
        device: torch.device,
        dtype: torch.dtype | None,
        progress: bool,
    ) -> bool:
        """Manage a network on the meta device whose weights `found` says where to read.

        Returns False, and does nothing, if all of its weights are to stay in memory as they are.
        """
        precomputed = component == "transformer" and self.modulation == "precomputed"
        shrunk = component != "vae" and self.storage is not None
        if self.residency == "resident" and not precomputed and not shrunk:
            return False
        source = Source(WeightFiles(found.values()), device, dtype)
        base = {name: Place.of(module, name, stored, dtype) for name, stored in found.items()}
        lists = []
        for path in BLOCK_LISTS[component]:
            parts: list[BlockParts] = []
            blocks: Any = module.get_submodule(path)
            for number in range(len(blocks)):
                start = f"{path}.{number}."
                own = [name for name in base if name.startswith(start)]
                mod = [
                    name for name in own if precomputed and name[len(start) :].startswith(MODULATION_LAYERS)
                ]
                rest = [name for name in own if name not in mod]
                if shrunk:
                    rest = [name for name in rest if len(found[name].shape) == 2]
                elif self.residency != "stream":
                    rest = []
                kept, gone = ([base.pop(name) for name in names] for names in (rest, mod))
                parts.append(BlockParts(Part(source, kept, shrunk=shrunk), Part(source, gone)))
            if any(part.places for of_block in parts for part in (of_block.rest, of_block.modulation)):
                streamed = Streamed(blocks, parts, precomputed=precomputed)
                parent, _, leaf = path.rpartition(".")
                setattr(module.get_submodule(parent), leaf, streamed)
                lists.append(streamed)
        managed = _Managed(component, self, source, list(base.values()), lists, progress)
        module.__dict__["_managed"] = managed
        if self.residency == "resident":
            managed.__enter__()  # and never leaves
        managed.stays = self.residency == "resident"
        return True


def _managed(module: nn.Module) -> _Managed | None:
    return module.__dict__.get("_managed")


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """Load the weights of managed networks for the length of a `with` block, or of the outermost of several.

    Other networks are left alone. Calling a network by hand, like `pipe.mmdit(...)`, needs such a block with
    residency="stage" and "stream".

    Raises:
        ValueError: a file of the checkpoint has changed or is gone.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_managed(module) or nullcontext())
        yield


def while_present(modules: Sequence[nn.Module], items: Iterator[T]) -> Iterator[T]:
    """Yield the items. The networks' weights are loaded from the first item until the generator ends."""
    with present(*modules):
        yield from items


def current_modes(module: nn.Module) -> Modes:
    """The memory modes that a network is in."""
    managed = _managed(module)
    return Modes() if managed is None else managed.modes


def home(module: nn.Module) -> torch.device:
    """The device that a network computes on, whether or not its weights are loaded."""
    managed = _managed(module)
    return next(module.parameters()).device if managed is None else managed.source.device


def move(modules: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
    """`module.to(...)` for each network, managed or not.

    Raises:
        ValueError: another dtype for a managed network, whose weights are read in the dtype given to `load`.
            Nothing has moved then. Or weights that are split over processes, which stay where they are.
    """
    homes = {}
    for module in filter(is_split, modules):
        weight = next(module.parameters())
        moved = _moved(weight.dtype, weight.device, args, kwargs)
        if (moved.dtype, moved.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"weights that are split over processes stay in {weight.dtype} on {weight.device}: to have "
                f"them in {moved.dtype} on {moved.device} pass it to load"
            )
    for managed in [one for module in modules if (one := _managed(module))]:
        for dtype in {place.absent.dtype for place in managed.places}:
            moved = _moved(dtype, managed.source.device, args, kwargs)
            if moved.dtype != dtype:
                raise ValueError(
                    f"weights of the {managed.component} are read from its files again and again, in the "
                    f"dtype that load was given: to have them in {moved.dtype} pass it there"
                )
            homes[managed] = moved.device
    for module in modules:
        network = _managed(module)
        if network is None:
            if not is_split(module):
                module.to(*args, **kwargs)
            continue
        device = network.source.device = homes[network]
        for x in (*module.parameters(), *module.buffers()):
            if not x.is_meta:
                x.data = x.data.to(device)
        for part in network.blocks:
            part.held = [(weight.to(device), scale.to(device)) for weight, scale in part.held]


def _moved(dtype: torch.dtype, device: torch.device, args: Any, kwargs: Any) -> Tensor:
    """A parameter after `module.to(*args, **kwargs)`."""
    (moved,) = nn.ParameterList([torch.empty(0, dtype=dtype, device=device)]).to(*args, **kwargs)
    return moved


def weight_value(module: nn.Module, weight: Tensor) -> Tensor:
    """The values of a network's weight: its own, or if it is not in memory those in the checkpoint's files.

    Of a weight that is split over processes every process asks at the same time.

    Raises:
        ValueError: a file of the checkpoint has changed or is gone.
    """
    managed = _managed(module)
    if managed is None or not isinstance(weight, Absent):
        return whole(weight)
    (place,) = (place for place in managed.places if place.absent is weight)
    (value,) = managed.source.read([place])
    return value


def require_staying(module: nn.Module, weights: Sequence[Tensor], what: str) -> None:
    """Require that changes of these weights last.

    Raises:
        ValueError: the weights are read from the files again and again. The message begins with `what` is
            done to them.
    """
    managed = _managed(module)
    if managed is not None and (not managed.stays or any(weight.is_meta for weight in weights)):
        raise ValueError(
            f"{what}, but those of the {managed.component} come from the files again and again: load with "
            "residency='resident', modulation='live' and storage=None"
        )


@dataclass(frozen=True, eq=False)
class _Origin:
    """Where the weights of a network came from, and what they were then."""

    component: str
    found: Mapping[str, Stored]
    weights: Mapping[str, tuple[int, int, torch.dtype]]  # identity, version, dtype

    @classmethod
    def of(cls, module: nn.Module, component: str, found: Mapping[str, Stored]) -> _Origin:
        weights = {  # a LoRA, which may be there meanwhile, puts the layer into its `base`
            name.replace(".base.", "."): (id(x), x._version, x.dtype)
            for name, x in module.named_parameters()
            if ".held." not in name
        }
        return cls(component, found, weights)


def remember(module: nn.Module, component: str, found: Mapping[str, Stored]) -> None:
    """Note where the weights of a network that was just loaded came from, for `read_when_needed`."""
    module.__dict__["_origin"] = _Origin.of(module, component, found)


def origin_of(module: nn.Module) -> Mapping[str, Stored] | None:
    """Where the weights of a network were read from, by our names; None if `load` did not make it."""
    origin = module.__dict__.get("_origin")
    return None if origin is None else origin.found


def files_of(module: nn.Module) -> list[Path]:
    """The files that a network's weights were loaded from; none for a network that was not loaded."""
    return sorted({stored.path for stored in (origin_of(module) or {}).values()})


def as_loaded(module: nn.Module) -> bool:
    """True if a network's weights are still those of the files that `load` read."""
    managed, origin = _managed(module), module.__dict__.get("_origin")
    if managed is not None:  # they cannot be changed
        return origin is not None
    return origin is not None and origin.weights == _Origin.of(module, "", {}).weights


def read_when_needed(modules: Sequence[nn.Module], residency: str, progress: bool) -> None:
    """Give networks the residency "stage" or "stream" after loading. Those that have it are left alone.

    Raises:
        ValueError: weights that differ from the files', or other memory modes. Nothing has changed then.
    """
    changing: list[tuple[nn.Module, _Origin]] = []
    for module in modules:
        managed, origin = _managed(module), module.__dict__.get("_origin")
        if managed is not None and not managed.stays:
            streams = residency == "stage" or not BLOCK_LISTS[managed.component]
            if streams or any(part.places for part in managed.blocks if not part.shrunk):
                continue
        now = origin and _Origin.of(module, origin.component, origin.found).weights
        if is_split(module):
            raise ValueError(
                f"weights that are split over processes stay in memory, and residency={residency!r} drops "
                "them: load without split_weights and tensor"
            )
        if managed is not None or origin is None or now != origin.weights:
            raise ValueError(
                "weights that were changed, cast to another dtype or loaded in another memory mode cannot be "
                f"read from the files again: pass residency={residency!r} to load, or call this first"
            )
        changing.append((module, origin))
    for module, origin in changing:
        dtypes = {dtype for _, _, dtype in origin.weights.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        Modes(residency).manage(origin.component, module, origin.found, home(module), dtype, progress)


class _Managed:
    """A managed network: a context in which the weights that no list streams are in memory."""

    def __init__(
        self,
        component: str,
        modes: Modes,
        source: Source,
        base: list[Place],
        lists: list[Streamed],
        progress: bool,
    ) -> None:
        self.component = component
        self.modes = modes
        self.source = source
        self.base = Part(source, base)
        self.lists = lists
        self.progress = progress
        self.stays = False
        self.lock = Lock()  # one thread at a time loads the weights, or drops them
        of_blocks = [parts for streamed in lists for parts in streamed.parts]
        self.blocks = [parts.rest for parts in of_blocks]  # streamed, or kept in 8 bits
        every = (self.base, *self.blocks, *(parts.modulation for parts in of_blocks))
        self.places = [place for part in every for place in part.places]
        for place in self.places:
            place.absent.component = component

    def __enter__(self) -> None:
        with self.lock:
            self._load()

    def _load(self) -> None:
        if self.base.depth:
            self.base.put([])
            return
        held = [part for part in self.blocks if part.shrunk]
        total = sum(place.stored.bytes for part in (self.base, *held) for place in part.places)
        try:  # the weights outlive an inference mode that the caller may be in
            with torch.inference_mode(False), loading_bar(self.component, total, self.progress) as bar:
                for part in held:
                    part.held = part.in_8_bits(bar)
                self.base.put(self.source.read(self.base.places, bar))
        except BaseException:
            self._let_go()
            raise

    def __exit__(self, *_error: object) -> None:
        with self.lock:
            self.base.drop()
            if self.base.depth == 0:
                self._let_go()

    def __getstate__(self) -> dict[str, Any]:
        parts = self.blocks if self.stays else (self.base, *self.blocks)
        if any(part.depth for part in parts):
            raise ValueError(
                f"the {self.component} is in use, and some of its weights are read from files only while it "
                "is: copy or pickle the pipeline before or after the run"
            )
        return self.__dict__

    def _let_go(self) -> None:
        for streamed in self.lists:
            streamed.stop()
        for part in self.blocks:
            part.held = []
