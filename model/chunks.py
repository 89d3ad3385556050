"""Speech in chunks: how much of a sentence is filled in and spoken while the rest is not yet said.

The NAR model was trained to see both sides of a frame. So it fills in all that the AR model has
said so far, and the last `lookahead` frames of that wait for the next chunk. Frames that were
spoken stay as they are: the new ones follow what was heard.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from valle.model.codec.interface import Codes
from valle.model.nar_decoding import NARRequest
from valle.model.tokens import FRAME_RATE


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Sizes of the chunks."""

    first_frames: int = 15
    """Frames that are spoken at first, 0.2 s."""

    growth: float = 1.6
    """Each chunk over the one before it: there is more and more sound that still plays."""

    max_frames: int = 2 * FRAME_RATE
    """Frames of a chunk, at most."""

    lookahead: int = 12
    """Frames that the NAR model sees beyond those that are spoken."""

    def sizes(self) -> Iterator[int]:
        """New frames of the first codebook that each chunk waits for."""
        size = self.first_frames
        yield min(size, self.max_frames) + self.lookahead
        while True:
            size = min(int(size * self.growth), self.max_frames)
            yield size


def nar_decode_chunks(
    decode: Callable[[NARRequest], Codes], request: NARRequest, chunking: Chunking, group_size: int
) -> Codes:
    """All codebooks `[8, T]` of a sentence, each chunk filled in as it is known when it is due.

    `group_size` is what the AR model says at a time: a chunk ends where a group does. Where the
    sentence ends at that very frame, that is not known yet, unless it was cut there (it is not
    `complete`).
    """
    n_frames = len(request.first_codebook)
    prefix: Codes | None = None
    due = 0
    for size in chunking.sizes():
        due += -(-size // group_size) * group_size
        if due > n_frames or (due == n_frames and not request.complete):
            return decode(replace(request, prefix=prefix))
        chunk = replace(
            request, first_codebook=request.first_codebook[:due], prefix=prefix, complete=False
        )
        codes = decode(chunk)
        prefix = codes[:, : due - chunking.lookahead]
    raise AssertionError("sizes never end")
