"""Voices of a server: recordings in a folder or on S3, shared by all replicas.

An uploaded voice is one file, `{id}.flac`, with its metadata and the codes of its prompt in the
header. Two uploads under one name therefore cannot mix the consent of one with the recording of the
other, and deleting the file deletes everything. A `{id}.wav` put there by hand is a voice too.
"""

import base64
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np
from dacite import DaciteError, from_dict

from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import CODEBOOK_SIZE, N_CODEBOOKS
from valle.platform import audio, decoding, storage
from valle.platform.decoder_pool import DecoderBusyError, DecoderPool
from valle.platform.reference import MAX_REFERENCE_SECONDS, ReferenceReader
from valle.serve.deployments.interface import OverloadedError

DECODERS, DECODING_SECONDS, DECODING_BYTES = 2, 10.0, 512 * 2**20
"""Decoder processes of an ingress replica, the time of one for a recording, and its memory."""

VOICE_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,100}")
"""Names of voices: nothing in them can leave the folder."""
SUFFIXES = (".flac", ".wav")


class VoiceError(ValueError):
    """A missing or existing voice, or a bad name; `code` is the error code of the API."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class VoiceMetadata:
    """Metadata of an uploaded recording."""

    seconds: float
    """Duration, without the silence at both ends."""

    consent: str
    """Who agreed to the use of this voice, as stated at the upload."""

    created: int
    """Seconds since 1970."""

    text: str | None = None
    """Transcript."""

    prompt: str = ""
    """Codes `[8, P]` of the first seconds: 16-bit little endian, in base64."""

    codec: str = ""
    """Hash of the weights of the codec that made `prompt`."""

    def prompt_codes(self) -> Codes:
        """`prompt` as an array `[8, P]`. Raises ValueError if it is none, or is empty."""
        stored = np.frombuffer(base64.b64decode(self.prompt, validate=True), "<i2")
        codes = stored.reshape(N_CODEBOOKS, -1).astype(np.int16)
        if not codes.size or not ((codes >= 0) & (codes < CODEBOOK_SIZE)).all():
            raise ValueError(f"prompt: not codes of 0 to {CODEBOOK_SIZE - 1}")
        return codes


def pack_codes(prompt: Codes) -> str:
    """Codes `[8, P]` in the form of `VoiceMetadata.prompt`."""
    return base64.b64encode(prompt.astype("<i2").tobytes()).decode()


def read_voice_metadata(
    data: bytes, read_comment: Callable[[bytes], str] = decoding.read_comment
) -> VoiceMetadata | None:
    """Metadata in the header of a voice's file; None for a file that was not uploaded, whatever its
    comment says. `read_comment` may be that of a `DecoderPool`."""
    try:
        fields = json.loads(read_comment(data))
        if not isinstance(fields, dict):
            return None
        metadata = from_dict(VoiceMetadata, fields)
        if metadata.prompt:
            metadata.prompt_codes()
        return metadata
    except (ValueError, DaciteError, RecursionError):  # no audio, no JSON, other fields or codes
        return None


class VoiceStore:
    """Reads, adds and deletes voices."""

    def __init__(self, root: str, decoders: DecoderPool | None = None) -> None:
        """`root`: a folder or an `s3://` URI; `decoders`: where recordings are decoded."""
        self._root = root
        self._decoders = decoders or DecoderPool(
            DECODERS,
            time_limit=DECODING_SECONDS,
            memory_bytes=DECODING_BYTES,
            wait=DECODING_SECONDS,
        )
        self._references = ReferenceReader(self._decoders.decode)

    def ids(self) -> list[str]:
        """Names of all voices, sorted."""
        paths = (PurePosixPath(name) for name in storage.list_files(self._root, SUFFIXES))
        names = {path.stem for path in paths if len(path.parts) == 1 and path.suffix in SUFFIXES}
        return sorted(name for name in names if VOICE_ID_PATTERN.fullmatch(name))

    def read(self, name: str) -> bytes:
        """The file of a voice. Raises VoiceError for an unknown name."""
        for path in self._paths(name):
            with suppress(FileNotFoundError):
                return storage.read_bytes(path)
        raise VoiceError(f"no voice {name!r}", "voice_not_found")

    def read_reference(self, data: bytes) -> Wave:
        """A recording as prompts are made of it.

        Raises AudioError for one that cannot serve, OverloadedError when no decoder is free.
        """
        try:
            return self._references.read(data)
        except DecoderBusyError as error:
            raise OverloadedError(str(error)) from error

    def read_uploaded(self, data: bytes) -> Wave:
        """The recording in the file of an uploaded voice, which was trimmed and checked then.

        Raises AudioError, and OverloadedError when no decoder is free.
        """
        try:
            return audio.read(data, max_seconds=MAX_REFERENCE_SECONDS, decode=self._decoders.decode)
        except DecoderBusyError as error:
            raise OverloadedError(str(error)) from error

    def read_metadata(self, data: bytes) -> VoiceMetadata | None:
        """The metadata in an uploaded voice's file; None for other files.

        Raises OverloadedError when no decoder is free.
        """
        try:
            return read_voice_metadata(data, self._decoders.read_comment)
        except DecoderBusyError as error:
            raise OverloadedError(str(error)) from error

    def validate_recording(self, name: str, data: bytes) -> Wave:
        """The recording as it would be stored: trimmed, with the samples rounded to 16 bits.

        Raises AudioError for a recording that cannot serve as a voice, VoiceError for a name that
        is in use.
        """
        self._check_free(name)
        wave = audio.wav_bytes(self.read_reference(data))
        return audio.read(wave, max_seconds=MAX_REFERENCE_SECONDS)

    def add(self, name: str, wave: Wave, metadata: VoiceMetadata) -> None:
        """Stores a recording that `validate_recording` returned. Raises VoiceError when the name
        has been taken since then; of two concurrent calls, the later one wins."""
        self._check_free(name)
        comment = json.dumps(asdict(metadata), ensure_ascii=False)
        storage.write_bytes(self._paths(name)[0], audio.flac_bytes(wave, comment))

    def delete(self, name: str) -> None:
        """Deletes a voice with its metadata. Raises VoiceError for an unknown name."""
        paths = [path for path in self._paths(name) if storage.exists(path)]
        if not paths:
            raise VoiceError(f"no voice {name!r}", "voice_not_found")
        for path in paths:
            storage.delete(path)

    def _paths(self, name: str) -> list[str]:
        """Possible files of a voice. Raises VoiceError for a name that could leave the folder."""
        if not VOICE_ID_PATTERN.fullmatch(name):
            message = f"{name[:100]!r} is not a valid name: use 1 to 100 of a-z, A-Z, 0-9, _ and -"
            raise VoiceError(message, "invalid_name")
        return [storage.join(self._root, f"{name}{suffix}") for suffix in SUFFIXES]

    def _check_free(self, name: str) -> None:
        if any(map(storage.exists, self._paths(name))):
            raise VoiceError(f"there is a voice {name!r}; delete it first", "voice_exists")
