"""How much of a recording is speech (silero's detector, weights in its wheel)."""

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio

_RATE = 16_000
"""What the detector hears."""


class SpeechFraction:
    """Share of the time that silero's detector takes for speech."""

    def __init__(self) -> None:
        from silero_vad import load_silero_vad

        self._model = load_silero_vad(onnx=True)

    def score(self, wave: Wave) -> float:
        """0 to 1 for a 24 kHz recording."""
        import torch
        from silero_vad import get_speech_timestamps

        samples = torch.from_numpy(audio.resample(wave, SAMPLE_RATE, _RATE))
        spans = get_speech_timestamps(samples, self._model, sampling_rate=_RATE)
        return sum(span["end"] - span["start"] for span in spans) / max(1, len(samples))
