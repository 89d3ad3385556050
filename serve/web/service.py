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
from valle.model.sentences import PAUSE
from valle.model.text import languages
from valle.model.tokens import FRAME_RATE
from valle.model.valle import sentence_ids
from valle.serve.deployments.backpressure import ahead
from valle.serve.deployments.versions import Followed
from valle.serve.web.audio import MEDIA_TYPES, Encoder, encode
from valle.serve.web.metrics import Metrics
from valle.serve.web.prompts import Prompts
from valle.serve.web.schema import ApiError, AppArgs, ErrorDetail, SpeechRequest
from valle.serve.web.sentence import Piece, ask, say_in_chunks, say_whole
from valle.serve.web.stats import Speech

logger = logging.getLogger("ray.serve")

AHEAD = 2
"""Pieces that may wait for whoever reads them."""


class Speaker:
    """Answers speech requests."""

    def __init__(self, args: AppArgs, prompts: Prompts, model: Followed, metrics: Metrics) -> None:
        self._args, self._prompts, self._model, self._metrics = args, prompts, model, metrics

    async def speak(self, request: SpeechRequest) -> Response:
        """The answer. What is wrong with the request, or its first sentence, is an ApiError."""
        speech = Speech(len(request.input), time.perf_counter())
        sentences = await run_in_threadpool(_sentences, request, self._args)
        version = await self._model.version()
        prompt = await self._prompts.of(request, version)
        said = self._say(version, sentences, prompt, request)
        pieces = self._counted(ahead(said, AHEAD), speech)
        first = await anext(pieces)
        headers = {"X-Seed": str(request.seed), "X-Model": version}
        if request.stream_format == "sse":
            events = _events(first, pieces, request, sum(map(len, sentences)), speech)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        media_type = MEDIA_TYPES[request.response_format]
        if len(sentences) > 1 or not first.ends:
            body = _body(first, pieces, request)
            return StreamingResponse(body, media_type=media_type, headers=headers)
        await pieces.aclose()
        data = await run_in_threadpool(encode, first.wave, request.response_format, request.speed)
        headers["X-Hit-Limit"] = str(first.hit_limit).lower()
        return Response(data, media_type=media_type, headers=headers)

    async def _say(
        self, version: str, sentences: list[list[int]], prompt: Codes, request: SpeechRequest
    ) -> AsyncGenerator[Piece]:
        """The pieces of all sentences, up to the length limit."""
        asked_for = request.max_seconds or self._args.max_seconds
        left = int(min(asked_for, self._args.max_seconds) * FRAME_RATE)
        longest = int(self._args.sentence_seconds * FRAME_RATE)
        chunked = self._args.chunked if request.chunked is None else request.chunked
        for number, ids in enumerate(sentences):
            # a seed for each: two equal sentences need not sound the same
            seed = (request.seed + number) % 2**63
            limit = max(1, min(left, longest))
            asked = ask(ids, prompt, request, limit, seed, self._args.guidance_scale)
            insist = number > 0
            if chunked:
                said = say_in_chunks(version, asked, insist, self._args.chunking())
                async with aclosing(said):
                    async for piece in said:
                        left -= piece.frames
                        yield piece
            else:
                piece = await say_whole(version, asked, insist)
                left -= piece.frames
                yield piece
            if left < 1:
                return

    async def _counted(
        self, pieces: AsyncGenerator[Piece], speech: Speech
    ) -> AsyncGenerator[Piece]:
        """The same pieces, with pauses between sentences; what they add up to is logged."""
        begins = False  # the first sentence has nothing to pause after
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    speech.add(piece)
                    wave = np.concatenate([PAUSE, piece.wave]) if begins else piece.wave
                    yield replace(piece, wave=wave)
                    begins = piece.ends
        finally:
            if speech.frames:  # else it was refused
                self._metrics.spoken(speech)
                logger.info("speech %s", speech)


async def _encoded(
    first: Piece, pieces: AsyncGenerator[Piece], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """The file's bytes as sentences come."""
    encoder = Encoder(request.response_format, request.speed)
    if data := await run_in_threadpool(encoder.add, first.wave):
        yield data
    async for piece in pieces:
        if data := await run_in_threadpool(encoder.add, piece.wave):
            yield data
    if data := await run_in_threadpool(encoder.finish):
        yield data


async def _body(
    first: Piece, pieces: AsyncGenerator[Piece], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """A failure past the first sentence breaks the connection: no client takes half for whole."""
    try:
        async with aclosing(pieces):
            async for data in _encoded(first, pieces, request):
                yield data
    except Exception:
        logger.exception("an answer broke off after it had begun")
        raise


async def _events(
    first: Piece,
    pieces: AsyncGenerator[Piece],
    request: SpeechRequest,
    phonemes: int,
    speech: Speech,
) -> AsyncIterator[str]:
    """OpenAI's server-sent events, the last one with our `hit_limit`. A failure past the first
    sentence is an `error` event."""
    try:
        async with aclosing(pieces):
            async for data in _encoded(first, pieces, request):
                delta = base64.b64encode(data).decode()
                yield _event({"type": "speech.audio.delta", "audio": delta})
        usage = {
            "input_tokens": phonemes, "output_tokens": speech.frames,
            "total_tokens": phonemes + speech.frames,
        }  # fmt: skip
        done = {"type": "speech.audio.done", "usage": usage, "hit_limit": speech.hit_limit}
        yield _event(done)
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
        sentences = sentence_ids(request.input, request.language)
    except ValueError as error:
        raise ApiError(400, str(error), "input") from error
    longest = max(map(len, sentences))
    if longest > args.max_phonemes:
        message = f"input: {longest} phonemes in one sentence, limit {args.max_phonemes}"
        raise ApiError(400, message, "input")
    return sentences
