"""Voices of a server: recordings in a folder or on S3, shared by all replicas.

An uploaded voice is one file, `{id}.flac`, with its metadata and the codes of its prompt in the
header. Two uploads under one name therefore cannot mix the consent of one with the recording of the
other, and deleting the file deletes everything. A `{id}.wav` put there by hand is a voice too.
"""

import base64
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import PurePosixPath
from typing import ParamSpec, TypeVar

import numpy as np
from dacite import DaciteError, from_dict

from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import N_CODEBOOKS, SAMPLE_RATE
from valle.platform import audio, storage
from valle.platform.vad import SpeechFraction

P = ParamSpec("P")
Result = TypeVar("Result")

MIN_VOICE_SECONDS, MAX_RECORDING_SECONDS = 2.0, 30.0
"""Bounds of an uploaded recording."""
MIN_RMS_DBFS = -45.0
"""Lower bound of a recording's level, in dB of full scale: below it there is mostly noise."""
MIN_SPEECH_FRACTION = 0.4
"""Lower bound of the share of a recording that is speech."""

VOICE_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,100}")
"""Names of voices: nothing in them can leave the folder."""
SUFFIXES = (".flac", ".wav")


class VoiceError(ValueError):
    """A missing or existing voice, or a bad name; `code` is the error code of the API."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


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
        """`prompt` as an array `[8, P]`."""
        stored = np.frombuffer(base64.b64decode(self.prompt), "<i2")
        return stored.reshape(N_CODEBOOKS, -1).astype(np.int16)


def pack_codes(prompt: Codes) -> str:
    """Codes `[8, P]` in the form of `VoiceMetadata.prompt`."""
    return base64.b64encode(prompt.astype("<i2").tobytes()).decode()


def read_voice_metadata(data: bytes) -> VoiceMetadata | None:
    """Metadata in the header of a voice's file; None for a file that was not uploaded, whatever its
    comment says."""
    try:
        metadata = json.loads(audio.read_comment(data))
        return from_dict(VoiceMetadata, metadata) if isinstance(metadata, dict) else None
    except (audio.AudioError, ValueError, DaciteError):  # no audio, no JSON, or other fields
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

    def __init__(self, root: str) -> None:
        self._root = root
        self._detector: SpeechFraction | None = None
        self._lock = threading.Lock()  # the detector is stateful

    @_store_errors
    def ids(self) -> list[str]:
        """Names of all voices, sorted."""
        paths = (PurePosixPath(name) for name in storage.list_files(self._root, SUFFIXES))
        names = {path.stem for path in paths if len(path.parts) == 1 and path.suffix in SUFFIXES}
        return sorted(name for name in names if VOICE_ID_PATTERN.fullmatch(name))

    @_store_errors
    def check_reachable(self) -> None:
        """Asks storage about the folder of the voices, which need not exist."""
        storage.exists(self._root)

    @_store_errors
    def stamp(self, name: str) -> storage.FileStamp:
        """Path, time and size of a voice's file, which is not read. Raises as `read` does."""
        for path in self._paths(name):
            if (stamp := storage.file_stamp(path)) is not None:
                return stamp
        raise VoiceError(f"no voice {name!r}", "voice_not_found")

    @_store_errors
    def read(self, name: str) -> bytes:
        """The file of a voice. Raises VoiceError for an unknown name."""
        for path in self._paths(name):
            with suppress(FileNotFoundError):
                return storage.read_bytes(path)
        raise VoiceError(f"no voice {name!r}", "voice_not_found")

    @_store_errors
    def validate_recording(self, name: str, data: bytes) -> Wave:
        """The recording as it would be stored: trimmed, with the samples rounded to 16 bits.

        Raises AudioError for a recording that cannot serve as a voice, VoiceError for a name that
        is in use.
        """
        self._check_free(name)
        wave = audio.trim(audio.read(data, max_seconds=MAX_RECORDING_SECONDS))
        seconds = len(wave) / SAMPLE_RATE
        if seconds < MIN_VOICE_SECONDS:
            raise audio.AudioError(
                f"too short: {seconds:.1f} s of sound, at least {MIN_VOICE_SECONDS:g} s"
            )
        if (level := audio.rms_dbfs(wave)) < MIN_RMS_DBFS:
            raise audio.AudioError(f"too quiet: {level:.0f} dB, at least {MIN_RMS_DBFS:.0f} dB")
        if (share := self._speech(wave)) < MIN_SPEECH_FRACTION:
            raise audio.AudioError(
                f"{share:.0%} of it is speech, at least {MIN_SPEECH_FRACTION:.0%} has to be"
            )
        return audio.read(audio.wav_bytes(wave), max_seconds=MAX_RECORDING_SECONDS)

    @_store_errors
    def add(self, name: str, wave: Wave, metadata: VoiceMetadata) -> None:
        """Stores a recording that `validate_recording` returned. Raises VoiceError when the name
        has been taken since then; of two concurrent calls, the later one wins."""
        self._check_free(name)
        comment = json.dumps(asdict(metadata), ensure_ascii=False)
        storage.write_bytes(self._paths(name)[0], audio.flac_bytes(wave, comment))

    @_store_errors
    def delete(self, name: str) -> None:
        """Deletes a voice with its metadata, and what killed writers have left of any voice.

        Raises VoiceError for an unknown name.
        """
        storage.sweep_parts(self._root, older_than_seconds=PART_SECONDS)
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

    def _speech(self, wave: Wave) -> float:
        with self._lock:
            self._detector = self._detector or SpeechFraction()
            return self._detector.score(wave)
