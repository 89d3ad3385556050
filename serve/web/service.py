"""One request: its text sentence by sentence, spoken while the next is being made.

Serve takes what it is given, so a slow reader does not slow the making. The answer to one sentence
is a whole file, with its length; everything else is sent as it comes.
"""

import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from valle.model.codec.interface import Codes
from valle.model.sentences import PAUSE, sentence_phoneme_ids
from valle.model.text import languages
from valle.model.tokens import FRAME_RATE
from valle.serve.app_args import AppArgs
from valle.serve.deployments.backpressure import prefetch
from valle.serve.deployments.versions import AliasWatcher
from valle.serve.web.audio_formats import MEDIA_TYPES, AudioEncoder, encode_audio
from valle.serve.web.metrics import Metrics
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import ApiError, ErrorDetail, SpeechRequest
from valle.serve.web.sentence import (
    AudioChunk,
    engine_request,
    stream_sentence,
    synthesize_sentence,
)
from valle.serve.web.stats import SpeechStats

logger = logging.getLogger("ray.serve")

PREFETCH_CHUNKS = 2
"""Chunks that may wait for whoever reads them."""


class SpeechService:
    """Answers speech requests."""

    def __init__(
        self, args: AppArgs, prompts: PromptEncoder, watcher: AliasWatcher, metrics: Metrics
    ) -> None:
        self._args, self._prompts, self._watcher, self._metrics = args, prompts, watcher, metrics

    async def create_speech(self, request: SpeechRequest) -> Response:
        """The answer. What is wrong with the request, or its first sentence, is an ApiError."""
        stats = SpeechStats(len(request.input), time.perf_counter())
        sentences = await run_in_threadpool(_sentences, request, self._args)
        version = await self._watcher.version()
        prompt = await self._prompts.for_request(request, version)
        chunks = self._synthesize(version, sentences, prompt, request)
        chunks = self._count(prefetch(chunks, PREFETCH_CHUNKS), stats)
        first = await anext(chunks)
        headers = {"X-Seed": str(request.seed), "X-Model": version}
        if request.stream_format == "sse":
            events = _events(first, chunks, request, sum(map(len, sentences)), stats)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        media_type = MEDIA_TYPES[request.response_format]
        if len(sentences) > 1 or not first.last:
            body = _body(first, chunks, request)
            return StreamingResponse(body, media_type=media_type, headers=headers)
        await chunks.aclose()
        data = await run_in_threadpool(
            encode_audio, first.wave, request.response_format, request.speed
        )
        headers["X-Hit-Limit"] = str(first.hit_limit).lower()
        return Response(data, media_type=media_type, headers=headers)

    async def _synthesize(
        self, version: str, sentences: list[list[int]], prompt: Codes, request: SpeechRequest
    ) -> AsyncGenerator[AudioChunk]:
        """The chunks of all sentences, up to the length limit."""
        max_seconds = request.max_seconds or self._args.max_seconds
        remaining = int(min(max_seconds, self._args.max_seconds) * FRAME_RATE)
        max_frames = int(self._args.max_sentence_seconds * FRAME_RATE)
        chunked = self._args.chunked if request.chunked is None else request.chunked
        for number, ids in enumerate(sentences):
            # a seed for each: two equal sentences need not sound the same
            seed = (request.seed + number) % 2**63
            limit = max(1, min(remaining, max_frames))
            sentence_request = engine_request(
                ids, prompt, request, limit, seed, self._args.guidance_scale
            )
            retry = number > 0
            if chunked:
                chunks = stream_sentence(version, sentence_request, retry, self._args.chunking())
                async with aclosing(chunks):
                    async for chunk in chunks:
                        remaining -= chunk.frames
                        yield chunk
            else:
                chunk = await synthesize_sentence(version, sentence_request, retry)
                remaining -= chunk.frames
                yield chunk
            if remaining < 1:
                return

    async def _count(
        self, chunks: AsyncGenerator[AudioChunk], stats: SpeechStats
    ) -> AsyncGenerator[AudioChunk]:
        """The same chunks, with pauses between sentences; what they add up to is logged."""
        pause_first = False  # the first sentence has nothing to pause after
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    stats.add(chunk)
                    wave = np.concatenate([PAUSE, chunk.wave]) if pause_first else chunk.wave
                    yield replace(chunk, wave=wave)
                    pause_first = chunk.last
        finally:
            if stats.frames:  # else it was refused
                self._metrics.record_response(stats)
                logger.info("speech %s", stats)


async def _encode(
    first: AudioChunk, chunks: AsyncGenerator[AudioChunk], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """The file's bytes as sentences come."""
    encoder = AudioEncoder(request.response_format, request.speed)
    if data := await run_in_threadpool(encoder.add, first.wave):
        yield data
    async for chunk in chunks:
        if data := await run_in_threadpool(encoder.add, chunk.wave):
            yield data
    if data := await run_in_threadpool(encoder.finish):
        yield data


async def _body(
    first: AudioChunk, chunks: AsyncGenerator[AudioChunk], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """A failure past the first sentence breaks the connection: no client takes half for whole."""
    try:
        async with aclosing(chunks):
            async for data in _encode(first, chunks, request):
                yield data
    except Exception:
        logger.exception("an answer broke off after it had begun")
        raise


async def _events(
    first: AudioChunk,
    chunks: AsyncGenerator[AudioChunk],
    request: SpeechRequest,
    phonemes: int,
    stats: SpeechStats,
) -> AsyncIterator[str]:
    """OpenAI's server-sent events, the last one with our `hit_limit`. A failure past the first
    sentence is an `error` event."""
    try:
        async with aclosing(chunks):
            async for data in _encode(first, chunks, request):
                delta = base64.b64encode(data).decode()
                yield _event({"type": "speech.audio.delta", "audio": delta})
        usage = {
            "input_tokens": phonemes, "output_tokens": stats.frames,
            "total_tokens": phonemes + stats.frames,
        }  # fmt: skip
        done_event = {"type": "speech.audio.done", "usage": usage, "hit_limit": stats.hit_limit}
        yield _event(done_event)
    except Exception as error:  # the status is long sent: the stream itself has to say it
        logger.exception("a stream failed after it had begun")
        detail = (
            error.detail
            if isinstance(error, ApiError)
            else ErrorDetail(message="the server failed", type="server_error")
        )
        yield _event({"type": "error", "error": detail.model_dump()})


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _sentences(request: SpeechRequest, args: AppArgs) -> list[list[int]]:
    """Phoneme ids of each sentence that has something to say."""
    if request.language not in languages():
        message = f"language: espeak has no voice named {request.language!r} (try en-us, fr-fr)"
        raise ApiError(400, message, "language")
    if len(request.input) > args.max_characters:
        message = f"input: {len(request.input)} characters, limit {args.max_characters}"
        raise ApiError(400, message, "input")
    try:
        sentences = sentence_phoneme_ids(request.input, request.language)
    except ValueError as error:
        raise ApiError(400, str(error), "input") from error
    longest = max(map(len, sentences))
    if longest > args.max_phonemes:
        message = f"input: {longest} phonemes in one sentence, limit {args.max_phonemes}"
        raise ApiError(400, message, "input")
    return sentences
