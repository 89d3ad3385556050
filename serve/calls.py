"""Waiting for other deployments, and working ahead of whoever is slower."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

Item = TypeVar("Item")


async def result(response: DeploymentResponse[Any]) -> Any:
    """What a deployment answers; who stops waiting for it stops its work too."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def results(response: DeploymentResponseGenerator[Any]) -> AsyncGenerator[Any]:
    """What a deployment yields; who stops reading stops its work too."""
    try:
        async for item in response:
            yield item
    except (asyncio.CancelledError, GeneratorExit):
        response.cancel()
        raise


async def ahead(items: AsyncGenerator[Item], most: int) -> AsyncGenerator[Item]:
    """The same items, made while those before them are still being used; `most` may wait."""
    queue: asyncio.Queue[Item | Exception | None] = asyncio.Queue(most)

    async def produce() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    await queue.put(item)
        except Exception as error:  # raised below, where the items are read
            await queue.put(error)
        else:
            await queue.put(None)

    producer = asyncio.create_task(produce())
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        producer.cancel()  # whoever read has gone: what is being made is for nobody
        await asyncio.wait([producer])
