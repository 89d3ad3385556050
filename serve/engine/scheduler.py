"""Who speaks next: admission by urgency and age, one text read at a time. No tensors here.

A request's place in the queue is fixed when it arrives: its time of arrival, less its urgency in
seconds. An urgent request overtakes those that came shortly before it and never those that have
waited longer than its urgency, so nobody starves, and no place has to be computed again.
"""

import heapq
import itertools
import time
from collections.abc import Callable

from valle.serve.engine.request import Request, Stream
from valle.serve.engine.slots import Move, Slots


class Scheduler:
    """Queue, slots, and which stream is where."""

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots = Slots(slots)
        self._clock = clock
        self._count = itertools.count()
        self._queue: list[tuple[float, int, Stream]] = []
        self._streams: dict[str, Stream] = {}
        self.reading: Stream | None = None
        """Whose text is being read; it has a slot when that is done."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._streams

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._streams) - len(self.slots.owners) - (self.reading is not None)

    def add(self, request: Request) -> None:
        """Puts a request in the queue. Raises ValueError when its id is in use."""
        if request.id in self._streams:
            raise ValueError(f"id: {request.id!r} is in use")
        self._streams[request.id] = stream = Stream(request)
        place = self._clock() - request.urgency
        heapq.heappush(self._queue, (place, next(self._count), stream))

    def admit(self) -> Stream | None:
        """The next request to be read; None while one is, or when none waits or none fits."""
        while self._queue and self.reading is None and not self.slots.full:
            stream = heapq.heappop(self._queue)[2]
            if self._streams.get(stream.request.id) is stream:  # else aborted while it waited
                self.reading = stream
                return stream
        return None

    def seat(self) -> Stream:
        """The request that has been read, now with a slot."""
        assert self.reading is not None, "admit() comes first"
        stream, self.reading = self.reading, None
        stream.slot = self.slots.take(stream.request.id)
        return stream

    def running(self) -> list[Stream]:
        """Streams with a slot, in the order of their slots."""
        return [self._streams[name] for name in self.slots.owners]

    def remove(self, name: str) -> Move | None:
        """Forgets a stream wherever it is; what must be moved to keep the slots dense."""
        stream = self._streams.pop(name)
        if stream is self.reading:
            self.reading = None
        if stream.slot is None:
            return None  # `admit` skips its place in the queue
        if move := self.slots.release(stream.slot):
            self._streams[self.slots.owners[move.target]].slot = move.target
        return move

    def slot(self, name: str) -> int | None:
        """The slot of a stream; None while it waits."""
        return self._streams[name].slot

    def knows(self, name: str) -> bool:
        """Whether a stream of this id waits, is read or runs."""
        return name in self._streams

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not agree."""
        owners = self.slots.owners
        assert len(set(owners)) == len(owners) <= self.slots.count, "a stream has two slots"
        for slot, name in enumerate(owners):
            assert self._streams[name].slot == slot, f"{name} is not in the slot it thinks"
        queued = {id(stream) for _, _, stream in self._queue}
        for name, stream in self._streams.items():
            if stream.slot is None:
                known = stream is self.reading or id(stream) in queued
                assert known, f"{name} waits and is not in the queue"
            else:
                assert name in owners, f"{name} thinks it has a slot"
