"""Recordings to prompts: bytes of a sound file to codes, under limits.

An uploaded voice brings its codes along; others are encoded once by each replica that is asked.
"""

import base64
import binascii
import hashlib

from cachetools import TTLCache
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.concurrency import run_in_threadpool

from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import FRAME_RATE, HOP, SAMPLE_RATE
from valle.model.valle import Synthesis
from valle.platform import audio
from valle.serve.deployments.backpressure import call_deployment
from valle.serve.web.schema import ApiError, SpeechRequest
from valle.serve.web.voices import (
    MAX_RECORDING_SECONDS,
    VoiceError,
    VoiceStore,
    read_voice_metadata,
)

PROMPT_FRAMES = int(Synthesis().prompt_seconds * FRAME_RATE)
MIN_PROMPT_SECONDS = 1.0
"""Seconds of a recording that a voice can be told from."""
PROMPT_CACHE_SIZE, PROMPT_CACHE_SECONDS = 256, 600
"""Prompts in memory, and how long: a deleted voice is not remembered for ever."""


class PromptEncoder:
    """Codes of the recordings that requests name or bring."""

    def __init__(self, store: VoiceStore) -> None:
        self._store = store
        self._cache: TTLCache[tuple[str, bytes], Codes] = TTLCache(
            PROMPT_CACHE_SIZE, PROMPT_CACHE_SECONDS
        )
        self._codecs: dict[str, str] = {}  # hash of each version's codec

    async def for_request(self, request: SpeechRequest, version: str) -> Codes:
        """`[8, P]` of the recording's first seconds, by that version's codec.

        Raises ApiError for what is no voice.
        """
        data, param = await run_in_threadpool(self._recording, request)
        # by content, since a voice may be replaced, and by version, since its codec may be another
        key = (version, hashlib.sha256(data).digest())
        codes = self._cache.get(key)
        if codes is None:
            metadata = (
                await run_in_threadpool(read_voice_metadata, data) if param == "voice" else None
            )
            if metadata and metadata.codec == await self.codec_sha256(version):
                codes = metadata.prompt_codes()
            else:
                codes = await self.encode(await run_in_threadpool(_decode, data, param), version)
            self._cache[key] = codes
        return codes

    async def encode(self, wave: Wave, version: str) -> Codes:
        """`[8, P]` of a recording's first seconds."""
        start = wave[: PROMPT_FRAMES * HOP]
        return await call_deployment(lambda: _deployment().encode.remote(version, start))

    async def codec_sha256(self, version: str) -> str:
        """Hash of the weights of that version's codec."""
        if version not in self._codecs:
            self._codecs[version] = await call_deployment(
                lambda: _deployment().codec_sha256.remote(version)
            )
        return self._codecs[version]

    def _recording(self, request: SpeechRequest) -> tuple[bytes, str]:
        """A sound file, and the field that it is from."""
        if request.ref_audio is not None:
            try:
                return base64.b64decode(request.ref_audio, validate=True), "ref_audio"
            except binascii.Error as error:
                raise ApiError(400, f"ref_audio: not base64 ({error})", "ref_audio") from error
        if not request.voice:
            raise ApiError(400, "give a voice, or a recording as ref_audio", "voice")
        try:
            return self._store.read(request.voice), "voice"
        except VoiceError as error:
            raise ApiError(404, str(error), "voice", error.code) from error


def _deployment() -> DeploymentHandle:
    return serve.get_deployment_handle("Codec", serve.get_replica_context().app_name)


def _decode(data: bytes, param: str) -> Wave:
    try:
        wave = audio.read(data, max_seconds=MAX_RECORDING_SECONDS)
        if len(wave) < MIN_PROMPT_SECONDS * SAMPLE_RATE:
            raise audio.AudioError(
                f"{len(wave) / SAMPLE_RATE:.2f} s, at least {MIN_PROMPT_SECONDS:g} s"
            )
    except audio.AudioError as error:
        raise ApiError(400, f"{param}: {error}", param) from error
    return wave
