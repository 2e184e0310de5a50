"""Blocks whose weights come and go: read from the files, or widened from 8 bits, while a loop is at them.

A weight that is not there is an `Absent`. A `Part` is what comes and goes together, from a `Source`. A
`Streamed` is a list of blocks that brings each in while a loop is at it, and fetches the next one meanwhile.
What of it is when is for residency.py to decide.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from qwenedit.memory.reading import Files
from qwenedit.weights.formats import Stored, dequantise

__all__ = ["Absent", "Part", "Place", "Source", "Streamed", "Turn"]

_NAMES = {"text_encoder": "vision_language", "transformer": "mmdit", "vae": "vae"}  # of the pipeline's parts
FP8 = torch.float8_e4m3fn


class Absent(nn.Parameter):
    """A parameter that is not there: its shape and dtype, on the meta device. To compute with it is an error.

    Raises:
        ValueError: an operation on it and on numbers, or one that asks for its numbers or for its gradient.
    """

    component = ""  # whose it is

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.detach:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            absent = [x for x in tensors if isinstance(x, Absent)]
            if all(x.is_meta for x in tensors):
                try:
                    result = func(*args, **(kwargs or {}))
                    if not any(x.requires_grad for x in absent):
                        return result
                    for x in absent:  # no gradient would ever reach it
                        x.requires_grad_(False)
                except NotImplementedError:  # what torch says where there is no data
                    pass
        component = absent[0].component
        raise ValueError(
            f"weights of the {component} are in its files, not in memory: run it in `with "
            f"qwenedit.memory.residency.present(pipe.{_NAMES[component]})`, and blocks that are streamed "
            "within a loop over all of them; or load with residency='resident', modulation='live' and "
            "storage=None"
        )


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter: where it belongs, whatever is put around that module later, and where it is read from."""

    owner: nn.Module
    leaf: str
    stored: Stored
    absent: Absent

    @classmethod
    def of(cls, module: nn.Module, name: str, stored: Stored, dtype: torch.dtype | None) -> Place:
        """The parameter's place, from then on without its weight."""
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        dtype = dtype or getattr(torch, stored.dtype)
        absent = Absent(torch.empty(stored.shape, dtype=dtype, device="meta"), requires_grad=False)
        place = cls(owner, leaf, stored, absent)
        place.put(absent)
        return place

    def put(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.leaf] = parameter


@dataclass(eq=False)
class Source:
    """The files of a network, and what becomes of what is read."""

    files: Files
    device: torch.device
    dtype: torch.dtype | None  # None: as it is stored

    def read(self, places: Sequence[Place], bar: tqdm | None = None) -> list[nn.Parameter]:
        """Their weights, each with memory of its own."""
        made: dict[Stored, nn.Parameter] = {}
        for stored, value in self.files.read([place.stored for place in places]):
            made[stored] = nn.Parameter(self.placed(value), requires_grad=False)
            if bar is not None:
                bar.update(stored.bytes)
        return [made[place.stored] for place in places]

    def placed(self, value: Tensor) -> Tensor:
        dtype = self.dtype or value.dtype
        if self.device.type == "cpu" and value.dtype == dtype and value.data_ptr() % 64 == 0:
            return value  # aligned as torch's own: where it is not, kernels may round differently
        pinned = self.device.type == "cuda"
        own = torch.empty(value.shape, dtype=dtype, pin_memory=pinned, device="cpu").copy_(value)
        return own.to(self.device, non_blocking=pinned)


class Part:
    """Parameters that come and go together."""

    def __init__(self, source: Source, places: Sequence[Place], *, shrunk: bool = False) -> None:
        self.source = source
        self.places = places
        self.shrunk = shrunk  # are they what 8 bits have kept of them?
        self.held: list[tuple[Tensor, Tensor]] = []  # fp8 weights with their scales, in place of the files
        self.depth = 0  # how many loops are at it

    def hold(self, bar: tqdm) -> None:
        """Keep the weights in 8 bits."""
        self.held = self._in_8_bits(bar)

    def _in_8_bits(self, bar: tqdm | None = None) -> list[tuple[Tensor, Tensor]]:
        """The weights and their scales: those that the file has so as they are, others with a scale a row."""
        made = {}
        for stored, value in self.source.files.read([place.stored for place in self.places], raw=True):
            weight, scale = value if isinstance(value, tuple) else _shrunk(value)
            made[stored] = weight.to(self.source.device), scale.to(self.source.device)
            if bar is not None:
                bar.update(stored.bytes)
        return [made[place.stored] for place in self.places]

    def weights(self) -> list[nn.Parameter]:
        if not self.shrunk:
            return self.source.read(self.places)
        return [
            nn.Parameter(dequantise(*held).to(place.absent.dtype), requires_grad=False)
            for held, place in zip(self.held or self._in_8_bits(), self.places, strict=True)
        ]

    def put(self, weights: Sequence[nn.Parameter]) -> None:
        if self.depth == 0:
            for place, weight in zip(self.places, weights, strict=True):
                place.put(weight)
        self.depth += 1

    def drop(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            for place in self.places:
                place.put(place.absent)


def _shrunk(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as fp8 with a scale a row: each row's largest value becomes fp8's largest."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(FP8).max
    return (weight.float() / scale).to(FP8), scale


@dataclass(frozen=True, eq=False)
class Turn:
    """What comes and goes with a block; either may be empty."""

    rest: Part
    modulation: Part


class Streamed(nn.ModuleList):
    """Blocks each of which has its weights while a loop is at it, and the next one's are on their way.

    Nothing is read but by a loop over the list: not by its length, an index, or a walk over modules.
    """

    transparent = True  # see `taps.modified`

    def __init__(
        self, blocks: Iterable[nn.Module] = (), turns: Sequence[Turn] = (), *, precomputed: bool = False
    ) -> None:
        super().__init__(blocks)
        self.turns = turns
        self.precomputed = precomputed
        self._with_modulation = True
        self._loops: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Any]:
        if self._with_modulation:
            return self._loop([(turn.rest, turn.modulation) for turn in self.turns])
        return self._loop([(turn.rest,) for turn in self.turns])

    @contextmanager
    def without_modulation(self) -> Iterator[None]:
        """In the `with` block loops leave out the adaLN weights: what they make is known already."""
        before, self._with_modulation = self._with_modulation, False
        try:
            yield
        finally:
            self._with_modulation = before

    def only_modulation(self) -> Iterator[Any]:
        """The blocks, for who wants nothing of them but their modulation."""
        return self._loop([(turn.modulation,) for turn in self.turns])

    def stop(self) -> None:
        """Close the loops that did not come to their end."""
        for loop in list(self._loops):
            loop.close()

    def _loop(self, turns: Sequence[Sequence[Part]]) -> Iterator[Any]:
        if len(self) != len(turns):
            raise ValueError(f"there are weights for {len(turns)} blocks, but the list has {len(self)}")
        loop = self._each([[part for part in turn if part.places] for turn in turns])
        self._loops.add(loop)
        return loop

    def _each(self, parts: Sequence[Sequence[Part]]) -> Generator[Any, None, None]:
        blocks = list(self._modules.values())  # a module that is there twice, twice
        if not any(parts):
            yield from blocks
            return
        done = None
        with ThreadPoolExecutor(1, "qwenedit-read") as reader:
            coming: Future[_Arrived] | None = reader.submit(_Arrived.of, parts[0], done)
            for block, own, following in zip(blocks, parts, [*parts[1:], None], strict=True):
                assert coming is not None
                coming.result().put()
                coming = None  # which would keep the weights
                try:
                    if following is not None:
                        coming = reader.submit(_Arrived.of, following, done)
                    yield block
                finally:
                    for part in own:
                        part.drop()
                done = _mark(own)

    def __repr__(self) -> str:  # the plain list's loops over itself
        return repr(nn.ModuleList(self.children())).replace("ModuleList", "Streamed", 1)


@dataclass(frozen=True, eq=False)
class _Arrived:
    """Weights of a block that are in memory, on an accelerator maybe in a while."""

    parts: Sequence[Part]
    weights: list[list[nn.Parameter]]
    copied: Any  # the event after their copy, on CUDA

    @classmethod
    def of(cls, parts: Sequence[Part], before: Any) -> _Arrived:
        """Runs beside the computation: on CUDA on a stream of its own, from pinned memory, and not before the
        block that these weights follow in memory is done with.
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


@functools.cache  # memory that was freed on a stream is used again on that stream only
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _mark(parts: Sequence[Part]) -> Any:
    """On CUDA, where computation may be far behind the program: the event after all that was asked for."""
    for part in parts:
        if part.source.device.type == "cuda":
            return torch.cuda.current_stream(part.source.device).record_event()
    return None
