"""A bounded buffer between a generator and its slower reader."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def prefetch(items: AsyncGenerator[Item], buffer_size: int) -> AsyncGenerator[Item]:
    """The same items, produced ahead of the reader: `buffer_size` of them may wait.

    An error of `items` is raised after the items before it. Closing this generator closes `items`.
    """
    queue: asyncio.Queue[Item] = asyncio.Queue(buffer_size)

    async def produce() -> None:
        async with aclosing(items):
            async for item in items:
                await queue.put(item)

    producer = asyncio.create_task(produce())
    try:
        while not (producer.done() and queue.empty()):
            # the producer may end without another item: wait for both
            getter = asyncio.create_task(queue.get())
            try:
                await asyncio.wait([getter, producer], return_when=asyncio.FIRST_COMPLETED)
            finally:
                has_item = getter.done()
                getter.cancel()
            if has_item:
                yield getter.result()
        await producer  # raises its error
    finally:
        producer.cancel()
        await asyncio.wait([producer])
