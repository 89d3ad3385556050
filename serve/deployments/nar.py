"""The NAR deployment: first codebook to all eight, in batches of similar length."""

import asyncio
from dataclasses import dataclass, replace
from functools import partial

from valle.model.codec.interface import Codes
from valle.model.nar_decoding import NARDecoder, NARRequest
from valle.model.quantize import convert
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Synthesis
from valle.platform import registry
from valle.serve.app_args import AppArgs
from valle.serve.deployments.batching import DynamicBatcher
from valle.serve.deployments.health import ReplicaHealth
from valle.serve.deployments.interface import PROMPT_FRAMES
from valle.serve.deployments.versions import MultiVersionDeployment, limit_threads


@dataclass(frozen=True)
class BatchedNAR:
    """A NAR model with its cache of prompts, and its batcher."""

    decoder: NARDecoder
    batcher: DynamicBatcher[NARRequest, Codes]


class NARDeployment(MultiVersionDeployment[BatchedNAR]):
    """A NAR model with a batcher for each version in memory."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        limit_threads(device)
        budget = int(args.batch_seconds * FRAME_RATE)
        self._max_positions = (
            args.max_phonemes + PROMPT_FRAMES + int(args.max_sentence_seconds * FRAME_RATE)
        )
        self._prompt_seconds = args.nar_prompt_cache_seconds
        self._expiry: asyncio.TimerHandle | None = None
        default = Synthesis()
        synthesis = replace(
            default,
            nar=replace(default.nar, guidance_scale=args.guidance_scale),
            guided_levels=args.guided_levels,
        )
        health = ReplicaHealth(args.max_step_seconds)

        def load(version: str) -> BatchedNAR:
            nar = registry.load_nar(registry.resolve(version, tracking_uri), device)
            decoder = NARDecoder(
                convert(nar, args.precision),
                args.nar_prompt_cache_size,
                prompt_seconds=args.nar_prompt_cache_seconds,
            )
            work = partial(decoder.decode, decoding=synthesis.nar_decoding)
            batcher = DynamicBatcher(work, lambda item: item.n_positions, budget, health)
            return BatchedNAR(decoder, batcher)

        version = registry.pin(model, tracking_uri, allow_cached=True)
        super().__init__(load, version, health=health, on_gpu=device == "cuda")

    async def decode(self, version: str, request: NARRequest) -> Codes:
        """All codebooks `[8, T]`."""
        async with self.lease(version) as nar:
            request.validate(nar.decoder.config)
            if request.n_positions > self._max_positions:
                raise ValueError(
                    f"first_codebook: text, prompt and speech have {request.n_positions} "
                    f"positions, limit {self._max_positions}"
                )
            try:
                return await nar.batcher.submit(request)
            finally:
                self._schedule_expiry()

    async def forget_prompts(self) -> None:
        """Empties the caches of prompts. Called when a voice has been deleted."""
        for nar in self.models:
            nar.decoder.forget_prompts()

    def _schedule_expiry(self) -> None:
        """Removes expired prompts even if no further call comes."""
        if self._expiry is None:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(self._prompt_seconds, self._expire_prompts)

    def _expire_prompts(self) -> None:
        self._expiry = None
        remaining = [nar.decoder.expire_prompts() for nar in self.models]
        if any(remaining):
            self._schedule_expiry()
