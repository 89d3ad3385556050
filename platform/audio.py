"""Recordings: any sound file becomes 24 kHz mono float32, and back.

Functions that read raise `AudioError`, whose message is the reason that reports show.
"""

import io
from collections.abc import Callable

import numpy as np
import soundfile
import soxr

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import decoding, storage
from valle.platform.decoding import Samples
from valle.platform.sound_formats import CONVERSION_HINT as CONVERSION_HINT
from valle.platform.sound_formats import AudioError as AudioError

MAX_PEAK = 16.0
"""Upper bound of a float file's samples, relative to full scale: beyond it, 24 dB, they are no
recording with headroom but integers written as floats."""
MAX_CLIPPED = 0.01
"""Upper bound of the share of clipped samples in a recording to learn or to speak from."""

Decode = Callable[[bytes, float], tuple[Samples, int]]
"""`decoding.decode`, or that of a `DecoderPool`: bytes and a limit in seconds to mono samples and
their rate."""


def read(
    data: bytes,
    *,
    max_seconds: float,
    sample_rate: int = SAMPLE_RATE,
    max_clipped: float | None = None,
    decode: Decode = decoding.decode,
) -> Wave:
    """The samples of a sound file in any format of `sound_formats`, mono, at `sample_rate`.

    Channels are averaged. Samples beyond full scale, which float files and lossy formats have, are
    scaled down together so that the largest is 1; others stay as they are. Raises AudioError for a
    file that cannot be read or is longer than `max_seconds`, for NaN, for samples beyond `MAX_PEAK`
    and, if `max_clipped` is given, for a larger share of clipped samples.
    """
    samples, rate = decode(data, max_seconds)
    if not np.isfinite(samples).all():
        raise AudioError("audio holds NaN or infinite samples")
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise AudioError(
            f"too loud: samples reach {peak:.4g}, full scale is 1; integers written as floats? "
            "Divide them by their full scale (32768 for 16 bits) or write them as integers"
        )
    if max_clipped is not None and (share := clipped_fraction(samples)) > max_clipped:
        raise AudioError(
            f"clipped: {share:.1%} of its samples are cut off at full scale, limit "
            f"{max_clipped:.0%}; record it again at a lower level"
        )
    return resample(samples / max(1.0, peak), rate, sample_rate)


def clipped_fraction(samples: Samples) -> float:
    """The share of samples in runs of three or more at the highest or the lowest value, where that
    is near full scale or beyond: the flat tops of clipped waves."""
    clipped = 0
    for side in (samples, -samples):
        top = float(side.max(initial=0.0))
        if top >= 0.9:
            flat = np.concatenate([[False], side >= top - 4e-5 * top, [False]])  # 16-bit steps
            edges = np.flatnonzero(np.diff(flat.astype(np.int8)))
            runs = edges[1::2] - edges[::2]
            clipped += int(runs[runs >= 3].sum())
    return clipped / max(1, len(samples))


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
