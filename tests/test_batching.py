"""Batches of what waits: equal to one at a time, like with like, nobody forgotten."""

import asyncio
import threading

import pytest

from valle.serve.deployments.batching import Drain


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
        drain = Drain(work, size=lambda item: item, budget=40)
        asked = [asyncio.create_task(drain.do(item)) for item in (10, 100, 11, 9, 12, 90, 14, 500)]
        await asyncio.sleep(0.05)
        work.gate.set()
        return await asyncio.gather(*asked)

    assert asyncio.run(go()) == [20, 200, 22, 18, 24, 180, 28, 1000]
    # the oldest goes first, with what is like it; a batch is padded to its longest and stays in the
    # budget; what is too large for that goes alone
    assert work.batches == [[10, 11, 9], [100], [12, 14], [90], [500]]


def test_one_bad_item_fails_alone() -> None:
    work = Doubler()
    work.gate.set()

    async def go() -> list[int | BaseException]:
        drain = Drain(work, size=lambda item: item, budget=100)
        asked = [drain.do(item) for item in (12, 13, 14)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [*found, await drain.do(15)]

    found = asyncio.run(go())
    assert found[0] == 24 and found[2] == 28 and found[3] == 30
    assert isinstance(found[1], ValueError) and "bad luck" in str(found[1])


def test_who_has_left_is_not_worked_for() -> None:
    work = Doubler()

    async def go() -> None:
        drain = Drain(work, size=lambda item: item, budget=10)
        first = asyncio.create_task(drain.do(10))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(drain.do(11))
        third = asyncio.create_task(drain.do(12))
        await asyncio.sleep(0.05)
        second.cancel()
        first.cancel()  # too late for the work, early enough for its answer
        work.gate.set()
        assert await third == 24
        for left in (first, second):
            with pytest.raises(asyncio.CancelledError):
                await left

    asyncio.run(go())
    assert work.batches == [[10], [12]]
