"""The sentences of a request's text, made when they are needed. The first sound does not wait for
the normalization of the whole text."""

import asyncio
from collections.abc import Callable, Iterator

from valle.model.sentences import phoneme_budget, sentence_blocks
from valle.serve.app_args import AppArgs
from valle.serve.web.schema import ApiError, SpeechRequest
from valle.serve.web.threads import run_text


class SentenceSource:
    """Phoneme ids of a text's sentences, of which there is at least one."""

    def __init__(self, blocks: Iterator[list[list[int]]], first: list[list[int]]) -> None:
        """`first` is the first block; `blocks` yields the others."""
        self._blocks = blocks
        self._sentences = list(first)
        self._complete = False
        self._lock = asyncio.Lock()

    @classmethod
    async def open(cls, request: SpeechRequest, args: AppArgs) -> "SentenceSource":
        """The sentences of a request. Raises ApiError for a text that cannot be spoken."""
        return cls(*await run_text(_first_block, request, args))

    async def has(self, index: int) -> bool:
        """True if there is a sentence of that index. Makes it if it is not made yet."""
        return await self._until(lambda: len(self._sentences) > index)

    def __getitem__(self, index: int) -> list[int]:
        """A sentence that `has` has found."""
        return self._sentences[index]

    async def n_phonemes(self) -> int:
        """Number of phonemes of the whole text, whose remaining sentences are made for it."""
        await self._until(lambda: False)
        return sum(map(len, self._sentences))

    async def _until(self, condition: Callable[[], bool]) -> bool:
        async with self._lock:  # one thread at a time takes blocks
            while not condition() and not self._complete:
                block = await run_text(next, self._blocks, None)
                if block is None:
                    self._complete = True
                else:
                    self._sentences += block
        return condition()


def _first_block(
    request: SpeechRequest, args: AppArgs
) -> tuple[Iterator[list[list[int]]], list[list[int]]]:
    if len(request.input) > args.max_characters:
        message = f"input: {len(request.input)} characters, limit {args.max_characters}"
        raise ApiError(400, message, "input")
    budget = phoneme_budget(args.max_sentence_seconds, args.max_phonemes)
    try:
        blocks = sentence_blocks(request.input, request.language, budget)
        return blocks, next(blocks)
    except ValueError as error:
        message = str(error)
        field = "language" if message.startswith("language:") else "input"
        if not message.startswith(("language:", "text:")):
            message = f"input: {message}"
        raise ApiError(400, message, field) from error
