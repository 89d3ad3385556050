"""Replicas that end themselves: device errors, failures in a row, calls that do not return."""

import asyncio
import subprocess
import sys
import threading

import pytest
import torch

from valle.serve.deployments.health import EXIT_STATUS, MAX_FAILURES, ReplicaHealth, is_device_error

pytestmark = pytest.mark.anyio


class Work:
    """Work that raises the given errors in turn, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)

    def __call__(self) -> str:
        if self._errors:
            raise self._errors.pop(0)
        return "done"


def new_health() -> tuple[ReplicaHealth, list[str]]:
    reasons: list[str] = []
    return ReplicaHealth(max_step_seconds=60, end=reasons.append), reasons


async def run_all(health: ReplicaHealth, *errors: Exception, counts: bool = True) -> None:
    work = Work(*errors)
    for error in errors:
        with pytest.raises(type(error)):
            await health.run(work, counts=counts)


async def test_failures_in_a_row_end_the_replica() -> None:
    health, reasons = new_health()
    broken = RuntimeError("no room")
    await run_all(health, *[broken] * (MAX_FAILURES - 1))
    assert await health.run(Work()) == "done"
    await run_all(health, *[broken] * (MAX_FAILURES - 1))
    health.check()
    await run_all(health, broken)
    assert reasons == ["3 calls in a row failed, the last one with RuntimeError: no room"]
    with pytest.raises(RuntimeError, match="this replica has ended"):
        health.check()
    await run_all(health, broken)
    assert len(reasons) == 1, "it ends once"


async def test_errors_of_the_calls_themselves_do_not_count() -> None:
    health, reasons = new_health()
    await run_all(health, *[ValueError("codes: outside 0 to 1023")] * 9)
    await run_all(health, *[RuntimeError("one of a batch")] * 9, counts=False)
    health.check()
    assert not reasons


def caused_by(cause: Exception) -> Exception:
    error = KeyError("prompt")
    error.__cause__ = cause
    return error


DEVICE_ERRORS = [
    torch.AcceleratorError("an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    caused_by(RuntimeError("CUDA error: unspecified launch failure")),
]


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=str)
async def test_one_device_error_ends_the_replica(error: Exception) -> None:
    assert is_device_error(error)
    health, reasons = new_health()
    await run_all(health, error, counts=False)
    assert len(reasons) == 1 and "the device failed" in reasons[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("shapes do not match"),
        ValueError("device: CUDA is not a codec"),
        None,
    ],
    ids=str,
)
def test_other_errors_leave_the_device_usable(error: Exception | None) -> None:
    assert not is_device_error(error)


async def test_a_call_that_does_not_return_ends_the_replica() -> None:
    """Also one whose caller has left."""
    now = 0.0
    reasons: list[str] = []
    health = ReplicaHealth(max_step_seconds=60, end=reasons.append, clock=lambda: now)
    started, released = threading.Event(), threading.Event()

    def stuck() -> None:
        started.set()
        assert released.wait(30)

    call = asyncio.create_task(health.run(stuck))
    await asyncio.to_thread(started.wait, 30)
    now = 59.0
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    health.check()
    now = 61.0
    with pytest.raises(RuntimeError, match="this replica has ended"):
        health.check()
    assert reasons == ["a call has not returned in 61 s"]
    released.set()


def test_a_process_that_ends_writes_its_last_log_lines() -> None:
    """Even when a stuck thread holds the lock of a log handler."""
    code = """
import logging, threading
from valle.serve.deployments import health
handler = logging.StreamHandler()
logging.getLogger().addHandler(handler)
stuck = logging.NullHandler()
stuck.acquire()
health.exit_process("the device failed")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert ended.returncode == EXIT_STATUS
    assert "this replica ends: the device failed" in ended.stderr
