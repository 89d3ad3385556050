"""Chunked NAR decoding: a sentence is decoded and played while the AR model still generates it.

The NAR model was trained with context on both sides of a frame. Each chunk therefore decodes all
frames so far, and its last `lookahead` frames are decoded again with the next chunk. Frames before
those may have been played: they are the next chunk's fixed prefix.

Legend: Q codebooks, T frames.
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
    """Frames played from the first chunk: 0.2 s."""

    growth: float = 1.6
    """Ratio of each chunk to the one before it: the buffer of unplayed sound grows."""

    max_frames: int = 2 * FRAME_RATE
    """Largest chunk."""

    lookahead: int = 12
    """Frames that the NAR model sees after those that are played."""

    def sizes(self) -> Iterator[int]:
        """New frames of the first codebook that each chunk waits for, without end."""
        size = self.first_frames
        yield min(size, self.max_frames) + self.lookahead
        while True:
            size = min(int(size * self.growth), self.max_frames)
            yield size


def nar_decode_chunks(
    decode: Callable[[NARRequest], Codes], request: NARRequest, chunking: Chunking, group_size: int
) -> Codes:
    """All codebooks `[Q, T]` of a sentence, decoded in the chunks that streaming decodes: the slow
    reference for it.

    `group_size` is the AR model's: chunks end at the end of a group. A chunk that ends at the last
    frame of a complete sentence does not know it, since EOS comes with the next group; one that
    ends at the length limit (the request is not `complete`) is the last.
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
