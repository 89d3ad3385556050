"""Which version of the model new requests get: the one that a registry alias points to."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

logger = logging.getLogger("ray.serve")

MAX_BACKOFF_SECONDS = 600.0
"""Upper bound of the time between two attempts to load a version that fails."""


class AliasWatcher:
    """Follows an alias: polls the registry while requests come, and moves new requests to another
    version once every replica has loaded it."""

    def __init__(
        self,
        resolve: Callable[[], str],
        preload: Callable[[str], Awaitable[None]],
        poll_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`resolve` asks the registry for the alias's version and may block; `preload` returns
        when every replica has loaded a version, or raises."""
        self._resolve, self._preload = resolve, preload
        self._poll_seconds, self._clock = poll_seconds, clock
        self._version: str | None = None
        self._next_poll = 0.0
        self._failures = 0
        self._poll_task: asyncio.Task[None] | None = None

    async def version(self) -> str:
        """The version of a new request; only the very first call waits for the registry."""
        if self._version is None:
            self._version = await self._resolve_now()
        elif self._poll_task is None and self._clock() > self._next_poll:
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            self._poll_task = asyncio.create_task(self._poll(), context=Context())
        return self._version

    async def _resolve_now(self) -> str:
        self._next_poll = self._clock() + self._poll_seconds
        return await asyncio.to_thread(self._resolve)

    async def _poll(self) -> None:
        try:
            version = await self._resolve_now()
            if version != self._version:
                await self._preload(version)
                logger.warning("model: %s follows %s", version, self._version)
                self._version = version
            self._failures = 0
        except Exception:  # the old version stays in use; the time between attempts doubles
            self._failures += 1
            wait = min(self._poll_seconds * 2**self._failures, MAX_BACKOFF_SECONDS)
            self._next_poll = self._clock() + wait
            logger.exception("model: stays at %s, next attempt in %.0f s", self._version, wait)
        finally:
            self._poll_task = None
