"""Files on a local disk or on S3, by URI.

A URI is `s3://bucket/key`, `file:///absolute/path` or a plain path. A relative path starts at
`VALLE_HOME`. pyarrow reads S3 endpoints and credentials from the AWS_* variables.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from valle.platform import settings
from valle.platform.credentials import refuse_credentials, strip_credentials

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/")


def absolute(uri: str, names: Collection[str] = ()) -> str:
    """The absolute form of a path or URI: the one rule for relative paths.

    A relative path is resolved against `VALLE_HOME`; `file://` is removed; other URIs (`s3://`,
    the registry's `models:/`) are returned unchanged. So are the `names` of things that have no
    path, such as the codecs shipped with the code: `nano` is the codec, `./nano` is a folder.
    Raises ValueError for an address that holds credentials.
    """
    refuse_credentials(uri)
    if uri in names:
        return uri
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    if _SCHEME.match(uri):
        return uri
    return str(settings.read().home / uri)


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, without doubled slashes."""
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of `uri`, and the path on it. Raises ValueError for an unusable URI."""
    target = absolute(uri)
    if not _SCHEME.match(target):
        return fs.LocalFileSystem(), target
    try:
        return fs.FileSystem.from_uri(target)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"not a usable storage URI: {uri!r} ({strip_credentials(str(error))})"
        ) from error


@dataclass(frozen=True)
class FileStamp:
    """What changes when a file is replaced, known without reading it."""

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
    return bool(filesys.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises FileNotFoundError."""
    filesys, path = filesystem(uri)
    with filesys.open_input_file(path) as file:
        return bytes(file.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file atomically: a reader sees the old content or the new one, never a part."""
    filesys, path = filesystem(uri)
    if not isinstance(filesys, fs.LocalFileSystem):
        with filesys.open_output_stream(path) as stream:  # S3 shows an object once it is closed
            stream.write(data)
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    part = Path(f"{path}.{uuid.uuid4().hex}.part")
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
    filesys, root = filesystem(uri)
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    # paths on S3 start with the bucket, as `root` does
    files = (i.path for i in filesys.get_file_info(selector) if i.type == fs.FileType.File)
    relative = sorted(os.path.relpath(path, root) for path in files)
    for path in relative:
        if not path.endswith(".part") and (not suffixes or path.lower().endswith(suffixes)):
            yield path


def sweep_parts(uri: str, *, older_than_seconds: float) -> int:
    """Removes what killed writers have left in a local folder; returns the number of files.

    On S3 nothing is visible of an unfinished write: a lifecycle rule of the bucket removes it.
    """
    filesys, root = filesystem(uri)
    if not isinstance(filesys, fs.LocalFileSystem):
        return 0
    removed = 0
    for part in Path(root).glob("**/*.part"):
        with suppress(FileNotFoundError):  # its writer has finished
            if time.time() - part.stat().st_mtime > older_than_seconds:
                part.unlink()
                removed += 1
    return removed
