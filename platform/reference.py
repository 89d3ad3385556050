"""The rule for reference recordings: uploads, `ref_audio`, voices put into the folder by hand, the
command line and `synthesize`.

A prompt is the first seconds of the recording, so silence before the speech is cut off.
"""

import threading

import numpy as np

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, decoding
from valle.platform.audio import AudioError, Decode
from valle.platform.vad import SpeechDetector

MIN_REFERENCE_SECONDS, MAX_REFERENCE_SECONDS = 1.0, 60.0
"""Least length of the speech that is left, and greatest length of the file, in seconds."""
MIN_RMS_DBFS = -45.0
"""Lower bound of a recording's level, in dB of full scale: below it there is mostly noise."""
MIN_SPEECH_FRACTION = 0.4
"""Lower bound of the share of speech, from its beginning to its end."""
MAX_SILENCE_SECONDS, MARGIN_SECONDS = 0.3, 0.1
"""A longer silence before or after the speech is cut to the margin. A shorter one stays, so that a
recording that has been cut once stays as it is."""
SILENCE_PEAK = 1e-3
"""A recording that never exceeds this, -60 dB of full scale, is silence."""


class ReferenceReader:
    """Reads reference recordings, for calls from any thread."""

    def __init__(self, decode: Decode = decoding.decode) -> None:
        """`decode`: for recordings that may be hostile, the one of a `DecoderPool`."""
        self._decode = decode
        self._detector: SpeechDetector | None = None
        self._lock = threading.Lock()

    def read(self, data: bytes) -> Wave:
        """The recording from the beginning to the end of its speech, at 24 kHz.

        Raises AudioError, with the reason, for one that cannot be read or is not speech of at least
        `MIN_REFERENCE_SECONDS`.
        """
        wave = audio.read(
            data,
            max_seconds=MAX_REFERENCE_SECONDS,
            max_clipped=audio.MAX_CLIPPED,
            decode=self._decode,
        )
        _check_length(wave)
        peak = float(np.abs(wave).max())
        if peak < SILENCE_PEAK:
            raise AudioError("nothing but silence")
        # the detector expects speech at a usual level; that of the recording is judged below
        spans = self._speech_detector().spans((wave * (0.5 / peak)).astype(np.float32))
        if not spans:
            raise _not_speech(0.0)
        speech = _cut_silence(wave, spans[0][0], spans[-1][1])
        _check_length(speech)
        if (level := audio.rms_dbfs(speech)) < MIN_RMS_DBFS:
            raise AudioError(f"too quiet: {level:.0f} dB, at least {MIN_RMS_DBFS:.0f} dB")
        share = sum(last - first for first, last in spans) / len(speech)
        if share < MIN_SPEECH_FRACTION:
            raise _not_speech(share)
        return speech

    def _speech_detector(self) -> SpeechDetector:
        with self._lock:
            self._detector = self._detector or SpeechDetector()
            return self._detector


def _check_length(wave: Wave) -> None:
    seconds = len(wave) / SAMPLE_RATE
    if seconds < MIN_REFERENCE_SECONDS:
        raise AudioError(
            f"too short: {seconds:.2f} s, at least {MIN_REFERENCE_SECONDS:g} s of speech"
        )


def _cut_silence(wave: Wave, start: int, end: int) -> Wave:
    """`wave` without long silence before `start` and after `end`, where its speech is."""
    longest, margin = (int(s * SAMPLE_RATE) for s in (MAX_SILENCE_SECONDS, MARGIN_SECONDS))
    first = start - margin if start > longest else 0
    last = end + margin if len(wave) - end > longest else len(wave)
    return wave[first:last]


def _not_speech(share: float) -> AudioError:
    return AudioError(f"{share:.0%} of it is speech, at least {MIN_SPEECH_FRACTION:.0%} has to be")
