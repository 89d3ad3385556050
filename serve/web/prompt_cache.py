"""Codes of recordings in the memory of an ingress replica: of stored voices, and by content.

Each request asks the store for the stamp of the voice's file (path, time, size), so that a voice
that was replaced or deleted is not spoken by its old codes; the file itself is read and encoded
once. Codes are removed when the store has no such voice any more, and in any case after
`PROMPT_CACHE_SECONDS`. A timer checks all of them, for times without requests.

While the store does not answer, voices that it has confirmed recently can still be used.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context

from cachetools import LRUCache, TTLCache

from valle.model.codec.interface import Codes
from valle.platform.storage import FileStamp
from valle.serve.web.single_flight import SingleFlight
from valle.serve.web.voices import VoiceError, VoiceStoreError

logger = logging.getLogger("ray.serve")

PROMPT_CACHE_SIZE, PROMPT_CACHE_SECONDS = 256, 600
"""Prompts in the cache, and their lifetime since the store has last confirmed them."""

STALE_SECONDS = 60.0
"""Time for which a voice goes on without the store's confirmation."""

STORE_SECONDS = 5.0
"""Time that the store gets for its answer."""

RETRY_SECONDS = 2.0
"""Time after a failure of the store in which confirmed voices do not wait for it again."""

SWEEP_SECONDS = 30.0
"""Time between two looks for voices that have been deleted."""


class PromptCache:
    """Codes by voice and by content, for each model version.

    A voice is any name that `read_stamp` understands. Codes are made once for all that ask for them
    meanwhile.
    """

    def __init__(
        self,
        read_stamp: Callable[[Hashable], Awaitable[FileStamp]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read_stamp` raises VoiceError for an unknown voice, and VoiceStoreError if the store
        does not answer."""
        self._read_stamp, self._clock = read_stamp, clock
        self._stamps: LRUCache[Hashable, tuple[FileStamp, float]] = LRUCache(PROMPT_CACHE_SIZE)
        """Of each voice, and when the store has confirmed it."""
        self._codes: TTLCache[tuple[Hashable, FileStamp, str], Codes] = TTLCache(
            PROMPT_CACHE_SIZE, PROMPT_CACHE_SECONDS, timer=clock
        )
        self._contents: TTLCache[tuple[bytes, str], Codes] = TTLCache(
            PROMPT_CACHE_SIZE, PROMPT_CACHE_SECONDS, timer=clock
        )
        """By hash of the recording: one that requests contain, or several voices have."""
        self._flights = SingleFlight()
        self._n_removals = 0
        """What was being made when something was removed is used once, and not kept."""
        self._store_failed_at = -RETRY_SECONDS
        self._sweep: asyncio.TimerHandle | asyncio.Task[None] | None = None

    async def of_content(
        self, sha256: bytes, version: str, make: Callable[[], Awaitable[Codes]]
    ) -> Codes:
        """Codes `[8, P]` of the recording with that hash. `make` encodes it, and its errors are
        raised."""
        key = (sha256, version)
        codes = self._contents.get(key)
        if codes is None:
            n_removals = self._n_removals
            codes = await self._flights.run(key, make)
            if n_removals == self._n_removals:
                self._contents[key] = codes
                self._schedule_sweep()
        return codes

    async def of_voice(
        self, voice: Hashable, version: str, make: Callable[[], Awaitable[Codes]]
    ) -> Codes:
        """Codes `[8, P]` of a voice. `make` reads and encodes it. Errors of `read_stamp` and `make`
        are raised."""
        stamp = await self._current_stamp(voice)
        n_removals = self._n_removals
        key = (voice, stamp, version)
        codes = self._codes.get(key)
        if codes is None:
            codes = await self._flights.run(key, make)
        if n_removals == self._n_removals:
            self._codes[key] = codes  # confirmed now: its lifetime begins anew
            self._schedule_sweep()
        return codes

    def forget(self) -> None:
        """Removes all codes."""
        self._n_removals += 1
        for cache in (self._codes, self._stamps, self._contents):
            cache.clear()

    def __len__(self) -> int:
        return len(self._codes) + len(self._contents)

    async def sweep(self) -> None:
        """Removes the codes of deleted voices, and those that the store has not confirmed in
        time."""
        for voice in list(self._stamps):
            try:
                await self._current_stamp(voice)
            except VoiceError:
                continue  # `_stamp` has removed it
            except VoiceStoreError:
                self._remove(voice)
        self._codes.expire()
        self._contents.expire()

    async def _current_stamp(self, voice: Hashable) -> FileStamp:
        return await self._flights.run(("stamp", voice), lambda: self._stamp(voice))

    async def _stamp(self, voice: Hashable) -> FileStamp:
        """The store's stamp of a voice; while the store does not answer, the previous one."""
        now = self._clock()
        known, confirmed_at = self._stamps.get(voice, (None, 0.0))
        fresh = known if now - confirmed_at <= STALE_SECONDS else None
        if fresh is not None and now - self._store_failed_at < RETRY_SECONDS:
            return fresh
        try:
            async with asyncio.timeout(STORE_SECONDS):
                stamp = await self._read_stamp(voice)
        except VoiceError:
            self._remove(voice)
            raise
        except (VoiceStoreError, TimeoutError) as error:
            self._store_failed_at = self._clock()
            logger.warning("the voice store does not answer: %s", error or "too slow")
            if fresh is not None:
                return fresh
            raise VoiceStoreError(str(error) or "no answer in time") from error
        if known is not None and known != stamp:
            self._remove(voice)
        self._stamps[voice] = stamp, now
        return stamp

    def _remove(self, voice: Hashable) -> None:
        self._n_removals += 1
        self._stamps.pop(voice, None)
        for key in [key for key in self._codes if key[0] == voice]:
            self._codes.pop(key, None)
        self._contents.clear()  # its recording may be among them

    def _schedule_sweep(self) -> None:
        if self._sweep is None:
            loop = asyncio.get_running_loop()
            self._sweep = loop.call_later(SWEEP_SECONDS, self._start_sweep)

    def _start_sweep(self) -> None:
        self._sweep = asyncio.create_task(self._sweep_all(), context=Context())

    async def _sweep_all(self) -> None:
        try:
            await self.sweep()
        finally:
            self._sweep = None
            if self._stamps or len(self):
                self._schedule_sweep()
