"""The right to write below a URI: one run at a time holds it.

The lease is a small file that its holder renews. A run that finds a lease watches it: if the lease
changes, its holder is alive; if it does not change for `STALE_SECONDS`, its holder was killed.
Clocks of two machines are never compared. The file is created so that one of two simultaneous
creators fails: with a hard link on a disk, with a conditional PUT on S3. On storage without either,
the last of two simultaneous writers gets the lease, and the other one notices that.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from valle.platform import storage
from valle.platform.retries import Retrier

RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Time without a renewal after which a lease is taken over."""


class LeaseError(RuntimeError):
    """Another run holds the lease."""


@dataclass(frozen=True)
class _Holder:
    """The contents of a lease."""

    owner: str
    """A random name of this holder."""
    job: str
    host: str
    machine: str
    """Identity of the booted machine and of the container on it: numbers of processes are unique
    within it."""
    pid: int
    pid_started: float
    started: float
    """Seconds since 1970, for messages."""
    renewals: int = 0

    @property
    def is_dead(self) -> bool:
        """True if the holder was a process of this machine that has ended."""
        if self.machine != _machine():
            return False
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).create_time() != self.pid_started
        return True

    def __str__(self) -> str:
        minutes = max(0.0, time.time() - self.started) / 60
        return f"{self.job} on {self.host} (process {self.pid}), started {minutes:.0f} minutes ago"


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    container = Path("/proc/self/ns/pid")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {container.readlink()}"
    return f"{uuid.getnode():x}"


class Lease:
    """A lease that is held and renewed."""

    def __init__(self, uri: str, holder: _Holder) -> None:
        self._uri, self._holder = uri, holder
        self._renewals = 0
        self._stopped = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew_forever, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseError if another run has taken the lease over meanwhile."""
        if self._lost is not None:
            raise LeaseError(self._lost)

    def release(self) -> None:
        """Deletes the lease file, if the lease is still held."""
        self._stopped.set()
        self._thread.join()
        try:
            present = _read(self._uri)
            if present is not None and present.owner == self._holder.owner:
                storage.delete(self._uri)
        except OSError as error:  # the next run takes it over
            logging.getLogger(__name__).warning("lease %s is not released: %s", self._uri, error)

    def _renew_forever(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            try:
                present = _read(self._uri)
                if present is None or present.owner != self._holder.owner:
                    self._lost = (
                        f"lease {self._uri}: taken over by {present}"
                        if present
                        else f"lease {self._uri}: removed"
                    )
                    return
                self._renewals += 1
                _write(self._uri, _Holder(**{**asdict(self._holder), "renewals": self._renewals}))
            except OSError as error:  # storage may come back before the lease is stale
                logging.getLogger(__name__).warning("lease %s: %s", self._uri, error)


@contextmanager
def lease(uri: str, job: str, retrier: Retrier | None = None) -> Iterator[Lease]:
    """Holds the lease file `uri` for `job` within the block; `retrier` bounds the tries to get it.

    Raises LeaseError, naming the holder, when another run holds it. That takes up to
    `RENEW_SECONDS`; a killed run's lease is taken over at once where its process is known to be
    dead, else after `STALE_SECONDS`.
    """
    holder = _Holder(
        owner=uuid.uuid4().hex,
        job=job,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        pid_started=psutil.Process().create_time(),
        started=time.time(),
    )
    (retrier or Retrier(0)).call(_acquire, uri, holder)
    held = Lease(uri, holder)
    try:
        yield held
    finally:
        held.release()


def _acquire(uri: str, holder: _Holder) -> None:
    first = None
    deadline = time.monotonic() + STALE_SECONDS
    while True:
        if _create(uri, holder):
            return
        present = _read(uri)
        if present is None:
            continue  # released meanwhile
        if present.owner == holder.owner:
            return  # created by a call whose answer was lost
        if first is None and not present.is_dead:
            first = present
            logging.getLogger(__name__).warning(
                "%s: held by %s; waiting to see whether it lives", uri, present
            )
        if first is not None and present != first:
            raise LeaseError(
                f"{uri}: another run is writing there: {present}. Wait for its end, stop it, or "
                "name another folder"
            )
        if present.is_dead or time.monotonic() > deadline:
            if _read(uri) == present:  # no other run has taken it over
                storage.delete(uri)  # `_create` decides who is next
            first, deadline = None, time.monotonic() + STALE_SECONDS
            continue
        time.sleep(min(1.0, RENEW_SECONDS / 5))


def _read(uri: str) -> _Holder | None:
    """The present holder; None if there is no lease, or an unreadable one."""
    try:
        return _Holder(**json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # cut off by a full disk, or of another version
        storage.delete(uri)
        return None


def _write(uri: str, holder: _Holder) -> None:
    storage.write_json(uri, asdict(holder))


def _create(uri: str, holder: _Holder) -> bool:
    """Creates the lease unless there is one."""
    data = json.dumps(asdict(holder), indent=2).encode()
    target = storage.absolute(uri)
    if storage.is_local(uri):
        return _create_locally(Path(target), data)
    if not target.startswith("s3://"):
        return _write_and_look(uri, holder)
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = target.removeprefix("s3://").partition("/")
    try:
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        if code == "NotImplemented":
            return _write_and_look(uri, holder)
        raise OSError(f"lease {uri}: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"lease {uri}: {error}") from error
    return True


def _create_locally(path: Path, data: bytes) -> bool:
    """Writes beside the lease, and links the file there: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{storage.PART_SUFFIX}")
    try:
        part.write_bytes(data)
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a mount without hard links
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _write_and_look(uri: str, holder: _Holder) -> bool:
    """Without a conditional write: of two that write at once, the last one stays."""
    if _read(uri) is not None:
        return False
    _write(uri, holder)
    time.sleep(2.0)
    present = _read(uri)
    return present is not None and present.owner == holder.owner
