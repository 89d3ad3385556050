"""Who speaks next: admission by priority and age, one text read at a time. No tensors here.

A request's place in the queue is fixed when it arrives: its time of arrival, less its priority in
seconds. An urgent request overtakes those that came shortly before it and never those that have
waited longer than its priority, so nobody starves, and no place has to be computed again.
"""

import heapq
import itertools
import time
from collections.abc import Callable

from valle.serve.engine.request import Request, RequestState
from valle.serve.engine.slots import Move, Slots


class Scheduler:
    """Queue, slots, and which stream is where."""

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots = Slots(slots)
        self._clock = clock
        self._count = itertools.count()
        self._queue: list[tuple[float, int, RequestState]] = []
        self._states: dict[str, RequestState] = {}
        self.prefilling: RequestState | None = None
        """Whose text is being read; it has a slot when that is done."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._states

    @property
    def n_waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._states) - len(self.slots.request_ids) - (self.prefilling is not None)

    def add(self, request: Request) -> None:
        """Puts a request in the queue. Raises ValueError when its id is in use."""
        if request.id in self._states:
            raise ValueError(f"id: {request.id!r} is in use")
        self._states[request.id] = state = RequestState(request)
        place = self._clock() - request.priority
        heapq.heappush(self._queue, (place, next(self._count), state))

    def admit(self) -> RequestState | None:
        """The next request to be read; None while one is, or when none waits or none fits."""
        while self._queue and self.prefilling is None and not self.slots.full:
            state = heapq.heappop(self._queue)[2]
            if self._states.get(state.request.id) is state:  # else aborted while it waited
                self.prefilling = state
                return state
        return None

    def activate(self) -> RequestState:
        """The request that has been read, now with a slot."""
        assert self.prefilling is not None, "admit() comes first"
        state, self.prefilling = self.prefilling, None
        state.slot = self.slots.allocate(state.request.id)
        return state

    def running(self) -> list[RequestState]:
        """Streams with a slot, in the order of their slots."""
        return [self._states[request_id] for request_id in self.slots.request_ids]

    def remove(self, request_id: str) -> Move | None:
        """Forgets a stream wherever it is; what must be moved to keep the slots dense."""
        state = self._states.pop(request_id)
        if state is self.prefilling:
            self.prefilling = None
        if state.slot is None:
            return None  # `admit` skips its place in the queue
        if move := self.slots.release(state.slot):
            self._states[self.slots.request_ids[move.target]].slot = move.target
        return move

    def slot(self, request_id: str) -> int | None:
        """The slot of a stream; None while it waits."""
        return self._states[request_id].slot

    def has_request(self, request_id: str) -> bool:
        """Whether a stream of this id waits, is read or runs."""
        return request_id in self._states

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not agree."""
        request_ids = self.slots.request_ids
        assert len(set(request_ids)) == len(request_ids) <= self.slots.count, (
            "a stream has two slots"
        )
        for slot, request_id in enumerate(request_ids):
            assert self._states[request_id].slot == slot, (
                f"{request_id} is not in the slot it thinks"
            )
        queued = {id(state) for _, _, state in self._queue}
        for request_id, state in self._states.items():
            if state.slot is None:
                is_waiting = state is self.prefilling or id(state) in queued
                assert is_waiting, f"{request_id} waits and is not in the queue"
            else:
                assert request_id in request_ids, f"{request_id} thinks it has a slot"
