"""API keys: what each may do, and its limits.

    valle keys web    # creates a key; prints it once, with its entry for the file

The file (`api_keys` of `AppArgs`) is a YAML list. It holds the SHA-256 of each key, from which the
key cannot be recovered. Without a file, requests need no key.

    - name: web                 # in logs, and as the owner of the voices that the key adds
      sha256: 0123...
      may: [speak, add]         # default: speak, add, delete, inline
      voices: all               # default: own, and the shared ones that have no owner
      requests_per_minute: 60        # the default
      characters_per_minute: 20000   # default: no limit
      concurrent: 8                  # the default
      max_voices: 100                # the default
"""

import argparse
import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Literal

import dacite
import yaml

from valle.platform import storage
from valle.serve.web.callers import PERMISSIONS, Caller, Permission

KEY_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Names of keys: each is a folder of voices, too."""

READ_SECONDS = 2.0
"""Seconds that a request waits for the file to be read again."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One entry of the file."""

    name: str
    """Name of the key in messages and logs; also the owner of the voices that the key adds."""

    sha256: str
    """SHA-256 of the key, in hexadecimal."""

    may: tuple[Permission, ...] = PERMISSIONS
    """What the key may do: speak, add and delete voices, inline (speak with `ref_audio`)."""

    voices: Literal["own", "all"] = "own"
    """own: the key may use its own and the shared voices, and delete its own. all: it may use and
    delete every voice."""

    requests_per_minute: int = 60
    """Requests in any 60 seconds; more are refused with 429."""

    characters_per_minute: int | None = None
    """Characters of text in a minute; more are refused with 429. None: no limit."""

    concurrent: int = 8
    """Requests at the same time; more are refused with 429."""

    max_voices: int = 100
    """Most voices that the key may store; more are refused with 507."""

    def __post_init__(self) -> None:
        if not KEY_NAME_PATTERN.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} is not 1 to 64 of a-z, A-Z, 0-9, _ and -")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(f"{self.name}: sha256 must be 64 digits of lower-case hexadecimal")
        characters = 1 if self.characters_per_minute is None else self.characters_per_minute
        if min(self.requests_per_minute, self.concurrent, characters) < 1 or self.max_voices < 0:
            raise ValueError(f"{self.name}: limits must be above 0")

    def caller(self, request_id: str) -> Caller:
        """The sender of a request with this key."""
        return Caller(
            key=self.name,
            permissions=self.may,
            all_voices=self.voices == "all",
            max_voices=self.max_voices,
            characters_per_minute=self.characters_per_minute,
            request_id=request_id,
        )


def read_keys(uri: str) -> list[ApiKey]:
    """The keys of a file. Raises ValueError for a file with errors, OSError for a missing one."""
    return parse_keys(uri, storage.read_bytes(uri))


def parse_keys(uri: str, content: bytes) -> list[ApiKey]:
    """The keys in the content of a file. Raises ValueError for errors."""
    try:
        rows = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"api_keys: {uri}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"api_keys: {uri} must be a list of keys with at least one entry")
    strict = dacite.Config(strict=True, cast=[tuple])
    try:
        keys = [dacite.from_dict(ApiKey, row, strict) for row in rows]
    except (dacite.DaciteError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"api_keys: {uri}: {error}") from error
    # folders of voices, on file systems that do not tell upper from lower case, too
    if len({key.name.lower() for key in keys}) < len(keys):
        raise ValueError(f"api_keys: {uri}: two keys have the same name")
    if len({key.sha256 for key in keys}) < len(keys):
        raise ValueError(f"api_keys: {uri}: two keys have the same sha256")
    return keys


class KeyFile:
    """The keys of a file, read again as requests come: a key that is added or taken out counts
    after `poll_seconds`, in every replica, without a restart."""

    def __init__(
        self, uri: str, poll_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ValueError or OSError for a file that cannot be used: nothing starts open."""
        self._uri, self._poll_seconds, self._clock = uri, poll_seconds, clock
        self._content = storage.read_bytes(uri)
        self._keys = _by_digest(parse_keys(uri, self._content))
        self._next_read = clock() + poll_seconds
        self._reading: asyncio.Task[None] | None = None
        self._read_start = 0.0
        self._error = ""

    async def find(self, secret: str) -> ApiKey | None:
        """The entry of a key; None for one that is not, or no longer, in the file."""
        if self._clock() >= self._next_read and self._reading is None:
            self._read_start = self._clock()
            # in a context of its own: Serve cancels the tasks that belong to a request's context
            self._reading = asyncio.create_task(self._read(), context=Context())
        if self._reading is not None:
            # this request is judged by the new content, unless the storage hangs
            remaining = self._read_start + READ_SECONDS - self._clock()
            await asyncio.wait([self._reading], timeout=max(0.0, remaining))
        # found by its digest: the time that this takes says nothing about the keys
        return self._keys.get(hashlib.sha256(secret.encode()).hexdigest())

    async def _read(self) -> None:
        """Takes over a changed file. The keys stay as they are while it cannot be read or has
        errors, which are logged once."""
        try:
            content = await asyncio.to_thread(storage.read_bytes, self._uri)
            if content != self._content:
                keys = _by_digest(parse_keys(self._uri, content))
                self._content, self._keys = content, keys
                logger.warning("api_keys: %s was read again, %d keys", self._uri, len(keys))
            self._error = ""
        except Exception as error:
            if str(error) != self._error:
                self._error = str(error)
                logger.error("api_keys: the keys stay as they were: %s", error)
        finally:
            self._next_read = self._clock() + self._poll_seconds
            self._reading = None


def _by_digest(keys: Sequence[ApiKey]) -> dict[str, ApiKey]:
    return {key.sha256: key for key in keys}


def main(argv: Sequence[str] | None = None) -> None:
    """Creates a key; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of the key, of a-z, A-Z, 0-9, _ and -")
    arguments = parser.parse_args(argv)
    if not KEY_NAME_PATTERN.fullmatch(arguments.name):
        parser.error(f"name: {arguments.name!r} is not 1 to 64 of a-z, A-Z, 0-9, _ and -")
    key = secrets.token_urlsafe(32)
    line = [{"name": arguments.name, "sha256": hashlib.sha256(key.encode()).hexdigest()}]
    print(f"key, shown only now: {key}\nline for the file of keys:\n{yaml.safe_dump(line)}", end="")


if __name__ == "__main__":
    main()
