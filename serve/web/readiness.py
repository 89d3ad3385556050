"""Whether the deployments can answer, asked at most once a second, whoever asks for it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

MAX_AGE_SECONDS = 1.0
DEADLINE_SECONDS = 2.0
"""Seconds that a probe waits for an answer."""


class Readiness:
    """One question at a time for any number of probes, which need no key."""

    def __init__(
        self,
        not_running: Callable[[], Awaitable[list[str]]],
        deadline_seconds: float = DEADLINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._not_running, self._deadline, self._clock = not_running, deadline_seconds, clock
        self._asking: asyncio.Task[list[str]] | None = None
        self._asked = 0.0

    async def waiting_for(self) -> list[str]:
        """Names of what is missing; "an answer from Serve" where none comes in time."""
        old = self._clock() - self._asked >= MAX_AGE_SECONDS
        if self._asking is None or (self._asking.done() and old):
            self._asked = self._clock()
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            self._asking = asyncio.create_task(self._ask(), context=Context())
        done, _ = await asyncio.wait([self._asking], timeout=self._deadline)
        if not done or self._asking.exception() is not None:
            return ["an answer from Serve"]
        return self._asking.result()

    async def _ask(self) -> list[str]:
        return await self._not_running()
