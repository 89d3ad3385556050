"""Storage that fails for a while: batch jobs repeat the call with growing pauses, then stop.

An error of one file (missing, a folder, a name too long) is not a fault of storage. It is raised at
once.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import tenacity

from valle.platform import storage
from valle.platform.storage import NotAFileError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_FILE_FAULTS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|NO_SUCH_BUCKET|HTTP response code 40[13]"
)
"""Answers of S3, in pyarrow's words, that waiting seldom changes."""

REFUSAL_ATTEMPTS = 3
"""Tries of what storage refuses: rights and credentials may be seconds old."""


class StorageError(OSError):
    """Storage has failed or refused all tries. The cause is not a single file."""


def is_storage_fault(error: BaseException) -> bool:
    """True for an error of storage (network, disk, rights, limits), False for one of a file."""
    if not isinstance(error, OSError) or isinstance(error, NotAFileError | StorageError):
        return False
    return error.errno not in _FILE_FAULTS and not isinstance(error, FileNotFoundError)


def is_refusal(error: BaseException) -> bool:
    """True for an error of rights or credentials."""
    return isinstance(error, PermissionError) or bool(_REFUSED.search(str(error)))


class Retrier:
    """Calls functions of storage until they succeed, for at most `seconds` each."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.retries = 0
        """Calls that were tried again, each time counted."""

    def call(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """The result of `function`, which may be called several times, so it must be repeatable.

        Raises StorageError when storage still fails after `seconds`, and errors of the file or the
        arguments at once.
        """
        started = time.monotonic()

        def give_up(state: tenacity.RetryCallState) -> bool:
            assert state.outcome is not None
            error = state.outcome.exception()
            if error is not None and is_refusal(error) and state.attempt_number >= REFUSAL_ATTEMPTS:
                return True
            return time.monotonic() - started >= self._seconds

        def count(_: tenacity.RetryCallState) -> None:
            self.retries += 1

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_storage_fault),
            wait=tenacity.wait_exponential(multiplier=0.2, max=10) + tenacity.wait_random(0, 0.3),
            stop=give_up,
            before_sleep=count,
            reraise=True,
        )
        try:
            return retrying(function, *args, **kwargs)
        except OSError as error:
            if not is_storage_fault(error):
                raise
            tried = time.monotonic() - started
            raise StorageError(
                f"storage failed {self._attempts(retrying)} times in {tried:.0f} s: {error}. "
                "No input was rejected because of it; run the job again when storage answers"
            ) from error

    @staticmethod
    def _attempts(retrying: tenacity.Retrying) -> int:
        return int(retrying.statistics.get("attempt_number", 1))


def is_forbidden_file(uri: str, error: BaseException) -> bool:
    """True for a local file that may not be read although its folder may: one file's own mode,
    not a worker without rights."""
    if not isinstance(error, PermissionError) or not storage.is_local(uri):
        return False
    folder = os.path.dirname(storage.absolute(uri))
    return os.access(folder, os.R_OK | os.X_OK)


@contextmanager
def storage_errors_of_workers() -> Iterator[None]:
    """Raises the StorageError of a worker for the errors that Ray wraps around it."""
    try:
        yield
    except Exception as error:
        if (cause := find_storage_error(error)) is not None:
            raise StorageError(str(cause)) from error
        raise


def find_storage_error(error: BaseException | None) -> StorageError | None:
    """The StorageError that has led to an error."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, StorageError):
            return current
        pending += [current.__cause__, current.__context__, getattr(current, "cause", None)]
    return None
