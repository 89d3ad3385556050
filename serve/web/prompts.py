"""Prompts of requests: bytes of a recording to codes, under limits.

An uploaded voice is stored with its codes. Each ingress replica encodes other recordings when a
request needs them, and caches the codes for a while.
"""

import base64
import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import HOP
from valle.platform.audio import AudioError
from valle.platform.storage import FileStamp
from valle.serve.deployments.interface import PROMPT_FRAMES, Deployments
from valle.serve.web.callers import Caller
from valle.serve.web.prompt_cache import PromptCache
from valle.serve.web.schema import ApiError, SpeechRequest
from valle.serve.web.threads import run_decoding, run_storage
from valle.serve.web.voices import VoiceError, VoiceMetadata, VoiceStore


@dataclass(frozen=True)
class Recording:
    """A sound file, undecoded, and the request field it comes from."""

    data: bytes
    param: Literal["voice", "ref_audio"]


class _CallersVoice(NamedTuple):
    """A voice as a caller names it."""

    name: str
    key: str
    all_voices: bool


class PromptEncoder:
    """Codes of the recordings that requests name or contain."""

    def __init__(self, store: VoiceStore, deployments: Deployments) -> None:
        self._store, self._deployments = store, deployments
        self._cache = PromptCache(self._stamp)
        self._codec_sha256: dict[str, str] = {}  # by version

    async def for_request(self, request: SpeechRequest, version: str, caller: Caller) -> Codes:
        """Codes `[8, P]` of the recording's first seconds, by that version's codec.

        Raises ApiError for a missing voice or an unusable recording.
        """
        if request.ref_audio is not None or not request.voice:
            return await self._read_and_encode(request, version, caller)
        # the same name may be another voice to another key
        voice = _CallersVoice(request.voice, caller.key, caller.all_voices)
        try:
            return await self._cache.of_voice(
                voice, version, lambda: self._read_and_encode(request, version, caller)
            )
        except VoiceError as error:
            raise ApiError(404, str(error), "voice", error.code) from error

    async def forget(self) -> None:
        """Removes all prompts from memory, here and in the replicas of the models. Called when a
        voice has been deleted. Other ingress replicas notice the deletion within half a minute."""
        self._cache.forget()
        await self._deployments.forget_prompts()

    async def _stamp(self, voice: Hashable) -> FileStamp:
        assert isinstance(voice, _CallersVoice), "for_request asks for no others"
        caller = Caller(key=voice.key, all_voices=voice.all_voices)
        return await run_storage(self._store.stamp, voice.name, caller)

    async def _read_and_encode(self, request: SpeechRequest, version: str, caller: Caller) -> Codes:
        recording = await run_storage(self._read_recording, request, caller)
        sha256 = hashlib.sha256(recording.data).digest()
        return await self._cache.of_content(
            sha256, version, lambda: self._encode_recording(recording, version)
        )

    async def _encode_recording(self, recording: Recording, version: str) -> Codes:
        metadata = None
        if recording.param == "voice":
            metadata = await run_decoding(self._store.read_metadata, recording.data)
        if metadata is not None and await self._is_current(metadata, version):
            return metadata.prompt_codes()
        wave = await run_decoding(self._decode, recording, metadata is not None)
        return await self.encode(wave, version)

    async def encode(self, wave: Wave, version: str) -> Codes:
        """Codes `[8, P]` of the first seconds of a recording."""
        return await self._deployments.encode(version, wave[: PROMPT_FRAMES * HOP])

    async def codec_sha256(self, version: str) -> str:
        """Hash of the weights of that version's codec."""
        if version not in self._codec_sha256:
            self._codec_sha256[version] = await self._deployments.codec_sha256(version)
        return self._codec_sha256[version]

    async def _is_current(self, metadata: VoiceMetadata, version: str) -> bool:
        """Whether that version's codec made the codes that are stored with an uploaded voice."""
        return bool(metadata.prompt) and metadata.codec == await self.codec_sha256(version)

    def _decode(self, recording: Recording, uploaded: bool) -> Wave:
        """The recording to make a prompt of. Raises ApiError for one that breaks a rule of
        `reference`."""
        try:
            if uploaded:
                return self._store.read_uploaded(recording.data)
            return self._store.read_reference(recording.data)
        except AudioError as error:
            raise ApiError(400, f"{recording.param}: {error}", recording.param) from error

    def _read_recording(self, request: SpeechRequest, caller: Caller) -> Recording:
        if request.ref_audio is not None:
            try:
                data = base64.b64decode(request.ref_audio, validate=True)
            except ValueError as error:  # binascii's too
                raise ApiError(400, f"ref_audio: not base64 ({error})", "ref_audio") from error
            return Recording(data, "ref_audio")
        if not request.voice:
            message = "voice: missing; name a voice, or send a recording as ref_audio"
            raise ApiError(400, message, "voice")
        try:
            return Recording(self._store.read(request.voice, caller), "voice")
        except VoiceError as error:
            raise ApiError(404, str(error), "voice", error.code) from error
