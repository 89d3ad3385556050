"""Calls of deployments: full queues, dead replicas, cancelled callers, and time limits.

The result of a call depends on its arguments only (speech is drawn by a seed), so every replica
gives the same one. A call whose replica dies is therefore made again, but only once: a request that
ends each replica that runs it must not end all of them.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from valle.serve.deployments.interface import (
    OverloadedError,
    RefusedCallError,
    UnavailableError,
)

RETRY_SECONDS = 0.25
"""Seconds between two attempts to enter a full queue."""

MAX_ATTEMPTS = 2
"""Replicas that a call may fail on; full queues do not count."""

_FAILURES = (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    ObjectLostError,  # the replica's node has gone with its answer
    OutOfMemoryError,  # Ray has ended the replica, for want of memory on its node
    RayActorError,
    RayTaskError,
)


class _Attempts:
    """Decides whether a call that has failed is made again."""

    def __init__(self, retry: bool, max_seconds: float) -> None:
        self._retry, self._max_seconds = retry, max_seconds
        self._deadline = time.monotonic() + max_seconds
        self._n_failed = 0

    def timeout(self) -> asyncio.Timeout:
        """The time that is left, for a block that waits for a replica."""
        return asyncio.timeout(max(0.0, self._deadline - time.monotonic()))

    def restart(self) -> None:
        """Starts the time limit again, after a stream has yielded an item."""
        self._deadline = time.monotonic() + self._max_seconds

    def expired(self) -> UnavailableError:
        return UnavailableError(f"no answer in {self._max_seconds:g} s")

    async def after(self, error: Exception) -> None:
        """Returns when the next attempt is due; raises if there is none."""
        if isinstance(error, BackPressureError):
            if not self._retry:
                raise OverloadedError from error
            if time.monotonic() + RETRY_SECONDS >= self._deadline:
                raise self.expired() from error
            await asyncio.sleep(RETRY_SECONDS)
            return
        # another replica would refuse the same arguments
        if isinstance(error, RayTaskError) and isinstance(error, ValueError):
            raise RefusedCallError(str(getattr(error, "cause", error))) from error
        self._n_failed += 1
        if self._n_failed >= MAX_ATTEMPTS:
            raise UnavailableError(f"{self._n_failed} replicas failed the call") from error


async def call_deployment(
    call: Callable[[], DeploymentResponse[Any]], *, retry: bool = False, max_seconds: float
) -> Any:
    """The result of a call; cancelling this cancels the call.

    A full queue raises OverloadedError or, with `retry`, is tried again until it has a place.
    Raises UnavailableError when two replicas have failed, or after `max_seconds`, and
    RefusedCallError where a replica raises ValueError.
    """
    attempts = _Attempts(retry, max_seconds)
    while True:
        response = call()
        try:
            async with attempts.timeout() as timeout:
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except TimeoutError as error:
            response.cancel()
            if timeout.expired():
                raise attempts.expired() from error
            await attempts.after(error)  # the replica's fault, not the call's
        except _FAILURES as error:
            await attempts.after(error)


async def stream_deployment(
    call: Callable[[], DeploymentResponseGenerator[Any]],
    *,
    retry: bool = False,
    max_seconds: float,
    same: Callable[[Any, Any], bool],
) -> AsyncGenerator[Any]:
    """The items of a streaming call; closing this generator cancels the call.

    Full queues and dead replicas are handled as by `call_deployment`; `max_seconds` bounds the time
    to each item. A stream that is started again must repeat the items that it has yielded, which
    `same` compares; the caller gets only those that follow.
    """
    attempts = _Attempts(retry, max_seconds)
    given: list[Any] = []
    while True:
        response = call()
        n_received = 0
        try:
            while True:
                try:
                    async with attempts.timeout() as timeout:
                        item = await anext(response)
                except StopAsyncIteration:
                    break
                attempts.restart()
                n_received += 1
                if n_received > len(given):
                    given.append(item)
                    yield item
                elif not same(given[n_received - 1], item):
                    raise UnavailableError("a stream that was started again gave other items")
            if n_received < len(given):
                raise UnavailableError("a stream that was started again ended too early")
            return
        except (asyncio.CancelledError, GeneratorExit, UnavailableError):
            response.cancel()
            raise
        except TimeoutError as error:
            response.cancel()
            if timeout.expired():
                raise attempts.expired() from error
            await attempts.after(error)
        except _FAILURES as error:
            await attempts.after(error)
