"""Dynamic batching: similar lengths together, errors and cancellations apart."""

import asyncio
import threading

import pytest

from valle.serve.deployments.batching import DynamicBatcher
from valle.serve.deployments.health import ReplicaHealth

HEALTH = ReplicaHealth(max_step_seconds=300)


class Doubler:
    """Doubles numbers once the gate is open; records its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        assert self.gate.wait(30)
        self.batches.append(items)
        if 13 in items:
            raise ValueError("13 is bad luck")
        return [2 * item for item in items]


def test_batches_hold_items_of_similar_size_within_the_budget() -> None:
    work = Doubler()

    async def go() -> list[int]:
        batcher = DynamicBatcher(work, size=lambda item: item, budget=40, health=HEALTH)
        tasks = [
            asyncio.create_task(batcher.submit(item)) for item in (10, 100, 11, 9, 12, 90, 14, 500)
        ]
        await asyncio.sleep(0.05)
        work.gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(go()) == [20, 200, 22, 18, 24, 180, 28, 1000]
    # the oldest item first, with those of similar size; each batch, padded to its longest item, is
    # within the budget, unless it is a single item
    assert work.batches == [[10, 11, 9], [100], [12, 14], [90], [500]]


def test_an_item_that_fails_leaves_the_others_of_its_batch() -> None:
    work = Doubler()
    work.gate.set()

    async def go() -> list[int | BaseException]:
        batcher = DynamicBatcher(work, size=lambda item: item, budget=100, health=HEALTH)
        calls = [batcher.submit(item) for item in (12, 13, 14)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        return [*results, await batcher.submit(15)]

    results = asyncio.run(go())
    assert results[0] == 24 and results[2] == 28 and results[3] == 30
    assert isinstance(results[1], ValueError) and "bad luck" in str(results[1])


def test_a_cancelled_item_is_left_out() -> None:
    work = Doubler()

    async def go() -> None:
        batcher = DynamicBatcher(work, size=lambda item: item, budget=10, health=HEALTH)
        first = asyncio.create_task(batcher.submit(10))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(batcher.submit(11))
        third = asyncio.create_task(batcher.submit(12))
        await asyncio.sleep(0.05)
        second.cancel()
        first.cancel()  # too late for the work, early enough for its answer
        work.gate.set()
        assert await third == 24
        for cancelled in (first, second):
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    asyncio.run(go())
    assert work.batches == [[10], [12]]
