"""Voice activity detection by silero-vad, whose weights come in its wheel."""

import threading

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio

_RATE = 16_000
"""Sample rate of the detector's input, in Hz."""


class SpeechDetector:
    """Finds the speech in recordings; for calls from any thread."""

    def __init__(self) -> None:
        from silero_vad import load_silero_vad

        self._model = load_silero_vad(onnx=True)
        self._lock = threading.Lock()  # the detector is stateful

    def spans(self, wave: Wave) -> list[tuple[int, int]]:
        """Beginning and end of each stretch of speech, in samples of a 24 kHz recording."""
        scale = SAMPLE_RATE / _RATE
        spans, _ = self._detect(wave)
        return [(int(start * scale), min(len(wave), int(end * scale))) for start, end in spans]

    def score(self, wave: Wave) -> float:
        """The share, 0 to 1, of a 24 kHz recording that is speech."""
        spans, total = self._detect(wave)
        return sum(end - start for start, end in spans) / max(1, total)

    def _detect(self, wave: Wave) -> tuple[list[tuple[int, int]], int]:
        """Stretches of speech, and the length of the recording, at the detector's rate."""
        import torch
        from silero_vad import get_speech_timestamps

        samples = torch.from_numpy(audio.resample(wave, SAMPLE_RATE, _RATE))
        with self._lock:
            found = get_speech_timestamps(samples, self._model, sampling_rate=_RATE)
        return [(span["start"], span["end"]) for span in found], len(samples)
