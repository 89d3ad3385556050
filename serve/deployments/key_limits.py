"""The counts of API keys over all ingress replicas: one small replica of their own deployment."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray import serve
from ray.serve.handle import DeploymentHandle

from valle.serve.key_limits import LocalKeyLimits

T = TypeVar("T")

KEY_LIMITS = "KeyLimits"
"""Name of the deployment."""

ANSWER_SECONDS = 1.0
"""Seconds that a request waits for the shared count."""
RETRY_SECONDS = 5.0
"""Seconds without a question after one that had no answer."""

logger = logging.getLogger("ray.serve")


class KeyLimitsDeployment(LocalKeyLimits):
    """`LocalKeyLimits` in a replica. When the replica dies, its counts are lost; a minute later the
    new replica's counts are right."""


class ServeKeyLimits:
    """`serve.key_limits.KeyLimits` over the deployment. While the deployment does not answer, each
    ingress replica counts its own requests, so that keys still work and still have limits."""

    def __init__(self) -> None:
        self._local = LocalKeyLimits()
        self._handle: DeploymentHandle | None = None
        self._next_question = 0.0

    async def start_request(
        self, replica: str, key: str, running: int, per_minute: int, concurrent: int
    ) -> int:
        arguments = (replica, key, running, per_minute, concurrent)
        return await self._ask(
            lambda handle: handle.start_request.remote(*arguments),
            lambda: self._local.start_request(*arguments),
        )

    async def report_running(self, replica: str, running: dict[str, int]) -> None:
        await self._ask(
            lambda handle: handle.report_running.remote(replica, running),
            lambda: self._local.report_running(replica, running),
        )

    async def spend_characters(self, key: str, characters: int, per_minute: int) -> int:
        arguments = (key, characters, per_minute)
        return await self._ask(
            lambda handle: handle.spend_characters.remote(*arguments),
            lambda: self._local.spend_characters(*arguments),
        )

    async def _ask(
        self,
        remote: Callable[[DeploymentHandle], Awaitable[T]],
        local: Callable[[], Awaitable[T]],
    ) -> T:
        if time.monotonic() >= self._next_question:
            try:
                self._handle = self._handle or serve.get_deployment_handle(
                    KEY_LIMITS, serve.get_replica_context().app_name
                )
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await remote(self._handle)
            except Exception as error:  # whatever ails it, requests go on under local limits
                self._next_question = time.monotonic() + RETRY_SECONDS
                logger.warning(
                    "key limits: no shared count (%s); each ingress replica counts alone for %g s",
                    type(error).__name__,
                    RETRY_SECONDS,
                )
        return await local()
