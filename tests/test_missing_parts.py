"""`/health/ready`: each part that may be missing, and parts that do not answer."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.deployments import FakeDeployments

from valle.platform import storage
from valle.serve.web import missing_parts
from valle.serve.web.alias_watcher import AliasWatcher
from valle.serve.web.missing_parts import MissingParts
from valle.serve.web.voices import VoiceStore

pytestmark = pytest.mark.anyio


def no_registry() -> str:
    raise ConnectionError("no registry")


def parts(
    folder: Path, deployments: FakeDeployments, resolve: Callable[..., str] = lambda *_: "/bundle"
) -> MissingParts:
    watcher = AliasWatcher(resolve, deployments.preload, poll_seconds=10)
    return MissingParts(deployments, watcher, VoiceStore(str(folder)))


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing_parts, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(missing_parts, "VALID_SECONDS", 0.0)


async def test_nothing_is_missing_where_all_answer(tmp_path: Path) -> None:
    assert await parts(tmp_path, FakeDeployments()).names() == []
    assert await parts(tmp_path / "no voices yet", FakeDeployments()).names() == []


async def test_deployments_without_a_replica_are_named(tmp_path: Path) -> None:
    deployments = FakeDeployments(missing=["AR", "Codec"])
    assert await parts(tmp_path, deployments).names() == ["AR", "Codec"]


async def test_a_controller_that_is_away_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> list[str]:
        raise RuntimeError("the controller has died")

    deployments = FakeDeployments()
    checked = parts(tmp_path, deployments)
    monkeypatch.setattr(checked._not_running, "_ask", away)
    assert await checked.names() == ["Serve's controller"]


async def test_a_missing_version_is_named_until_the_registry_answers(tmp_path: Path) -> None:
    away = True

    def resolve(*_: Any) -> str:
        return no_registry() if away else "/bundle"

    checked = parts(tmp_path, FakeDeployments(), resolve)
    assert await checked.names() == ["a model version"]
    away = False
    async with asyncio.timeout(30):
        while await checked.names():
            await asyncio.sleep(0.1)


async def test_a_voice_store_that_is_away_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(uri: str) -> bool:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(storage, "exists", away)
    assert await parts(tmp_path, FakeDeployments()).names() == ["the voice store"]


async def test_a_part_that_does_not_answer_is_missing_and_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many probes come: each would hold a thread."""
    released, n_asked = threading.Event(), 0

    def hang(uri: str) -> bool:
        nonlocal n_asked
        n_asked += 1
        assert released.wait(30)
        return True

    monkeypatch.setattr(storage, "exists", hang)
    checked = parts(tmp_path, FakeDeployments())
    for answer in await asyncio.gather(*(checked.names() for _ in range(5))):
        assert answer == ["the voice store"]
    assert await checked.names() == ["the voice store"] and n_asked == 1
    released.set()
    async with asyncio.timeout(10):
        while await checked.names():
            await asyncio.sleep(0.01)
