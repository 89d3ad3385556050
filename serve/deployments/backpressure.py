"""Waiting for other deployments, and working ahead of whoever is slower."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from valle.serve.web.schema import ApiError

Item = TypeVar("Item")

RETRY_SECONDS = 0.25
"""Seconds until a full queue is tried again."""


async def call_deployment(
    call: Callable[[], DeploymentResponse[Any]], *, retry: bool = False
) -> Any:
    """What a deployment answers; who stops waiting for it stops its work too.

    A full queue raises ApiError 429 (Serve itself would answer BackPressureError with 503, whatever
    handler the application has); with `retry` it is waited for. A request that has begun
    to answer retries, or those who come anew would break off those who are being served.
    """
    while True:
        response = call()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            if not retry:
                raise _busy() from error
        await asyncio.sleep(RETRY_SECONDS)


def _busy() -> ApiError:
    """The answer to one too many."""
    return ApiError(429, "the server is busy; try again in a moment", code="overloaded")


async def stream_deployment(
    call: Callable[[], DeploymentResponseGenerator[Any]], *, retry: bool = False
) -> AsyncGenerator[Any]:
    """What a deployment yields; who stops reading stops its work too. `retry` as above."""
    while True:
        response = call()
        try:
            async for item in response:
                yield item
            return
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise
        except BackPressureError as error:  # comes before anything else
            if not retry:
                raise _busy() from error
        await asyncio.sleep(RETRY_SECONDS)


async def prefetch(items: AsyncGenerator[Item], buffer_size: int) -> AsyncGenerator[Item]:
    """The same items, made while those before them are still being used; `buffer_size` may wait."""
    queue: asyncio.Queue[Item] = asyncio.Queue(buffer_size)

    async def produce() -> None:
        async with aclosing(items):
            async for item in items:
                await queue.put(item)

    producer = asyncio.create_task(produce())
    try:
        while not (producer.done() and queue.empty()):
            getter = asyncio.create_task(queue.get())
            try:
                await asyncio.wait([getter, producer], return_when=asyncio.FIRST_COMPLETED)
            finally:  # the producer has ended without another item, or nobody waits any more
                ready = getter.done()
                getter.cancel()
            if ready:
                yield getter.result()
        await producer  # raises what it has ended with
    finally:
        producer.cancel()  # whoever read has gone: what is being made is for nobody
        await asyncio.wait([producer])
