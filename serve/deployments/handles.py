"""The application's deployments over Ray Serve's handles."""

import asyncio
import threading
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
from cachetools import TTLCache, cached
from ray import serve
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.serve.handle import DeploymentHandle

from valle.model.chunks import Chunking, CodesChunk
from valle.model.codec.encodec_stream import EncodecState
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARRequest
from valle.serve.deployments.backpressure import call_deployment, stream_deployment
from valle.serve.deployments.interface import DecodedChunk
from valle.serve.deployments.key_limits import KEY_LIMITS
from valle.serve.engine.request import Request

APP_NAME = "valle"
"""Name of the application in Serve, unless a Serve configuration gives it another."""

AR, NAR, CODEC = "AR", "NAR", "Codec"
"""Names of its deployments beside the ingress."""

FORGET_SECONDS = 30.0
"""Upper bound of the time in which all replicas of a deployment forget prompts."""

PRELOAD_SECONDS = 1800.0
"""Upper bound of the time in which all replicas of a deployment load a version, its download and
the wait for room included: one that is stuck must not keep all others at the old version for
ever."""


class ServeDeployments:
    """`interface.Deployments` within a replica of the application."""

    def __init__(self, max_call_seconds: float) -> None:
        """`max_call_seconds` bounds each call, the attempts after a failure included."""
        self._call = partial(call_deployment, max_seconds=max_call_seconds)
        self._stream = partial(stream_deployment, max_seconds=max_call_seconds)

    @cached_property
    def _ar(self) -> DeploymentHandle:
        return _handle(AR)

    @cached_property
    def _nar(self) -> DeploymentHandle:
        return _handle(NAR)

    @cached_property
    def _codec(self) -> DeploymentHandle:
        return _handle(CODEC)

    def stream_codes(
        self, version: str, request: Request, chunking: Chunking, *, retry: bool
    ) -> AsyncGenerator[CodesChunk]:
        stream = self._ar.options(stream=True).stream
        return self._stream(
            lambda: stream.remote(version, _with_new_id(request), chunking),
            retry=retry,
            same=_same_chunk,
        )

    async def generate_codes(self, version: str, request: Request, *, retry: bool) -> CodesChunk:
        generate = self._ar.generate
        return await self._call(
            lambda: generate.remote(version, _with_new_id(request)), retry=retry
        )

    async def nar_decode(self, version: str, request: NARRequest) -> Codes:
        decode = self._nar.decode
        return await self._call(lambda: decode.remote(version, request), retry=True)

    async def encode(self, version: str, wave: Wave) -> Codes:
        return await self._call(lambda: self._codec.encode.remote(version, wave))

    async def decode(self, version: str, codes: Codes) -> Wave:
        decode = self._codec.decode
        return await self._call(lambda: decode.remote(version, codes), retry=True)

    async def decode_next(
        self, version: str, codes: Codes, state: EncodecState | None
    ) -> DecodedChunk:
        decode_next = self._codec.decode_next
        return await self._call(lambda: decode_next.remote(version, codes, state), retry=True)

    async def codec_sha256(self, version: str) -> str:
        return await self._call(lambda: self._codec.codec_sha256.remote(version))

    async def languages(self, version: str) -> tuple[str, ...]:
        return await self._call(lambda: self._codec.languages.remote(version))

    async def preload(self, version: str) -> None:
        for handle in (self._ar, self._nar, self._codec):
            await handle.broadcast("preload", version).results_async(timeout_s=PRELOAD_SECONDS)

    async def forget_prompts(self) -> None:
        for handle in (self._ar, self._nar):
            responses = handle.broadcast("forget_prompts")
            for result in await responses.results_async(
                timeout_s=FORGET_SECONDS, return_exceptions=True
            ):
                if isinstance(result, RayActorError | OutOfMemoryError):
                    continue  # the process has ended, and its memory with it
                if isinstance(result, BaseException):
                    raise result

    async def not_running(self) -> list[str]:
        return await asyncio.to_thread(_not_running, serve.get_replica_context().app_name)


def _with_new_id(request: Request) -> Request:
    """The same request with a new id: a replica that could not be reached may still run the
    previous attempt. Codes do not depend on the id."""
    return replace(request, id=uuid.uuid4().hex)


def _same_chunk(first: CodesChunk, again: CodesChunk) -> bool:
    return (first.last, first.hit_limit) == (again.last, again.hit_limit) and np.array_equal(
        first.codes, again.codes
    )


def _handle(deployment: str) -> DeploymentHandle:
    return serve.get_deployment_handle(deployment, serve.get_replica_context().app_name)


@cached(TTLCache(1, 1.0), lock=threading.Lock())  # unauthenticated, and the controller answers
def _not_running(app_name: str) -> list[str]:
    """Deployments of an application that have no running replica, the ingress included. KeyLimits
    is left out, because requests are answered without it too."""
    app = serve.status().applications[app_name]
    return [
        name
        for name, deployment in app.deployments.items()
        if name != KEY_LIMITS and not deployment.replica_states.get("RUNNING")
    ]
