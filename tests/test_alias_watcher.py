"""Following a registry alias: one version for new requests, loaded before it is used."""

import asyncio
import threading

import pytest
from helpers.deployments import FakeDeployments

from valle.serve.web import alias_watcher
from valle.serve.web.alias_watcher import (
    FIRST_RETRY_SECONDS,
    MAX_BACKOFF_SECONDS,
    AliasWatcher,
    NoVersionError,
)

pytestmark = pytest.mark.anyio


class Alias:
    """An alias in a registry, and a clock that stands still until it is moved."""

    def __init__(self, deployments: FakeDeployments, poll_seconds: float = 10.0) -> None:
        self.version = "models:/valle/1"
        self.now = 0.0
        self.n_lookups = 0
        self.away = False
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._other_tasks = asyncio.all_tasks()
        self.watcher = AliasWatcher(
            self.resolve, deployments.preload, poll_seconds, clock=lambda: self.now
        )

    def resolve(self, current: str | None) -> str:
        assert current in (None, "models:/valle/1", "models:/valle/2")
        self.n_lookups += 1
        assert self.may_answer.wait(30)
        if self.away:
            raise ConnectionError("no registry")
        return self.version

    async def version_after(self, seconds: float) -> str:
        """The version of a request that comes so much later, after a poll if one is due."""
        self.now += seconds
        await self.watcher.version()
        await asyncio.gather(*(asyncio.all_tasks() - self._other_tasks))
        return await self.watcher.version()


async def test_version_follows_the_alias_after_a_poll() -> None:
    deployments = FakeDeployments()
    alias = Alias(deployments)
    assert await alias.version_after(0) == "models:/valle/1"
    alias.version = "models:/valle/2"
    assert await alias.version_after(9) == "models:/valle/1"
    assert alias.n_lookups == 1 and not deployments.calls
    assert await alias.version_after(2) == "models:/valle/2"
    assert [call.version for call in deployments.calls] == ["models:/valle/2"]
    assert await alias.version_after(11) == "models:/valle/2"
    assert alias.n_lookups == 3 and deployments.count("preload") == 1


async def test_version_stays_until_the_new_one_is_loaded() -> None:
    deployments = FakeDeployments()
    alias = Alias(deployments)
    await alias.watcher.version()
    loaded = deployments.hold("preload")
    alias.version, alias.now = "models:/valle/2", 11.0
    for _ in range(3):
        assert await alias.watcher.version() == "models:/valle/1"
        await asyncio.sleep(0)
    loaded.set()
    assert await alias.version_after(0) == "models:/valle/2"
    assert deployments.count("preload") == 1


async def test_version_stays_when_the_new_one_cannot_be_loaded() -> None:
    """The time between attempts doubles up to a bound; a version after it is loaded."""
    deployments = FakeDeployments()
    alias = Alias(deployments)
    await alias.version_after(0)
    alias.version = "models:/valle/2"
    deployments.fail("preload", RuntimeError("the weights do not fit"))
    for attempt, wait in enumerate((10, 20, 40, 80, 160, 320, 600, MAX_BACKOFF_SECONDS)):
        assert await alias.version_after(wait - 1) == "models:/valle/1"
        assert deployments.count("preload") == attempt
        assert await alias.version_after(2) == "models:/valle/1"
        assert deployments.count("preload") == attempt + 1
    deployments.fail("preload", RuntimeError("never"), after=100)
    alias.version = "models:/valle/3"
    assert await alias.version_after(MAX_BACKOFF_SECONDS + 1) == "models:/valle/3"


async def test_version_stays_when_the_registry_is_away() -> None:
    alias = Alias(FakeDeployments())
    assert await alias.version_after(0) == "models:/valle/1"

    alias.away = True
    assert await alias.version_after(11) == "models:/valle/1"
    alias.away, alias.version = False, "models:/valle/2"
    assert await alias.version_after(21) == "models:/valle/2"


async def test_requests_before_the_first_answer_share_one_lookup() -> None:
    """A request that leaves takes none of the others with it."""
    alias = Alias(FakeDeployments())
    alias.may_answer.clear()
    requests = [asyncio.create_task(alias.watcher.version()) for _ in range(20)]
    await asyncio.sleep(0)
    requests[0].cancel()
    alias.may_answer.set()
    versions = await asyncio.gather(*requests[1:])
    assert set(versions) == {"models:/valle/1"} and alias.n_lookups == 1
    with pytest.raises(asyncio.CancelledError):
        await requests[0]


async def test_without_a_first_answer_requests_are_refused_at_once() -> None:
    """And the registry is asked again after a while."""
    alias = Alias(FakeDeployments())
    alias.away = True
    for _ in range(5):
        with pytest.raises(NoVersionError, match="no registry"):
            await alias.watcher.version()
    assert alias.n_lookups == 1
    alias.now += FIRST_RETRY_SECONDS + 0.1
    alias.away = False
    assert await alias.watcher.version() == "models:/valle/1" and alias.n_lookups == 2


async def test_the_first_lookup_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias_watcher, "FIRST_LOOKUP_SECONDS", 0.01)
    alias = Alias(FakeDeployments())
    alias.may_answer.clear()
    with pytest.raises(NoVersionError, match="has not answered yet"):
        await alias.watcher.version()
    monkeypatch.setattr(alias_watcher, "FIRST_LOOKUP_SECONDS", 30)
    alias.may_answer.set()
    assert await alias.watcher.version() == "models:/valle/1"
    assert alias.n_lookups == 1, "the one that took long has answered"
