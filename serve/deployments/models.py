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
from valle.model.codec.encodec import Encodec
from valle.model.codec.encodec_stream import EncodecState, decode_next
from valle.model.codec.interface import Codes
from valle.model.nar_decoding import NARDecoder, NARRequest
from valle.model.quantize import convert
from valle.model.tokens import FRAME_RATE, HOP
from valle.model.valle import Synthesis
from valle.platform import registry
from valle.serve.app_args import AppArgs
from valle.serve.deployments.batching import DynamicBatcher
from valle.serve.deployments.versions import MultiVersionDeployment
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason, Request, StepOutput
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler
from valle.serve.engine.worker import EngineWorker
from valle.serve.web.prompts import PROMPT_FRAMES

CodesChunk = tuple[NDArray[np.int16], bool, bool]
"""New frames of the first codebook, whether they are the last, and if so because of the limit."""

MAX_ONGOING_REQUESTS = 32
"""Requests that a NAR or codec replica may hold; what fits is worked on at the same time."""


class ARDeployment(MultiVersionDeployment[EngineWorker]):
    """Phonemes and prompt to the first codebook, many requests at once (see engine.py)."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        max_frames = int(args.max_sentence_seconds * FRAME_RATE)

        def load(version: str) -> EngineWorker:
            ar = registry.load_ar(registry.resolve(version, tracking_uri), device)
            ar = convert(ar, args.precision)
            max_positions = ar.capacity(args.max_phonemes, PROMPT_FRAMES, max_frames)
            runner = Runner(
                ar, slots=args.slots, max_positions=max_positions, compiled=args.compiled,
                guided=args.guidance_scale > 1,
            )  # fmt: skip
            return EngineWorker(Engine(runner, Scheduler(args.slots)))

        super().__init__(load, EngineWorker.close, registry.pin(model, tracking_uri))

    async def stream(
        self, version: str, request: Request, chunking: Chunking
    ) -> AsyncGenerator[CodesChunk]:
        """The first codebook as it comes, in chunks."""
        codes: list[int] = []
        sizes = chunking.sizes()
        size = next(sizes)
        async with aclosing(self._outputs(version, request)) as outputs:
            async for output in outputs:
                codes += output.codes
                if output.finish_reason is not None:
                    yield (
                        np.array(codes, np.int16),
                        True,
                        output.finish_reason is FinishReason.LENGTH,
                    )
                elif len(codes) >= size:
                    yield np.array(codes, np.int16), False, False
                    codes, size = [], next(sizes)

    async def generate(self, version: str, request: Request) -> tuple[NDArray[np.int16], bool]:
        """First codebook `[T]`, and whether the length limit ended it."""
        codes: list[int] = []
        finish_reason = None
        async for output in self._outputs(version, request):
            codes += output.codes
            finish_reason = output.finish_reason
        return np.array(codes, np.int16), finish_reason is FinishReason.LENGTH

    async def _outputs(self, version: str, request: Request) -> AsyncGenerator[StepOutput]:
        async with self.lease(version) as worker, aclosing(worker.stream(request)) as outputs:
            async for output in outputs:
                yield output

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has died."""
        for worker in self.models:
            worker.check_health()


class NARDeployment(MultiVersionDeployment[DynamicBatcher[NARRequest, Codes]]):
    """First codebook to all eight, for all that wait and are alike in length."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        budget = int(args.batch_seconds * FRAME_RATE)

        def load(version: str) -> DynamicBatcher[NARRequest, Codes]:
            nar = registry.load_nar(registry.resolve(version, tracking_uri), device)
            nar = convert(nar, args.precision)
            default = Synthesis()
            synthesis = replace(
                default, nar=replace(default.nar, guidance_scale=args.guidance_scale),
                guided_levels=args.guided_levels,
            )  # fmt: skip
            nar_decoder = NARDecoder(nar, args.nar_prompt_cache_size)
            return DynamicBatcher(
                partial(nar_decoder.decode, decoding=synthesis.nar_decoding), _positions, budget
            )

        super().__init__(load, _forget, registry.pin(model, tracking_uri))

    async def generate(self, version: str, item: NARRequest) -> Codes:
        """Codes `[8, T]`."""
        async with self.lease(version) as batcher:
            return await batcher.submit(item)


@dataclass(frozen=True)
class _Coder:
    """A codec and what waits for it."""

    codec: Encodec
    encoding: DynamicBatcher[NDArray[np.float32], Codes]
    decoding: DynamicBatcher[Codes, NDArray[np.float32]]


class CodecDeployment(MultiVersionDeployment[_Coder]):
    """Recordings to codes and codes to waveforms."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        budget = int(args.batch_seconds * FRAME_RATE)

        def load(version: str) -> _Coder:
            codec = registry.load_codec(registry.resolve(version, tracking_uri), device)
            encoding = DynamicBatcher(codec.encode, lambda wave: len(wave) // HOP, budget)
            return _Coder(codec, encoding, DynamicBatcher(codec.decode, _frames, budget))

        super().__init__(load, _forget, registry.pin(model, tracking_uri))

    async def encode(self, version: str, wave: NDArray[np.float32]) -> Codes:
        """Codes `[8, T]` of a recording."""
        async with self.lease(version) as coder:
            return await coder.encoding.submit(wave)

    async def codec_sha256(self, version: str) -> str:
        """Hash of the codec's weights."""
        async with self.lease(version) as coder:
            return coder.codec.identity.sha256

    async def decode(self, version: str, codes: Codes) -> NDArray[np.float32]:
        """Samples at 24 kHz."""
        async with self.lease(version) as coder:
            return await coder.decoding.submit(codes)

    async def decode_next(
        self, version: str, codes: Codes, state: EncodecState | None
    ) -> tuple[NDArray[np.float32], EncodecState]:
        """Samples of a stream's next codes, and what the replica that decodes more has to know."""
        async with self.lease(version) as coder:
            return await asyncio.to_thread(decode_next, coder.codec, codes, state)


def _positions(item: NARRequest) -> int:
    return item.n_positions


def _frames(codes: Codes) -> int:
    return int(codes.shape[1])


def _forget(model: object) -> None:
    """Nothing to stop: memory goes with the last reference."""


def _one_thread(device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)  # replicas, not threads, use the other cores
