"""Calls of deployments: full queues, cancellation, failures; without a cluster."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from valle.serve.deployments import backpressure
from valle.serve.deployments.backpressure import call_deployment, stream_deployment
from valle.serve.deployments.interface import OverloadedError

pytestmark = pytest.mark.anyio


class FakeResponse:
    """What a handle returns: a result or an error to await, items to iterate over."""

    def __init__(self, *items: int | Exception | asyncio.Event) -> None:
        """An event is waited for, an error raised, a number yielded; the last one is the result."""
        self._items = items
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, int]:
        return self._last().__await__()

    async def _last(self) -> int:
        return [item async for item in self][-1]

    async def __aiter__(self) -> AsyncIterator[int]:
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
    return [await call_deployment(method, retry=retry)]


async def stream(method: Callable[[], Any], retry: bool) -> list[int]:
    return [item async for item in stream_deployment(method, retry=retry)]


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
async def test_other_errors_are_not_tried_again(run: Callable[..., Any]) -> None:
    method = FakeMethod(FakeResponse(ValueError("max_frames: too many")))
    with pytest.raises(ValueError, match="max_frames"):
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
    items = stream_deployment(FakeMethod(response))
    assert await anext(items) == 1
    assert not response.cancelled
    await items.aclose()
    assert response.cancelled


async def test_a_call_that_ends_is_not_cancelled() -> None:
    responses = [FakeResponse(1), FakeResponse(1, 2)]
    assert await call(FakeMethod(responses[0]), retry=False) == [1]
    assert await stream(FakeMethod(responses[1]), retry=False) == [1, 2]
    assert not any(response.cancelled for response in responses)
