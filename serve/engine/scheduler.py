"""Scheduling of requests: first come, first served, one prefill at a time. No tensors here."""

from collections import deque

from valle.serve.engine.request import Request, RequestState
from valle.serve.engine.slots import Move, Slots


class Scheduler:
    """The queue, the request in prefill, and the slots of running requests."""

    def __init__(self, slots: int) -> None:
        self.slots = Slots(slots)
        self._queue: deque[RequestState] = deque()
        self._states: dict[str, RequestState] = {}
        self.prefilling: RequestState | None = None
        """The request in prefill, which gets a slot afterwards."""

    @property
    def idle(self) -> bool:
        """No request waits, is in prefill or runs."""
        return not self._states

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._states) - len(self.slots.request_ids) - (self.prefilling is not None)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError when its id is in use."""
        if request.id in self._states:
            raise ValueError(f"id: {request.id!r} is in use; give each request an id of its own")
        self._states[request.id] = state = RequestState(request)
        self._queue.append(state)

    def admit(self) -> RequestState | None:
        """Starts the prefill of the oldest request; None when another one is in prefill, no slot is
        free or the queue is empty."""
        while self._queue and self.prefilling is None and not self.slots.full:
            state = self._queue.popleft()
            if self._states.get(state.request.id) is state:  # else aborted in the queue
                self.prefilling = state
                return state
        return None

    def activate(self) -> RequestState:
        """Gives a slot to the request whose prefill is complete."""
        assert self.prefilling is not None, "admit() comes first"
        state, self.prefilling = self.prefilling, None
        state.slot = self.slots.allocate(state.request.id)
        return state

    def running(self) -> list[RequestState]:
        """Requests with a slot, in the order of their slots."""
        return [self._states[request_id] for request_id in self.slots.request_ids]

    def remove(self, request_id: str) -> Move | None:
        """Removes a request in any state; returns the move that keeps the slots dense."""
        state = self._states.pop(request_id)
        if state is self.prefilling:
            self.prefilling = None
        if state.slot is None:
            return None  # `admit` skips its entry in the queue
        if move := self.slots.release(state.slot):
            self._states[self.slots.request_ids[move.target]].slot = move.target
        return move

    def slot(self, request_id: str) -> int | None:
        """The slot of a request; None while it waits or is in prefill."""
        return self._states[request_id].slot

    def has_request(self, request_id: str) -> bool:
        """Whether a request waits, is in prefill or runs."""
        return request_id in self._states

    def request_ids(self) -> set[str]:
        """Ids of all requests that wait, are in prefill or run."""
        return set(self._states)

    def check_integrity(self) -> None:
        """Raises AssertionError when queue, states and slots disagree."""
        request_ids = self.slots.request_ids
        assert len(set(request_ids)) == len(request_ids) <= self.slots.count, (
            "a request has two slots"
        )
        for slot, request_id in enumerate(request_ids):
            assert self._states[request_id].slot == slot, f"{request_id} is not in its slot"
        queued = {id(state) for state in self._queue}
        for request_id, state in self._states.items():
            if state.slot is None:
                is_waiting = state is self.prefilling or id(state) in queued
                assert is_waiting, f"{request_id} has no slot and is not in the queue"
            else:
                assert request_id in request_ids, f"{request_id} has a slot that is not its own"
