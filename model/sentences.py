"""Long text in pieces that the models can say in one breath."""

import re
from collections.abc import Sequence

import numpy as np
import sentencex
from numpy.typing import NDArray

from valle.model.tokens import SAMPLE_RATE

LONGEST = 240
"""Characters of a piece: about 15 s, as long as the utterances models are trained on."""

PAUSE = np.zeros(int(0.15 * SAMPLE_RATE), np.float32)
"""Between two sentences, beside what the model itself leaves."""

_BREATHS = re.compile(r"(?<=[,;:–—])\s+")


def split(text: str, language: str = "en-us", longest: int = LONGEST) -> list[str]:
    """The sentences of `text`, white space evened out; those above `longest` characters are cut
    at commas and the like, and where there are none, between words."""
    sentences = (" ".join(part.split()) for part in sentencex.segment(language[:2], text))
    return [piece for sentence in sentences if sentence for piece in _cut(sentence, longest)]


def _cut(sentence: str, longest: int) -> list[str]:
    if len(sentence) <= longest:
        return [sentence]
    clauses = _BREATHS.split(sentence)
    parts = [clause for whole in clauses for clause in _words(whole, longest)]
    pieces = [parts[0]]
    for part in parts[1:]:
        joined = f"{pieces[-1]} {part}"
        if len(joined) <= longest:
            pieces[-1] = joined
        else:
            pieces.append(part)
    return pieces


def _words(clause: str, longest: int) -> list[str]:
    """A clause between words; a word above `longest`, which nobody can say, anywhere."""
    if len(clause) <= longest:
        return [clause]
    words = [w[i : i + longest] for w in clause.split() for i in range(0, len(w), longest)]
    pieces = [words[0]]
    for word in words[1:]:
        if len(pieces[-1]) + 1 + len(word) <= longest:
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


def join(waves: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Sentences in turn, with pauses between them."""
    parts = [part for wave in waves for part in (PAUSE, wave)]
    return np.concatenate(parts[1:])
