"""Which stream has which slot of the key-value memory. Book-keeping only: no tensors here.

Slots in use are always the first ones: a decode step then reads one dense block, without gathering.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """The contents of slot `source` are to be copied to slot `target`."""

    source: int
    target: int


class Slots:
    """A fixed number of slots, dense from 0."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"slots: {count} is below 1")
        self.count = count
        self._request_ids: list[str] = []

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the streams in slots 0, 1, 2 ..."""
        return tuple(self._request_ids)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return len(self._request_ids) == self.count

    def allocate(self, request_id: str) -> int:
        """Gives the next free slot to a stream; returns its number."""
        assert not self.full, "the scheduler admits no more than there are slots"
        self._request_ids.append(request_id)
        return len(self._request_ids) - 1

    def release(self, slot: int) -> Move | None:
        """Frees a slot; the last one moves into the hole, if it is another."""
        last = len(self._request_ids) - 1
        assert 0 <= slot <= last, f"slot {slot} is not in use"
        request_id = self._request_ids.pop()
        if slot == last:
            return None
        self._request_ids[slot] = request_id
        return Move(source=last, target=slot)
