"""URI to filesystem: local folders and S3 through one small set of verbs.

A URI is `s3://bucket/key`, `file:///abs/path` or a plain path; a relative path starts at
`VALLE_HOME`. S3 endpoints and credentials come from the AWS_* variables, which pyarrow reads.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pyarrow import fs

from valle.platform import settings


def absolute(uri: str) -> str:
    """`uri` with a relative path resolved against `VALLE_HOME`; schemes other than file stay."""
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    if "://" in uri:
        return uri
    return str(settings.read().home / uri)


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, without doubled slashes."""
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it. Raises ValueError for a bad URI."""
    target = absolute(uri)
    if "://" not in target:
        return fs.LocalFileSystem(), target
    try:
        return fs.FileSystem.from_uri(target)
    except (ValueError, OSError) as error:
        raise ValueError(f"not a usable storage URI: {uri!r} ({error})") from error


def exists(uri: str) -> bool:
    """True when a file or folder is there."""
    filesys, path = filesystem(uri)
    return bool(filesys.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError when it is missing."""
    filesys, path = filesystem(uri)
    with filesys.open_input_file(path) as file:
        return bytes(file.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Writes atomically: a reader sees the old file or the new one, never a part of it."""
    filesys, path = filesystem(uri)
    if not isinstance(filesys, fs.LocalFileSystem):
        with filesys.open_output_stream(path) as stream:  # S3 makes an object visible on close
            stream.write(data)
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex}.part"
    with open(part, "wb") as file:
        file.write(data)
    os.replace(part, path)


def delete(uri: str) -> None:
    """Removes a file; one that is not there is as good as removed."""
    filesys, path = filesystem(uri)
    with suppress(FileNotFoundError):
        filesys.delete_file(path)


def read_json(uri: str) -> Any:
    """The parsed JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: object) -> None:
    """Writes `value` as readable JSON, atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths below `uri`, relative to it, sorted; `suffixes` (lower case) filters by ending."""
    filesys, root = filesystem(uri)
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    # an object store answers with paths that start at the bucket, a disk with ours
    files = (i.path for i in filesys.get_file_info(selector) if i.type == fs.FileType.File)
    relative = sorted(os.path.relpath(path, root) for path in files)
    for path in relative:
        if not path.endswith(".part") and (not suffixes or path.lower().endswith(suffixes)):
            yield path
