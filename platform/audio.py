"""Sound files: any format that libsndfile reads becomes 24 kHz mono float32, and back.

Functions that read raise `AudioError`, whose message is the reason that reports show.
"""

import io

import numpy as np
import soundfile
import soxr

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import storage

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 192_000
"""Accepted sample rates of a file, in Hz."""
MAX_CHANNELS = 16
BLOCK_SAMPLES = 65_536
"""Samples per channel that are decoded at a time."""


class AudioError(ValueError):
    """A recording that cannot be used; the message is the reason."""


def read(data: bytes, *, max_seconds: float, sample_rate: int = SAMPLE_RATE) -> Wave:
    """The samples of a wav, flac, ogg or mp3 file, mono, at `sample_rate`. Raises AudioError.

    A crafted file cannot exhaust memory: rate, channels and length are checked in the header, at
    most `max_seconds` are decoded, and channels are mixed down block by block.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            # the header, before any sample is decoded
            rate = file.samplerate
            if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
                raise AudioError(f"{rate} Hz; {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} can be read")
            if file.channels > MAX_CHANNELS:
                raise AudioError(f"{file.channels} channels, limit {MAX_CHANNELS}")
            limit = int(max_seconds * rate)
            if file.frames > limit:
                raise AudioError(f"too long: {file.frames / rate:.1f} s, limit {max_seconds:g} s")
            # a header may lie about the length: `frames` bounds what is decoded
            blocks = file.blocks(BLOCK_SAMPLES, frames=limit, dtype="float32", always_2d=True)
            parts = [block.mean(axis=1) for block in blocks]
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"unreadable audio: {error}") from error
    mono = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(mono):
        raise AudioError("empty audio: 0 samples")
    if not np.isfinite(mono).all():
        raise AudioError("audio holds NaN or infinite samples")
    return resample(mono, rate, sample_rate)


def read_file(uri: str, *, max_seconds: float) -> Wave:
    """The recording at a path or URI, as `read` decodes it. Raises AudioError."""
    return read(storage.read_bytes(uri), max_seconds=max_seconds)


def resample(wave: Wave, rate: int, to: int = SAMPLE_RATE) -> Wave:
    """`wave` at the sample rate `to` instead of `rate`."""
    if rate == to:
        return wave.astype(np.float32, copy=False)
    return soxr.resample(wave, rate, to).astype(np.float32)


def rms_dbfs(wave: Wave) -> float:
    """Root mean square level in dB relative to full scale."""
    return float(20 * np.log10(np.sqrt(np.mean(np.square(wave, dtype=np.float64))) + 1e-9))


def wav_bytes(wave: Wave, sample_rate: int = SAMPLE_RATE) -> bytes:
    """The bytes of a 16-bit PCM wav file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def flac_bytes(wave: Wave, comment: str) -> bytes:
    """The bytes of a 16-bit flac file at 24 kHz with a comment in its header."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
        file.comment = comment  # first: the header cannot grow once samples follow it
        file.write(np.clip(wave, -1, 1))
    return buffer.getvalue()


def read_comment(data: bytes) -> str:
    """The comment in a sound file's header, or an empty string. Raises AudioError."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return str(file.comment)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"unreadable audio: {error}") from error


def trim(wave: Wave, threshold: float = 0.01, margin_seconds: float = 0.05) -> Wave:
    """`wave` with the silence at both ends cut to a margin, and scaled to peaks below 1.

    Raises AudioError when no sample exceeds `threshold`.
    """
    loud = np.flatnonzero(np.abs(wave) > threshold)
    if not len(loud):
        raise AudioError("nothing but silence")
    margin = int(margin_seconds * SAMPLE_RATE)
    wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
    return (wave / max(1.0, float(np.abs(wave).max()) / 0.99)).astype(np.float32)
