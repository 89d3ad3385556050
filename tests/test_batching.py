"""Batches of what waits: equal to one at a time, like with like, nobody forgotten."""

import asyncio
import threading

import pytest

from valle.serve.deployments.batching import DynamicBatcher


class Doubler:
    """Doubles numbers, holds at the gate, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.gate.wait(10)
        self.batches.append(items)
        if 13 in items:
            raise ValueError("13 is bad luck")
        return [2 * item for item in items]


def test_what_waits_goes_together_like_with_like() -> None:
    work = Doubler()

    async def go() -> list[int]:
        batcher = DynamicBatcher(work, size=lambda item: item, budget=40)
        tasks = [
            asyncio.create_task(batcher.submit(item)) for item in (10, 100, 11, 9, 12, 90, 14, 500)
        ]
        await asyncio.sleep(0.05)
        work.gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(go()) == [20, 200, 22, 18, 24, 180, 28, 1000]
    # the oldest goes first, with what is like it; a batch is padded to its longest and stays in the
    # budget; what is too large for that goes alone
    assert work.batches == [[10, 11, 9], [100], [12, 14], [90], [500]]


def test_one_bad_item_fails_alone() -> None:
    work = Doubler()
    work.gate.set()

    async def go() -> list[int | BaseException]:
        batcher = DynamicBatcher(work, size=lambda item: item, budget=100)
        calls = [batcher.submit(item) for item in (12, 13, 14)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        return [*results, await batcher.submit(15)]

    results = asyncio.run(go())
    assert results[0] == 24 and results[2] == 28 and results[3] == 30
    assert isinstance(results[1], ValueError) and "bad luck" in str(results[1])


def test_who_has_left_is_not_worked_for() -> None:
    work = Doubler()

    async def go() -> None:
        batcher = DynamicBatcher(work, size=lambda item: item, budget=10)
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
