"""Deployments that hold several versions of a model.

Each call names the version it needs. A replica loads a version when the first call names it and
evicts the least recently used ones as soon as no call runs on them, so that a new champion is
served without a pause and no response mixes two versions.

How much memory a change of version takes: both versions, old and new, with all they hold (weights,
and an engine's key-value cache), until `IDLE_SECONDS` after the last call for the old one; the new
one alone from then on. A third version, on a GPU, waits until one of the two has left, so that two
are the peak. Replicas on a CPU may hold three for a moment. Those whose versions are weights only
keep two for good there: a rollback needs no loading.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from valle.serve.deployments.health import ReplicaHealth
from valle.serve.deployments.scaling import SLOT_DEMAND

logger = logging.getLogger("ray.serve")

Model = TypeVar("Model")

MAX_CACHED_VERSIONS = 2
"""Versions in a replica's memory, the one in use included."""

IDLE_SECONDS = 120.0
"""Time after its last call for which an old version stays: a change of version is over when the
last ingress replica has followed the alias."""


@dataclass
class _Loaded(Generic[Model]):
    model: Model
    n_calls: int = 0
    """Calls that run on it."""
    idle_since: float = 0.0
    """When the last one ended."""


class MultiVersionDeployment(Generic[Model]):
    """Base of the deployments: loads, leases and evicts versions of a model."""

    def __init__(
        self,
        load: Callable[[str], Model],
        initial_version: str,
        *,
        health: ReplicaHealth,
        close: Callable[[Model], None] | None = None,
        on_gpu: bool = False,
        idle_seconds: float | None = None,
    ) -> None:
        """Loads `initial_version` at once: a replica is ready when it can answer.

        `load` runs in a thread, and so does `close`, with a model that is evicted. An old version
        leaves `idle_seconds` after its last call; None: `IDLE_SECONDS` on a GPU, and on a CPU when
        a third one has come.
        """
        self._load, self._close, self._on_gpu = load, close, on_gpu
        self._idle_seconds = IDLE_SECONDS if idle_seconds is None and on_gpu else idle_seconds
        self.health = health
        # in the order of their last use
        self._versions = {initial_version: _Loaded(load(initial_version))}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._n_loading = 0
        """Versions on their way into the memory: loads that do not wait for room any more."""
        self._closing: set[asyncio.Task[None]] = set()
        """Versions that are about to leave the memory."""
        self._changed = asyncio.Event()
        """Set when a call or a load has ended or a version has left; cleared by those who wait."""

    async def preload(self, version: str) -> None:
        """Loads a version. Raises RuntimeError where `load` raises ValueError, which would say that
        the call is wrong, and whatever else it raises."""
        async with self.lease(version):
            pass

    async def check_health(self) -> None:
        """Called by Serve every few seconds. Ends the replica if it is broken."""
        self.health.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Calls that run or wait here, for `scaling.SlotUtilizationPolicy`."""
        return {SLOT_DEMAND: sum(loaded.n_calls for loaded in self._versions.values())}

    @asynccontextmanager
    async def lease(self, version: str) -> AsyncIterator[Model]:
        """The version's model, which stays in memory until the block ends."""
        while version not in self._versions:
            load = self._loads.get(version) or self._start_loading(version)
            # other calls may wait for the same load: a cancelled one leaves it running
            await asyncio.shield(load)
        loaded = self._versions.pop(version)
        self._versions[version] = loaded  # now the last one used
        loaded.n_calls += 1
        try:
            yield loaded.model
        finally:
            loaded.n_calls -= 1
            loaded.idle_since = time.monotonic()
            self._changed.set()
            self._evict(len(self._versions) - MAX_CACHED_VERSIONS)
            if self._idle_seconds is not None and not loaded.n_calls and len(self._versions) > 1:
                asyncio.get_running_loop().call_later(self._idle_seconds, self._evict_idle)

    @property
    def models(self) -> list[Model]:
        """The model of each version in memory."""
        return [loaded.model for loaded in self._versions.values()]

    def _start_loading(self, version: str) -> asyncio.Task[None]:
        # in a context of its own: Serve cancels the tasks that belong to a request's context
        self._loads[version] = asyncio.create_task(self._load_version(version), context=Context())
        return self._loads[version]

    async def _load_version(self, version: str) -> None:
        try:
            if self._on_gpu:
                await self._make_room()
            logger.info("loading version=%s", version)
            self._n_loading += 1
            try:
                model = await asyncio.to_thread(self._load, version)
                self._versions[version] = _Loaded(model, idle_since=time.monotonic())
            finally:
                self._n_loading -= 1
                self._changed.set()
        except ValueError as error:  # a damaged bundle: another replica may have a sound copy
            raise RuntimeError(f"{version} cannot be loaded: {error}") from error
        finally:
            del self._loads[version]

    async def _make_room(self) -> None:
        """Waits until another version fits beside those in memory."""
        while True:
            self._changed.clear()
            self._evict(len(self._versions) - MAX_CACHED_VERSIONS + 1)
            n_held = len(self._versions) + len(self._closing) + self._n_loading
            if n_held < MAX_CACHED_VERSIONS:
                return
            await self._changed.wait()

    def _evict_idle(self) -> None:
        """Evicts versions that nothing has used for a while, but never the last one used."""
        assert self._idle_seconds is not None, "only scheduled with it"
        now = time.monotonic()
        for version, loaded in list(self._versions.items())[:-1]:
            if not loaded.n_calls and now - loaded.idle_since >= self._idle_seconds:
                self._remove(version)

    def _evict(self, count: int) -> None:
        """Evicts those of the `count` least recently used versions that no call runs on."""
        for version in list(self._versions)[: max(0, count)]:
            if not self._versions[version].n_calls:
                self._remove(version)

    def _remove(self, version: str) -> None:
        logger.info("evicting version=%s", version)
        model = self._versions.pop(version).model
        if self._close is None:
            self._changed.set()
            return
        # in a thread: an engine ends after its step, and calls of other versions must not wait
        task = asyncio.create_task(asyncio.to_thread(self._close, model), context=Context())
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a version could not be closed", exc_info=error)


def limit_threads(device: str) -> None:
    """Limits torch to one thread on a CPU, whose other cores belong to other replicas."""
    if device == "cpu":
        torch.set_num_threads(1)
