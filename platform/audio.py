"""Sound files in and out: any format libsndfile reads, as 24 kHz mono float32.

Bad input raises `AudioError` with a reason fit for a report.
"""

import io

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from valle.model.tokens import SAMPLE_RATE

Wave = NDArray[np.float32]
"""Mono samples in [-1, 1], shape [samples]."""


class AudioError(ValueError):
    """A recording that cannot be used, and why."""


def read(data: bytes, *, max_seconds: float, sample_rate: int = SAMPLE_RATE) -> Wave:
    """Decodes wav, flac, ogg or mp3 bytes, mixes down to mono and resamples.

    The header's length is checked against `max_seconds` before any sample is decoded, and no
    more than that is ever read, so a crafted file cannot exhaust memory. Raises AudioError.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            limit = int(max_seconds * file.samplerate)
            if file.frames > limit:
                seconds = file.frames / file.samplerate
                raise AudioError(f"too long: {seconds:.1f} s, limit {max_seconds:g} s")
            samples = file.read(limit, dtype="float32", always_2d=True)
            rate = file.samplerate
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"unreadable audio: {error}") from error
    if not len(samples):
        raise AudioError("empty audio: 0 samples")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError("audio holds NaN or infinite samples")
    return resample(mono, rate, sample_rate)


def resample(wave: Wave, rate: int, to: int = SAMPLE_RATE) -> Wave:
    """`wave` at another sample rate."""
    if rate == to:
        return wave.astype(np.float32, copy=False)
    return soxr.resample(wave, rate, to).astype(np.float32)


def loudness(wave: Wave) -> float:
    """Level in dB relative to full scale (RMS)."""
    return float(20 * np.log10(np.sqrt(np.mean(np.square(wave, dtype=np.float64))) + 1e-9))


def wav_bytes(wave: Wave, sample_rate: int = SAMPLE_RATE) -> bytes:
    """A 16-bit PCM wav file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def trim(wave: Wave, threshold: float = 0.01, keep_seconds: float = 0.05) -> Wave:
    """`wave` without the silence at both ends, but for a short rest, and with peaks below one."""
    loud = np.flatnonzero(np.abs(wave) > threshold)
    if not len(loud):
        raise AudioError("nothing but silence")
    keep = int(keep_seconds * SAMPLE_RATE)
    wave = wave[max(0, loud[0] - keep) : loud[-1] + keep]
    return (wave / max(1.0, float(np.abs(wave).max()) / 0.99)).astype(np.float32)
