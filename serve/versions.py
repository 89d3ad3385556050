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
from dataclasses import dataclass
from typing import Generic, TypeVar

from ray import serve

from valle.platform import registry
from valle.serve.calls import result

logger = logging.getLogger("ray.serve")

Model = TypeVar("Model")

KEPT = 2
"""Versions in a replica's memory when nothing is being swapped: one can go back without a wait."""


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
        self._loading = asyncio.Lock()

    async def prepare(self, version: str) -> None:
        """Loads a version. Raises what is wrong with it."""
        async with self.use(version):
            pass

    @asynccontextmanager
    async def use(self, version: str) -> AsyncIterator[Model]:
        """The version's model, which stays in memory until this block is left."""
        async with self._loading:
            if version not in self._versions:
                logger.info("loading version=%s", version)
                self._versions[version] = _Loaded(await asyncio.to_thread(self._load, version))
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
        self._looked = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def version(self) -> str:
        """The version, without waiting for the registry once there is one."""
        if self._version is None:
            self._version = await self._named()
        elif self._looking is None and time.monotonic() - self._looked > self._seconds:
            self._looking = asyncio.create_task(self._look())
        return self._version

    async def _named(self) -> str:
        self._looked = time.monotonic()
        return await asyncio.to_thread(registry.pin, self._model, self._tracking_uri)

    async def _look(self) -> None:
        """Moves to another version once a replica of each deployment has loaded it."""
        try:
            named = await self._named()
            if named == self._version:
                return
            app = serve.get_replica_context().app_name
            for deployment in ("AR", "NAR", "Codec"):
                await result(serve.get_deployment_handle(deployment, app).prepare.remote(named))
            logger.warning("model: %s follows %s", named, self._version)
            self._version = named
        except Exception:  # what is served goes on; the next look tries again
            logger.exception("model: cannot move on from %s", self._version)
        finally:
            self._looking = None
