"""Dynamic batching for models that compute a result in one call (NAR, codec).

There is no timer: whenever the model is free, the next batch is the oldest request with those of
similar length that fit beside it. A single request never waits for others, and batches grow with
the load.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from valle.serve.deployments.health import ReplicaHealth

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_LENGTH_RATIO = 1.5
"""Upper bound of longest over shortest item in a batch: padding costs as much as speech."""


class DynamicBatcher(Generic[Item, Result]):
    """Runs `work` in a thread on batches of the submitted items, one batch at a time."""

    def __init__(
        self,
        work: Callable[[list[Item]], list[Result]],
        size: Callable[[Item], int],
        budget: int,
        health: ReplicaHealth,
    ) -> None:
        """`size` returns an item's frames. The padded sizes of a batch add up to `budget` at most;
        a larger item gets a batch of its own. `health` runs `work`."""
        self._work, self._size, self._budget = work, size, budget
        self._health = health
        self._waiting: list[tuple[Item, int, asyncio.Future[Result]]] = []
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The result of one item. Raises the error that `size` or `work` raises for it. An item
        whose caller is cancelled before its batch starts is left out."""
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
            work = partial(self._work, [item for item, _ in batch])
            results = await self._health.run(work, counts=len(batch) == 1)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            if len(batch) > 1:  # one bad item must not fail the others: run each alone
                for entry in batch:
                    await self._run_batch([entry])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """The oldest waiting item and those that fit beside it, in the order of their arrival."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        remaining: list[tuple[Item, int, asyncio.Future[Result]]] = []
        low = high = 0
        for item, size, future in self._waiting:
            if future.done():  # its caller was cancelled
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
