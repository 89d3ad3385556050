"""Unexpected errors, answered inside the other middlewares, so that these handle the answer too."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valle.serve.web.body_limit import BodyRefusedError
from valle.serve.web.json_body import shorten
from valle.serve.web.schema import ErrorDetail, error_response

logger = logging.getLogger("ray.serve")


class FailureMiddleware:
    """ASGI middleware, the innermost: answers 500 to an error of the application and logs it. If
    the response has begun, the connection is closed, so that no client takes a part for the whole.

    Starlette's own handler is outside of all middlewares: its answers have no CORS headers, and
    a page of another origin would see no error but a network's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def forward(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, forward)
        except BodyRefusedError:  # answered further out
            raise
        except Exception:
            if started or scope["type"] != "http":
                raise
            path = repr(shorten(scope["path"]))  # decoded, it may hold line ends
            logger.exception("a request failed: %s %s", scope["method"], path)
            detail = ErrorDetail(message="the server failed", type="server_error")
            response = error_response(500, detail, {"Retry-After": "2"})
            await response(scope, receive, forward)
