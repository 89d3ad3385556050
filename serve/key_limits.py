"""Limits of API keys, counted: requests and characters a minute, requests at the same time."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

REPORT_SECONDS = 2.0
"""Seconds between two reports of a replica about its running requests."""

LEASE_SECONDS = 10.0
"""Seconds after which the running requests of a replica count no more that reports nothing: it is
dead, and they are too."""


class KeyLimits(Protocol):
    """Counts for all ingress replicas. Methods return the seconds to wait; 0: allowed, and
    counted."""

    async def start_request(
        self, replica: str, key: str, running: int, per_minute: int, concurrent: int
    ) -> int:
        """Counts a request; `running` are those of the key that this replica has already."""

    async def report_running(self, replica: str, running: dict[str, int]) -> None:
        """States a replica's running requests, by key: when one ends, and now and then."""

    async def spend_characters(self, key: str, characters: int, per_minute: int) -> int:
        """Counts the characters of a text."""


class LocalKeyLimits:
    """Counts in one process: of an application with one ingress replica, or of the one replica
    that counts for all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = MovingWindowRateLimiter(MemoryStorage())
        self._characters = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._clock = clock
        # by replica: time of the last report, running requests by key
        self._running: dict[str, tuple[float, dict[str, int]]] = {}

    async def start_request(
        self, replica: str, key: str, running: int, per_minute: int, concurrent: int
    ) -> int:
        """As `KeyLimits` says."""
        elsewhere = self._running_by_key(without=replica)[key]
        own = self._running.get(replica, (0.0, {}))[1]
        if running + elsewhere >= concurrent:
            return 1
        item = RateLimitItemPerMinute(per_minute)
        if not self._requests.hit(item, key):
            reset = self._requests.get_window_stats(item, key).reset_time
            return max(1, math.ceil(reset - time.time()))
        self._running[replica] = (self._clock(), {**own, key: running + 1})
        return 0

    async def report_running(self, replica: str, running: dict[str, int]) -> None:
        """As `KeyLimits` says."""
        self._running[replica] = (self._clock(), dict(running))

    async def spend_characters(self, key: str, characters: int, per_minute: int) -> int:
        """As `KeyLimits` says."""
        item = RateLimitItemPerMinute(per_minute)
        if self._characters.hit(item, key, cost=characters):
            return 0
        reset = self._characters.get_window_stats(item, key).reset_time
        return max(1, math.ceil(reset - time.time()))

    def _running_by_key(self, without: str) -> defaultdict[str, int]:
        """Running requests of the other replicas that still report."""
        oldest = self._clock() - LEASE_SECONDS
        self._running = {
            replica: report for replica, report in self._running.items() if report[0] >= oldest
        }
        total: defaultdict[str, int] = defaultdict(int)
        for replica, (_, running) in self._running.items():
            if replica != without:
                for key, count in running.items():
                    total[key] += count
        return total
