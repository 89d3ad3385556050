"""Voice activity detection by silero-vad, whose weights come in its wheel."""

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio

_RATE = 16_000
"""Sample rate of the detector's input, in Hz."""


class SpeechFraction:
    """The share of a recording that is speech."""

    def __init__(self) -> None:
        from silero_vad import load_silero_vad

        self._model = load_silero_vad(onnx=True)

    def score(self, wave: Wave) -> float:
        """The share, 0 to 1, of a 24 kHz recording."""
        import torch
        from silero_vad import get_speech_timestamps

        samples = torch.from_numpy(audio.resample(wave, SAMPLE_RATE, _RATE))
        spans = get_speech_timestamps(samples, self._model, sampling_rate=_RATE)
        return sum(span["end"] - span["start"] for span in spans) / max(1, len(samples))
