"""Calls of deployments: a full queue is `OverloadedError`, a cancelled caller cancels its call."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from valle.serve.deployments.interface import OverloadedError

RETRY_SECONDS = 0.25
"""Seconds between two attempts to enter a full queue."""


async def call_deployment(
    call: Callable[[], DeploymentResponse[Any]], *, retry: bool = False
) -> Any:
    """The result of a call; cancelling this cancels the call.

    A full queue raises OverloadedError or, with `retry`, is tried again until it has a place.
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
                raise OverloadedError from error
        await asyncio.sleep(RETRY_SECONDS)


async def stream_deployment(
    call: Callable[[], DeploymentResponseGenerator[Any]], *, retry: bool = False
) -> AsyncGenerator[Any]:
    """The items of a streaming call; closing this generator cancels the call. A full queue is
    handled as by `call_deployment`."""
    while True:
        response = call()
        try:
            async for item in response:
                yield item
            return
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise
        except BackPressureError as error:  # raised before the first item
            if not retry:
                raise OverloadedError from error
        await asyncio.sleep(RETRY_SECONDS)
