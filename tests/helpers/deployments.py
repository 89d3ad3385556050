"""`Deployments` in the process of a test: deterministic stand-ins for the models, with delays,
refusals and failures on demand."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from valle.model.chunks import ChunkCollector, Chunking, CodesChunk
from valle.model.codec.encodec_stream import MIN_FIRST_CHUNK, EncodecState
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARRequest
from valle.model.tokens import CODEBOOK_SIZE, HOP, N_CODEBOOKS
from valle.serve.deployments.interface import DecodedChunk, OverloadedError
from valle.serve.engine.request import Request

GROUP = 2
"""Frames of an AR step."""


@dataclass(frozen=True)
class Call:
    """One call of a method of `FakeDeployments`."""

    method: str
    version: str
    request: Request | None = None
    """The AR request, in calls that have one."""


@dataclass
class FakeDeployments:
    """Codes and samples are arithmetic of the request; each frame's samples also depend on how many
    frames the NAR model saw when it decoded that frame."""

    ar_slots: int = 100
    """Calls that the AR model runs at the same time; another one finds the queue full."""

    frames_per_phoneme: int = 3

    ends_at_limit: bool = False
    """A sentence of just the length limit ends by itself."""

    missing: list[str] = field(default_factory=list)
    """What `not_running` returns."""

    calls: list[Call] = field(default_factory=list)
    running: Counter[str] = field(default_factory=Counter)
    """Calls in progress, by method."""
    n_queued: int = 0
    """Calls that wait for a full queue of the AR model."""

    _holds: dict[str, asyncio.Event] = field(default_factory=dict)
    _failures: dict[str, tuple[int, Exception]] = field(default_factory=dict)

    def hold(self, method: str) -> asyncio.Event:
        """Makes calls of a method wait until the event is set."""
        self._holds[method] = asyncio.Event()
        return self._holds[method]

    def fail(self, method: str, error: Exception, after: int = 0) -> None:
        """Makes the calls of a method raise, after `after` more that succeed."""
        self._failures[method] = self.count(method) + after, error

    def count(self, method: str) -> int:
        """Calls of a method so far."""
        return sum(call.method == method for call in self.calls)

    @asynccontextmanager
    async def _call(
        self, method: str, version: str, request: Request | None = None
    ) -> AsyncIterator[None]:
        self.calls.append(Call(method, version, request))
        self.running[method] += 1
        try:
            await asyncio.sleep(0)  # as every remote call, it lets others run
            if method in self._holds:
                await self._holds[method].wait()
            after, error = self._failures.get(method, (0, None))
            if error is not None and self.count(method) > after:
                raise error
            yield
        finally:
            self.running[method] -= 1

    @asynccontextmanager
    async def _ar_call(
        self, method: str, version: str, request: Request, retry: bool
    ) -> AsyncIterator[None]:
        if self._ar_is_full() and not retry:
            raise OverloadedError
        self.n_queued += 1
        try:
            while self._ar_is_full():
                await asyncio.sleep(0.001)
        finally:
            self.n_queued -= 1
        async with self._call(method, version, request):
            yield

    def _ar_is_full(self) -> bool:
        running = self.running["stream_codes"] + self.running["generate_codes"]
        return running >= self.ar_slots

    async def stream_codes(
        self, version: str, request: Request, chunking: Chunking, *, retry: bool
    ) -> AsyncGenerator[CodesChunk]:
        collector = ChunkCollector(chunking)
        codes, hit_limit = self.first_codebook(request)
        async with self._ar_call("stream_codes", version, request, retry):
            for start in range(0, len(codes), GROUP):
                await asyncio.sleep(0)
                chunk = collector.add(codes[start : start + GROUP].tolist())
                if chunk is not None:
                    yield chunk
            yield collector.finish([], hit_limit=hit_limit)

    async def generate_codes(self, version: str, request: Request, *, retry: bool) -> CodesChunk:
        async with self._ar_call("generate_codes", version, request, retry):
            codes, hit_limit = self.first_codebook(request)
            return CodesChunk(codes, last=True, hit_limit=hit_limit)

    async def nar_decode(self, version: str, request: NARRequest) -> Codes:
        async with self._call("nar_decode", version):
            return all_codebooks(request)

    async def encode(self, version: str, wave: Wave) -> Codes:
        async with self._call("encode", version):
            return recording_codes(wave)

    async def decode(self, version: str, codes: Codes) -> Wave:
        async with self._call("decode", version):
            return samples(codes)

    async def decode_next(
        self, version: str, codes: Codes, state: EncodecState | None
    ) -> DecodedChunk:
        async with self._call("decode_next", version):
            n_before = 0 if state is None else len(state.tensors[0])
            assert n_before or codes.shape[1] >= MIN_FIRST_CHUNK, "the first chunk is too short"
            state = EncodecState((np.zeros(n_before + codes.shape[1], np.float32),))
            return DecodedChunk(samples(codes), state)

    async def codec_sha256(self, version: str) -> str:
        async with self._call("codec_sha256", version):
            return f"codec of {version}"

    async def languages(self, version: str) -> tuple[str, ...]:
        async with self._call("languages", version):
            return ("en-us",)

    async def preload(self, version: str) -> None:
        async with self._call("preload", version):
            pass

    async def forget_prompts(self) -> None:
        async with self._call("forget_prompts", ""):
            pass

    async def not_running(self) -> list[str]:
        return self.missing

    def first_codebook(self, request: Request) -> tuple[Codes, bool]:
        """Frames by the number of phonemes, drawn by the seed; and whether the limit cut them."""
        n_frames = self.frames_per_phoneme * len(request.phonemes)
        codes = np.random.default_rng(request.seed).integers(0, CODEBOOK_SIZE, n_frames)
        cut = (
            n_frames > request.max_frames if self.ends_at_limit else n_frames >= request.max_frames
        )
        return codes.astype(np.int16)[: request.max_frames], cut


def all_codebooks(request: NARRequest) -> Codes:
    """Codes `[8, T]` that depend on the number of frames and on the prompt, after the prefix."""
    n_frames = len(request.first_codebook)
    levels = np.arange(N_CODEBOOKS)[:, None] * (n_frames + int(request.prompt[0, 0]))
    codes = ((request.first_codebook[None] + levels) % CODEBOOK_SIZE).astype(np.int16)
    if request.prefix is not None:
        codes[:, : request.prefix.shape[1]] = request.prefix
    return codes


def recording_codes(wave: Wave) -> Codes:
    """Codes `[8, T]` of a recording: the loudness of each frame."""
    frames = np.abs(wave[: len(wave) // HOP * HOP].reshape(-1, HOP)).mean(1)
    return np.tile((frames * 1000).astype(np.int16) % CODEBOOK_SIZE, (N_CODEBOOKS, 1))


def samples(codes: Codes) -> Wave:
    """Samples of codes `[8, T]`, each frame's from its own codes."""
    levels = codes.astype(np.float32).mean(0) / CODEBOOK_SIZE
    return np.repeat(levels, HOP).astype(np.float32)
