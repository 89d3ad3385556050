"""Versions of a model in one replica: loading, failing, eviction; and the number of replicas."""

import asyncio
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from valle.jobs.publish import PublishRecipe, publish
from valle.platform import bundle, registry
from valle.serve.deployments.health import ReplicaHealth
from valle.serve.deployments.scaling import SlotUtilizationPolicy
from valle.serve.deployments.versions import MultiVersionDeployment


class FakeLoader:
    """Loads a name as its capitals, once `may_load` is set; records what is loaded and closed."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.closed: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self.may_close = threading.Event()
        self.may_close.set()

    def load(self, name: str) -> str:
        self.loads.append(name)
        assert self.may_load.wait(30)
        if name == "bad":
            raise ValueError("no such weights")
        return name.upper()

    def deployment(self, **options: Any) -> MultiVersionDeployment[str]:
        health = ReplicaHealth(max_step_seconds=300)
        return MultiVersionDeployment(self.load, "a", health=health, close=self.close, **options)

    def close(self, model: str) -> None:
        assert threading.current_thread() is not threading.main_thread(), "an engine is waited for"
        assert self.may_close.wait(30)
        self.closed.append(model)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def until_loading(loader: FakeLoader, name: str) -> None:
    await until(lambda: name in loader.loads)


@pytest.mark.anyio
async def test_lease_of_a_loaded_version_does_not_wait_for_another_load() -> None:
    loader = FakeLoader()
    deployment = loader.deployment()
    loader.may_load.clear()
    cancelled = asyncio.create_task(deployment.preload("b"))
    patient = asyncio.create_task(deployment.preload("b"))
    await until_loading(loader, "b")
    async with asyncio.timeout(10), deployment.lease("a") as model:
        assert model == "A"
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    loader.may_load.set()
    await patient
    assert loader.loads == ["a", "b"] and deployment.models == ["A", "B"]
    async with deployment.lease("b") as model:
        assert model == "B"


@pytest.mark.anyio
async def test_preload_raises_the_error_of_the_load() -> None:
    """But no ValueError: the call would count as wrong, and not be made elsewhere."""
    deployment = FakeLoader().deployment()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bad cannot be loaded: no such weights"):
            await deployment.preload("bad")
    assert deployment.models == ["A"]


@pytest.mark.anyio
async def test_versions_are_evicted_when_no_call_runs_on_them() -> None:
    loader = FakeLoader()
    deployment = loader.deployment()
    async with deployment.lease("a"):
        for name in ("b", "c", "d"):
            await deployment.preload(name)
        await until(lambda: loader.closed)
        assert loader.closed == ["B"]  # a is leased, c and d are the last two
        assert await deployment.record_autoscaling_stats() == {"slot_demand": 1}
    await until(lambda: len(loader.closed) == 2)
    assert loader.closed == ["B", "A"] and deployment.models == ["C", "D"]
    assert await deployment.record_autoscaling_stats() == {"slot_demand": 0}


@pytest.mark.anyio
async def test_an_old_version_leaves_when_it_has_been_idle() -> None:
    """And the last one used stays, however long it is idle."""
    loader = FakeLoader()
    deployment = loader.deployment(idle_seconds=0.02)
    async with deployment.lease("a"):
        await deployment.preload("b")
        async with deployment.lease("a"):
            pass
        await asyncio.sleep(0.1)
        assert "A" in deployment.models, "a call runs on it"
    async with deployment.lease("b"):
        pass
    await until(lambda: deployment.models == ["B"])
    await asyncio.sleep(0.1)
    assert deployment.models == ["B"] and "A" in loader.closed


@pytest.mark.anyio
async def test_a_gpu_never_holds_three_versions() -> None:
    """The third one is loaded when one of the others has left, its engine's memory included."""
    loader = FakeLoader()
    deployment = loader.deployment(on_gpu=True)
    async with deployment.lease("b"):
        async with deployment.lease("a"):
            third = asyncio.create_task(deployment.preload("c"))
            await asyncio.sleep(0.05)
            assert loader.loads == ["a", "b"], "calls run on both"
            loader.may_close.clear()
        await asyncio.sleep(0.05)
        assert loader.loads == ["a", "b"], "the old engine's last step still runs"
        async with asyncio.timeout(10), deployment.lease("b") as model:
            assert model == "B", "calls of the other version do not wait for that"
        loader.may_close.set()
        await third
        assert loader.closed == ["A"] and sorted(deployment.models) == ["B", "C"]


@pytest.mark.anyio
async def test_a_gpu_never_loads_two_versions_beside_a_third() -> None:
    """As when two ingress replicas follow an alias that moves twice."""
    loader = FakeLoader()
    deployment = loader.deployment(on_gpu=True)
    loader.may_load.clear()
    preloads = [asyncio.create_task(deployment.preload(name)) for name in ("b", "c", "d")]
    await asyncio.sleep(0.05)
    assert loader.loads == ["a", "b"]
    loader.may_load.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*preloads)
    assert deployment.models == ["C", "D"]
    await until(lambda: loader.closed == ["A", "B"])


@pytest.mark.anyio
async def test_a_replica_whose_model_is_broken_ends_itself() -> None:
    reasons: list[str] = []
    health = ReplicaHealth(max_step_seconds=300, end=reasons.append)
    deployment = MultiVersionDeployment(str.upper, "a", health=health)
    await deployment.check_health()
    health.end("the device failed")
    with pytest.raises(RuntimeError, match="this replica has ended"):
        await deployment.check_health()
    assert reasons == ["the device failed"]


@pytest.mark.usefixtures("database")
def test_pin_returns_a_name_that_does_not_move(publish_recipe: PublishRecipe) -> None:
    publish(publish_recipe)
    publish(publish_recipe)
    second = registry.pin("models:/valle@champion")
    assert re.fullmatch(r"models:/valle/2#m-[0-9a-f]{32}/[0-9a-f]{8}", second)
    assert registry.pin("models:/valle/latest") == second == registry.pin("models:/valle/2")
    first = registry.pin("models:/valle/1")
    assert registry.pin(first) == first, "a pinned name stays as it is"
    digits = bundle.verify(registry.resolve(first))[:8]
    assert registry.display_name(first) == f"models:/valle/1#{digits}"
    with pytest.raises(FileNotFoundError, match=r"no models:/valle@nobody; it has versions 1, 2"):
        registry.pin("models:/valle@nobody")
    with pytest.raises(ValueError, match="is not models:/name@alias or models:/name/version"):
        registry.pin("models:/valle/Production")


@pytest.mark.parametrize(
    ("reported", "queued", "replicas"),
    [({}, 0, 1), ({"a": 6.0}, 0, 1), ({"a": 6.0}, 1, 2), ({"a": 8.0, "b": 8.0}, 9, 5)],
)
def test_slot_utilization_policy_counts_running_and_queued_requests(
    reported: dict[str, float], queued: int, replicas: int
) -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics={"slot_demand": reported}, total_queued_requests=queued
    )
    assert SlotUtilizationPolicy(slots=8)(context) == (replicas, {})
