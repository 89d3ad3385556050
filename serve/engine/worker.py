"""The engine on a thread of its own, used from coroutines.

Coroutines put requests and aborts into a mailbox. The thread steps the engine while it has requests
and hands the outputs to the event loop. If a step fails, or does not end in time, `on_failure` is
called, every request ends with that error, and `check_health` raises it from then on: no request
waits for a thread that is dead or stuck.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Request, StepOutput

logger = logging.getLogger("ray.serve")


class EngineError(RuntimeError):
    """The engine's thread has ended; the message names the cause."""


class _Forget:
    """Message to the thread: call `Engine.forget_prompts`."""


_Mail = Request | str | _Forget | None
"""A request to add, the id of one to abort, something to forget, or None to end the thread."""

WorkerOutput = StepOutput | ValueError | EngineError
"""What a request's coroutine receives: ValueError for a request that cannot run."""


MAX_STEP_SECONDS = 300.0
"""Upper bound of a step: the first one of a compiled model waits for the compiler."""


class EngineWorker:
    """An engine with its thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_failure: Callable[[str], None] | None = None,
        max_step_seconds: float = MAX_STEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the thread. `on_failure` is called with the reason, before the requests end."""
        self._engine = engine
        self._on_failure, self._max_step_seconds, self._clock = on_failure, max_step_seconds, clock
        self._step_started: float | None = None
        """When the step began that runs now; None between two steps."""
        self._mailbox: queue.SimpleQueue[_Mail] = queue.SimpleQueue()
        self._outputs: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[WorkerOutput]]] = {}
        self._error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput]:
        """Outputs of one request, step by step. Closing the generator aborts the request.

        Raises ValueError for a request that cannot run, EngineError when the thread has ended.
        """
        if request.id in self._outputs:
            raise ValueError(f"id: {request.id!r} is in use; give each request an id of its own")
        outputs: asyncio.Queue[WorkerOutput] = asyncio.Queue()
        self._outputs[request.id] = (asyncio.get_running_loop(), outputs)
        finished = False
        try:
            self.check_health()  # after the entry above, which a thread that ends now will notify
            self._mailbox.put(request)
            while not finished:
                output = await outputs.get()
                if not isinstance(output, StepOutput):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            self._outputs.pop(request.id, None)
            if not finished:
                self._mailbox.put(request.id)

    def check_health(self) -> None:
        """Raises EngineError when the thread has ended, or is stuck in a step."""
        started = self._step_started
        if self._error is None and started is not None:
            seconds = self._clock() - started
            if seconds > self._max_step_seconds:
                self._fail(f"the engine is stuck: a step has not ended in {seconds:.0f} s")
        if self._error is not None:
            raise self._error

    def forget_prompts(self) -> None:
        """Overwrites the keys and values of ended requests, and of running ones when they end."""
        self._mailbox.put(_Forget())

    def close(self) -> None:
        """Ends the thread after its current step and waits for it. It blocks, so it must not be
        called in an event loop."""
        self._mailbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._read_mail():
                self._step_started = self._clock()
                outputs = self._engine.step()
                self._step_started = None
                if self._error is not None:  # it was stuck, and nobody waits any more
                    return
                for output in outputs:
                    self._deliver(output.request_id, output)
            self._stop("the engine is closed")
        except BaseException as error:  # no request may wait for a dead thread
            logger.exception("the engine has stopped")
            self._fail(f"the engine has stopped: {type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if self._on_failure is not None:
            self._on_failure(reason)
        self._stop(reason)

    def _stop(self, reason: str) -> None:
        self._error = EngineError(reason)
        for request_id in list(self._outputs):
            self._deliver(request_id, self._error)

    def _read_mail(self) -> bool:
        """Handles the mailbox, waiting for mail while the engine is idle; False ends the thread."""
        while self._engine.idle or not self._mailbox.empty():
            mail = self._mailbox.get()
            if mail is None:
                return False
            if isinstance(mail, str):
                self._engine.abort(mail)
                continue
            if isinstance(mail, _Forget):
                self._engine.forget_prompts()
                continue
            try:
                self._engine.add(mail)
            except ValueError as error:
                self._deliver(mail.id, error)
        return True

    def _deliver(self, request_id: str, output: WorkerOutput) -> None:
        """Hands an output to the coroutine of its request, in the thread of its event loop."""
        if entry := self._outputs.get(request_id):  # else the coroutine has left
            loop, outputs = entry
            # the event loop may have ended meanwhile
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(outputs.put_nowait, output)
