"""Versions beside each other: loading, failing, leaving; and how many replicas that needs."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from valle.jobs.publish import PublishRecipe, publish
from valle.platform import registry
from valle.serve.deployments.scaling import SlotUtilizationPolicy
from valle.serve.deployments.versions import AliasWatcher, MultiVersionDeployment


class Shelf:
    """Loads names as they are, slowly if told so, and notes what is let go."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.closed: list[str] = []
        self.go = threading.Event()
        self.go.set()

    def load(self, name: str) -> str:
        self.loads.append(name)
        self.go.wait(5)
        if name == "bad":
            raise ValueError("no such weights")
        return name.upper()

    def deployment(self) -> MultiVersionDeployment[str]:
        return MultiVersionDeployment(self.load, self.closed.append, "a")


@pytest.mark.anyio
async def test_a_version_that_loads_holds_nobody_up() -> None:
    shelf = Shelf()
    deployment = shelf.deployment()
    shelf.go.clear()
    impatient = asyncio.create_task(deployment.preload("b"))
    patient = asyncio.create_task(deployment.preload("b"))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(1), deployment.lease("a") as model:
        assert model == "A"
    impatient.cancel()
    await asyncio.sleep(0.05)
    shelf.go.set()
    await patient
    assert shelf.loads == ["a", "b"] and deployment.models == ["A", "B"]
    with pytest.raises(ValueError, match="no such weights"):
        await deployment.preload("bad")
    async with deployment.lease("b") as model:
        assert model == "B"


@pytest.mark.anyio
async def test_old_versions_go_when_nobody_uses_them() -> None:
    shelf = Shelf()
    deployment = shelf.deployment()
    async with deployment.lease("a"):
        for name in ("b", "c", "d"):
            await deployment.preload(name)
        assert shelf.closed == ["B"]  # a is in use, c and d are the last two
        assert await deployment.record_autoscaling_stats() == {"slot_demand": 1}
    assert shelf.closed == ["B", "A"] and deployment.models == ["C", "D"]
    assert await deployment.record_autoscaling_stats() == {"slot_demand": 0}


@pytest.mark.anyio
async def test_requests_follow_the_alias_and_a_bad_version_is_not_tried_all_the_time(
    publish_recipe: PublishRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish(publish_recipe) == 1
    watcher = AliasWatcher(registry.CHAMPION, "", poll_seconds=0.01)
    tried: list[str] = []

    async def preload(version: str) -> None:
        tried.append(version)
        if version == "models:/valle/2":
            raise RuntimeError("the weights do not fit")

    monkeypatch.setattr(watcher, "_preload", preload)
    assert await watcher.version() == "models:/valle/1"
    publish(publish_recipe)
    for _ in range(30):
        assert await watcher.version() == "models:/valle/1"
        await asyncio.sleep(0.02)
    assert 1 <= len(tried) <= 7  # each wait twice the last: 20 ms, 40, 80 ...
    publish(publish_recipe)
    async with asyncio.timeout(20):
        while await watcher.version() != "models:/valle/3":
            await asyncio.sleep(0.05)


def test_pinned_names_do_not_move(publish_recipe: PublishRecipe) -> None:
    publish(publish_recipe)
    publish(publish_recipe)
    assert registry.pin("models:/valle@champion") == "models:/valle/2"
    assert registry.pin("models:/valle/latest") == "models:/valle/2"
    assert registry.pin("models:/valle/1") == "models:/valle/1"
    assert registry.pin("some/folder") == "some/folder"
    with pytest.raises(FileNotFoundError, match="the registry has no models:/valle@nobody"):
        registry.pin("models:/valle@nobody")
    with pytest.raises(ValueError, match="is not models:/name@alias or models:/name/version"):
        registry.pin("models:/valle/Production")


@pytest.mark.parametrize(
    ("reported", "queued", "replicas"),
    [({}, 0, 1), ({"a": 6.0}, 0, 1), ({"a": 6.0}, 1, 2), ({"a": 8.0, "b": 8.0}, 9, 5)],
)
def test_replicas_by_slots(reported: dict[str, float], queued: int, replicas: int) -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics={"slot_demand": reported}, total_queued_requests=queued
    )
    assert SlotUtilizationPolicy(slots=8)(context) == (replicas, {})
