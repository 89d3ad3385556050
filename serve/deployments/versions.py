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
from valle.serve.deployments.scaling import WANTED

logger = logging.getLogger("ray.serve")

Model = TypeVar("Model")

KEPT = 2
"""Versions in a replica's memory when nothing is being swapped: one can go back without a wait."""

LONGEST_WAIT = 600.0
"""Seconds between two tries of a version that cannot be loaded."""


@dataclass
class _Loaded(Generic[Model]):
    model: Model
    users: int = 0


class Versioned(Generic[Model]):
    """A deployment that holds versions of its network."""

    def __init__(
        self, load: Callable[[str], Model], close: Callable[[Model], None], first: str
    ) -> None:
        """Loads `first` at once: a replica is ready when it can answer."""
        self._load, self._close = load, close
        self._versions = {first: _Loaded(load(first))}
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def prepare(self, version: str) -> None:
        """Loads a version. Raises what is wrong with it."""
        async with self.use(version):
            pass

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.BySlots`: calls that run or wait here."""
        return {WANTED: sum(loaded.users for loaded in self._versions.values())}

    @asynccontextmanager
    async def use(self, version: str) -> AsyncIterator[Model]:
        """The version's model, which stays in memory until this block is left."""
        while version not in self._versions:
            load = self._loads.get(version) or self._start_loading(version)
            await asyncio.shield(load)  # whoever gives up waiting does not stop it for others
        found = self._versions.pop(version)
        self._versions[version] = found  # the last in the dict is the last that was used
        found.users += 1
        try:
            yield found.model
        finally:
            found.users -= 1
            self._let_go()

    @property
    def loaded(self) -> list[Model]:
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

    def _let_go(self) -> None:
        for version in list(self._versions)[:-KEPT]:
            if not self._versions[version].users:
                self._close(self._versions.pop(version).model)


class Followed:
    """The version that new requests get: the one the model's name stands for, looked up anew
    every `seconds` while requests come."""

    def __init__(self, model: str, tracking_uri: str, seconds: float) -> None:
        self._model, self._tracking_uri, self._seconds = model, tracking_uri, seconds
        self._version: str | None = None
        self._next_look = 0.0
        self._failures = 0
        self._looking: asyncio.Task[None] | None = None

    async def version(self) -> str:
        """The version, without waiting for the registry once there is one."""
        if self._version is None:
            self._version = await self._named()
        elif self._looking is None and time.monotonic() > self._next_look:
            self._looking = asyncio.create_task(self._look(), context=Context())
        return self._version

    async def _named(self) -> str:
        self._next_look = time.monotonic() + self._seconds
        return await asyncio.to_thread(registry.pin, self._model, self._tracking_uri)

    async def _look(self) -> None:
        """Moves to another version once every replica has loaded it."""
        try:
            named = await self._named()
            if named != self._version:
                await self._prepare(named)
                logger.warning("model: %s follows %s", named, self._version)
                self._version = named
            self._failures = 0
        except Exception:  # what is served goes on; later looks try again, ever less often
            self._failures += 1
            wait = min(self._seconds * 2**self._failures, LONGEST_WAIT)
            self._next_look = time.monotonic() + wait
            logger.exception("model: stays at %s, next try in %.0f s", self._version, wait)
        finally:
            self._looking = None

    async def _prepare(self, version: str) -> None:
        app = serve.get_replica_context().app_name
        for deployment in ("AR", "NAR", "Codec"):
            handle = serve.get_deployment_handle(deployment, app)
            await handle.broadcast("prepare", version).results_async()
