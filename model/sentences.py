"""Splits text into pieces short enough for the models, and joins their waves.

A long sentence is split before its normalization, by its characters, and after it, by its
phonemes: numbers take few characters and many words.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from valle.model.languages import check_script, espeak_voice
from valle.model.normalize import speak, written_sentences
from valle.model.text import spoken_ids
from valle.model.tokens import SAMPLE_RATE

MAX_SENTENCE_CHARACTERS = 240
"""Characters of a sentence: about 15 s of speech, as long as the training utterances."""

PHONEMES_PER_SECOND = 18.0
"""IPA symbols that a voice speaks in a second, on average."""

SLOWNESS = 1.3
"""How much slower than the average a voice may speak before a sentence reaches its time limit."""

MAX_SECONDS = 20.0
"""Length limit of a sentence's speech where nothing else is said, as in `Synthesis`."""

PAUSE = np.zeros(int(0.15 * SAMPLE_RATE), np.float32)
"""Silence between two sentences, in addition to what the models generate."""

MAX_BLOCK = 16
"""Sentences that are normalized at once while the speech before them is synthesized."""

_CLAUSE_ENDS = re.compile(r"(?<=[,;:–—])\s+")


def phoneme_budget(max_seconds: float = MAX_SECONDS, max_phonemes: int = 1000) -> int:
    """Phonemes of a sentence that even a slow voice speaks within `max_seconds`; at least 10."""
    return max(10, min(max_phonemes, int(max_seconds * PHONEMES_PER_SECOND / SLOWNESS)))


def split_sentences(
    text: str, language: str = "en-us", max_characters: int = MAX_SENTENCE_CHARACTERS
) -> list[str]:
    """The sentences of `text`, without markup, white space normalised. A sentence above
    `max_characters` is cut at commas, colons, semicolons or dashes, and without those between
    words. Raises ValueError for a language that espeak lacks."""
    sentences = written_sentences(text, espeak_voice(language))
    return [piece for sentence in sentences for piece in _cut(sentence, max_characters)]


def sentence_phoneme_ids(text: str, language: str, budget: int | None = None) -> list[list[int]]:
    """Phoneme ids of each sentence that can be pronounced; of one above `budget` phonemes
    (default: `phoneme_budget()`), of each of its parts.

    Raises ValueError if nothing can be pronounced, for a language that espeak lacks, for a script
    that its voice cannot read, and for a language with tones.
    """
    return [ids for block in sentence_blocks(text, language, budget) for ids in block]


def sentence_blocks(
    text: str, language: str, budget: int | None = None
) -> Iterator[list[list[int]]]:
    """`sentence_phoneme_ids` in blocks of one sentence or more, each made when it is asked for: the
    first one, of the first sentence, does not wait for the text.

    Raises as `sentence_phoneme_ids` does; a script that the voice cannot read, wherever it is in
    the text, before the first block.
    """
    voice = espeak_voice(language)
    budget = phoneme_budget() if budget is None else budget
    written = split_sentences(text, voice)
    for sentence in written:
        check_script(sentence, voice)
    n_blocks, start, size = 0, 0, 1
    while start < len(written):
        spoken = [speak(sentence, voice) for sentence in written[start : start + size]]
        block = []
        for sentence, ids in zip(spoken, spoken_ids(spoken, voice), strict=True):
            block += [ids] if len(ids) <= budget else _split_spoken(sentence, voice, budget)
        if block := [ids for ids in block if ids]:
            yield block
            n_blocks += 1
        start, size = start + size, min(2 * size, MAX_BLOCK)
    if not n_blocks:
        raise ValueError("text: nothing to say in it")


def _split_spoken(sentence: str, voice: str, budget: int) -> list[list[int]]:
    """Phoneme ids of a sentence's parts, each within the budget: it is cut into ever smaller parts,
    at clauses, between words, and at last within a word."""
    for max_characters in _halvings(len(sentence)):
        parts = _cut(sentence, max_characters)
        ids = spoken_ids(parts, voice)
        if max(map(len, ids)) <= budget:
            return ids
    return [part[:budget] for part in ids]  # one character with a name longer than the budget


def _halvings(length: int) -> list[int]:
    """Lengths of the parts to try: `length` over 2, 3, 4, 6, 8, 12 ..., down to 1."""
    parts = [2, 3]
    while parts[-2] < length:
        parts.append(2 * parts[-2])
    return [max(1, -(-length // n)) for n in parts] + [1]


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
