"""API keys and their limits: requests a minute and concurrent requests.

    python -m valle.serve.web.keys web    # creates a key, prints it once with its entry in the file

The file (`api_keys` of `AppArgs`) is a YAML list. It holds the SHA-256 of each key, from which the
key cannot be recovered. Each ingress replica counts its own requests. Without a file, requests need
no key.
"""

import argparse
import hashlib
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import dacite
import limits
import yaml
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from valle.platform import storage
from valle.serve.web.schema import ErrorDetail, error_response

PUBLIC_PATHS = re.compile(r"/|/health/(live|ready)|/ui/[a-z]+\.(css|js|svg)")
"""Paths that need no key: health probes and the web page, where the user enters a key."""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One entry of the file."""

    name: str
    """Name of the key in messages."""

    sha256: str
    """SHA-256 of the key, in hexadecimal."""

    requests_per_minute: int = 60
    """Requests in any 60 seconds; more are refused with 429."""

    concurrent: int = 8
    """Requests at the same time; more are refused with 429."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(f"{self.name}: sha256 must be 64 digits of lower-case hexadecimal")
        if self.requests_per_minute < 1 or self.concurrent < 1:
            raise ValueError(f"{self.name}: limits must be above 0")


def read_keys(uri: str) -> list[ApiKey]:
    """The keys of a file. Raises ValueError for a file with errors."""
    rows = yaml.safe_load(storage.read_bytes(uri))
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"api_keys: {uri} must be a list of keys with at least one entry")
    try:
        keys = [dacite.from_dict(ApiKey, row, dacite.Config(strict=True)) for row in rows]
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"api_keys: {uri}: {error}") from error
    for field in ("name", "sha256"):
        if len({getattr(key, field) for key in keys}) < len(keys):
            raise ValueError(f"api_keys: {uri}: two keys have the same {field}")
    return keys


class ApiKeyMiddleware:
    """ASGI middleware: answers 401 without a valid key and 429 beyond the key's limits."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self._app = app
        self._keys = {key.sha256: key for key in keys}
        self._window = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on an allowed request, which counts as running until its last byte is sent or its
        client disconnects."""
        # `path` includes the route prefix of the application, `PUBLIC_PATHS` does not
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or PUBLIC_PATHS.fullmatch(path):
            await self._app(scope, receive, send)
            return
        key = self._key(Headers(scope=scope).get("authorization", ""))
        if key is None:
            detail = ErrorDetail(
                message="give a valid key as `Authorization: Bearer KEY`", code="invalid_api_key"
            )
            headers = {"WWW-Authenticate": "Bearer"}
            await error_response(401, detail, headers)(scope, receive, send)
            return
        if wait := self._wait(key):
            detail = ErrorDetail(
                message=f"key {key.name}: {key.requests_per_minute} requests a minute and "
                f"{key.concurrent} at the same time are allowed",
                type="rate_limit_error",
                code="rate_limit_exceeded",
            )
            await error_response(429, detail, {"Retry-After": str(wait)})(scope, receive, send)
            return
        self._running[key.name] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[key.name] -= 1

    def _key(self, authorization: str) -> ApiKey | None:
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._keys.get(hashlib.sha256(secret.strip().encode()).hexdigest())

    def _wait(self, key: ApiKey) -> int:
        """Seconds until the key allows another request; 0: now, and this one is counted."""
        if self._running[key.name] >= key.concurrent:
            return 1
        allowed = limits.RateLimitItemPerMinute(key.requests_per_minute)
        if self._window.hit(allowed, key.name):
            return 0
        reset = self._window.get_window_stats(allowed, key.name).reset_time
        return max(1, round(reset - time.time() + 0.5))


def main(argv: Sequence[str] | None = None) -> None:
    """Creates a key; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of the key's owner")
    arguments = parser.parse_args(argv)
    key = secrets.token_urlsafe(32)
    line = [{"name": arguments.name, "sha256": hashlib.sha256(key.encode()).hexdigest()}]
    print(f"key, shown only now: {key}\nline for the file of keys:\n{yaml.safe_dump(line)}", end="")


if __name__ == "__main__":
    main()
