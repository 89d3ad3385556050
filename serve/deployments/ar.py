"""The AR deployment: phonemes and prompt to the first codebook, many requests in one engine."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np

from valle.model.chunks import ChunkCollector, Chunking, CodesChunk
from valle.model.quantize import convert
from valle.model.tokens import FRAME_RATE
from valle.platform import registry
from valle.serve.app_args import AppArgs
from valle.serve.deployments.health import ReplicaHealth
from valle.serve.deployments.interface import PROMPT_FRAMES
from valle.serve.deployments.versions import (
    IDLE_SECONDS,
    MultiVersionDeployment,
    limit_threads,
)
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason, Request, StepOutput
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler
from valle.serve.engine.worker import EngineWorker


class ARDeployment(MultiVersionDeployment[EngineWorker]):
    """An engine for each version in memory."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        limit_threads(device)
        health = ReplicaHealth(args.max_step_seconds)
        max_frames = int(args.max_sentence_seconds * FRAME_RATE)

        def load(version: str) -> EngineWorker:
            ar = registry.load_ar(registry.resolve(version, tracking_uri), device)
            ar = convert(ar, args.precision)
            runner = Runner(
                ar,
                slots=args.slots,
                max_positions=ar.capacity(args.max_phonemes, PROMPT_FRAMES, max_frames),
                compiled=args.compiled,
                guided=args.guidance_scale > 1,
            )
            return EngineWorker(
                Engine(runner, Scheduler(args.slots)),
                on_failure=health.end,
                max_step_seconds=args.max_step_seconds,
            )

        # on a CPU too: an old engine keeps the key-value cache of all its slots
        super().__init__(
            load,
            registry.pin(model, tracking_uri, allow_cached=True),
            health=health,
            close=EngineWorker.close,
            on_gpu=device == "cuda",
            idle_seconds=IDLE_SECONDS,
        )

    async def stream(
        self, version: str, request: Request, chunking: Chunking
    ) -> AsyncGenerator[CodesChunk]:
        """First codebook in chunks, each as soon as it is due."""
        collector = ChunkCollector(chunking)
        async with aclosing(self._outputs(version, request)) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    hit_limit = output.finish_reason is FinishReason.LENGTH
                    yield collector.finish(output.codes, hit_limit=hit_limit)
                elif (chunk := collector.add(output.codes)) is not None:
                    yield chunk

    async def generate(self, version: str, request: Request) -> CodesChunk:
        """First codebook as one chunk."""
        codes: list[int] = []
        finish_reason = None
        async with aclosing(self._outputs(version, request)) as outputs:
            async for output in outputs:
                codes += output.codes
                finish_reason = output.finish_reason
        hit_limit = finish_reason is FinishReason.LENGTH
        return CodesChunk(np.array(codes, np.int16), last=True, hit_limit=hit_limit)

    async def _outputs(self, version: str, request: Request) -> AsyncGenerator[StepOutput]:
        async with self.lease(version) as worker, aclosing(worker.stream(request)) as outputs:
            async for output in outputs:
                yield output

    async def forget_prompts(self) -> None:
        """Overwrites the keys and values of ended requests at once, and those of running requests
        when they end. Called when a voice has been deleted."""
        for worker in self.models:
            worker.forget_prompts()

    async def check_health(self) -> None:
        """Ends the replica when an engine has died or is stuck: Serve then replaces it."""
        for worker in self.models:
            worker.check_health()
        self.health.check()
