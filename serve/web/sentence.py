"""One sentence through the AR, NAR and codec deployments: whole, or in chunks.

The whole sentence equals `model.valle.Synthesizer.synthesize`; in chunks its codes equal
`model.chunks.nar_decode_chunks`.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from valle.model.chunks import ChunkedNARDecoding, Chunking
from valle.model.codec.encodec_stream import MIN_FIRST_CHUNK, EncodecState
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARRequest
from valle.serve.deployments.interface import Deployments
from valle.serve.engine.request import Request
from valle.serve.web.prefetch import prefetch


@dataclass(frozen=True)
class AudioChunk:
    """Samples of a sentence that follow those of the chunk before."""

    wave: Wave
    n_frames: int
    last: bool
    """The sentence ends here."""
    hit_limit: bool
    """The length limit ended the sentence; False unless `last`."""


@dataclass(frozen=True)
class _SettledChunk:
    """Final codes of a sentence's next frames, ready for the codec."""

    codes: Codes
    """`[8, T]`"""
    last: bool
    hit_limit: bool


async def synthesize_sentence(
    deployments: Deployments, version: str, request: Request, *, retry: bool
) -> AudioChunk:
    """The whole sentence as one chunk. Raises OverloadedError when the AR deployment's queue is
    full; with `retry`, waits for a place in it."""
    chunk = await deployments.generate_codes(version, request, retry=retry)
    nar_request = NARRequest(
        request.phonemes, request.prompt, chunk.codes, complete=not chunk.hit_limit
    )
    codes = await deployments.nar_decode(version, nar_request)
    wave = await deployments.decode(version, codes)
    return AudioChunk(wave, codes.shape[1], last=True, hit_limit=chunk.hit_limit)


async def stream_sentence(
    deployments: Deployments, version: str, request: Request, chunking: Chunking, *, retry: bool
) -> AsyncGenerator[AudioChunk]:
    """The sentence chunk by chunk, while the AR model draws the rest. Raises as
    `synthesize_sentence` does."""
    state: EncodecState | None = None
    settled_chunks = _settled_chunks(deployments, version, request, chunking, retry=retry)
    # the NAR model works on the next chunk while the codec decodes this one
    async with aclosing(prefetch(settled_chunks, 1)) as chunks:
        async for chunk in chunks:
            n_frames = chunk.codes.shape[1]
            if state is None and chunk.last and n_frames < MIN_FIRST_CHUNK:
                # the whole sentence is shorter than the stream decoder's first chunk must be
                wave = await deployments.decode(version, chunk.codes)
            else:
                decoded = await deployments.decode_next(version, chunk.codes, state)
                wave, state = decoded.wave, decoded.state
            yield AudioChunk(wave, n_frames, chunk.last, chunk.hit_limit)


async def _settled_chunks(
    deployments: Deployments, version: str, request: Request, chunking: Chunking, *, retry: bool
) -> AsyncGenerator[_SettledChunk]:
    """AR chunks through the NAR model."""
    decoding = ChunkedNARDecoding(request.phonemes, request.prompt, chunking.lookahead)
    stream = deployments.stream_codes(version, request, chunking, retry=retry)
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            codes = await deployments.nar_decode(version, decoding.next_request(chunk))
            yield _SettledChunk(decoding.settle(codes), chunk.last, chunk.hit_limit)
