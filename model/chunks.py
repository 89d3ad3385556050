"""Speech in chunks: how much of a sentence is filled in and spoken while the rest is not yet said.

The NAR model was trained to see both sides of a frame. So it fills in all that the AR model has
said so far, and the last `look_ahead` frames of that wait for the next chunk. Frames that were
spoken stay as they are: the new ones follow what was heard.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from valle.model.codec.interface import Codes
from valle.model.nar_decoding import Unfilled
from valle.model.tokens import FRAME_RATE


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Sizes of the chunks."""

    first: int = 15
    """Frames that are spoken at first, 0.2 s."""

    growth: float = 1.6
    """Each chunk over the one before it: there is more and more sound that still plays."""

    longest: int = 2 * FRAME_RATE
    """Frames of a chunk, at most."""

    look_ahead: int = 12
    """Frames that the NAR model sees beyond those that are spoken."""

    def sizes(self) -> Iterator[int]:
        """New frames of the first codebook that each chunk waits for."""
        size = self.first
        yield min(size, self.longest) + self.look_ahead
        while True:
            size = min(int(size * self.growth), self.longest)
            yield size


def fill_in_chunks(
    fill_in: Callable[[Unfilled], Codes], whole: Unfilled, chunking: Chunking, group: int
) -> Codes:
    """All codebooks `[8, T]` of a sentence, each chunk filled in as it is known when it is due.

    `group` is what the AR model says at a time: a chunk ends where a group does. Where the sentence
    ends at that very frame, that is not known yet, unless it was cut there (it has not `ended`).
    """
    first = whole.first
    spoken: Codes | None = None
    due = 0
    for size in chunking.sizes():
        due += -(-size // group) * group
        if due > len(first) or (due == len(first) and not whole.ended):
            return fill_in(replace(whole, spoken=spoken))
        codes = fill_in(replace(whole, first=first[:due], spoken=spoken, ended=False))
        spoken = codes[:, : due - chunking.look_ahead]
    raise AssertionError("sizes never end")
