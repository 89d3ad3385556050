"""AR, NAR and codec as Ray Serve deployments. Each answers in the version that it is asked for."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from valle.model.chunks import Chunking
from valle.model.codec.encodec import Codec
from valle.model.codec.encodec_stream import DecoderState, decode_next
from valle.model.codec.interface import Codes
from valle.model.nar_decoding import Filler, Unfilled
from valle.model.precision import convert
from valle.model.tokens import FRAME_RATE, HOP
from valle.model.valle import Synthesis
from valle.platform import registry
from valle.serve.deployments.batching import Drain
from valle.serve.deployments.versions import Versioned
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Event, Finish, Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler
from valle.serve.engine.worker import EngineWorker
from valle.serve.web.prompts import PROMPT_FRAMES
from valle.serve.web.schema import AppArgs

Chunk = tuple[NDArray[np.int16], bool, bool]
"""New frames of the first codebook, whether they are the last, and if so because of the limit."""

TOGETHER = 32
"""Requests that a NAR or codec replica may hold; what fits is worked on at the same time."""


class ARDeployment(Versioned[EngineWorker]):
    """Phonemes and prompt to the first codebook, many requests at once (see engine.py)."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        max_frames = int(args.sentence_seconds * FRAME_RATE)

        def load(version: str) -> EngineWorker:
            ar = registry.load_ar(registry.resolve(version, tracking_uri), device)
            ar = convert(ar, args.precision)
            positions = ar.capacity(args.max_phonemes, PROMPT_FRAMES, max_frames)
            runner = Runner(
                ar, slots=args.slots, positions=positions, compiled=args.compiled,
                guided=args.guidance_scale > 1,
            )  # fmt: skip
            return EngineWorker(Engine(runner, Scheduler(args.slots)))

        super().__init__(load, EngineWorker.close, registry.pin(model, tracking_uri))

    async def stream(
        self, version: str, request: Request, chunking: Chunking
    ) -> AsyncGenerator[Chunk]:
        """The first codebook as it comes, in chunks."""
        codes: list[int] = []
        sizes = chunking.sizes()
        size = next(sizes)
        async with aclosing(self._events(version, request)) as events:
            async for event in events:
                codes += event.codes
                if event.finish is not None:
                    yield np.array(codes, np.int16), True, event.finish is Finish.LENGTH
                elif len(codes) >= size:
                    yield np.array(codes, np.int16), False, False
                    codes, size = [], next(sizes)

    async def generate(self, version: str, request: Request) -> tuple[NDArray[np.int16], bool]:
        """First codebook `[T]`, and whether the length limit ended it."""
        codes: list[int] = []
        finish = None
        async for event in self._events(version, request):
            codes += event.codes
            finish = event.finish
        return np.array(codes, np.int16), finish is Finish.LENGTH

    async def _events(self, version: str, request: Request) -> AsyncGenerator[Event]:
        async with self.use(version) as worker, aclosing(worker.stream(request)) as events:
            async for event in events:
                yield event

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has died."""
        for worker in self.loaded:
            worker.check()


class NARDeployment(Versioned[Drain[Unfilled, Codes]]):
    """First codebook to all eight, for all that wait and are alike in length."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        budget = int(args.batch_seconds * FRAME_RATE)

        def load(version: str) -> Drain[Unfilled, Codes]:
            nar = registry.load_nar(registry.resolve(version, tracking_uri), device)
            nar = convert(nar, args.precision)
            default = Synthesis()
            how = replace(
                default, nar=replace(default.nar, guidance_scale=args.guidance_scale),
                guided_levels=args.guided_levels,
            )  # fmt: skip
            filler = Filler(nar, args.nar_prompts)
            return Drain(partial(filler.fill_in, how=how.filling), _positions, budget)

        super().__init__(load, _forget, registry.pin(model, tracking_uri))

    async def fill_in(self, version: str, item: Unfilled) -> Codes:
        """Codes `[8, T]`."""
        async with self.use(version) as drain:
            return await drain.do(item)


@dataclass(frozen=True)
class _Coder:
    """A codec and what waits for it."""

    codec: Codec
    encoding: Drain[NDArray[np.float32], Codes]
    decoding: Drain[Codes, NDArray[np.float32]]


class CodecDeployment(Versioned[_Coder]):
    """Recordings to codes and codes to waveforms."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        budget = int(args.batch_seconds * FRAME_RATE)

        def load(version: str) -> _Coder:
            codec = registry.load_codec(registry.resolve(version, tracking_uri), device)
            encoding = Drain(codec.encode, lambda wave: len(wave) // HOP, budget)
            return _Coder(codec, encoding, Drain(codec.decode, _frames, budget))

        super().__init__(load, _forget, registry.pin(model, tracking_uri))

    async def encode(self, version: str, wave: NDArray[np.float32]) -> Codes:
        """Codes `[8, T]` of a recording."""
        async with self.use(version) as coder:
            return await coder.encoding.do(wave)

    async def identity(self, version: str) -> str:
        """Hash of the codec's weights."""
        async with self.use(version) as coder:
            return coder.codec.identity.sha256

    async def decode(self, version: str, codes: Codes) -> NDArray[np.float32]:
        """Samples at 24 kHz."""
        async with self.use(version) as coder:
            return await coder.decoding.do(codes)

    async def decode_next(
        self, version: str, codes: Codes, state: DecoderState | None
    ) -> tuple[NDArray[np.float32], DecoderState]:
        """Samples of a stream's next codes, and what the replica that decodes more has to know."""
        async with self.use(version) as coder:
            return await asyncio.to_thread(decode_next, coder.codec, codes, state)


def _positions(item: Unfilled) -> int:
    return item.positions


def _frames(codes: Codes) -> int:
    return int(codes.shape[1])


def _forget(model: object) -> None:
    """Nothing to stop: memory goes with the last reference."""


def _one_thread(device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)  # replicas, not threads, use the other cores
