"""The deployments' classes in the process of a test, with tiny models and without Serve."""

import asyncio
import gc
import weakref

import numpy as np
import pytest
from helpers.deployments import FakeDeployments
from helpers.engines import generate_alone, request, short_ar
from ray.exceptions import ActorDiedError, OutOfMemoryError

from valle.model.chunks import Chunking, CodesChunk
from valle.model.nar_decoding import NARRequest
from valle.serve.app_args import AppArgs
from valle.serve.deployments import ar as ar_module
from valle.serve.deployments import handles
from valle.serve.deployments.ar import ARDeployment
from valle.serve.deployments.interface import Deployments
from valle.serve.deployments.nar import NARDeployment
from valle.serve.engine.engine import Engine
from valle.serve.engine.worker import EngineError

pytestmark = pytest.mark.anyio

ARGS = AppArgs(slots=2, max_sentence_seconds=1.0, max_phonemes=100)


def ar_deployment(args: AppArgs = ARGS) -> ARDeployment:
    return ARDeployment("a", "", "cpu", args)


async def test_an_engine_that_stops_ends_its_replica(
    tiny_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a health check asks, and before a caller has its error."""
    ar = ar_deployment()
    reasons: list[str] = []
    monkeypatch.setattr(ar.health, "_end", reasons.append)

    def broken(self: Engine) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Engine, "step", broken)
    with pytest.raises(EngineError, match="no room"):
        await ar.generate("a", request(1))
    assert reasons == ["the engine has stopped: MemoryError: no room"]
    with pytest.raises(EngineError, match="no room"):
        await ar.check_health()


async def test_an_old_version_gives_back_its_slots(
    tiny_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU too; its thread ends and its key-value cache is freed."""
    monkeypatch.setattr(ar_module, "IDLE_SECONDS", 0.05)
    ar = ar_deployment()
    old = weakref.ref(ar.models[0]._engine._runner)
    thread = ar.models[0]._thread
    await ar.generate("a", request(1))
    await ar.generate("b", request(1))
    async with asyncio.timeout(30):
        while len(ar.models) > 1 or thread.is_alive():
            await asyncio.sleep(0.01)
        while old() is not None:
            gc.collect()
            await asyncio.sleep(0.01)
    chunk = await ar.generate("b", request(1))
    assert chunk.codes.tolist() == generate_alone(short_ar(2), request(1))[0]
    await asyncio.to_thread(ar.models[0].close)


async def test_replicas_draw_the_same_codes_for_the_same_seed(tiny_models: None) -> None:
    """Also beside other requests: a call may be made again on another replica."""
    first, second = ar_deployment(), ar_deployment()

    async def chunks(ar: ARDeployment) -> list[CodesChunk]:
        stream = ar.stream("a", request(4), Chunking(first_frames=8, lookahead=2))
        return [chunk async for chunk in stream]

    alone = await chunks(first)
    beside, *_ = await asyncio.gather(
        chunks(second), *(second.generate("a", request(number)) for number in (1, 2, 3, 5))
    )
    assert [chunk.codes.tolist() for chunk in alone] == [chunk.codes.tolist() for chunk in beside]
    assert [chunk.last for chunk in alone] == [chunk.last for chunk in beside]
    for ar in (first, second):
        await asyncio.to_thread(ar.models[0].close)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("phonemes", NARRequest([10_000], np.zeros((8, 3), np.int16), np.zeros(3, np.int16))),
        ("prompt", NARRequest([5], np.full((8, 3), 1024, np.int16), np.zeros(3, np.int16))),
        ("first_codebook", NARRequest([5], np.zeros((8, 3), np.int16), np.full(3, -1, np.int16))),
        ("first_codebook", NARRequest([5], np.zeros((8, 3), np.int16), np.zeros(9999, np.int16))),
    ],
)
async def test_nar_deployment_refuses_what_would_break_a_device(
    tiny_models: None, field: str, bad: NARRequest
) -> None:
    nar = NARDeployment("a", "", "cpu", ARGS)
    for _ in range(5):
        with pytest.raises(ValueError, match=f"^{field}: "):
            await nar.decode("a", bad)
    await nar.check_health()
    codes = np.zeros((8, 3), np.int16)
    assert (await nar.decode("a", NARRequest([5], codes, codes[0]))).shape == (8, 3)


def test_fake_has_the_methods_of_the_protocol() -> None:
    for name in vars(Deployments):
        if not name.startswith("_"):
            assert callable(getattr(FakeDeployments(), name)), name


async def test_preload_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is stuck in it would keep all others at the old version."""

    class StuckHandle:
        def broadcast(self, method: str, version: str) -> "StuckHandle":
            assert (method, version) == ("preload", "a")
            return self

        async def results_async(self, *, timeout_s: float) -> list[None]:
            async with asyncio.timeout(timeout_s):
                await asyncio.Event().wait()
            return []

    monkeypatch.setattr(handles, "PRELOAD_SECONDS", 0.01)
    monkeypatch.setattr(handles, "_handle", lambda name: StuckHandle())
    with pytest.raises(TimeoutError):
        await handles.ServeDeployments(10.0).preload("a")


async def test_a_replica_that_has_ended_has_forgotten_its_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Handle:
        result: Exception = ActorDiedError()

        def broadcast(self, method: str) -> "Handle":
            assert method == "forget_prompts"
            return self

        async def results_async(self, **_: object) -> list[Exception | None]:
            return [None, self.result]

    monkeypatch.setattr(handles, "_handle", lambda name: Handle())
    deployments = handles.ServeDeployments(10.0)
    for error in (ActorDiedError(), OutOfMemoryError("the node was low on memory")):
        monkeypatch.setattr(Handle, "result", error)
        await deployments.forget_prompts()
    monkeypatch.setattr(Handle, "result", RuntimeError("no answer"))
    with pytest.raises(RuntimeError, match="no answer"):
        await deployments.forget_prompts()
