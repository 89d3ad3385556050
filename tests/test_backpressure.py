"""Working ahead: same items, bounded, failures told, nothing left running."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from valle.serve.deployments.backpressure import prefetch


class CountingGenerator:
    """Counts to `count`, and notes how far it has come and that it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.produced = 0
        self.closed = False

    async def items(self) -> AsyncGenerator[int]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise RuntimeError(f"item {number} failed")
                self.produced += 1
                yield number
        finally:
            self.closed = True


@pytest.mark.anyio
async def test_all_items_come_in_order_and_few_wait() -> None:
    source = CountingGenerator(10)
    seen = []
    async for item in prefetch(source.items(), 2):
        seen.append(item)
        await asyncio.sleep(0)
        assert source.produced <= item + 4  # two wait, one is on its way
    assert seen == list(range(10)) and source.closed


@pytest.mark.anyio
async def test_a_failure_comes_after_what_was_made() -> None:
    source = CountingGenerator(10, fails_at=3)
    seen = []
    with pytest.raises(RuntimeError, match="item 3 failed"):
        async for item in prefetch(source.items(), 5):
            seen.append(item)
    assert seen == [0, 1, 2] and source.closed


@pytest.mark.anyio
async def test_who_leaves_ends_the_work() -> None:
    source = CountingGenerator(1000)
    before = len(asyncio.all_tasks())
    items = prefetch(source.items(), 1)
    assert await anext(items) == 0
    await items.aclose()
    assert source.closed and source.produced < 5
    assert len(asyncio.all_tasks()) == before
