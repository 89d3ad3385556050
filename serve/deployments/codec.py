"""The codec deployment: recordings to codes and codes to waveforms, in batches."""

from dataclasses import dataclass
from functools import partial

from valle.model.codec.encodec import Encodec
from valle.model.codec.encodec_stream import EncodecState, decode_next
from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import FRAME_RATE, HOP
from valle.model.validation import validate_codes, validate_wave
from valle.platform import registry
from valle.serve.app_args import AppArgs
from valle.serve.deployments.batching import DynamicBatcher
from valle.serve.deployments.health import ReplicaHealth
from valle.serve.deployments.interface import DecodedChunk
from valle.serve.deployments.versions import MultiVersionDeployment, limit_threads


@dataclass(frozen=True)
class BatchedCodec:
    """A codec with a batcher for each direction."""

    codec: Encodec
    encoder: DynamicBatcher[Wave, Codes]
    decoder: DynamicBatcher[Codes, Wave]
    languages: tuple[str, ...]
    """Languages of the version's training data."""


class CodecDeployment(MultiVersionDeployment[BatchedCodec]):
    """A codec for each version in memory."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        limit_threads(device)
        health = ReplicaHealth(args.max_step_seconds)
        budget = int(args.batch_seconds * FRAME_RATE)

        def load(version: str) -> BatchedCodec:
            folder = registry.resolve(version, tracking_uri)
            codec = registry.load_codec(folder, device)
            encoder = DynamicBatcher(codec.encode, lambda wave: len(wave) // HOP, budget, health)
            decoder = DynamicBatcher(
                codec.decode, lambda codes: int(codes.shape[1]), budget, health
            )
            return BatchedCodec(codec, encoder, decoder, registry.read_languages(folder))

        version = registry.pin(model, tracking_uri, allow_cached=True)
        super().__init__(load, version, health=health)

    async def encode(self, version: str, wave: Wave) -> Codes:
        """Codes `[8, T]` of a recording at 24 kHz."""
        validate_wave("recording", wave)
        async with self.lease(version) as batched:
            return await batched.encoder.submit(wave)

    async def codec_sha256(self, version: str) -> str:
        """Hash of the codec's weights."""
        async with self.lease(version) as batched:
            return batched.codec.identity.sha256

    async def languages(self, version: str) -> tuple[str, ...]:
        """Languages that the model was trained on."""
        async with self.lease(version) as batched:
            return batched.languages

    async def decode(self, version: str, codes: Codes) -> Wave:
        """Samples at 24 kHz."""
        validate_codes("codes", codes)
        async with self.lease(version) as batched:
            return await batched.decoder.submit(codes)

    async def decode_next(
        self, version: str, codes: Codes, state: EncodecState | None
    ) -> DecodedChunk:
        """Samples of a stream's next codes, and the state for those after them: any replica can
        continue a stream."""
        validate_codes("codes", codes)
        async with self.lease(version) as batched:
            work = partial(decode_next, batched.codec, codes, state)
            return DecodedChunk(*await self.health.run(work))
