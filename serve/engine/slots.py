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
        self._owners: list[str] = []

    @property
    def owners(self) -> tuple[str, ...]:
        """Ids of the streams in slots 0, 1, 2 ..."""
        return tuple(self._owners)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return len(self._owners) == self.count

    def take(self, owner: str) -> int:
        """Gives the next free slot to a stream; returns its number."""
        assert not self.full, "the scheduler admits no more than there are slots"
        self._owners.append(owner)
        return len(self._owners) - 1

    def release(self, slot: int) -> Move | None:
        """Frees a slot; the last one moves into the hole, if it is another."""
        last = len(self._owners) - 1
        assert 0 <= slot <= last, f"slot {slot} is not in use"
        owner = self._owners.pop()
        if slot == last:
            return None
        self._owners[slot] = owner
        return Move(source=last, target=slot)
