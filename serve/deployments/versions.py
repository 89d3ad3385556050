"""Deployments that hold several versions of a model.

Each call names the version it needs. A replica loads a version when the first call names it and
evicts the least recently used ones as soon as no call runs on them, so that a new champion is
served without a pause and no response mixes two versions.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from valle.serve.deployments.scaling import SLOT_DEMAND

logger = logging.getLogger("ray.serve")

Model = TypeVar("Model")

MAX_CACHED_VERSIONS = 2
"""Versions that stay in a replica's memory: a rollback to the previous one needs no loading."""


@dataclass
class _Loaded(Generic[Model]):
    model: Model
    n_calls: int = 0
    """Calls that run on it."""


class MultiVersionDeployment(Generic[Model]):
    """Base of the deployments: loads, leases and evicts versions of a model."""

    def __init__(
        self,
        load: Callable[[str], Model],
        initial_version: str,
        *,
        close: Callable[[Model], None] | None = None,
    ) -> None:
        """Loads `initial_version` at once: a replica is ready when it can answer.

        `load` runs in a thread; `close` is called with a model that is evicted.
        """
        self._load, self._close = load, close
        # in the order of their last use
        self._versions = {initial_version: _Loaded(load(initial_version))}
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def preload(self, version: str) -> None:
        """Loads a version; raises whatever error `load` raises."""
        async with self.lease(version):
            pass

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
            self._evict()

    @property
    def models(self) -> list[Model]:
        """The model of each version in memory."""
        return [loaded.model for loaded in self._versions.values()]

    def _start_loading(self, version: str) -> asyncio.Task[None]:
        # in a context of its own: Serve cancels the tasks that belong to a request's context
        self._loads[version] = asyncio.create_task(self._load_version(version), context=Context())
        return self._loads[version]

    async def _load_version(self, version: str) -> None:
        logger.info("loading version=%s", version)
        try:
            self._versions[version] = _Loaded(await asyncio.to_thread(self._load, version))
        finally:
            del self._loads[version]

    def _evict(self) -> None:
        for version in list(self._versions)[:-MAX_CACHED_VERSIONS]:
            if self._versions[version].n_calls:
                continue
            model = self._versions.pop(version).model
            if self._close is not None:
                self._close(model)


def limit_threads(device: str) -> None:
    """Limits torch to one thread on a CPU, whose other cores belong to other replicas."""
    if device == "cpu":
        torch.set_num_threads(1)
