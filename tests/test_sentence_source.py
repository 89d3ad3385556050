"""Sentences made when they are needed: the same ones, and the first without the rest."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valle.model import sentences
from valle.model.sentences import sentence_blocks, sentence_phoneme_ids, split_sentences
from valle.serve.app_args import AppArgs
from valle.serve.web import sentence_source
from valle.serve.web.schema import ApiError, SpeechRequest
from valle.serve.web.sentence_source import SentenceSource

TEXT = "The early train was late. It cost $5.50 at 9:30 AM! ... So we walked. " * 12


def whole(text: str, language: str = "en-us") -> list[list[int]]:
    """`sentence_phoneme_ids` without blocks: the slow twin."""
    spoken = [sentences.speak(part, language) for part in split_sentences(text, language)]
    return [ids for ids in sentences.spoken_ids(spoken, language) if ids]


@pytest.mark.parametrize(
    "text", ["Hello.", "Hello. Then?", TEXT, "... Hello.", "Hello. ... - ! Oh.", "“No.” " * 40]
)
def test_blocks_are_the_sentences_of_the_whole_text(text: str) -> None:
    blocks = list(sentence_blocks(text, "en-us"))
    assert (
        [ids for block in blocks for ids in block]
        == whole(text)
        == sentence_phoneme_ids(text, "en-us")
    )
    assert len(blocks[0]) == 1 and all(blocks)


@pytest.mark.fuzz
@given(
    st.lists(st.sampled_from(["Hi.", "...", "$5 no.", "Mr. B. left!", "—", "3 x 4?"]), min_size=1)
)
def test_blocks_equal_the_whole_for_any_sentences(parts: list[str]) -> None:
    text = " ".join(parts)
    expected = whole(text)
    if not expected:
        with pytest.raises(ValueError, match="nothing to say"):
            list(sentence_blocks(text, "en-us"))
        return
    assert [ids for block in sentence_blocks(text, "en-us") for ids in block] == expected


def test_first_block_does_not_normalize_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[str] = []
    speak = sentences.speak

    def count(sentence: str, voice: str) -> str:
        spoken.append(sentence)
        return speak(sentence, voice)

    monkeypatch.setattr(sentences, "speak", count)
    blocks = sentence_blocks(TEXT, "en-us")
    next(blocks)
    assert spoken == ["The early train was late."]
    next(blocks)
    assert len(spoken) == 3


def test_a_script_at_the_end_is_refused_before_the_first_block() -> None:
    with pytest.raises(ValueError, match="script|read"):
        next(sentence_blocks(TEXT + "漢字漢字漢字漢字。", "en-us"))


@pytest.mark.anyio
async def test_source_makes_sentences_once_for_concurrent_readers() -> None:
    n_taken = 0

    def blocks() -> Iterator[list[list[int]]]:
        nonlocal n_taken
        for block in ([[1]], [[2], [3, 3]], [[4]]):
            n_taken += 1
            yield block

    iterator = blocks()
    source = SentenceSource(iterator, next(iterator))
    assert await source.has(0) and n_taken == 1
    assert await asyncio.gather(*(source.has(1) for _ in range(5))) == [True] * 5
    assert n_taken == 2 and source[2] == [3, 3]
    assert await source.n_phonemes() == 5 and not await source.has(4)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "..."}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"language": "xx"}, "language"),
    ],
)
async def test_source_refuses_by_the_name_of_the_field(fields: dict[str, str], param: str) -> None:
    request = SpeechRequest(**({"input": "Hello.", "voice": "ann"} | fields))
    with pytest.raises(ApiError) as refused:
        await SentenceSource.open(request, AppArgs())
    assert (refused.value.status, refused.value.detail.param) == (400, param)
    assert json.loads(refused.value.detail.model_dump_json())["message"]


def test_sentence_source_splits_within_the_budget() -> None:
    request = SpeechRequest(input="word " * 200, voice="ann")
    args = AppArgs(max_sentence_seconds=5.0)
    _, first = sentence_source._first_block(request, args)
    budget = sentences.phoneme_budget(5.0, args.max_phonemes)
    assert len(first) > 1 and all(len(ids) <= budget for ids in first)
