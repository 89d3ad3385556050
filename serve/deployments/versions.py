"""Which model answers: versions swap under load, and no answer is made of two.

The ingress follows the registry's alias and names the version with every call, so that AR, NAR and
codec of an answer belong together. A replica loads a version when it is first asked for it, and
lets go of older ones when nothing runs on them any more.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

from ray import serve

from valle.platform import registry
from valle.serve.deployments.scaling import SLOT_DEMAND

logger = logging.getLogger("ray.serve")

Model = TypeVar("Model")

MAX_CACHED_VERSIONS = 2
"""Versions in a replica's memory when nothing is being swapped: one can go back without a wait."""

MAX_BACKOFF_SECONDS = 600.0
"""Seconds between two tries of a version that cannot be loaded."""


@dataclass
class _Loaded(Generic[Model]):
    model: Model
    users: int = 0


class MultiVersionDeployment(Generic[Model]):
    """A deployment that holds versions of its network."""

    def __init__(
        self, load: Callable[[str], Model], close: Callable[[Model], None], initial_version: str
    ) -> None:
        """Loads `initial_version` at once: a replica is ready when it can answer."""
        self._load, self._close = load, close
        self._versions = {initial_version: _Loaded(load(initial_version))}
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def preload(self, version: str) -> None:
        """Loads a version. Raises what is wrong with it."""
        async with self.lease(version):
            pass

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.SlotUtilizationPolicy`: calls that run or wait here."""
        return {SLOT_DEMAND: sum(loaded.users for loaded in self._versions.values())}

    @asynccontextmanager
    async def lease(self, version: str) -> AsyncIterator[Model]:
        """The version's model, which stays in memory until this block is left."""
        while version not in self._versions:
            load = self._loads.get(version) or self._start_loading(version)
            await asyncio.shield(load)  # whoever gives up waiting does not stop it for others
        loaded = self._versions.pop(version)
        self._versions[version] = loaded  # the last in the dict is the last that was used
        loaded.users += 1
        try:
            yield loaded.model
        finally:
            loaded.users -= 1
            self._evict()

    @property
    def models(self) -> list[Model]:
        """The model of each version in memory."""
        return [loaded.model for loaded in self._versions.values()]

    def _start_loading(self, version: str) -> asyncio.Task[None]:
        # in a context of its own: Serve would cancel it with the request that happened to begin it
        self._loads[version] = asyncio.create_task(self._fetch(version), context=Context())
        return self._loads[version]

    async def _fetch(self, version: str) -> None:
        logger.info("loading version=%s", version)
        try:
            self._versions[version] = _Loaded(await asyncio.to_thread(self._load, version))
        finally:
            del self._loads[version]

    def _evict(self) -> None:
        for version in list(self._versions)[:-MAX_CACHED_VERSIONS]:
            if not self._versions[version].users:
                self._close(self._versions.pop(version).model)


class AliasWatcher:
    """The version that new requests get: the one the model's name stands for, looked up anew
    every `seconds` while requests come."""

    def __init__(self, model: str, tracking_uri: str, poll_seconds: float) -> None:
        self._model, self._tracking_uri, self._poll_seconds = model, tracking_uri, poll_seconds
        self._version: str | None = None
        self._next_poll = 0.0
        self._failures = 0
        self._poll_task: asyncio.Task[None] | None = None

    async def version(self) -> str:
        """The version, without waiting for the registry once there is one."""
        if self._version is None:
            self._version = await self._pin()
        elif self._poll_task is None and time.monotonic() > self._next_poll:
            self._poll_task = asyncio.create_task(self._poll(), context=Context())
        return self._version

    async def _pin(self) -> str:
        self._next_poll = time.monotonic() + self._poll_seconds
        return await asyncio.to_thread(registry.pin, self._model, self._tracking_uri)

    async def _poll(self) -> None:
        """Moves to another version once every replica has loaded it."""
        try:
            version = await self._pin()
            if version != self._version:
                await self._preload(version)
                logger.warning("model: %s follows %s", version, self._version)
                self._version = version
            self._failures = 0
        except Exception:  # what is served goes on; later looks try again, ever less often
            self._failures += 1
            wait = min(self._poll_seconds * 2**self._failures, MAX_BACKOFF_SECONDS)
            self._next_poll = time.monotonic() + wait
            logger.exception("model: stays at %s, next try in %.0f s", self._version, wait)
        finally:
            self._poll_task = None

    async def _preload(self, version: str) -> None:
        app = serve.get_replica_context().app_name
        for deployment in ("AR", "NAR", "Codec"):
            handle = serve.get_deployment_handle(deployment, app)
            await handle.broadcast("preload", version).results_async()
