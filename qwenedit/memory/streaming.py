"""Blocks whose weights are in memory only while they run: read from the files, or widened from 8 bits.

A weight that is not in memory is an `Absent`. A `Part` is a group of weights that are loaded and dropped
together, from a `Source`. A `Streamed` is a list of blocks: a loop over it loads each block's weights for its
iteration, and reads the next block's in the background. residency.py decides which weights are streamed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwenedit.checks import ProgressBar
from qwenedit.memory.reading import WeightFiles
from qwenedit.taps import tensors_in
from qwenedit.weights.formats import Stored, dequantise

__all__ = ["Absent", "BlockParts", "Lock", "Part", "Place", "Source", "Streamed"]

_NAMES = {
    "text_encoder": "pipe.vision_language",
    "transformer": "pipe.mmdit",
    "vae": "pipe.vae",
    "controlnet": "*pipe.controlnets",
}
FP8 = torch.float8_e4m3fn


class Absent(nn.Parameter):
    """A parameter that is not in memory: its shape and dtype on the meta device.

    Raises:
        ValueError: an operation that needs its values or its gradient.
    """

    component = ""  # that it belongs to

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _absent, (tuple(self.shape), self.dtype, self.component)

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        copied: Absent = memo.setdefault(id(self), _absent(*self.__reduce_ex__(2)[1]))
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.detach:
            return args[0]
        # Tensor's own method runs `_without_values` with this override disabled.
        return Tensor.__torch_function__(_without_values, (), (func, args, kwargs or {}))


def _absent(shape: tuple[int, ...], dtype: torch.dtype, component: str) -> Absent:
    made = Absent(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    made.component = component
    return made


def _without_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The result of an operation on absent weights, if it needs neither values nor gradients."""
    tensors = tensors_in((args, kwargs))
    absent = [x for x in tensors if isinstance(x, Absent)]
    if all(x.is_meta for x in tensors):
        try:
            result = func(*args, **kwargs)
            if not any(x.requires_grad for x in absent):
                return result
            for x in absent:  # no gradient would ever reach it
                x.requires_grad_(False)
        except NotImplementedError:  # torch's error for values on the meta device
            pass
    component = absent[0].component
    raise ValueError(
        f"weights of the {component} are in its files, not in memory: run it in `with "
        f"qwenedit.memory.residency.present({_NAMES[component]})`, and blocks that are streamed "
        "within a loop over all of them; or load with residency='resident', modulation='live' and "
        "storage=None"
    )


class Lock:
    """A lock that its holder may take again. A copy of it is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter's place: its module, which stays valid if that is wrapped later, and its file."""

    owner: nn.Module
    leaf: str
    stored: Stored
    absent: Absent

    @classmethod
    def of(cls, module: nn.Module, name: str, stored: Stored, dtype: torch.dtype | None) -> Place:
        """The place of the module's parameter `name`, whose weight is made `Absent`."""
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        owner = getattr(owner, "base", owner)  # of a layer with LoRAs
        dtype = dtype or getattr(torch, stored.dtype)
        absent = _absent(stored.shape, dtype, "")
        place = cls(owner, leaf, stored, absent)
        place.put(absent)
        return place

    def put(self, parameter: nn.Parameter) -> None:
        setattr(self.owner, self.leaf, parameter)


@dataclass(eq=False)
class Source:
    """The files of a network, with the device and dtype of its weights in memory; None: as stored."""

    files: WeightFiles
    device: torch.device
    dtype: torch.dtype | None

    def read(self, places: Sequence[Place], bar: ProgressBar | None = None) -> list[nn.Parameter]:
        """Read the weights of these places, each into memory of its own."""
        made: dict[Stored, nn.Parameter] = {}
        for stored, weight, scale in self.files.read([place.stored for place in places]):
            value = weight if scale is None else dequantise(weight, scale)
            made[stored] = nn.Parameter(self._placed(value), requires_grad=False)
            if bar is not None:
                bar.update(stored.bytes)
        return [made[place.stored] for place in places]

    def _placed(self, value: Tensor) -> Tensor:
        dtype = self.dtype or value.dtype
        if self.device.type == "cpu" and value.dtype == dtype and value.data_ptr() % 64 == 0:
            return value  # aligned like torch's own memory; kernels may round differently without
        pinned = self.device.type == "cuda"
        own = torch.empty(value.shape, dtype=dtype, pin_memory=pinned, device="cpu").copy_(value)
        return own.to(self.device, non_blocking=pinned)


class Part:
    """Parameters that are loaded and dropped together.

    Several threads may use a part at once: the last one drops the weights. With `shrunk` they are matrices
    that are rounded to 8 bits. `held` has them as fp8 with scales. While it is empty they are read and
    rounded again for each loop.
    """

    def __init__(self, source: Source, places: Sequence[Place], *, shrunk: bool = False) -> None:
        self.source = source
        self.places = places
        self.shrunk = shrunk
        self.held: list[tuple[Tensor, Tensor]] = []
        self.depth = 0  # number of loops and `with` blocks that use it
        self.lock = Lock()  # of `depth` and of the places

    def __getstate__(self) -> dict[str, Any]:
        held = [(weight.view(torch.uint8), scale) for weight, scale in self.held]  # pickle knows no fp8
        return {**self.__dict__, "held": held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.held = [(weight.view(FP8), scale) for weight, scale in self.held]

    def in_8_bits(self, bar: ProgressBar | None = None) -> list[tuple[Tensor, Tensor]]:
        """Read the weights as fp8 with scales. fp8 weights stay as they are; others get a scale per row."""
        made = {}
        for stored, weight, scale in self.source.files.read([place.stored for place in self.places]):
            if weight.dtype != FP8:
                weight, scale = _shrunk(weight if scale is None else dequantise(weight, scale))
            elif scale is None:
                scale = torch.ones(())
            made[stored] = weight.to(self.source.device), scale.to(self.source.device)
            if bar is not None:
                bar.update(stored.bytes)
        return [made[place.stored] for place in self.places]

    def weights(self) -> list[nn.Parameter]:
        """Read the weights, or widen them from 8 bits."""
        if not self.shrunk:
            return self.source.read(self.places)
        return [
            nn.Parameter(dequantise(*held).to(place.absent.dtype), requires_grad=False)
            for held, place in zip(self.held or self.in_8_bits(), self.places, strict=True)
        ]

    def put(self, weights: Sequence[nn.Parameter]) -> None:
        with self.lock:
            if self.depth == 0:
                for place, weight in zip(self.places, weights, strict=True):
                    place.put(weight)
            self.depth += 1

    def drop(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                for place in self.places:
                    place.put(place.absent)


def _shrunk(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to fp8, with a scale per row that maps the row's largest value to fp8's largest."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(FP8).max
    return (weight.float() / scale).to(FP8), scale


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The parts that are streamed with one block; either may be empty."""

    rest: Part
    modulation: Part


class Streamed(nn.ModuleList):
    """A list of blocks. A loop over it loads each block's weights and prefetches the next block's.

    Loops of several threads may run at once. Only loops read weights; its length, an index, or a walk over
    modules read nothing.
    """

    transparent = True  # see `taps.modified`

    def __init__(
        self, blocks: Iterable[nn.Module] = (), parts: Sequence[BlockParts] = (), *, precomputed: bool = False
    ) -> None:
        super().__init__(blocks)
        self.parts = parts
        self.precomputed = precomputed
        self._without_modulation: set[int] = set()  # threads
        self._loops: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Any]:
        if threading.get_ident() in self._without_modulation:
            return self._loop([(own.rest,) for own in self.parts])
        return self._loop([(own.rest, own.modulation) for own in self.parts])

    @contextmanager
    def without_modulation(self) -> Iterator[None]:
        """Loops of this thread in the `with` block skip the adaLN weights, whose results are precomputed."""
        thread = threading.get_ident()
        outermost = thread not in self._without_modulation
        self._without_modulation.add(thread)
        try:
            yield
        finally:
            if outermost:
                self._without_modulation.discard(thread)

    def only_modulation(self) -> Iterator[Any]:
        """Loop over the blocks with nothing but their adaLN weights."""
        return self._loop([(own.modulation,) for own in self.parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loops": None}  # a copy has no loops

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_loops": weakref.WeakSet()})

    def stop(self) -> None:
        """Close all unfinished loops."""
        for loop in list(self._loops):
            loop.close()

    def _loop(self, parts: Sequence[Sequence[Part]]) -> Iterator[Any]:
        if len(self) != len(parts):
            raise ValueError(f"there are weights for {len(parts)} blocks, but the list has {len(self)}")
        loop = self._each([[part for part in own if part.places] for own in parts])
        self._loops.add(loop)
        return loop

    def _each(self, parts: Sequence[Sequence[Part]]) -> Generator[Any, None, None]:
        blocks = list(super().__iter__())
        if not any(parts):
            yield from blocks
            return
        # Of what was queued before: the blocks of the loop before this one may be in memory until it has run.
        done = _mark([part for own in parts for part in own])
        with ThreadPoolExecutor(1, "qwenedit-read") as reader:
            coming: Future[_Arrived] | None = reader.submit(_Arrived.of, parts[0], done)
            for block, own, following in zip(blocks, parts, [*parts[1:], None], strict=True):
                assert coming is not None
                coming.result().put()
                coming = None  # it holds a reference to the weights
                try:
                    if following is not None:
                        coming = reader.submit(_Arrived.of, following, done)
                    yield block
                finally:
                    for part in own:
                        part.drop()
                done = _mark(own)

    def __repr__(self) -> str:  # the plain list's would start a loop
        return repr(nn.ModuleList(self.children())).replace("ModuleList", "Streamed", 1)


@dataclass(frozen=True, eq=False)
class _Arrived:
    """A block's weights, read from the files. On CUDA the event `copied` marks the end of their copy."""

    parts: Sequence[Part]
    weights: list[list[nn.Parameter]]
    copied: Any

    @classmethod
    def of(cls, parts: Sequence[Part], before: Any) -> _Arrived:
        """Read the weights, in the background. On CUDA they are copied on a stream of its own, from pinned
        memory, once the event `before` has passed: the end of the block whose memory they take.
        """
        devices = {part.source.device for part in parts if part.source.device.type == "cuda"}
        if not devices:
            return cls(parts, [part.weights() for part in parts], None)
        (device,) = devices
        if before is not None:
            before.synchronize()
        side = _side(device)
        with torch.cuda.stream(side):
            weights = [part.weights() for part in parts]
            return cls(parts, weights, side.record_event())

    def put(self) -> None:
        for part, weights in zip(self.parts, self.weights, strict=True):
            part.put(weights)
            if self.copied is not None:
                current = torch.cuda.current_stream(part.source.device)
                current.wait_event(self.copied)
                for weight in weights:
                    weight.record_stream(current)


@functools.cache  # torch reuses memory freed on a stream on that stream only
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _mark(parts: Sequence[Part]) -> Any:
    """On CUDA, an event after all computation queued so far."""
    for part in parts:
        if part.source.device.type == "cuda":
            return torch.cuda.current_stream(part.source.device).record_event()
    return None
