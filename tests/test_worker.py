"""The engine's thread: many coroutines at once, leaving early, bad requests, a dead engine."""

import asyncio
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


async def listen(worker: EngineWorker, request: Request) -> list[int]:
    return [code async for output in worker.stream(request) for code in output.codes]


def test_coroutines_hear_what_they_would_hear_alone(model: AR) -> None:
    requests = [request(number) for number in range(9)]

    async def run() -> list[list[int]]:
        worker = EngineWorker(build_engine(model, slots=3))
        try:
            return await asyncio.gather(*(listen(worker, one) for one in requests))
        finally:
            worker.close()

    assert asyncio.run(run()) == [generate_alone(model, one)[0] for one in requests]


def test_who_leaves_early_frees_the_slot(model: AR) -> None:
    talker = replace(request(1, max_frames=40), seed=4)
    assert len(generate_alone(model, talker)[0]) > 4

    async def run() -> list[int]:
        engine = build_engine(model, slots=1)
        worker = EngineWorker(engine)
        try:
            speech = worker.stream(talker)
            assert (await anext(speech)).codes
            await speech.aclose()
            waiting = asyncio.create_task(listen(worker, replace(talker, id="cancelled")))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            codes = await asyncio.wait_for(listen(worker, request(2)), 30)
            assert engine.idle
            return codes
        finally:
            worker.close()

    assert asyncio.run(run()) == generate_alone(model, request(2))[0]


def test_a_request_that_cannot_run_gets_its_error_and_hurts_nobody(model: AR) -> None:
    async def run() -> list[int]:
        worker = EngineWorker(build_engine(model, slots=2))
        try:
            with pytest.raises(ValueError, match="max_frames: text, prompt and 5000 frames"):
                await listen(worker, request(0, max_frames=5000))
            return await listen(worker, request(2))
        finally:
            worker.close()

    assert asyncio.run(run()) == generate_alone(model, request(2))[0]


def test_closing_ends_who_listens_and_an_id_is_used_once(model: AR) -> None:
    async def run() -> None:
        worker = EngineWorker(build_engine(model, slots=1))
        talkers = [asyncio.create_task(listen(worker, request(n))) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="id: 'r1' is in use"):
            await listen(worker, request(1))
        worker.close()
        ends = await asyncio.wait_for(asyncio.gather(*talkers, return_exceptions=True), 30)
        assert any(isinstance(end, EngineError) for end in ends)
        with pytest.raises(EngineError, match="the engine is closed"):
            worker.check_health()

    asyncio.run(run())


def test_a_dead_engine_tells_everybody(model: AR, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = Engine.step

    def fails_later(self: Engine) -> list[StepOutput]:
        nonlocal steps
        steps += 1
        if steps > 2:
            raise MemoryError("no room")
        return step(self)

    monkeypatch.setattr(Engine, "step", fails_later)

    async def run() -> None:
        worker = EngineWorker(build_engine(model, slots=1))
        talkers = [replace(request(1), id=f"t{n}", seed=4) for n in range(3)]
        ends = await asyncio.wait_for(
            asyncio.gather(*(listen(worker, t) for t in talkers), return_exceptions=True), 30
        )
        assert [str(end) for end in ends] == ["the engine has stopped: MemoryError: no room"] * 3
        with pytest.raises(EngineError, match="no room"):
            worker.check_health()
        with pytest.raises(EngineError, match="no room"):
            await listen(worker, request(3))

    asyncio.run(run())
