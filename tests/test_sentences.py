"""Long text is split into sentences of bounded length, without loss."""

import pytest

from valle.model.sentences import (
    MAX_SENTENCE_CHARACTERS,
    phoneme_budget,
    sentence_phoneme_ids,
    split_sentences,
)
from valle.model.text import decode, phoneme_ids


def test_split_sentences_at_their_ends() -> None:
    text = 'Dr. Smith paid $3.50 at 5 p.m. on Monday. Why?  "I do not know," she said.\n\nThe end'
    assert split_sentences(text) == [
        "Dr. Smith paid $3.50 at 5 p.m. on Monday.",
        "Why?",
        '"I do not know," she said.',
        "The end.",
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


def test_sentence_phoneme_ids_splits_what_numbers_make_long() -> None:
    """139 and 95 characters: one was refused, the other cut at 20 s."""
    populations = ", ".join(str(1_234_567 + 1_111_111 * n) for n in range(12))
    prices = ", ".join(f"${n},{n}34.{n}6" for n in range(1, 8))
    for text in (f"The populations are {populations} and 4456789.", f"The totals were {prices}."):
        sentences = sentence_phoneme_ids(text, "en-us")
        assert len(sentences) > 1 and max(map(len, sentences)) <= phoneme_budget()
        whole = decode(phoneme_ids(text, "en-us"))
        assert "".join(map(decode, sentences)).replace(" ", "") == whole.replace(" ", "")


@pytest.mark.parametrize("budget", [10, 40, 276])
@pytest.mark.parametrize("text", ["W" * 200, "IBM " * 30, "a, b; c: " * 30, "I said hello to you."])
def test_sentence_phoneme_ids_keeps_to_any_budget(text: str, budget: int) -> None:
    sentences = sentence_phoneme_ids(text, "en-us", budget)
    assert all(0 < len(ids) <= budget for ids in sentences)


def test_phoneme_budget_leaves_time_for_slow_voices() -> None:
    assert phoneme_budget(20.0) == int(20 * 18 / 1.3)
    assert phoneme_budget(20.0, 100) == 100 and phoneme_budget(0.1) == 10


def test_split_sentences_keeps_abbreviations_with_their_number() -> None:
    text = "It weighs approx. 5 kg. See vol. 3, p. 7. He said no. Then he left."
    assert split_sentences(text) == [
        "It weighs approx. 5 kg.", "See vol. 3, p. 7.", "He said no.", "Then he left.",
    ]  # fmt: skip
