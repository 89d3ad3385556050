"""Shares a running computation between all callers that ask for the same key."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass
class _Flight:
    task: "asyncio.Task[Any]"
    n_waiting: int = 0


class SingleFlight:
    """Callers that ask for the same key while the work runs share its result, or its error."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    async def run(self, key: Hashable, work: Callable[[], Awaitable[Result]]) -> Result:
        """The result of `work`. A caller that is cancelled leaves it to the others; with the last
        one, the work is cancelled."""
        flight = self._flights.get(key)
        if flight is None:
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            task = asyncio.create_task(_await(work), context=Context())
            flight = self._flights[key] = _Flight(task)
        flight.n_waiting += 1
        try:
            result: Result = await asyncio.shield(flight.task)
            return result
        finally:
            flight.n_waiting -= 1
            if flight.task.done() or not flight.n_waiting:
                flight.task.cancel()
                if self._flights.get(key) is flight:
                    del self._flights[key]


async def _await(work: Callable[[], Awaitable[Result]]) -> Result:
    return await work()
