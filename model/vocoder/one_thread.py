"""Limits numpy's matrix products to one thread, for loops of many small products.

numpy's BLAS splits even a product of two microseconds over all cores, and then waits for the other
threads six times as long as the product takes.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


class _OneThread:
    """The limit, shared by its concurrent users: it is the whole process's, and ends when the last
    user leaves."""

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
    """A context in which numpy's matrix products run on the calling thread."""
    return _process_wide()()
