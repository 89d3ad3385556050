"""One request through the deployments: codec, AR, NAR, codec, sentence by sentence.

While a sentence is handed to Serve, the next is being made. Serve takes what it is given, so a
slow reader does not slow the making. The answer to one sentence is a whole file, with its length;
more are sent as they come.
"""

import asyncio
import base64
import binascii
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from fastapi import Response
from fastapi.responses import StreamingResponse
from ray import serve
from starlette.concurrency import run_in_threadpool

from valle.model.codec import Codes
from valle.model.sampling import Sampling
from valle.model.sentences import split
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.model.valle import Synthesis, text_ids
from valle.platform import audio
from valle.serve.audio import MEDIA_TYPES, Encoder, encode
from valle.serve.request import Request as EngineRequest
from valle.serve.schema import ApiError, AppArgs, ErrorDetail, SpeechRequest
from valle.serve.voices import LONGEST, VoiceError, VoiceStore

logger = logging.getLogger("ray.serve")

PROMPT_FRAMES = int(Synthesis().prompt_seconds * FRAME_RATE)
PAUSE = np.zeros(int(0.15 * SAMPLE_RATE), np.float32)
"""Between two sentences, beside what the model itself leaves."""


@dataclass(frozen=True)
class Piece:
    """One sentence, said."""

    wave: audio.Wave
    frames: int
    hit_limit: bool


async def speak(request: SpeechRequest, args: AppArgs) -> Response:
    """Answers a request. What is wrong with it, or with its first sentence, is an ApiError."""
    started = time.perf_counter()
    sentences = await run_in_threadpool(_sentences, request, args)
    wave = await run_in_threadpool(_reference, request, args)
    app = serve.get_replica_context().app_name
    prompt = await serve.get_deployment_handle("Codec", app).encode.remote(wave, PROMPT_FRAMES)
    pieces = _say(sentences, prompt, request, args)
    first = await anext(pieces)
    headers = {"X-Seed": str(request.seed)}
    if request.stream_format == "sse":
        events = _events(first, pieces, request, sum(map(len, sentences)))
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    media_type = MEDIA_TYPES[request.response_format]
    if len(sentences) > 1:
        body = _body(first, pieces, request)
        return StreamingResponse(body, media_type=media_type, headers=headers)
    whole = await run_in_threadpool(encode, first.wave, request.response_format, request.speed)
    seconds, duration = time.perf_counter() - started, first.frames / FRAME_RATE
    logger.info(
        "speech characters=%d audio_s=%.2f wall_s=%.2f real_time_factor=%.2f hit_limit=%s",
        len(request.input), duration, seconds, seconds / duration, first.hit_limit,
    )  # fmt: skip
    headers["X-Hit-Limit"] = str(first.hit_limit).lower()
    return Response(whole, media_type=media_type, headers=headers)


async def _say(
    sentences: list[list[int]], prompt: Codes, request: SpeechRequest, args: AppArgs
) -> AsyncGenerator[Piece]:
    """The sentences in turn, each begun while the one before it is being sent."""
    ahead = asyncio.create_task(_one(sentences[0], prompt, request, args, request.seed))
    try:
        for number in range(1, len(sentences) + 1):
            piece = await ahead
            if number < len(sentences):
                # a seed of its own: two equal sentences need not sound the same
                seed = (request.seed + number) % 2**63
                ahead = asyncio.create_task(_one(sentences[number], prompt, request, args, seed))
            yield piece
    finally:
        ahead.cancel()  # the client has gone: its slot is somebody else's


async def _one(
    ids: list[int], prompt: Codes, request: SpeechRequest, args: AppArgs, seed: int
) -> Piece:
    app = serve.get_replica_context().app_name
    ar, nar, codec = (serve.get_deployment_handle(name, app) for name in ("AR", "NAR", "Codec"))
    sampling = Sampling(
        temperature=request.temperature, top_p=request.top_p,
        repetition_threshold=Synthesis().ar.repetition_threshold,
    )  # fmt: skip
    asked = EngineRequest(
        id=uuid.uuid4().hex, phonemes=ids, prompt=prompt, sampling=sampling,
        max_frames=int(args.max_seconds * FRAME_RATE), seed=seed,
    )  # fmt: skip
    first, hit_limit = await ar.generate.remote(asked)
    if not len(first):
        raise ApiError(500, "the model stopped at once; try another seed", code="empty_speech")
    codes = await nar.generate.remote(ids, prompt, first)
    return Piece(await codec.decode.remote(codes), len(first), hit_limit)


async def _encoded(
    first: Piece, pieces: AsyncGenerator[Piece], request: SpeechRequest
) -> AsyncIterator[tuple[bytes, int]]:
    """The file's bytes, and how many frames each part adds, as sentences come."""
    encoder = Encoder(request.response_format, request.speed)
    yield await run_in_threadpool(encoder.add, first.wave), first.frames
    async for piece in pieces:
        wave = np.concatenate([PAUSE, piece.wave])
        yield await run_in_threadpool(encoder.add, wave), piece.frames
    yield await run_in_threadpool(encoder.finish), 0


async def _body(
    first: Piece, pieces: AsyncGenerator[Piece], request: SpeechRequest
) -> AsyncIterator[bytes]:
    """A failure past the first sentence breaks the connection: no client takes half for whole."""
    async with aclosing(pieces):
        async for data, _ in _encoded(first, pieces, request):
            if data:
                yield data


async def _events(
    first: Piece, pieces: AsyncGenerator[Piece], request: SpeechRequest, phonemes: int
) -> AsyncIterator[str]:
    """OpenAI's server-sent events. A failure past the first sentence is an `error` event."""
    frames = 0
    try:
        async with aclosing(pieces):
            async for data, more in _encoded(first, pieces, request):
                frames += more
                if data:
                    delta = base64.b64encode(data).decode()
                    yield _event({"type": "speech.audio.delta", "audio": delta})
        usage = {
            "input_tokens": phonemes, "output_tokens": frames, "total_tokens": phonemes + frames,
        }  # fmt: skip
        yield _event({"type": "speech.audio.done", "usage": usage})
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
    found, silent = [], None
    for sentence in split(request.input, request.language):
        try:
            ids = text_ids(sentence, request.language)
        except ValueError as error:
            silent = error
            continue
        if len(ids) > args.max_phonemes:
            message = f"input: {len(ids)} phonemes in one sentence, limit {args.max_phonemes}"
            raise ApiError(400, message, "input")
        found.append(ids)
    if not found:
        raise ApiError(400, str(silent or "text: nothing to say in it"), "input") from silent
    return found


def _reference(request: SpeechRequest, args: AppArgs) -> audio.Wave:
    """The recording whose voice is wanted, decoded under limits."""
    if request.ref_audio is not None:
        try:
            data = base64.b64decode(request.ref_audio, validate=True)
        except binascii.Error as error:
            raise ApiError(400, f"ref_audio: not base64 ({error})", "ref_audio") from error
        param = "ref_audio"
    elif request.voice:
        try:
            data, param = VoiceStore(args.voices).read(request.voice), "voice"
        except VoiceError as error:
            raise ApiError(404, str(error), "voice", error.code) from error
    else:
        raise ApiError(400, "give a voice, or a recording as ref_audio", "voice")
    try:
        return audio.read(data, max_seconds=LONGEST)
    except audio.AudioError as error:
        raise ApiError(400, f"{param}: {error}", param) from error
