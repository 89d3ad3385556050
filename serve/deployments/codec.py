"""The codec deployment: recordings to codes and codes to waveforms, in batches."""

import asyncio
from dataclasses import dataclass

from valle.model.codec.encodec import Encodec
from valle.model.codec.encodec_stream import EncodecState, decode_next
from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import FRAME_RATE, HOP
from valle.platform import registry
from valle.serve.app_args import AppArgs
from valle.serve.deployments.batching import DynamicBatcher
from valle.serve.deployments.interface import DecodedChunk
from valle.serve.deployments.versions import MultiVersionDeployment, limit_threads


@dataclass(frozen=True)
class BatchedCodec:
    """A codec with a batcher for each direction."""

    codec: Encodec
    encoder: DynamicBatcher[Wave, Codes]
    decoder: DynamicBatcher[Codes, Wave]


class CodecDeployment(MultiVersionDeployment[BatchedCodec]):
    """A codec for each version in memory."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        limit_threads(device)
        budget = int(args.batch_seconds * FRAME_RATE)

        def load(version: str) -> BatchedCodec:
            codec = registry.load_codec(registry.resolve(version, tracking_uri), device)
            encoder = DynamicBatcher(codec.encode, lambda wave: len(wave) // HOP, budget)
            decoder = DynamicBatcher(codec.decode, lambda codes: int(codes.shape[1]), budget)
            return BatchedCodec(codec, encoder, decoder)

        super().__init__(load, registry.pin(model, tracking_uri, allow_cached=True))

    async def encode(self, version: str, wave: Wave) -> Codes:
        """Codes `[8, T]` of a recording at 24 kHz."""
        async with self.lease(version) as batched:
            return await batched.encoder.submit(wave)

    async def codec_sha256(self, version: str) -> str:
        """Hash of the codec's weights."""
        async with self.lease(version) as batched:
            return batched.codec.identity.sha256

    async def decode(self, version: str, codes: Codes) -> Wave:
        """Samples at 24 kHz."""
        async with self.lease(version) as batched:
            return await batched.decoder.submit(codes)

    async def decode_next(
        self, version: str, codes: Codes, state: EncodecState | None
    ) -> DecodedChunk:
        """Samples of a stream's next codes, and the state for those after them: any replica can
        continue a stream."""
        async with self.lease(version) as batched:
            return DecodedChunk(*await asyncio.to_thread(decode_next, batched.codec, codes, state))
