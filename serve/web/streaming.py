"""Bodies of streamed responses: audio chunks to encoded bytes, or to server-sent events."""

import base64
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from valle.serve.deployments.interface import OverloadedError, UnavailableError
from valle.serve.web.audio_formats import AudioEncoder
from valle.serve.web.schema import ApiError, ErrorDetail, SpeechRequest
from valle.serve.web.sentence import AudioChunk
from valle.serve.web.stats import SpeechStats
from valle.serve.web.threads import run_encoding

logger = logging.getLogger("ray.serve")


async def audio_body(
    first: AudioChunk, chunks: AsyncGenerator[AudioChunk], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """The bytes of an audio file. An error breaks the connection, so that no client takes a part
    for the whole."""
    try:
        async with aclosing(chunks):
            async for data in _encode(first, chunks, request):
                yield data
    except Exception:
        logger.exception("a stream failed after it had begun")
        raise


async def sse_body(
    first: AudioChunk,
    chunks: AsyncGenerator[AudioChunk],
    request: SpeechRequest,
    count_phonemes: Callable[[], Awaitable[int]],
    stats: SpeechStats,
) -> AsyncIterator[str]:
    """OpenAI's server-sent events; the last one has `hit_limit` in addition. An error becomes an
    `error` event, because the status has been sent."""
    try:
        async with aclosing(chunks):
            async for data in _encode(first, chunks, request):
                delta = base64.b64encode(data).decode()
                yield _event({"type": "speech.audio.delta", "audio": delta})
        n_phonemes = await count_phonemes()
        usage = {
            "input_tokens": n_phonemes,
            "output_tokens": stats.n_frames,
            "total_tokens": n_phonemes + stats.n_frames,
        }
        yield _event({"type": "speech.audio.done", "usage": usage, "hit_limit": stats.hit_limit})
    except Exception as error:
        logger.exception("a stream failed after it had begun")
        yield _event({"type": "error", "error": _error_detail(error).model_dump()})


async def _encode(
    first: AudioChunk, chunks: AsyncGenerator[AudioChunk], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """The file's bytes as chunks come."""
    encoder = AudioEncoder(request.response_format, request.speed)
    if data := await run_encoding(encoder.add, first.wave):
        yield data
    async for chunk in chunks:
        if data := await run_encoding(encoder.add, chunk.wave):
            yield data
    if data := await run_encoding(encoder.finish):
        yield data


def _error_detail(error: Exception) -> ErrorDetail:
    if isinstance(error, ApiError):
        return error.detail
    if isinstance(error, OverloadedError | UnavailableError):
        message = "the server is busy or a model is not available; try again in a moment"
        return ErrorDetail(message=message, type="server_error", code="unavailable")
    return ErrorDetail(message="the server failed", type="server_error")


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content)}\n\n"
