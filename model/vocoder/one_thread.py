"""numpy's matrix products on one thread, for loops of many small ones.

Its BLAS splits even a product that takes two microseconds over all cores, and waiting for the
others then takes six times as long as the work.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


class _OneThread:
    """Counts those who want it: the number of threads is the process's, not a caller's."""

    def __init__(self) -> None:
        self._pools = ThreadpoolController().select(user_api="blas")
        self._lock = threading.Lock()
        self._users = 0
        self._limit: AbstractContextManager[object] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._limit = self._pools.limit(limits=1)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._limit is not None:
                    self._limit.__exit__(None, None, None)
                    self._limit = None


@cache
def _process_wide() -> _OneThread:
    return _OneThread()


def one_thread() -> AbstractContextManager[None]:
    """A context in which numpy's products run on the thread that asks for them."""
    return _process_wide()()
