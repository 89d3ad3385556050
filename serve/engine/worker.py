"""The engine on a thread of its own, spoken to from coroutines.

Coroutines put requests and aborts into a mailbox; the thread steps the engine as long as there is
something to do and hands events back to the event loop. If a step fails, every stream ends with
that error and `check` tells the health check: a dead thread never leaves a request hanging.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress

from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Event, Request

logger = logging.getLogger("ray.serve")


class EngineError(RuntimeError):
    """The engine's thread has died; the message says of what."""


Answer = Event | ValueError | EngineError


class EngineWorker:
    """Owns an engine and its thread."""

    def __init__(self, engine: Engine) -> None:
        """Starts the thread."""
        self._engine = engine
        self._mailbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._answers: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Answer]]] = {}
        self._error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Event]:
        """Events of one request as they come. Leaving early, or being cancelled, frees its slot.

        Raises ValueError for a request that can never run, EngineError when the engine is dead.
        """
        if request.id in self._answers:
            raise ValueError(f"id: {request.id!r} is in use")
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._answers[request.id] = (asyncio.get_running_loop(), answers)
        finished = False
        try:
            self.check()  # after the entry above: a thread that dies now would see it
            self._mailbox.put(request)
            while not finished:
                answer = await answers.get()
                if not isinstance(answer, Event):
                    finished = True
                    raise answer
                finished = answer.finish is not None
                yield answer
        finally:
            self._answers.pop(request.id, None)
            if not finished:
                self._mailbox.put(request.id)

    def check(self) -> None:
        """Raises EngineError when the thread no longer works."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the thread after the step it is in."""
        self._mailbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._read_mail():
                for event in self._engine.step():
                    self._answer(event.id, event)
            self._stop("the engine is closed")
        except BaseException as error:  # whatever it is, nobody may wait for a dead thread
            logger.exception("the engine has stopped")
            self._stop(f"the engine has stopped: {type(error).__name__}: {error}")

    def _stop(self, reason: str) -> None:
        self._error = EngineError(reason)
        for name in list(self._answers):
            self._answer(name, self._error)

    def _read_mail(self) -> bool:
        """Does what the mailbox says, waiting for mail while the engine is idle; False: stop."""
        while self._engine.idle or not self._mailbox.empty():
            mail = self._mailbox.get()
            if mail is None:
                return False
            if isinstance(mail, str):
                self._engine.abort(mail)
                continue
            try:
                self._engine.add(mail)
            except ValueError as error:
                self._answer(mail.id, error)
        return True

    def _answer(self, name: str, answer: Answer) -> None:
        """Hands something to the coroutine that waits for it, in its own thread."""
        if found := self._answers.get(name):  # else it has left
            loop, answers = found
            # a loop that has ended has nobody left to tell
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(answers.put_nowait, answer)
