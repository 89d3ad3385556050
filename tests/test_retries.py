"""Storage that fails: tried again, then an error; what is one file's fault is raised at once."""

import errno
import os
import time
from pathlib import Path

import pytest
from helpers.s3_outages import failing_proxy, s3_server

from valle.platform import retries, settings, storage
from valle.platform.retries import Retrier, StorageError, is_forbidden_file, is_storage_fault

STORAGE_FAULTS = [
    OSError(errno.EIO, "i/o"), OSError(errno.EMFILE, "files"), OSError(errno.ENOSPC, "full"),
    OSError(errno.ESTALE, "stale"), OSError(errno.EROFS, "read only"),
    OSError(errno.EDQUOT, "quota"),
    TimeoutError("slow"), ConnectionResetError("reset"), BrokenPipeError("pipe"),
    OSError("AWS Error SLOW_DOWN during GetObject operation"),
    OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject"),
    OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28"),
]  # fmt: skip
REFUSALS = [
    PermissionError(errno.EACCES, "no"),
    OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
    OSError("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation"),
    OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation"),
]
FILE_FAULTS = [
    FileNotFoundError("x"), FileNotFoundError(errno.ENOENT, "x"),
    IsADirectoryError(errno.EISDIR, "x"),
    NotADirectoryError(errno.ENOTDIR, "x"), OSError(errno.ENAMETOOLONG, "x"),
    OSError(errno.ELOOP, "x"), storage.NotAFileError("x"), storage.FileTooLargeError("x"),
    ValueError("x"), KeyError("x"),
]  # fmt: skip


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


class Failing:
    """Raises `error` so many times, then returns."""

    def __init__(self, error: BaseException, times: int) -> None:
        self.error, self.left, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "done"


@pytest.mark.parametrize("error", STORAGE_FAULTS, ids=str)
def test_call_storage_fault_is_tried_again(no_pauses: None, error: OSError) -> None:
    retrier, function = Retrier(60), Failing(error, 5)
    assert retrier.call(function) == "done"
    assert retrier.retries == 5
    with pytest.raises(StorageError, match="storage failed 1 times .* run the job again") as caught:
        Retrier(0).call(Failing(error, 100))
    assert caught.value.__cause__ is error and str(error) in str(caught.value)


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_call_refusal_is_tried_three_times(no_pauses: None, error: OSError) -> None:
    function = Failing(error, 100)
    with pytest.raises(StorageError, match="storage failed 3 times"):
        Retrier(60).call(function)
    assert function.calls == 3
    assert Retrier(60).call(Failing(error, 2)) == "done"  # rights that were seconds old


@pytest.mark.parametrize("error", FILE_FAULTS, ids=repr)
def test_call_file_fault_is_raised_at_once(no_pauses: None, error: Exception) -> None:
    function = Failing(error, 100)
    with pytest.raises(type(error)) as caught:
        Retrier(60).call(function)
    assert caught.value is error and function.calls == 1 and not is_storage_fault(error)


def test_is_forbidden_file_tells_a_file_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError(errno.EACCES, "no")
    assert is_forbidden_file(str(tmp_path / "a.wav"), error)
    assert not is_forbidden_file("s3://b/a.wav", error)
    assert not is_forbidden_file(str(tmp_path / "a.wav"), OSError(errno.EIO, "i/o"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not is_forbidden_file(str(tmp_path / "a.wav"), error)


@pytest.mark.ray
@pytest.mark.parametrize("status", [503, 0])
def test_call_survives_an_outage_of_s3(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Every function of storage, over a server that fails six requests of sixteen in a row."""
    with s3_server(monkeypatch, "valle") as bucket:
        server = dict(settings.storage_variables())["AWS_ENDPOINT_URL"]
        with failing_proxy(monkeypatch, server) as proxy:
            proxy.status = status
            proxy.fails = lambda method, path: proxy.requests % 16 < 6
            retrier = Retrier(60)
            uri = f"{bucket}/a b/ü#1?.txt"
            retrier.call(storage.write_bytes, uri, b"one")
            assert retrier.call(storage.read_bytes, uri) == b"one"
            assert retrier.call(storage.exists, uri)
            assert retrier.call(lambda: list(storage.list_files(bucket))) == ["a b/ü#1?.txt"]
            with pytest.raises(FileNotFoundError):
                retrier.call(storage.read_bytes, f"{bucket}/none")
            retrier.call(storage.delete, uri)
            assert not retrier.call(storage.exists, uri)
            assert proxy.failures
            proxy.fails = lambda method, path: True
            with pytest.raises(StorageError):
                Retrier(0).call(storage.read_bytes, uri)


@pytest.mark.ray
def test_call_without_credentials_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """403 is no fault of the file: the run stops, and soon."""
    with s3_server(monkeypatch, "valle") as bucket:
        server = dict(settings.storage_variables())["AWS_ENDPOINT_URL"]
        with failing_proxy(monkeypatch, server) as proxy:
            proxy.status = 403
            proxy.fails = lambda method, path: True
            with pytest.raises(StorageError, match="storage failed 3 times"):
                Retrier(60).call(storage.read_bytes, f"{bucket}/a.wav")


def test_retries_are_bounded_in_time() -> None:
    assert retries.REFUSAL_ATTEMPTS == 3
    retrier = Retrier(0.05)
    started = time.monotonic()
    function = Failing(OSError(errno.EIO, "i/o"), 10**9)
    with pytest.raises(StorageError):
        retrier.call(function)
    assert time.monotonic() - started >= 0.05 and function.calls == retrier.retries + 1
