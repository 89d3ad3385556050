"""A bounded buffer between a generator and its reader."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from valle.serve.web.prefetch import prefetch

pytestmark = pytest.mark.anyio


class CountingGenerator:
    """Counts to `count`; records how far it came and whether it was closed."""

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


async def test_prefetch_keeps_the_order_and_its_bound() -> None:
    source = CountingGenerator(10)
    items = []
    async for item in prefetch(source.items(), 2):
        items.append(item)
        await asyncio.sleep(0)
        assert source.produced <= item + 4  # two in the buffer, one on its way
    assert items == list(range(10)) and source.closed


async def test_prefetch_raises_an_error_after_the_items_before_it() -> None:
    source = CountingGenerator(10, fails_at=3)
    items = []
    with pytest.raises(RuntimeError, match="item 3 failed"):
        async for item in prefetch(source.items(), 5):
            items.append(item)
    assert items == [0, 1, 2] and source.closed


async def test_prefetch_ends_its_source_when_closed() -> None:
    source = CountingGenerator(1000)
    n_tasks = len(asyncio.all_tasks())
    items = prefetch(source.items(), 1)
    assert await anext(items) == 0
    await items.aclose()
    assert source.closed and source.produced < 5
    assert len(asyncio.all_tasks()) == n_tasks
