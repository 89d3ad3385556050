"""Whether the deployments can answer: one question at a time, whoever asks for it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context

DEADLINE_SECONDS = 2.0
"""Seconds that a probe waits for an answer."""


class Readiness:
    """One question at a time for any number of probes, which need no key."""

    def __init__(
        self,
        not_running: Callable[[], Awaitable[list[str]]],
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        self._not_running, self._deadline = not_running, deadline_seconds
        self._asking: asyncio.Task[list[str]] | None = None

    async def waiting_for(self) -> list[str]:
        """Names of what is missing; "an answer from Serve" where none comes in time."""
        if self._asking is None or self._asking.done():
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            self._asking = asyncio.create_task(self._ask(), context=Context())
        asking = self._asking
        done, _ = await asyncio.wait([asking], timeout=self._deadline)
        if not done or asking.exception() is not None:
            return ["an answer from Serve"]
        return asking.result()

    async def _ask(self) -> list[str]:
        return await self._not_running()
