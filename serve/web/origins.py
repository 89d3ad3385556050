"""Which hosts and web origins may use the endpoint, and the headers of every response.

A browser sends the requests of any page, with the user's access to the network: a page may post to
a server on localhost, and with a name of its own that resolves to 127.0.0.1 (DNS rebinding) it may
read the answers too. So the `Host` of every request is checked, and the `Origin` of requests that
change something. Programs other than browsers send no `Origin`.
"""

import ipaddress
import re
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valle.serve.web.json_body import shorten
from valle.serve.web.schema import ErrorDetail, error_response

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Names of a server that only its own machine reaches."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing; browsers keep their answers from other origins."""

_HOST_ONLY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?//[A-Za-z0-9._:\[\]-]+")

EXPOSED_HEADERS = ("Retry-After", "X-Hit-Limit", "X-Ignored-Fields", "X-Model", "X-Seed")
"""Response headers that scripts of allowed origins may read."""


def is_loopback(host: str) -> bool:
    """True for an address to listen on that no other machine can reach."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:  # a name, or "" for every interface
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class HostMiddleware:
    """ASGI middleware: answers 421 to a request for another host, and 403 to one that would change
    something for a page of another origin."""

    def __init__(
        self, app: ASGIApp, allowed_hosts: Collection[str], allow_origins: Collection[str]
    ) -> None:
        """`allowed_hosts` are names without ports, `*.example.com` for all below one, `*` for any;
        `allow_origins` are `https://name:port`, or `*` for any."""
        self._app = app
        self._hosts = [host.lower().strip("[]") for host in allowed_hosts]
        self._origins = {origin.lower().rstrip("/") for origin in allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on an allowed request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_allowed_host(host):
            message = (
                f"Host: {shorten(host) or 'missing'} is not a name of this server; use one of its "
                "names, or add this one to allowed_hosts"
            )
            await refuse(421, message, "unknown_host", scope, receive, send)
            return
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        origin = headers.get("origin")
        if changes and origin is not None and not self._is_allowed_origin(origin, host):
            message = f"pages of {shorten(origin)} may not do this: add it to allow_origins"
            await refuse(403, message, "unknown_origin", scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed_host(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        name = _host_and_port(f"//{host}")[0]
        return bool(name) and any(
            name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:]))
            for allowed in self._hosts
        )

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin.lower() in self._origins:
            return True
        # the page's own: TLS may end before this server, so the scheme says nothing here
        name_and_port = _host_and_port(origin)
        return bool(name_and_port[0]) and name_and_port == _host_and_port(f"//{host}")


def _host_and_port(url: str) -> tuple[str, int | None]:
    """Host in lower case, and port unless it is the scheme's default.

    ("", None) for a text that is no URL, and for a URL with other parts, such as a user: the host
    of `//evil@localhost` is localhost.
    """
    if not _HOST_ONLY.fullmatch(url):
        return "", None
    try:
        parts = urlsplit(url)
        port = None if parts.port in (80, 443) else parts.port
    except ValueError:
        return "", None
    return (parts.hostname or "").lower(), port


async def refuse(
    status: int, message: str, code: str, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answers a request with an error; closes a websocket before it is accepted."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": code})
        return
    detail = ErrorDetail(message=message, code=code)
    await error_response(status, detail)(scope, receive, send)


def cors(app: ASGIApp, allow_origins: Sequence[str]) -> CORSMiddleware:
    """A middleware that answers preflights, and adds to every response, errors included, the
    headers that permit scripts of other origins to read it. Cookies play no part: a script sends
    its key in a header."""
    return CORSMiddleware(
        app,
        allow_origins=[origin.lower().rstrip("/") for origin in allow_origins],
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )


class ResponseMiddleware:
    """ASGI middleware: answers HEAD as GET without the body, and forbids browsers to guess a
    response's content type."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"

        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.setdefault("X-Content-Type-Options", "nosniff")
                message = {**message, "headers": headers.raw}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        if head:
            scope["method"] = "GET"  # in place: the metrics read the route that the router adds
        await self._app(scope, receive, forward)
