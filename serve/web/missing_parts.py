"""The parts that a server lacks to answer speech requests, for `/health/ready`.

All parts are asked at the same time, with one second each. A part that does not answer counts as
missing. Its question continues, and the next probe waits for it instead of asking again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

from starlette.concurrency import run_in_threadpool

from valle.serve.deployments.interface import Deployments
from valle.serve.web.alias_watcher import AliasWatcher
from valle.serve.web.voices import VoiceStore

ANSWER_SECONDS = 1.0
"""Time that a part gets for its answer."""

VALID_SECONDS = 1.0
"""Time for which a good answer is not asked for again: probes need no key."""

CONTROLLER, MODEL_VERSION, VOICE_STORE = "Serve's controller", "a model version", "the voice store"


class _Question:
    """One question, asked by one task at a time."""

    def __init__(self, ask: Callable[[], Awaitable[Any]]) -> None:
        self._ask = ask
        self._task: asyncio.Task[Any] | None = None
        self._answered_at = -VALID_SECONDS

    async def answer(self) -> Any:
        """The answer; raises TimeoutError, or the question's own error."""
        task = self._task
        if task is None or (task.done() and not self._is_valid(task)):
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            task = self._task = asyncio.create_task(self._ask_now(), context=Context())
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asyncio.shield(task)

    def _is_valid(self, task: "asyncio.Task[Any]") -> bool:
        failed = task.cancelled() or task.exception() is not None
        return not failed and time.monotonic() - self._answered_at < VALID_SECONDS

    async def _ask_now(self) -> Any:
        answer = await self._ask()
        self._answered_at = time.monotonic()
        return answer


class MissingParts:
    """The parts of one ingress replica's server."""

    def __init__(self, deployments: Deployments, watcher: AliasWatcher, store: VoiceStore) -> None:
        self._not_running = _Question(deployments.not_running)
        self._version = _Question(watcher.version)
        self._store = _Question(lambda: run_in_threadpool(store.check_reachable))

    async def names(self) -> list[str]:
        """Names of the missing parts and of the deployments without a running replica; empty if
        speech requests can be answered."""
        questions = (self._not_running, self._version, self._store)
        answers: list[Any] = await asyncio.gather(
            *(question.answer() for question in questions), return_exceptions=True
        )
        deployments, version, store = answers
        missing = [CONTROLLER] if isinstance(deployments, BaseException) else list(deployments)
        missing += [MODEL_VERSION] if isinstance(version, BaseException) else []
        missing += [VOICE_STORE] if isinstance(store, BaseException) else []
        return missing
