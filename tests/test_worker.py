"""The engine's thread: concurrent coroutines, cancellation, bad requests, a failing engine."""

import asyncio
import threading
from dataclasses import replace

import pytest
from helpers.engines import build_engine, generate_alone, request, short_ar

from valle.model.ar import AR
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Request, StepOutput
from valle.serve.engine.worker import EngineError, EngineWorker


@pytest.fixture(scope="module")
def model() -> AR:
    return short_ar(2)


async def collect_codes(worker: EngineWorker, request: Request) -> list[int]:
    return [code async for output in worker.stream(request) for code in output.codes]


def test_worker_gives_each_coroutine_the_codes_of_its_request(model: AR) -> None:
    requests = [request(number) for number in range(9)]

    async def run() -> list[list[int]]:
        worker = EngineWorker(build_engine(model, slots=3))
        try:
            return await asyncio.gather(*(collect_codes(worker, item) for item in requests))
        finally:
            await asyncio.to_thread(worker.close)

    assert asyncio.run(run()) == [generate_alone(model, item)[0] for item in requests]


def test_worker_frees_the_slot_of_a_cancelled_request(model: AR) -> None:
    long_request = replace(request(1, max_frames=40), seed=4)
    assert len(generate_alone(model, long_request)[0]) > 4

    async def run() -> list[int]:
        engine = build_engine(model, slots=1)
        worker = EngineWorker(engine)
        try:
            outputs = worker.stream(long_request)
            assert (await anext(outputs)).codes
            await outputs.aclose()
            cancelled = replace(long_request, id="cancelled")
            task = asyncio.create_task(collect_codes(worker, cancelled))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            codes = await asyncio.wait_for(collect_codes(worker, request(2)), 30)
            assert engine.idle
            return codes
        finally:
            await asyncio.to_thread(worker.close)

    assert asyncio.run(run()) == generate_alone(model, request(2))[0]


def test_worker_raises_the_error_of_a_bad_request_only_for_it(model: AR) -> None:
    async def run() -> list[int]:
        worker = EngineWorker(build_engine(model, slots=2))
        try:
            with pytest.raises(ValueError, match="max_frames: text, prompt and 5000 frames"):
                await collect_codes(worker, request(0, max_frames=5000))
            return await collect_codes(worker, request(2))
        finally:
            await asyncio.to_thread(worker.close)

    assert asyncio.run(run()) == generate_alone(model, request(2))[0]


def test_worker_ends_its_requests_when_closed(model: AR) -> None:
    async def run() -> None:
        worker = EngineWorker(build_engine(model, slots=1))
        tasks = [asyncio.create_task(collect_codes(worker, request(n))) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="id: 'r1' is in use"):
            await collect_codes(worker, request(1))
        await asyncio.to_thread(worker.close)
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        assert any(isinstance(end, EngineError) for end in ends)
        with pytest.raises(EngineError, match="the engine is closed"):
            worker.check_health()

    asyncio.run(run())


def test_worker_ends_all_requests_when_a_step_fails(
    model: AR, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_steps = 0
    step = Engine.step

    def step_twice(self: Engine) -> list[StepOutput]:
        nonlocal n_steps
        n_steps += 1
        if n_steps > 2:
            raise MemoryError("no room")
        return step(self)

    monkeypatch.setattr(Engine, "step", step_twice)

    reasons: list[str] = []

    async def run() -> None:
        worker = EngineWorker(build_engine(model, slots=1), on_failure=reasons.append)
        requests = [replace(request(1), id=f"t{n}", seed=4) for n in range(3)]
        ends = await asyncio.wait_for(
            asyncio.gather(
                *(collect_codes(worker, item) for item in requests), return_exceptions=True
            ),
            30,
        )
        assert [str(end) for end in ends] == ["the engine has stopped: MemoryError: no room"] * 3
        with pytest.raises(EngineError, match="no room"):
            worker.check_health()
        with pytest.raises(EngineError, match="no room"):
            await collect_codes(worker, request(3))

    asyncio.run(run())
    assert reasons == ["the engine has stopped: MemoryError: no room"]


def test_worker_fails_when_a_step_does_not_end(model: AR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests end, no further one is accepted, and the step's late result is nobody's."""
    released = threading.Event()
    step = Engine.step

    def stuck_step(self: Engine) -> list[StepOutput]:
        assert released.wait(30)
        return step(self)

    monkeypatch.setattr(Engine, "step", stuck_step)
    reasons: list[str] = []
    now = 0.0

    async def run() -> None:
        nonlocal now
        worker = EngineWorker(
            build_engine(model, slots=1),
            on_failure=reasons.append,
            max_step_seconds=60,
            clock=lambda: now,
        )
        now = 1000.0
        worker.check_health()  # an idle engine is not stuck
        task = asyncio.create_task(collect_codes(worker, request(1)))
        while worker._step_started is None:
            await asyncio.sleep(0.001)
        now = 1059.0
        worker.check_health()
        now = 1061.0
        with pytest.raises(EngineError, match="a step has not ended in 61 s"):
            worker.check_health()
        with pytest.raises(EngineError, match="a step has not ended in 61 s"):
            await asyncio.wait_for(task, 30)
        with pytest.raises(EngineError, match="stuck"):
            await collect_codes(worker, request(2))
        released.set()
        await asyncio.to_thread(worker._thread.join, 30)
        assert not worker._thread.is_alive()

    asyncio.run(run())
    assert reasons == ["the engine is stuck: a step has not ended in 61 s"]
