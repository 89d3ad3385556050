"""When a replica ends itself: a process whose model no longer works must not get further calls.

Serve notices at its next health check that a process has ended. Callers notice at once: their calls
fail and are made again on another replica (`backpressure`). A process that stays alive and only
fails its health checks gets calls until the third failure. As it fails faster than the others
answer, it would get most of the calls.
"""

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")

MAX_FAILURES = 3
"""Calls in a row that a replica may fail, errors of the calls themselves apart."""

EXIT_STATUS = 70
"""Of a process that has ended itself: EX_SOFTWARE of sysexits.h."""

_LOG_SECONDS = 2.0
"""Upper bound of the time to write the last log lines."""

_DEVICE_ERROR = re.compile(r"\bCUDA\b|\bcuDNN\b|CUDNN_|CUBLAS_|cuBLAS|\bHIP error\b|device-side")


def is_device_error(error: BaseException | None) -> bool:
    """True for an error, also as the cause of another, after which no call to the device succeeds.

    Out of memory is not such an error: later calls succeed once memory is free.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.AcceleratorError):
            return True
        is_runtime_error = isinstance(error, RuntimeError)
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if is_runtime_error and not out_of_memory and _DEVICE_ERROR.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_process(reason: str) -> None:
    """Ends this process at once, without clean-up that might wait for what is stuck."""
    logger.critical("this replica ends: %s", reason)
    # a thread that is stuck may hold the lock of a log handler
    flush = threading.Thread(target=logging.shutdown, daemon=True)
    flush.start()
    flush.join(_LOG_SECONDS)
    os._exit(EXIT_STATUS)


class ReplicaHealth:
    """Runs the calls of one replica's model, and ends the replica when they show that it is broken:
    after a device error, after `MAX_FAILURES` failures in a row, or when a call does not return."""

    def __init__(
        self,
        max_step_seconds: float,
        end: Callable[[str], None] = exit_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`end` is called with the reason, once."""
        self._max_step_seconds, self._end, self._clock = max_step_seconds, end, clock
        self._started: dict[object, float] = {}
        self._n_failures = 0
        self._ended = False

    async def run(self, work: Callable[[], Result], *, counts: bool = True) -> Result:
        """The result of `work`, in a thread; raises its error.

        ValueError is the call's own fault and says nothing about the replica. `counts=False`: only
        a device error does, because the parts of `work` are tried again alone.
        """
        call = object()

        def watched_work() -> Result:
            self._started[call] = self._clock()
            try:
                return work()
            finally:  # also when the caller has left meanwhile
                del self._started[call]

        try:
            result = await asyncio.to_thread(watched_work)
        except ValueError:
            raise
        except Exception as error:
            self._count_failure(error, counts)
            raise
        self._n_failures = 0
        return result

    def check(self) -> None:
        """Ends the replica if a call does not return. Raises RuntimeError once it has ended."""
        now = self._clock()
        running = [now - started for started in list(self._started.values())]
        if running and max(running) > self._max_step_seconds:
            self.end(f"a call has not returned in {max(running):.0f} s")
        if self._ended:
            raise RuntimeError("this replica has ended")

    def end(self, reason: str) -> None:
        """Ends the replica."""
        if not self._ended:
            self._ended = True
            self._end(reason)

    def _count_failure(self, error: Exception, counts: bool) -> None:
        if is_device_error(error):
            self.end(f"the device failed: {type(error).__name__}: {error}")
        elif counts:
            self._n_failures += 1
            if self._n_failures >= MAX_FAILURES:
                self.end(
                    f"{self._n_failures} calls in a row failed, the last one with "
                    f"{type(error).__name__}: {error}"
                )
