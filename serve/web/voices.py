"""Voices of a server: recordings in a folder or on S3, shared by all replicas.

An uploaded voice is one file, `{id}.flac`, with its metadata and the codes of its prompt in the
header. Two uploads under one name therefore cannot mix the consent of one with the recording of the
other, and deleting the file deletes everything. A `{id}.wav` put there by hand is a voice too.

A voice that was added with an API key belongs to it: its file is in `owned/{key}/`, so equal names
of two owners do not collide. All others are shared.
"""

import base64
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import PurePosixPath
from typing import ParamSpec, TypeVar

import numpy as np
from dacite import DaciteError, from_dict

from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import CODEBOOK_SIZE, N_CODEBOOKS
from valle.platform import audio, decoding, storage
from valle.platform.decoder_pool import DecoderBusyError, DecoderPool
from valle.platform.reference import MAX_REFERENCE_SECONDS, ReferenceReader
from valle.serve.deployments.interface import OverloadedError
from valle.serve.web.callers import Caller

P = ParamSpec("P")
Result = TypeVar("Result")

DECODERS, DECODING_SECONDS, DECODING_BYTES = 2, 10.0, 512 * 2**20
"""Decoder processes of an ingress replica, the time of one for a recording, and its memory."""

VOICE_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,100}")
"""Names of voices: nothing in them can leave the folder."""
SUFFIXES = (".flac", ".wav")
OWNED = "owned"
"""Folder of the voices that belong to keys, one folder for each."""


class VoiceError(ValueError):
    """A voice that is missing, exists already or has a bad name; `code` is the API's error code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, order=True)
class Voice:
    """A voice of the store."""

    owner: str
    """Name of the key that added it; empty for a shared one."""
    name: str

    def is_valid(self) -> bool:
        """True if owner and name are such that the file lies inside the folder of voices."""
        owner = not self.owner or VOICE_ID_PATTERN.fullmatch(self.owner)
        return bool(owner and VOICE_ID_PATTERN.fullmatch(self.name))


def _candidates(name: str, caller: Caller) -> list[Voice]:
    """The voices to which a caller's name may refer, in the order in which they are tried."""
    owner, dot, rest = name.partition(".")
    if dot:
        return [Voice(owner, rest)] if owner and (caller.all_voices or owner == caller.key) else []
    own = [Voice(caller.key, name)] if caller.key else []
    return [*own, Voice("", name)]


class VoiceStoreError(Exception):
    """The store of the voices does not answer."""


PART_SECONDS = 3600.0
"""Age from which an unfinished file is the rest of a writer that was killed."""


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


def _store_errors(method: Callable[P, Result]) -> Callable[P, Result]:
    """A method of the store whose errors of storage are VoiceStoreError."""

    @wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except OSError as error:
            raise VoiceStoreError(str(error)) from error

    return wrapper


class VoiceStore:
    """Reads, adds and deletes voices. Methods that use storage raise VoiceStoreError where it does
    not answer."""

    def __init__(
        self, root: str, max_voices: int = 1000, decoders: DecoderPool | None = None
    ) -> None:
        """`root`: a folder or an `s3://` URI; `decoders`: where recordings are decoded."""
        self._root, self._max_voices = root, max_voices
        self._decoders = decoders or DecoderPool(
            DECODERS,
            time_limit=DECODING_SECONDS,
            memory_bytes=DECODING_BYTES,
            wait=DECODING_SECONDS,
        )
        self._references = ReferenceReader(self._decoders.decode)

    @_store_errors
    def voices(self) -> list[Voice]:
        """All voices, sorted by owner and name; the shared ones first."""
        paths = [PurePosixPath(name) for name in storage.list_files(self._root, SUFFIXES)]
        paths = [path for path in paths if path.suffix in SUFFIXES]
        voices = {Voice("", path.stem) for path in paths if len(path.parts) == 1}
        voices |= {
            Voice(path.parts[1], path.stem)
            for path in paths
            if len(path.parts) == 3 and path.parts[0] == OWNED
        }
        return sorted(voice for voice in voices if voice.is_valid())

    def ids(self, caller: Caller) -> list[str]:
        """Names of the voices that a caller may use, as it names them, sorted."""
        names = set()
        for voice in self.voices():
            if voice.owner in ("", caller.key):
                names.add(voice.name)
            elif caller.all_voices:
                names.add(f"{voice.owner}.{voice.name}")
        return sorted(names)

    @_store_errors
    def check_reachable(self) -> None:
        """Asks storage about the folder of the voices, which need not exist."""
        storage.exists(self._root)

    @_store_errors
    def stamp(self, name: str, caller: Caller) -> storage.FileStamp:
        """Path, time and size of a voice's file, which is not read. Raises as `read` does."""
        for path in self._caller_paths(name, caller):
            if (stamp := storage.file_stamp(path)) is not None:
                return stamp
        raise VoiceError(f"no voice {name[:100]!r}", "voice_not_found")

    @_store_errors
    def read(self, name: str, caller: Caller) -> bytes:
        """The file of a voice. Raises VoiceError for one that does not exist for the caller."""
        for path in self._caller_paths(name, caller):
            with suppress(FileNotFoundError):
                return storage.read_bytes(path)
        raise VoiceError(f"no voice {name[:100]!r}", "voice_not_found")

    def read_reference(self, data: bytes) -> Wave:
        """The recording as `ReferenceReader` reads it.

        Raises AudioError for one that breaks a rule, OverloadedError when no decoder is free.
        """
        try:
            return self._references.read(data)
        except DecoderBusyError as error:
            raise OverloadedError(str(error)) from error

    def read_uploaded(self, data: bytes) -> Wave:
        """The recording in the file of an uploaded voice, which was trimmed and checked at the
        upload.

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

    def validate_recording(self, name: str, data: bytes, caller: Caller) -> Wave:
        """The recording as it would be stored: trimmed, with the samples rounded to 16 bits.

        Raises AudioError for a recording that cannot serve as a voice, VoiceError for a name that
        is in use, and for one voice too many.
        """
        self._check_free(name, caller)
        self._check_number(caller)
        wave = audio.wav_bytes(self.read_reference(data))
        return audio.read(wave, max_seconds=MAX_REFERENCE_SECONDS)

    @_store_errors
    def add(self, name: str, wave: Wave, metadata: VoiceMetadata, caller: Caller) -> None:
        """Stores a recording that `validate_recording` returned; it belongs to the caller's key.
        Raises VoiceError when the name has been taken since then; of two concurrent calls, the
        later one wins."""
        self._check_free(name, caller)
        comment = json.dumps(asdict(metadata), ensure_ascii=False)
        path = self._paths(Voice(caller.key, name))[0]
        storage.write_bytes(path, audio.flac_bytes(wave, comment))

    @_store_errors
    def delete(self, name: str, caller: Caller) -> None:
        """Deletes a voice with its metadata, and what killed writers have left of any voice.

        Raises VoiceError for an unknown name, and for a shared voice where the caller may not use
        all.
        """
        storage.sweep_parts(self._root, older_than_seconds=PART_SECONDS)
        for voice in _candidates(name, caller):
            if paths := [path for path in self._paths(voice) if storage.exists(path)]:
                if not voice.owner and not caller.all_voices:
                    message = f"voice {name!r} is shared: it takes a key with `voices: all`"
                    raise VoiceError(message, "not_permitted")
                for path in paths:
                    storage.delete(path)
                return
        raise VoiceError(f"no voice {name[:100]!r}", "voice_not_found")

    def _caller_paths(self, name: str, caller: Caller) -> list[str]:
        """Possible files of a name, in the order in which they are tried."""
        return [path for voice in _candidates(name, caller) for path in self._paths(voice)]

    def _paths(self, voice: Voice) -> list[str]:
        """Possible files of a voice. Raises VoiceError for a name that could leave the folder."""
        if not voice.is_valid():
            name = voice.name[:100]
            message = f"{name!r} is not a valid name: use 1 to 100 of a-z, A-Z, 0-9, _ and -"
            raise VoiceError(message, "invalid_name")
        folder = [OWNED, voice.owner] if voice.owner else []
        return [storage.join(self._root, *folder, f"{voice.name}{end}") for end in SUFFIXES]

    @_store_errors
    def _check_free(self, name: str, caller: Caller) -> None:
        """A new voice hides no shared one: whoever has used that name would hear another person."""
        for voice in {Voice(caller.key, name), Voice("", name)}:
            if any(map(storage.exists, self._paths(voice))):
                raise VoiceError(f"there is a voice {name!r}; delete it first", "voice_exists")

    def _check_number(self, caller: Caller) -> None:
        """Counted when an upload begins: uploads at the same time may pass the limit by a few."""
        voices = self.voices()
        if len(voices) >= self._max_voices:
            message = f"the server has {len(voices)} voices, limit {self._max_voices}: delete some"
            raise VoiceError(message, "too_many_voices")
        own = sum(bool(caller.key) and voice.owner == caller.key for voice in voices)
        if caller.max_voices is not None and own >= caller.max_voices:
            message = f"key {caller.key} has {own} voices, limit {caller.max_voices}: delete some"
            raise VoiceError(message, "too_many_voices")
