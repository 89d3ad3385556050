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
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np
from dacite import DaciteError, from_dict

from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import CODEBOOK_SIZE, N_CODEBOOKS, SAMPLE_RATE
from valle.platform import audio, storage
from valle.platform.vad import SpeechFraction
from valle.serve.web.callers import Caller

MIN_VOICE_SECONDS, MAX_RECORDING_SECONDS = 2.0, 30.0
"""Bounds of an uploaded recording."""
MIN_RMS_DBFS = -45.0
"""Lower bound of a recording's level, in dB of full scale: below it there is mostly noise."""
MIN_SPEECH_FRACTION = 0.4
"""Lower bound of the share of a recording that is speech."""

VOICE_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,100}")
"""Names of voices: nothing in them can leave the folder."""
SUFFIXES = (".flac", ".wav")
OWNED = "owned"
"""Folder of the voices that belong to keys, one folder for each."""


class VoiceError(ValueError):
    """A missing or existing voice, or a bad name; `code` is the error code of the API."""

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
        """Neither owner nor name can leave the folder."""
        owner = not self.owner or VOICE_ID_PATTERN.fullmatch(self.owner)
        return bool(owner and VOICE_ID_PATTERN.fullmatch(self.name))


def _candidates(name: str, caller: Caller) -> list[Voice]:
    """The voices that a name may mean to a caller, in the order in which they are tried."""
    owner, dot, rest = name.partition(".")
    if dot:
        return [Voice(owner, rest)] if owner and (caller.all_voices or owner == caller.key) else []
    own = [Voice(caller.key, name)] if caller.key else []
    return [*own, Voice("", name)]


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
        """`prompt` as an array `[8, P]`. Raises ValueError for what no codec has made, which the
        header of a file put there by hand may hold."""
        stored = np.frombuffer(base64.b64decode(self.prompt, validate=True), "<i2")
        codes = stored.reshape(N_CODEBOOKS, -1).astype(np.int16)
        if not codes.size or codes.min() < 0 or codes.max() >= CODEBOOK_SIZE:
            raise ValueError("the stored prompt holds no codes")
        return codes


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


class VoiceStore:
    """Reads, adds and deletes voices."""

    def __init__(self, root: str, max_voices: int = 1000) -> None:
        self._root, self._max_voices = root, max_voices
        self._detector: SpeechFraction | None = None
        self._lock = threading.Lock()  # the detector is stateful

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

    def read(self, name: str, caller: Caller) -> bytes:
        """The file of a voice. Raises VoiceError for one that does not exist for the caller."""
        for voice in _candidates(name, caller):
            for path in self._paths(voice):
                with suppress(FileNotFoundError):
                    return storage.read_bytes(path)
        raise VoiceError(f"no voice {name[:100]!r}", "voice_not_found")

    def validate_recording(self, name: str, data: bytes, caller: Caller) -> Wave:
        """The recording as it would be stored: trimmed, with the samples rounded to 16 bits.

        Raises AudioError for a recording that cannot serve as a voice, VoiceError for a name that
        is in use, and for one voice too many.
        """
        self._check_free(name, caller)
        self._check_number(caller)
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

    def add(self, name: str, wave: Wave, metadata: VoiceMetadata, caller: Caller) -> None:
        """Stores a recording that `validate_recording` returned; it belongs to the caller's key.
        Raises VoiceError when the name has been taken since then; of two concurrent calls, the
        later one wins."""
        self._check_free(name, caller)
        comment = json.dumps(asdict(metadata), ensure_ascii=False)
        path = self._paths(Voice(caller.key, name))[0]
        storage.write_bytes(path, audio.flac_bytes(wave, comment))

    def delete(self, name: str, caller: Caller) -> None:
        """Deletes a voice with its metadata. Raises VoiceError for an unknown name, and for a
        shared voice where the caller may not use all."""
        for voice in _candidates(name, caller):
            if paths := [path for path in self._paths(voice) if storage.exists(path)]:
                if not voice.owner and not caller.all_voices:
                    message = f"voice {name!r} is shared: it takes a key with `voices: all`"
                    raise VoiceError(message, "not_permitted")
                for path in paths:
                    storage.delete(path)
                return
        raise VoiceError(f"no voice {name[:100]!r}", "voice_not_found")

    def _paths(self, voice: Voice) -> list[str]:
        """Possible files of a voice. Raises VoiceError for a name that could leave the folder."""
        if not voice.is_valid():
            name = voice.name[:100]
            message = f"{name!r} is not a valid name: use 1 to 100 of a-z, A-Z, 0-9, _ and -"
            raise VoiceError(message, "invalid_name")
        folder = [OWNED, voice.owner] if voice.owner else []
        return [storage.join(self._root, *folder, f"{voice.name}{end}") for end in SUFFIXES]

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

    def _speech(self, wave: Wave) -> float:
        with self._lock:
            self._detector = self._detector or SpeechFraction()
            return self._detector.score(wave)
