"""Answers speech requests: the text sentence by sentence, each sent while the next is synthesized.

A slow client does not slow the synthesis down, because Serve buffers what it sends. A response of
one sentence, not in chunks, is a complete file with its length; all others are streamed.

When the client disconnects, Serve cancels the task of `create_speech` or closes the body that it
streams. Both close `prefetch`, the sentence's generator and the calls of deployments, down to
`EngineWorker.stream`: the engine aborts the request before its next step, and the slot is free. A
NAR or codec batch that has started is finished, and the result is dropped.
"""

import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
from fastapi import Response
from fastapi.responses import StreamingResponse

from valle.model.codec.interface import Codes
from valle.model.languages import espeak_voice
from valle.model.sampling import Sampling
from valle.model.sentences import PAUSE
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Synthesis
from valle.platform.registry import display_name
from valle.serve.app_args import AppArgs
from valle.serve.deployments.interface import Deployments
from valle.serve.engine.request import Request
from valle.serve.web.alias_watcher import AliasWatcher
from valle.serve.web.audio_formats import MEDIA_TYPES, encode_audio
from valle.serve.web.callers import Caller
from valle.serve.web.metrics import Metrics
from valle.serve.web.prefetch import prefetch
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import ApiError, SpeechRequest
from valle.serve.web.sentence import AudioChunk, stream_sentence, synthesize_sentence
from valle.serve.web.sentence_source import SentenceSource
from valle.serve.web.stats import SpeechStats
from valle.serve.web.streaming import audio_body, sse_body
from valle.serve.web.threads import run_encoding

logger = logging.getLogger("ray.serve")

PREFETCH_CHUNKS = 2
"""Chunks that may wait to be sent."""


@dataclass(frozen=True)
class Utterance:
    """A speech request after validation: all that synthesis needs."""

    request: SpeechRequest
    version: str
    """The model's, for all calls of the response."""
    sentences: SentenceSource
    prompt: Codes
    """`[8, P]`"""


class SpeechService:
    """Synthesizes the responses of one ingress replica."""

    def __init__(
        self,
        args: AppArgs,
        deployments: Deployments,
        prompts: PromptEncoder,
        watcher: AliasWatcher,
        metrics: Metrics,
    ) -> None:
        self._args, self._deployments = args, deployments
        self._prompts, self._watcher, self._metrics = prompts, watcher, metrics
        self._languages: dict[str, tuple[str, ...]] = {}  # by version

    async def create_speech(self, request: SpeechRequest, caller: Caller) -> Response:
        """The response, as soon as its first audio chunk is ready.

        Raises ApiError for a request that cannot be answered and OverloadedError for one that
        finds a queue full; later errors end the stream.
        """
        stats = SpeechStats(
            len(request.input), time.perf_counter(), sender=_sender(request, caller)
        )
        sentences = await SentenceSource.open(request, self._args)
        version = await self._watcher.version()
        voice = await self._choose_voice(request, version)
        if voice != espeak_voice(request.language):
            request = request.model_copy(update={"language": voice})
            sentences = await SentenceSource.open(request, self._args)
        prompt = await self._prompts.for_request(request, version, caller)
        utterance = Utterance(request, version, sentences, prompt)

        # the first chunk decides about the status and the kind of the response
        chunks = self._record(prefetch(self._synthesize(utterance), PREFETCH_CHUNKS), stats)
        first = await anext(chunks)
        headers = {"X-Seed": str(request.seed), "X-Model": display_name(version)}
        if request.stream_format == "sse":
            events = sse_body(first, chunks, request, sentences.n_phonemes, stats)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        media_type = MEDIA_TYPES[request.response_format]
        if not first.last or await sentences.has(1):
            headers["X-Hit-Limit"] = "unknown"  # sent before the end; SSE and the log say it there
            body = audio_body(first, chunks, request)
            return StreamingResponse(body, media_type=media_type, headers=headers)
        await chunks.aclose()
        data = await run_encoding(encode_audio, first.wave, request.response_format, request.speed)
        headers["X-Hit-Limit"] = str(first.hit_limit).lower()
        return Response(data, media_type=media_type, headers=headers)

    async def _choose_voice(self, request: SpeechRequest, version: str) -> str:
        """espeak's voice for the request's language: one of `AppArgs.languages`, or, without those,
        of the model's. Of a language's dialects, one stands for another: en-US for en-GB.

        Raises ApiError where there is none.
        """
        names = self._args.languages or self._languages.get(version)
        if names is None:
            names = self._languages[version] = await self._deployments.languages(version)
        allowed = sorted(set(map(espeak_voice, names)))
        voice = espeak_voice(request.language)
        if voice in allowed:
            return voice
        base = voice.split("-")[0]
        dialect = next((name for name in allowed if name.split("-")[0] == base), None)
        if dialect is None:
            message = f"language: {request.language} is not spoken here, only {', '.join(allowed)}"
            raise ApiError(400, message, "language")
        return dialect

    async def _synthesize(self, utterance: Utterance) -> AsyncGenerator[AudioChunk]:
        """The chunks of all sentences, up to the length limit of the response."""
        request, args = utterance.request, self._args
        max_seconds = min(request.max_seconds or args.max_seconds, args.max_seconds)
        remaining_frames = int(max_seconds * FRAME_RATE)
        chunked = args.chunked if request.chunked is None else request.chunked
        index = 0
        while await utterance.sentences.has(index):
            engine_request = self._engine_request(utterance, index, remaining_frames)
            # only the first sentence may be refused: later ones belong to a response that runs
            retry = index > 0
            if chunked:
                chunks = stream_sentence(
                    self._deployments,
                    utterance.version,
                    engine_request,
                    args.chunking(),
                    retry=retry,
                )
                async with aclosing(chunks):
                    async for chunk in chunks:
                        remaining_frames -= chunk.n_frames
                        yield await _mark_cut(chunk, remaining_frames, utterance.sentences, index)
            else:
                chunk = await synthesize_sentence(
                    self._deployments, utterance.version, engine_request, retry=retry
                )
                remaining_frames -= chunk.n_frames
                yield await _mark_cut(chunk, remaining_frames, utterance.sentences, index)
            if remaining_frames < 1:
                return
            index += 1

    def _engine_request(self, utterance: Utterance, index: int, remaining_frames: int) -> Request:
        """The AR request of a sentence."""
        request, args = utterance.request, self._args
        return Request(
            id=uuid.uuid4().hex,
            phonemes=utterance.sentences[index],
            prompt=utterance.prompt,
            sampling=Sampling(
                temperature=request.temperature,
                top_p=request.top_p,
                guidance_scale=args.guidance_scale,
                repetition_threshold=Synthesis().ar.repetition_threshold,
            ),
            max_frames=max(1, min(remaining_frames, int(args.max_sentence_seconds * FRAME_RATE))),
            # a seed for each sentence: two equal ones may sound different
            seed=(request.seed + index) % 2**63,
        )

    async def _record(
        self, chunks: AsyncGenerator[AudioChunk], stats: SpeechStats
    ) -> AsyncGenerator[AudioChunk]:
        """The same chunks with pauses between sentences; records statistics when they end."""
        pause_first = False
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    stats.add(chunk)
                    wave = np.concatenate([PAUSE, chunk.wave]) if pause_first else chunk.wave
                    yield replace(chunk, wave=wave)
                    pause_first = chunk.last
        finally:
            if stats.n_frames:  # zero for a request that was refused or cancelled before
                self._metrics.record_response(stats)
                logger.info("speech %s", stats)


def _sender(request: SpeechRequest, caller: Caller) -> str:
    """Key, request and voice for the log; a recording in the request is named by its hash."""
    voice = request.voice
    if request.ref_audio is not None:
        voice = f"inline:{hashlib.sha256(request.ref_audio.encode()).hexdigest()[:16]}"
    return f"{caller} voice={voice}"


async def _mark_cut(
    chunk: AudioChunk, remaining_frames: int, sentences: SentenceSource, index: int
) -> AudioChunk:
    """The chunk of a sentence, marked as cut where the sentence ends exactly at the response's
    limit and others would follow."""
    cut = chunk.last and remaining_frames < 1 and await sentences.has(index + 1)
    return replace(chunk, hit_limit=chunk.hit_limit or cut)
