"""The check of API keys before anything of a request is read."""

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from valle.serve.key_limits import REPORT_SECONDS, KeyLimits
from valle.serve.web.body_limit import route_path
from valle.serve.web.callers import request_id
from valle.serve.web.keys import ApiKey, KeyFile
from valle.serve.web.origins import refuse
from valle.serve.web.schema import ErrorDetail, error_response

PUBLIC_PATHS = re.compile(
    r"/|/health/(live|ready)|/docs|/docs/[a-z-]+\.(css|js)|/openapi\.json"
    r"|/ui/[a-z]+\.(css|js|svg)"
)
"""Paths that need no key: health probes, the web page, where the user enters a key, and the
documentation, which is the same for every server."""

UNCOUNTED_PATHS = re.compile(r"/metrics|/v1/models(/.*)?")
"""Paths that need a key and take nothing of its limits: whoever watches a server does not slow its
users down."""

LOG_SECONDS = 10.0
"""Seconds between two log lines about refused keys: an attack fills no disk."""

logger = logging.getLogger("ray.serve")


class ApiKeyMiddleware:
    """ASGI middleware: answers 401 without a valid key and 429 beyond the key's limits. The caller
    becomes `scope["state"]["caller"]`."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyFile,
        limits: KeyLimits,
        count_refusal: Callable[[str], None],
    ) -> None:
        """`count_refusal` is called with the reason of each 401: `missing` or `unknown`."""
        self._app, self._keys, self._limits = app, keys, limits
        self._count_refusal = count_refusal
        self._replica = uuid.uuid4().hex
        self._running: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._reporting: asyncio.Task[None] | None = None
        self._refused = 0
        self._next_log = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on an allowed request. It counts as running until its last byte is sent or its
        client disconnects."""
        path = route_path(scope)
        public = scope["type"] == "http" and PUBLIC_PATHS.fullmatch(path)
        if scope["type"] == "lifespan" or public:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        secret = _bearer(headers.get("authorization", ""))
        key = None if secret is None else await self._keys.find(secret)
        if key is None:
            self._refuse_key("missing" if secret is None else "unknown", scope)
            await _answer_unauthorized(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = key.caller(request_id(headers))
        if UNCOUNTED_PATHS.fullmatch(path):
            await self._app(scope, receive, send)
            return
        # counted here before the shared count is asked: others come in while it answers
        self._running[key.name] += 1
        try:
            if wait := await self._wait(key):
                await _answer_too_many(key, wait, scope, receive, send)
                return
            self._keep_reporting()
            await self._app(scope, receive, send)
        finally:
            self._running[key.name] -= 1
            self._changed.set()

    async def _wait(self, key: ApiKey) -> int:
        """Seconds until the key allows another request; 0: now, and this one is counted."""
        before = self._running[key.name] - 1
        if before >= key.concurrent:
            return 1
        return await self._limits.start_request(
            self._replica, key.name, before, key.requests_per_minute, key.concurrent
        )

    def _keep_reporting(self) -> None:
        """States the running requests at each change and every few seconds, while there are any."""
        if self._reporting is None or self._reporting.done():
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            self._reporting = asyncio.create_task(self._report_running(), context=Context())

    async def _report_running(self) -> None:
        while +self._running:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            await self._limits.report_running(self._replica, dict(+self._running))

    def _refuse_key(self, reason: str, scope: Scope) -> None:
        """Counts and, at most every `LOG_SECONDS`, logs a request without a valid key."""
        self._count_refusal(reason)
        self._refused += 1
        now = time.monotonic()
        if now >= self._next_log:
            client = (scope.get("client") or ("unknown",))[0]
            message = "401: %d requests without a valid key since the last such line, now from %s"
            logger.warning(message, self._refused, client)
            self._refused, self._next_log = 0, now + LOG_SECONDS


def _bearer(authorization: str) -> str | None:
    """The key of an `Authorization` header; None for another scheme."""
    scheme, _, secret = authorization.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None


async def _answer_unauthorized(scope: Scope, receive: Receive, send: Send) -> None:
    message = "give a valid key as `Authorization: Bearer KEY`"
    if scope["type"] == "websocket":
        await refuse(401, message, "invalid_api_key", scope, receive, send)
        return
    detail = ErrorDetail(message=message, code="invalid_api_key")
    await error_response(401, detail, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


async def _answer_too_many(
    key: ApiKey, wait: int, scope: Scope, receive: Receive, send: Send
) -> None:
    message = (
        f"key {key.name}: {key.requests_per_minute} requests a minute and {key.concurrent} at the "
        "same time are allowed"
    )
    if scope["type"] == "websocket":
        await refuse(429, message, "rate_limit_exceeded", scope, receive, send)
        return
    detail = ErrorDetail(message=message, type="rate_limit_error", code="rate_limit_exceeded")
    await error_response(429, detail, {"Retry-After": str(wait)})(scope, receive, send)
