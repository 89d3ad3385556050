"""Calls of deployments: full queues, cancellation, failures; without a cluster."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
)
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from valle.serve.deployments import backpressure
from valle.serve.deployments.backpressure import call_deployment, stream_deployment
from valle.serve.deployments.interface import OverloadedError, RefusedCallError, UnavailableError

pytestmark = pytest.mark.anyio

SECONDS = 30.0


def failed_in_replica(cause: Exception) -> Exception:
    """An error as Serve raises it for the caller: of two types."""
    return RayTaskError("decode", "its traceback", cause).as_instanceof_cause()


DEATHS = [
    ActorDiedError(),
    ActorUnavailableError("no connection", b"0" * 16),
    ReplicaUnavailableError("it drains"),
    ObjectLostError("0" * 56, None, "handle"),
    OutOfMemoryError("the node was low on memory"),
    failed_in_replica(RuntimeError("no room")),
    failed_in_replica(TimeoutError("its store")),
]
"""Errors after which another replica is asked."""


class FakeResponse:
    """What a handle returns: a result or an error to await, items to iterate over."""

    def __init__(self, *items: int | Exception | asyncio.Event) -> None:
        """An event is waited for, an error raised, a number yielded; the last one is the result."""
        self._items = items
        self._generator = self._generate()
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, int]:
        return self._last().__await__()

    async def _last(self) -> int:
        return [item async for item in self][-1]

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        return await anext(self._generator)

    async def _generate(self) -> AsyncGenerator[int]:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            else:
                yield item

    def cancel(self) -> None:
        self.cancelled = True


class FakeMethod:
    """A method of a handle that returns some responses in turn."""

    def __init__(self, *responses: FakeResponse) -> None:
        self.responses = responses
        self.n_calls = 0

    def __call__(self) -> Any:
        self.n_calls += 1
        return self.responses[self.n_calls - 1]


def full() -> FakeResponse:
    return FakeResponse(BackPressureError(64, 64))


async def call(method: Callable[[], Any], retry: bool) -> list[int]:
    return [await call_deployment(method, retry=retry, max_seconds=SECONDS)]


async def stream(method: Callable[[], Any], retry: bool) -> list[int]:
    items = stream_deployment(method, retry=retry, max_seconds=SECONDS, same=int.__eq__)
    return [item async for item in items]


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backpressure, "RETRY_SECONDS", 0.001)


@pytest.mark.parametrize("run", [call, stream])
async def test_a_full_queue_is_an_overload(run: Callable[..., Any]) -> None:
    method = FakeMethod(full())
    with pytest.raises(OverloadedError):
        await run(method, retry=False)
    assert method.n_calls == 1


@pytest.mark.parametrize("run", [call, stream])
async def test_a_full_queue_is_tried_again_with_retry(run: Callable[..., Any]) -> None:
    method = FakeMethod(full(), full(), FakeResponse(7))
    assert await run(method, retry=True) == [7]
    assert method.n_calls == 3


@pytest.mark.parametrize("run", [call, stream])
async def test_an_error_of_the_call_itself_is_not_tried_again(run: Callable[..., Any]) -> None:
    error = failed_in_replica(ValueError("max_frames: too many"))
    method = FakeMethod(FakeResponse(error))
    with pytest.raises(RefusedCallError, match="^max_frames: too many$"):
        await run(method, retry=True)
    assert method.n_calls == 1


@pytest.mark.parametrize("run", [call, stream])
async def test_a_cancelled_caller_cancels_the_call(run: Callable[..., Any]) -> None:
    response = FakeResponse(1, asyncio.Event())
    task = asyncio.create_task(run(FakeMethod(response), retry=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert response.cancelled


async def test_stream_deployment_cancels_the_call_when_closed() -> None:
    response = FakeResponse(1, 2, 3)
    items = stream_deployment(FakeMethod(response), max_seconds=SECONDS, same=int.__eq__)
    assert await anext(items) == 1
    assert not response.cancelled
    await items.aclose()
    assert response.cancelled


async def test_a_call_that_ends_is_not_cancelled() -> None:
    responses = [FakeResponse(1), FakeResponse(1, 2)]
    assert await call(FakeMethod(responses[0]), retry=False) == [1]
    assert await stream(FakeMethod(responses[1]), retry=False) == [1, 2]
    assert not any(response.cancelled for response in responses)


@pytest.mark.parametrize("run", [call, stream])
@pytest.mark.parametrize("death", DEATHS, ids=lambda error: type(error).__name__)
async def test_a_call_whose_replica_dies_is_made_again(
    run: Callable[..., Any], death: Exception
) -> None:
    method = FakeMethod(FakeResponse(death), full(), FakeResponse(7))
    assert await run(method, retry=True) == [7]
    assert method.n_calls == 3


@pytest.mark.parametrize("run", [call, stream])
@pytest.mark.parametrize("death", DEATHS, ids=lambda error: type(error).__name__)
async def test_a_call_that_fails_two_replicas_is_not_made_a_third_time(
    run: Callable[..., Any], death: Exception
) -> None:
    method = FakeMethod(FakeResponse(death), FakeResponse(death), FakeResponse(7))
    with pytest.raises(UnavailableError, match="2 replicas failed the call"):
        await run(method, retry=True)
    assert method.n_calls == 2


@pytest.mark.parametrize("n_given", [1, 2, 3])
async def test_a_stream_continues_where_its_replica_died(n_given: int) -> None:
    method = FakeMethod(FakeResponse(*range(n_given), ActorDiedError()), FakeResponse(0, 1, 2, 3))
    assert await stream(method, retry=False) == [0, 1, 2, 3]
    assert [response.cancelled for response in method.responses] == [False, False]


@pytest.mark.parametrize("again", [(0, 9, 2, 3), (0, 1, 9, 3), (0, 1), ()])
async def test_a_stream_that_begins_again_otherwise_is_not_continued(again: tuple[int]) -> None:
    method = FakeMethod(FakeResponse(0, 1, 2, ActorDiedError()), FakeResponse(*again))
    given = []
    with pytest.raises(UnavailableError, match="a stream that was started again"):
        async for item in stream_deployment(method, max_seconds=SECONDS, same=int.__eq__):
            given.append(item)
    assert given == [0, 1, 2]


@pytest.mark.parametrize("run", [call, stream])
async def test_a_call_without_an_answer_ends(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployment without replicas, or with one that is stuck; and a queue that stays full."""
    monkeypatch.setattr(f"{__name__}.SECONDS", 0.02)
    response = FakeResponse(asyncio.Event(), 1)
    with pytest.raises(UnavailableError, match=r"no answer in 0\.02 s"):
        await run(FakeMethod(response), retry=True)
    assert response.cancelled
    with pytest.raises(UnavailableError, match=r"no answer in 0\.02 s"):
        await run(FakeMethod(*[full() for _ in range(99)]), retry=True)
