"""Which version of the model new requests get: the one that a registry alias points to."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

logger = logging.getLogger("ray.serve")

MAX_BACKOFF_SECONDS = 600.0
"""Upper bound of the time between two attempts to load a version that fails."""

FIRST_LOOKUP_SECONDS = 20.0
"""Time that a request waits for the first version."""

FIRST_RETRY_SECONDS = 2.0
"""Time between two attempts to find a first version; requests in between are refused at once."""


class NoVersionError(Exception):
    """No model version is known yet, because the registry has never answered this replica."""


class AliasWatcher:
    """Follows an alias: polls the registry while requests come, and moves new requests to another
    version once every replica has loaded it."""

    def __init__(
        self,
        resolve: Callable[[str | None], str],
        preload: Callable[[str], Awaitable[None]],
        poll_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`resolve` gets the current version (None at first), returns the version that the alias
        points to, and may block. `preload` returns when every replica has loaded a version, or
        raises the error of one that cannot."""
        self._resolve, self._preload = resolve, preload
        self._poll_seconds, self._clock = poll_seconds, clock
        self._version: str | None = None
        self._next_poll = 0.0
        self._failures = 0
        self._first: asyncio.Task[None] | None = None
        self._first_error: Exception | None = None
        self._poll_task: asyncio.Task[None] | None = None

    async def version(self) -> str:
        """The version of a new request; only those before the first answer wait for the registry.

        They share one look-up. Raises NoVersionError when it fails or takes too long.
        """
        if self._version is None:
            await self._wait_for_first()
        elif self._poll_task is None and self._clock() > self._next_poll:
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            self._poll_task = asyncio.create_task(self._poll(), context=Context())
        assert self._version is not None, "the first look-up has set it"
        return self._version

    async def _wait_for_first(self) -> None:
        task = self._start_first()
        try:
            # shielded: a request that is cancelled leaves the look-up to the others
            await asyncio.wait_for(asyncio.shield(task), FIRST_LOOKUP_SECONDS)
        except TimeoutError as error:
            raise NoVersionError("the registry has not answered yet") from error
        if self._version is None:
            raise NoVersionError(str(self._first_error)) from self._first_error

    def _start_first(self) -> "asyncio.Task[None]":
        """The running first look-up, the one that failed a moment ago, or a new one."""
        failed = self._first is not None and self._first.done()
        if self._first is None or (failed and self._clock() > self._next_poll):
            self._first = asyncio.create_task(self._look_up_first(), context=Context())
        return self._first

    async def _look_up_first(self) -> None:
        try:
            version = await asyncio.to_thread(self._resolve, None)
        except Exception as error:  # told to the requests that wait
            self._first_error = error
            self._next_poll = self._clock() + FIRST_RETRY_SECONDS
            logger.warning("model: no version yet, next attempt in 2 s: %s", error)
            return
        self._next_poll = self._clock() + self._poll_seconds
        self._version = version

    async def _poll(self) -> None:
        self._next_poll = self._clock() + self._poll_seconds
        try:
            version = await asyncio.to_thread(self._resolve, self._version)
            if version != self._version:
                await self._preload(version)
                logger.warning("model: %s follows %s", version, self._version)
                self._version = version
            self._failures = 0
        except (
            Exception
        ) as error:  # the old version stays in use; the time between attempts doubles
            self._failures += 1
            wait = min(self._poll_seconds * 2**self._failures, MAX_BACKOFF_SECONDS)
            self._next_poll = self._clock() + wait
            expected = isinstance(error, OSError)  # an outage of minutes is no stack trace each
            logger.warning(
                "model: stays at %s, next attempt in %.0f s: %s",
                self._version,
                wait,
                error,
                exc_info=None if expected else error,
            )
        finally:
            self._poll_task = None
