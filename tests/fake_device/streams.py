"""Streams, events and the caching allocator of CUDA as a record of their order, without any of them.

Every operation takes a place in the queue of its stream. Streams run at the same time, except where one waits
for an event of another, or the host waited before it queued. A *fault* is

    a use of memory whose writing, on another stream, was not waited for
    memory that is released while another stream may still use it (`record_stream` tells the allocator)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Clock = dict[int, int]  # stream -> how far its queue is known to have run


@dataclass(eq=False)
class Stream:
    """A queue of operations, on the side of `Streams`."""

    streams: Streams
    number: int
    queued: int = 0
    seen: Clock = field(default_factory=dict)

    def record_event(self) -> Event:
        return Event(self.streams, {**self.seen, self.number: self.queued})

    def wait_event(self, event: Event) -> None:
        _merge(self.seen, event.clock)


@dataclass(eq=False)
class Event:
    """A place in a stream's queue, and what that place itself waited for."""

    streams: Streams
    clock: Clock

    def synchronize(self) -> None:
        _merge(self.streams.host, self.clock)


@dataclass(eq=False)
class Memory:
    """A storage: the stream that it was allocated on, its last write and its last use on each stream."""

    home: int
    size: int
    written: tuple[int, int]
    used: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Streams:
    """All streams, what the host waited for, and the faults that were seen."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.all: list[Stream] = []
        self.current = self.new()
        self.host: Clock = {}
        self.faults: list[str] = []
        self._memory: dict[int, Memory] = {}
        self._returning: list[Memory] = []  # released, but the allocator waits for a stream's event

    def new(self, *_device: Any) -> Stream:
        self.all.append(Stream(self, len(self.all)))
        return self.all[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def wait_for_current(self) -> None:
        """The host waits for the current stream, as a copy that is not asynchronous does."""
        self.current.record_event().synchronize()

    def used(self, what: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """An operation on the current stream that reads `given` and writes `made`."""
        here = self.current
        here.queued += 1
        _merge(here.seen, self.host)
        for x in given:
            if x.device.type == self.kind and (memory := self._memory.get(_key(x))) is not None:
                if not self._passed(here, *memory.written):
                    self.faults.append(f"{what}: used before its writing was waited for")
                memory.used[here.number] = here.queued
        for x in made:
            if x.device.type != self.kind or any(x is one for one in given):
                continue
            key, place = _key(x), (here.number, here.queued)
            if key not in self._memory:
                self._memory[key] = Memory(here.number, x.untyped_storage().nbytes(), place)

    def record(self, x: Tensor, stream: Stream) -> None:
        self._memory[_key(x)].recorded.add(stream.number)

    def released(self, key: int) -> None:
        memory = self._memory.pop(key, None)
        if memory is None:
            return
        for stream, place in memory.used.items():
            if stream == memory.home or self._passed(self.all[memory.home], stream, place):
                continue
            if stream in memory.recorded:
                self._returning.append(memory)
            else:
                self.faults.append("memory released while another stream may use it")

    def returning(self) -> int:
        """Bytes that were released and that the allocator cannot give out yet."""
        self._returning = [
            memory
            for memory in self._returning
            if any(self.host.get(stream, 0) < memory.used.get(stream, 0) for stream in memory.recorded)
        ]
        return sum(memory.size for memory in self._returning)

    def _passed(self, here: Stream, stream: int, place: int) -> bool:
        return stream == here.number or max(here.seen.get(stream, 0), self.host.get(stream, 0)) >= place


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _merge(clock: Clock, other: Clock) -> None:
    for stream, place in other.items():
        clock[stream] = max(clock.get(stream, 0), place)
