"""The NAR deployment: first codebook to all eight, in batches of similar length."""

from dataclasses import replace
from functools import partial

from valle.model.codec.interface import Codes
from valle.model.nar_decoding import NARDecoder, NARRequest
from valle.model.quantize import convert
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Synthesis
from valle.platform import registry
from valle.serve.app_args import AppArgs
from valle.serve.deployments.batching import DynamicBatcher
from valle.serve.deployments.versions import MultiVersionDeployment, limit_threads


class NARDeployment(MultiVersionDeployment[DynamicBatcher[NARRequest, Codes]]):
    """A NAR model with a batcher for each version in memory."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        limit_threads(device)
        budget = int(args.batch_seconds * FRAME_RATE)
        default = Synthesis()
        synthesis = replace(
            default,
            nar=replace(default.nar, guidance_scale=args.guidance_scale),
            guided_levels=args.guided_levels,
        )

        def load(version: str) -> DynamicBatcher[NARRequest, Codes]:
            nar = registry.load_nar(registry.resolve(version, tracking_uri), device)
            decoder = NARDecoder(convert(nar, args.precision), args.nar_prompt_cache_size)
            work = partial(decoder.decode, decoding=synthesis.nar_decoding)
            return DynamicBatcher(work, lambda request: request.n_positions, budget)

        super().__init__(load, registry.pin(model, tracking_uri, allow_cached=True))

    async def decode(self, version: str, request: NARRequest) -> Codes:
        """All codebooks `[8, T]`."""
        async with self.lease(version) as batcher:
            return await batcher.submit(request)
