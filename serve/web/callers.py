"""The sender of a request: its API key and what that key may do."""

import re
import uuid
from dataclasses import dataclass, field
from typing import Literal

from starlette.datastructures import Headers
from starlette.requests import Request

from valle.serve.web.schema import ApiError

Permission = Literal["speak", "add", "delete", "inline"]
"""speak: synthesize; add, delete: voices; inline: speak in the voice of a recording that the
request contains (`ref_audio`)."""

PERMISSIONS: tuple[Permission, ...] = ("speak", "add", "delete", "inline")

REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The sender of a request: an API key with its permissions, or nobody in particular."""

    key: str = ""
    """Name of the key; empty where the server asks for none."""

    permissions: tuple[Permission, ...] = PERMISSIONS

    all_voices: bool = True
    """May use and delete the voices of every owner, not its own and the shared ones only."""

    max_voices: int | None = None
    """Voices that may be stored under this key; None: the server's limit alone."""

    characters_per_minute: int | None = None
    """Characters of text that the key may have spoken in a minute; None: any number."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The `X-Request-ID` of the response."""

    def require(self, permission: Permission) -> None:
        """Raises ApiError (403) if the caller lacks the permission."""
        if permission not in self.permissions:
            message = f"key {self.key} may not {permission}: see `may` in the file of keys"
            raise ApiError(403, message, code="not_permitted")

    def __str__(self) -> str:
        return f"key={self.key or '-'} request={self.request_id}"


def request_id(headers: Headers) -> str:
    """The ID that Serve, the edge or the client has given a request, or a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID_PATTERN.fullmatch(given) else uuid.uuid4().hex


def caller_of(request: Request) -> Caller:
    """The caller that `ApiKeyMiddleware` has set; without keys, a caller with all permissions."""
    caller = request.scope.get("state", {}).get("caller")
    return caller or Caller(request_id=request_id(request.headers))
