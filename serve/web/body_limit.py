"""Limits of request bodies: bytes by their declared length or as they are counted, and seconds."""

import asyncio
import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valle.serve.web.schema import ErrorDetail, error_response

_UTF_8 = re.compile(r";\s*charset=\"?utf-?8\"?\s*(;|$)")


class BodyRefusedError(Exception):
    """A body that passed a limit while it was read; raised into the application that reads it."""

    def __init__(self, status: int, detail: ErrorDetail) -> None:
        super().__init__(detail.message)
        self.status, self.detail = status, detail


class BodyLimitMiddleware:
    """ASGI middleware: refuses a large body by its declared length, before it is read, or, where
    none is declared (.NET, Node), as soon as the limit is passed. What comes after is not read.

    Starlette's function middlewares are no alternative: with them, a stream that fails ends like
    one that is complete.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[str], int], seconds: float) -> None:
        """`limit` is the number of bytes for a path; within `seconds` a body must have arrived."""
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 400, 408, 413 or 415."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(route_path(scope))
        try:
            check_declared_length(scope, limit)
            check_form_charset(scope)
            await self._pass_on(scope, _CountedBody(receive, limit, self._seconds), send)
        except BodyRefusedError as error:
            # the client is still sending: the connection cannot be used again
            response = error_response(error.status, error.detail, {"Connection": "close"})
            await response(scope, receive, send)

    async def _pass_on(self, scope: Scope, body: "_CountedBody", send: Send) -> None:
        """Runs the application; raises BodyRefusedError instead of what it answers to a body that
        was refused, unless its answer has begun before."""
        started = False

        async def forward(message: Message) -> None:
            nonlocal started
            if body.refusal is None or started:
                started = True
                await send(message)

        try:
            await self._app(scope, body.receive, forward)
        except Exception:
            if body.refusal is None or started:
                raise
        if body.refusal is not None and not started:
            raise body.refusal


class _CountedBody:
    """`receive` of a request, which raises when the body passes a limit."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._deadline: float | None = None
        self._n_bytes = 0
        self._complete = False
        self.refusal: BodyRefusedError | None = None

    async def receive(self) -> Message:
        if self.refusal is not None:
            raise self.refusal
        if self._complete:  # what comes now is the client's disconnect, after any time
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the body has not arrived within {self._seconds:g} s"
            raise self._refuse(408, text, "request_timeout") from None
        self._n_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._n_bytes > self._limit:
            text = f"the body has more than {self._limit} bytes, the limit"
            raise self._refuse(413, text, "request_too_large")
        return message

    def _refuse(self, status: int, message: str, code: str) -> BodyRefusedError:
        self.refusal = BodyRefusedError(status, ErrorDetail(message=message, code=code))
        return self.refusal


def route_path(scope: Scope) -> str:
    """The path within the application: Serve leaves its route prefix in `path`."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def check_declared_length(scope: Scope, limit: int) -> None:
    """Raises BodyRefusedError for headers that state a larger body, or two lengths at once: what
    one reader takes for the end of a body, another takes for the next request."""
    headers = Headers(scope=scope)
    lengths = set(headers.getlist("content-length"))
    if lengths and "transfer-encoding" in headers:
        message = "Content-Length and Transfer-Encoding exclude each other: send one of them"
        raise BodyRefusedError(400, ErrorDetail(message=message, code="ambiguous_length"))
    if len(lengths) > 1 or any(not (n.isascii() and n.isdecimal()) for n in lengths):
        message = "Content-Length must be one decimal number"
        raise BodyRefusedError(400, ErrorDetail(message=message, code="ambiguous_length"))
    for length in lengths:
        # compared by its digits first: Python makes no number of thousands of them
        if len(length.lstrip("0")) > len(str(limit)) or int(length.lstrip("0") or "0") > limit:
            message = f"the body has {length[:30]} bytes, limit {limit}"
            raise BodyRefusedError(413, ErrorDetail(message=message, code="request_too_large"))


def check_form_charset(scope: Scope) -> None:
    """Raises BodyRefusedError for a form that names another encoding than UTF-8: the form's parser
    takes any of Python's, and some (punycode) take minutes for a megabyte."""
    for value in Headers(scope=scope).getlist("content-type"):
        kind = value.lower()
        times = kind.count("charset") if "multipart" in kind else 0
        if times > 1 or (times and not _UTF_8.search(kind)):
            message = "a form must be in UTF-8: leave out its charset"
            detail = ErrorDetail(message=message, code="unsupported_media_type")
            raise BodyRefusedError(415, detail)
