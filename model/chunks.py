"""Chunked synthesis: the first frames of a sentence are decoded while the AR model draws the rest.

The NAR model was trained to see frames on both sides. For each chunk it therefore decodes all
frames that the AR model has drawn so far, and the last `lookahead` of them are left to the next
chunk. Frames that a chunk has settled do not change any more: they are the prefix of the next one.

`ChunkCollector` decides when a chunk is due, `ChunkedNARDecoding` what it settles. The endpoint
runs them in two processes, `nar_decode_chunks` in one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from valle.model.codec.interface import Codes
from valle.model.nar_decoding import NARRequest
from valle.model.tokens import FRAME_RATE


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Sizes of the chunks."""

    first_frames: int = 15
    """Frames of the first chunk: 0.2 s."""

    growth: float = 1.6
    """Size of a chunk over the size of the one before it: the audio that still plays gives more
    and more time for the next chunk."""

    max_frames: int = 2 * FRAME_RATE
    """Upper bound of a chunk, in frames."""

    lookahead: int = 12
    """Frames that the NAR model sees beyond the end of a chunk."""

    def sizes(self) -> Iterator[int]:
        """New frames of the first codebook that each chunk needs, without end."""
        size = self.first_frames
        yield min(size, self.max_frames) + self.lookahead
        while True:
            size = min(int(size * self.growth), self.max_frames)
            yield size


@dataclass(frozen=True)
class CodesChunk:
    """Frames of a sentence's first codebook that follow those of the chunk before."""

    codes: NDArray[np.int16]
    """`[T]`; none where the sentence ended right after the last chunk."""

    last: bool
    """The sentence ends here."""

    hit_limit: bool
    """The length limit ended the sentence; False unless `last`."""


class ChunkCollector:
    """Collects the AR model's frames until a chunk is due."""

    def __init__(self, chunking: Chunking) -> None:
        self._sizes = chunking.sizes()
        self._size = next(self._sizes)
        self._codes: list[int] = []

    def add(self, codes: Iterable[int]) -> CodesChunk | None:
        """Appends frames; returns a chunk when enough are there."""
        self._codes += codes
        if len(self._codes) < self._size:
            return None
        self._size = next(self._sizes)
        return self._take(last=False, hit_limit=False)

    def finish(self, codes: Iterable[int], *, hit_limit: bool) -> CodesChunk:
        """Appends the sentence's last frames; returns the last chunk."""
        self._codes += codes
        return self._take(last=True, hit_limit=hit_limit)

    def _take(self, *, last: bool, hit_limit: bool) -> CodesChunk:
        codes, self._codes = np.array(self._codes, np.int16), []
        return CodesChunk(codes, last, hit_limit)


class ChunkedNARDecoding:
    """NAR decoding of one sentence chunk by chunk: `next_request`, a NAR model, `settle`."""

    def __init__(self, phonemes: list[int], prompt: Codes, lookahead: int) -> None:
        self._request = NARRequest(phonemes, prompt, np.zeros(0, np.int16), complete=False)
        self._lookahead = lookahead
        self._end = 0

    def next_request(self, chunk: CodesChunk) -> NARRequest:
        """The NAR request of all frames so far, those of `chunk` included."""
        first_codebook = np.concatenate([self._request.first_codebook, chunk.codes])
        self._request = replace(
            self._request,
            first_codebook=first_codebook,
            complete=chunk.last and not chunk.hit_limit,
        )
        self._end = len(first_codebook) - (0 if chunk.last else self._lookahead)
        return self._request

    def settle(self, codes: Codes) -> Codes:
        """Takes the decoded `[8, T]` of the last request; returns the frames of it that are new and
        final `[8, S]`."""
        prefix = self._request.prefix
        start = 0 if prefix is None else prefix.shape[1]
        self._request = replace(self._request, prefix=codes[:, : self._end])
        return codes[:, start : self._end]


def nar_decode_chunks(
    decode: Callable[[NARRequest], Codes], request: NARRequest, chunking: Chunking, group_size: int
) -> Codes:
    """All codebooks `[8, T]` of a sentence as the endpoint decodes it in chunks.

    `group_size` is the AR model's: a chunk ends where a group ends.
    """
    decoding = ChunkedNARDecoding(request.phonemes, request.prompt, chunking.lookahead)
    chunks = _replay(request, chunking, group_size)
    settled = [decoding.settle(decode(decoding.next_request(chunk))) for chunk in chunks]
    return np.concatenate(settled, axis=1)


def _replay(request: NARRequest, chunking: Chunking, group_size: int) -> Iterator[CodesChunk]:
    """The chunks in which the AR model would have given the request's first codebook."""
    collector = ChunkCollector(chunking)
    codes, hit_limit = request.first_codebook, not request.complete
    for start in range(0, len(codes), group_size):
        end = start + group_size
        group = codes[start:end].tolist()
        # EOS ends a sentence within a group or as the first frame of the next one; the limit ends
        # it with the frame that reaches it
        if end > len(codes) or (end == len(codes) and hit_limit):
            yield collector.finish(group, hit_limit=hit_limit)
            return
        if (chunk := collector.add(group)) is not None:
            yield chunk
    yield collector.finish([], hit_limit=False)
