"""Splits long text into sentences short enough for the models, and joins their waves."""

import re
from collections.abc import Sequence

import numpy as np
import sentencex
from numpy.typing import NDArray

from valle.model.text import phoneme_ids
from valle.model.tokens import SAMPLE_RATE

MAX_SENTENCE_CHARACTERS = 240
"""Characters of a sentence: about 15 s of speech, as long as the training utterances."""

PAUSE = np.zeros(int(0.15 * SAMPLE_RATE), np.float32)
"""Silence between two sentences, in addition to what the models generate."""

_CLAUSE_ENDS = re.compile(r"(?<=[,;:–—])\s+")


def split_sentences(
    text: str, language: str = "en-us", max_characters: int = MAX_SENTENCE_CHARACTERS
) -> list[str]:
    """The sentences of `text`, white space normalised. A sentence above `max_characters` is cut at
    commas, colons, semicolons or dashes, and without those between words."""
    sentences = (" ".join(part.split()) for part in sentencex.segment(language[:2], text))
    return [piece for sentence in sentences if sentence for piece in _cut(sentence, max_characters)]


def sentence_phoneme_ids(text: str, language: str) -> list[list[int]]:
    """Phoneme ids of each sentence that can be pronounced. Raises ValueError if none can."""
    sentences, last_error = [], None
    for sentence in split_sentences(text, language):
        try:
            sentences.append(phoneme_ids(sentence, language))
        except ValueError as error:
            last_error = error
    if not sentences:
        raise last_error or ValueError("text: nothing to say in it")
    return sentences


def _cut(sentence: str, max_characters: int) -> list[str]:
    """A sentence in as few parts as commas and word boundaries allow."""
    if len(sentence) <= max_characters:
        return [sentence]
    clauses = _CLAUSE_ENDS.split(sentence)
    parts = [part for clause in clauses for part in _words(clause, max_characters)]
    pieces = [parts[0]]
    for part in parts[1:]:
        joined = f"{pieces[-1]} {part}"
        if len(joined) <= max_characters:
            pieces[-1] = joined
        else:
            pieces.append(part)
    return pieces


def _words(clause: str, max_characters: int) -> list[str]:
    """A clause, cut between words; a word above `max_characters` is cut anywhere."""
    if len(clause) <= max_characters:
        return [clause]
    words = [
        w[i : i + max_characters] for w in clause.split() for i in range(0, len(w), max_characters)
    ]
    pieces = [words[0]]
    for word in words[1:]:
        if len(pieces[-1]) + 1 + len(word) <= max_characters:
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


def join_waves(waves: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The sentences one after the other, with `PAUSE` between them."""
    parts = [part for wave in waves for part in (PAUSE, wave)]
    return np.concatenate(parts[1:])
