"""What waits goes together: batches for the models that answer in one go (NAR, codec).

No timer: whenever the model is free, it takes the oldest request and those of like length that
fit beside it. A lone request never waits for company, and under load batches grow by themselves.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_LENGTH_RATIO = 1.5
"""Longest over shortest of a batch, at most: padding costs as much as speech."""


class DynamicBatcher(Generic[Item, Result]):
    """Runs `work` on batches of what `submit` was asked for, one batch at a time."""

    def __init__(
        self, work: Callable[[list[Item]], list[Result]], size: Callable[[Item], int], budget: int
    ) -> None:
        """`size` of an item in frames; a batch's padded sizes add up to `budget` at most, but a
        larger item still gets a batch of its own."""
        self._work, self._size, self._budget = work, size, budget
        self._waiting: list[tuple[Item, int, asyncio.Future[Result]]] = []
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The result for one item. Raises what `size` or `work` raises for it; cancelled before
        its turn comes, it is left out."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, self._size(item), future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while batch := self._next_batch():
                await self._run_batch(batch)
        finally:
            self._running = None

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await asyncio.to_thread(self._work, [item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:  # told to the one it belongs to
            if len(batch) > 1:  # one bad item must not fail its neighbours
                for one in batch:
                    await self._run_batch([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """The oldest that still waits, and what fits beside it, in the order they came."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        remaining: list[tuple[Item, int, asyncio.Future[Result]]] = []
        low = high = 0
        for item, size, future in self._waiting:
            if future.done():  # cancelled: nobody waits for it any more
                continue
            shortest, longest = min(low or size, size), max(high, size)
            fits = (
                longest <= MAX_LENGTH_RATIO * shortest
                and longest * (len(batch) + 1) <= self._budget
            )
            if batch and not fits:
                remaining.append((item, size, future))
                continue
            batch.append((item, future))
            low, high = shortest, longest
        self._waiting = remaining
        return batch
