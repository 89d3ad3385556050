"""English in spoken form: `english_rules`, then the grammars of wetext.

wetext (Apache-2.0, 20 MB of grammars in its wheel) is loaded by the first call, in 0.7 s. It may
raise, or return nothing, for text that its grammars do not cover. Such text stays as it is written,
and espeak reads it.
"""

import logging
import re
import sys
import unicodedata
from functools import lru_cache
from typing import Any

from valle.model.english_rules import RULES

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 300
"""Characters that wetext gets at a time."""


_WORTH = re.compile(r"[\d&@%=+]|\b[IVX]{2,}\b|\w\.")
"""What wetext may turn into words; a text without it is left as it is."""
_FIGURES = re.compile(r"\d+|[^\w\s]+")
_FINAL_STOP = re.compile(r"(?<=\w)\.[\"')\]]*$")
"""The end of a sentence, of which wetext would make an abbreviation's."""
_WORD = re.compile(r"\w*\d\w*|[^\W\d_]{2,}")


@lru_cache(maxsize=1)
def _normalizer() -> Any:
    from wetext import Normalizer

    return Normalizer(lang="en", operator="tn")


@lru_cache(maxsize=1)
def _report() -> None:
    """Logs the exception being handled, in the first call of this process."""
    error = sys.exception()
    logger.warning("reading English failed (%r); espeak reads such text as it is written", error)


def spoken_english(sentence: str) -> str:
    """One sentence with numbers, abbreviations and symbols in words. Never raises."""
    sentence = "".join(
        str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c for c in sentence
    )
    sentence = " ".join(_by_rules(sentence).split())
    sentence, stop = _FINAL_STOP.sub("", sentence), _FINAL_STOP.search(sentence)
    spoken = " ".join(_by_grammar(piece) for piece in _pieces(sentence))
    return re.sub(r" +(?=[.,;:!?](?:[\s\"')\]]|$))", "", spoken) + (stop[0] if stop else "")


def _by_rules(sentence: str) -> str:
    """The sentence after the rules; without one that fails on it."""
    for pattern, replacement in RULES:
        try:
            sentence = pattern.sub(replacement, sentence)
        # one wrong rule must not end a request or a job
        except Exception:
            _report()
    return sentence


def _pieces(sentence: str) -> list[str]:
    """The sentence in parts of bounded length, cut between words where there are any: the time of
    wetext grows faster than the length, most of all for figures."""
    figures = len(_FIGURES.findall(sentence))
    limit = MAX_CHARACTERS if figures * 12 < len(sentence) else MAX_CHARACTERS // 5
    pattern = rf"\S{{{limit}}}|\S.{{0,{limit - 2}}}(?:(?=\s)|$)|\S.{{0,{limit - 2}}}"
    return re.findall(pattern, sentence)


def _by_grammar(text: str) -> str:
    """wetext's spoken form; where it fails for the whole text, that of each half, down to words."""
    if not _WORTH.search(text):
        return text
    spoken = _try_grammar(text)
    if spoken is not None:
        return spoken
    words = text.split(" ")
    if len(words) == 1:
        return text
    middle = len(words) // 2
    return f"{_by_grammar(' '.join(words[:middle]))} {_by_grammar(' '.join(words[middle:]))}"


def _try_grammar(text: str) -> str | None:
    """wetext's spoken form, or None where wetext raises or loses words."""
    try:
        spoken = _normalizer().normalize(text)
    # wetext asserts, and its libraries raise, what its grammars do not cover
    except Exception:
        _report()
        return None
    spoken = re.sub(r"\\(.)", r"\1", spoken)  # it writes \" for a quotation mark
    complete = len(_WORD.findall(spoken)) >= len(_WORD.findall(text))
    return spoken if complete else None
