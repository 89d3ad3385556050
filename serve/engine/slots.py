"""Slots of the key-value cache and the requests in them. Book-keeping only: no tensors here.

The slots in use are always the first ones, so that a decode step reads one dense block of the
cache without gathering rows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """The contents of slot `source` have to be copied to slot `target`."""

    source: int
    target: int


class Slots:
    """A fixed number of slots, in use from 0 on without gaps."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"slots: {count} is below 1")
        self.count = count
        self._request_ids: list[str] = []

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the requests in slots 0, 1, 2 ..."""
        return tuple(self._request_ids)

    @property
    def full(self) -> bool:
        """No slot is free."""
        return len(self._request_ids) == self.count

    def allocate(self, request_id: str) -> int:
        """Gives the first free slot to a request; returns its number."""
        assert not self.full, "the scheduler admits no more requests than there are slots"
        self._request_ids.append(request_id)
        return len(self._request_ids) - 1

    def release(self, slot: int) -> Move | None:
        """Frees a slot. The request in the last slot takes it, unless it was the last one."""
        last = len(self._request_ids) - 1
        assert 0 <= slot <= last, f"slot {slot} is not in use"
        request_id = self._request_ids.pop()
        if slot == last:
            return None
        self._request_ids[slot] = request_id
        return Move(source=last, target=slot)
