"""espeak: text in spoken form to IPA, by one backend that changes its voice.

Only this module touches GPL-3 code (phonemizer, and the espeak library in `espeakng-loader`); the
rest of the project handles IPA strings and lists of ids.
"""

import logging
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_LOCK = threading.Lock()
"""espeak has one voice and returns results in static memory: a process may make one call at a
time, and no other between choosing the voice and phonemizing."""


@lru_cache(maxsize=1)
def voices() -> frozenset[str]:
    """Names of espeak's voices. Cached, since each query copies the shared library."""
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    return frozenset(EspeakBackend.supported_languages())


def _quiet() -> logging.Logger:
    """A logger that hides phonemizer's warnings of words of another language."""
    logger = logging.getLogger(f"{__name__}.phonemizer")
    logger.setLevel(logging.ERROR)
    return logger


class _Espeak:
    """The backend and the voice that it has now."""

    def __init__(self) -> None:
        from phonemizer.backend import EspeakBackend

        self._voice = "en-us"
        self._backend: Any = EspeakBackend(
            self._voice,
            preserve_punctuation=True,
            with_stress=True,
            language_switch="remove-flags",
            logger=_quiet(),
        )

    def phonemize(self, lines: Sequence[str], voice: str) -> list[str]:
        if voice != self._voice:
            # A backend of its own for each voice would keep 5 MB for ever: phonemizer copies the
            # library for each one and never unloads it.
            self._backend._espeak.set_voice(voice)
            self._voice = voice
        # one by one: phonemizer drops lines without a word, and joins them to others
        return [" ".join(self._backend.phonemize([line], strip=True)) for line in lines]


@lru_cache(maxsize=1)
def _espeak() -> _Espeak:
    return _Espeak()


def phonemize_spoken(texts: Sequence[str], voice: str) -> list[str]:
    """IPA of each text in spoken form, with stress marks, word boundaries and punctuation.

    Raises ValueError for a voice that espeak lacks.
    """
    if voice not in voices():
        raise ValueError(f"language: espeak has no voice named {voice!r} (try en-us, fr-fr, es)")
    with _LOCK:
        phonemes = _espeak().phonemize(texts, voice)
    return [re.sub(r"\s+", " ", line).strip() for line in phonemes]
