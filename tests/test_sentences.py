"""Long text is split into sentences of bounded length, without loss."""

import pytest

from valle.model.sentences import MAX_SENTENCE_CHARACTERS, sentence_phoneme_ids, split_sentences
from valle.model.text import phoneme_ids


def test_split_sentences_at_their_ends() -> None:
    text = 'Dr. Smith paid $3.50 at 5 p.m. on Monday. Why?  "I do not know," she said.\n\nThe end'
    assert split_sentences(text) == [
        "Dr. Smith paid $3.50 at 5 p.m. on Monday.",
        "Why?",
        '"I do not know," she said.',
        "The end",
    ]
    assert split_sentences("Il pleut. Restons ici !", "fr-fr") == ["Il pleut.", "Restons ici !"]
    assert split_sentences(" \n ") == [] and split_sentences("One.") == ["One."]


@pytest.mark.parametrize(
    "text",
    [
        "words " * 200,
        ", ".join(["a clause of some words"] * 40),
        "x" * 1000,
        "short, " + "long " * 100 + ", short; " + "y" * 300,
    ],
)
def test_split_sentences_cuts_long_ones_without_loss(text: str) -> None:
    pieces = split_sentences(text)
    assert len(pieces) > 1 and all(0 < len(piece) <= MAX_SENTENCE_CHARACTERS for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_split_sentences_cuts_at_commas_first() -> None:
    text = "the first clause is here, and the second one follows it, then a third closes"
    assert split_sentences(text, max_characters=60) == [
        "the first clause is here, and the second one follows it,",
        "then a third closes",
    ]


def test_sentence_phoneme_ids_leaves_out_silent_sentences() -> None:
    sentences = sentence_phoneme_ids("Hello there.\n\n...\n\nGood bye.", "en-us")
    assert sentences == [phoneme_ids("Hello there.", "en-us"), phoneme_ids("Good bye.", "en-us")]
    for silent in ("...", "  "):
        with pytest.raises(ValueError, match="nothing to say in it"):
            sentence_phoneme_ids(silent, "en-us")
