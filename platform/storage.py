"""Files on a local disk or on S3, by URI.

A URI is `s3://bucket/key`, `file:///absolute/path` or a plain path. Everything after the bucket is
the key, and everything after `file://` the path, as they are: blanks, umlauts, `#`, `?` and `%`
stand for themselves. A relative path starts at `VALLE_HOME`. pyarrow reads S3 endpoints and
credentials from the AWS_* variables; a URI holds none.

A function raises the first error of storage; `platform/retries.py` repeats calls.
"""

import json
import os
import re
import stat
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs

from valle.platform import settings
from valle.platform.credentials import refuse_credentials, strip_credentials

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs", "viewfs", "file")
PART_SUFFIX = ".part"
"""End of the name of a local file that is being written."""


class NotAFileError(OSError):
    """A folder, a pipe, a device or a broken link where a file is needed."""


class FileTooLargeError(ValueError):
    """A file with more bytes than its reader takes."""


@dataclass(frozen=True)
class FileEntry:
    """A file in a listing."""

    path: str
    """Relative to the listed folder. Bytes of a local name that are not UTF-8 are surrogates."""
    size: int | None
    """Bytes; None for a pipe, a device or a broken link."""
    modified_ns: int
    """Time of the last change, in nanoseconds since 1970."""


def absolute(uri: str, names: Collection[str] = ()) -> str:
    """The absolute form of a path or URI: the one rule for relative paths.

    A relative path is resolved against `VALLE_HOME`; `~/` is the user's folder; `file://` is
    removed; other URIs (`s3://`, the registry's `models:/`) are returned unchanged. So are the
    `names` of things that have no path, such as the codecs shipped with the code: `nano` is the
    codec, `./nano` is a folder. Raises ValueError for an address that holds credentials.
    """
    refuse_credentials(uri)
    if uri in names:
        return uri
    match = _SCHEME.match(uri)
    if not match:
        return str(settings.read().home / (Path(uri).expanduser() if uri[:2] == "~/" else uri))
    scheme, rest = match[1].lower(), uri[match.end() :].removeprefix("/")
    if scheme == "file":
        return "/" + rest.removeprefix("localhost/").lstrip("/")
    return scheme + uri[len(scheme) :]


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, without doubled slashes."""
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of `uri`, and the path on it.

    Raises ValueError for an unusable URI, and OSError for storage that does not answer.
    """
    target = absolute(uri)
    match = _SCHEME.match(target)
    if not match:
        return fs.LocalFileSystem(), target
    check_usable(target)
    authority, _, key = target[match.end() :].removeprefix("/").partition("/")
    key = key.rstrip("/")
    root = f"{match[1]}://{authority}/"
    try:
        filesys, base = _connect(root, os.getpid(), settings.storage_variables())
    except ValueError as error:
        raise ValueError(
            f"not a usable storage URI: {uri!r} ({strip_credentials(str(error))})"
        ) from error
    return filesys, f"{base.rstrip('/')}/{key}" if key else base


def check_usable(uri: str) -> None:
    """Raises ValueError for a URI that no storage here can read; connects to nothing."""
    match = _SCHEME.match(uri)
    if not match:
        return
    if match[1].lower() not in SCHEMES:
        raise ValueError(f"not a usable storage URI: {uri!r}; a path, or {', '.join(SCHEMES)}")
    key = uri[match.end() :].removeprefix("/").partition("/")[2].rstrip("/")
    if key and not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise ValueError(
            f"not a usable storage URI: {uri!r}: a key with an empty part, `.` or `..`"
        )


@lru_cache(maxsize=64)
def _connect(root: str, process: int, variables: tuple[Any, ...]) -> tuple[fs.FileSystem, str]:
    """The filesystem of a bucket, kept: a new one connects anew and may ask for the region.

    A forked process (another `process`) does not share connections with its parent, and changed
    `variables` reach another server.
    """
    return fs.FileSystem.from_uri(root)


def is_local(uri: str) -> bool:
    """True for a path or `file://` URI."""
    return not _SCHEME.match(absolute(uri))


@dataclass(frozen=True)
class FileStamp:
    """Path, time and size of a file: they change when the file is replaced."""

    path: str
    modified_ns: int | None
    """Time of the last change, in nanoseconds since 1970; S3 knows seconds."""
    size: int
    """Bytes."""


def file_stamp(uri: str) -> FileStamp | None:
    """The stamp of a file, None where there is none. Raises OSError where storage fails."""
    filesys, path = filesystem(uri)
    info = filesys.get_file_info(path)
    if info.type != fs.FileType.File:
        return None
    return FileStamp(path, info.mtime_ns, info.size)


def exists(uri: str) -> bool:
    """True if there is a file or folder."""
    filesys, path = filesystem(uri)
    if isinstance(filesys, fs.LocalFileSystem):
        return Path(path).exists()
    return bool(filesys.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """The content of a file.

    Raises FileNotFoundError, NotAFileError and, before a byte is read, FileTooLargeError for a file
    of more than `max_bytes`.
    """
    filesys, path = filesystem(uri)
    if isinstance(filesys, fs.LocalFileSystem):
        if not stat.S_ISREG((status := os.stat(path)).st_mode):  # a pipe would block for ever
            raise NotAFileError(f"{uri} is not a file")
        _check_size(status.st_size, max_bytes)
        with open(path, "rb") as local:
            return local.read()
    with filesys.open_input_file(path) as file:
        _check_size(file.size(), max_bytes)
        return bytes(file.read())


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise FileTooLargeError(f"{size / 1e6:.1f} MB, limit {max_bytes / 1e6:.1f} MB")


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file atomically: a reader sees the old content or the new one, never a part."""
    filesys, path = filesystem(uri)
    if not isinstance(filesys, fs.LocalFileSystem):
        with filesys.open_output_stream(path) as stream:  # S3 shows an object once it is closed
            stream.write(data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = Path(f"{path}.{uuid.uuid4().hex}{PART_SUFFIX}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # of a write that failed


def delete(uri: str) -> None:
    """Removes a file, if there is one."""
    filesys, path = filesystem(uri)
    with suppress(FileNotFoundError):
        filesys.delete_file(path)


def read_json(uri: str) -> Any:
    """The content of a JSON file. Raises FileNotFoundError."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the files below `uri`, relative to it, sorted; none for a missing folder.

    `suffixes` (lower case) selects by ending. Files that `write_bytes` has not finished are left
    out.
    """
    for entry in list_entries(uri, suffixes):
        if entry.size is not None:
            yield entry.path


def list_entries(
    uri: str, suffixes: tuple[str, ...] = (), *, recursive: bool = True
) -> list[FileEntry]:
    """The files below `uri`, named as by `list_files`, with size and time. Pipes, devices and
    broken links are listed too.

    Raises OSError for a local folder that cannot be read.
    """
    filesys, root = filesystem(uri)
    if isinstance(filesys, fs.LocalFileSystem):
        entries = list(_walk(root, recursive))
    else:
        selector = fs.FileSelector(root, recursive=recursive, allow_not_found=True)
        entries = [  # paths on S3 start with the bucket, as `root` does
            FileEntry(info.path.removeprefix(f"{root}/"), info.size, info.mtime_ns or 0)
            for info in filesys.get_file_info(selector)
            if info.type == fs.FileType.File
        ]
    return sorted(
        (
            entry
            for entry in entries
            if not entry.path.endswith(PART_SUFFIX)
            and (not suffixes or entry.path.lower().endswith(suffixes))
        ),
        key=lambda entry: entry.path,
    )


def _walk(root: str, recursive: bool) -> Iterator[FileEntry]:
    """Files below a local folder. Links to folders are followed, but not in circles."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        prefix, parents = pending.pop()
        try:
            folder = os.stat(os.path.join(root, prefix))
            found = list(os.scandir(os.path.join(root, prefix)))
        except FileNotFoundError:  # the folder is missing, or was removed meanwhile
            continue
        identity = (folder.st_dev, folder.st_ino)
        if identity in parents:
            continue
        for child in found:
            path = f"{prefix}{child.name}"
            try:
                status = child.stat()
            except OSError:  # a broken link
                yield FileEntry(path, None, 0)
                continue
            if stat.S_ISDIR(status.st_mode):
                if recursive:
                    pending.append((f"{path}/", parents | {identity}))
                continue
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
            yield FileEntry(path, size, status.st_mtime_ns)


def sweep_parts(uri: str, *, older_than_seconds: float) -> int:
    """Removes unfinished files of killed writers below a local folder; returns their number.

    On S3 an unfinished write is not visible; a lifecycle rule of the bucket removes it.
    """
    if not is_local(uri):
        return 0
    root, removed = absolute(uri), 0
    for entry in _walk(root, recursive=True):
        age = time.time() - entry.modified_ns / 1e9
        if entry.path.endswith(PART_SUFFIX) and entry.size is not None and age > older_than_seconds:
            Path(root, entry.path).unlink(missing_ok=True)
            removed += 1
    return removed
