"""Whole and broken checkpoint folders: the file `COMPLETE`, which is written last.

`COMPLETE` lists every other file of a checkpoint with its size and SHA-256. A folder without it
was left by a writer that was interrupted, or by code that did not write one yet; such an old
folder counts as whole if its files are there and as long as their own headers say.

A local folder is written beside its place and renamed; on S3, where nothing can be renamed,
`COMPLETE` is the last object.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from valle.platform import storage

COMPLETE = "COMPLETE"
_BLOCK = 1 << 22
_PART = ".part"


@dataclass(frozen=True)
class WrittenFile:
    """A file as `COMPLETE` lists it."""

    size: int
    """Bytes."""

    sha256: str


Files = Mapping[str, WrittenFile]
"""Files of a checkpoint by their path in its folder."""


class BrokenCheckpointError(ValueError):
    """A checkpoint that is not whole; the message names the file."""


def write(folder: Path, filesystem: fs.FileSystem, path: str) -> None:
    """Stores the checkpoint in the local `folder` as `path`, so that it is seen whole or not at
    all. What an earlier attempt left at `path` is replaced."""
    begin(filesystem, path)
    finish(filesystem, path, copy(folder, filesystem, path))


def begin(filesystem: fs.FileSystem, path: str) -> None:
    """Prepares the folder of a checkpoint that several ranks write. One rank calls `begin`, each
    calls `copy`, then one calls `finish`."""
    if _renames(filesystem):
        shutil.rmtree(path + _PART, ignore_errors=True)
        os.makedirs(path + _PART)
    elif _sizes(filesystem, path):
        # first the marker: from now on nobody takes the old files for a checkpoint
        if COMPLETE in _sizes(filesystem, path):
            filesystem.delete_file(f"{path}/{COMPLETE}")
        filesystem.delete_dir_contents(path)


def copy(folder: Path, filesystem: fs.FileSystem, path: str) -> dict[str, WrittenFile]:
    """Copies the files of a local folder to the prepared one; returns their entries for
    `finish`."""
    target = path + _PART if _renames(filesystem) else path
    files = {}
    for source in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = source.relative_to(folder).as_posix()
        if _renames(filesystem):
            copied = Path(target, name)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copied)
            _sync(copied)
        else:
            fs.copy_files(
                str(source), f"{target}/{name}", source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=filesystem, use_threads=False,
            )  # fmt: skip
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = WrittenFile(source.stat().st_size, digest)
    return files


def finish(filesystem: fs.FileSystem, path: str, files: Files) -> None:
    """Writes `COMPLETE` for the files of all ranks and makes the checkpoint visible.

    Raises BrokenCheckpointError if a stored file has another size than the written one (a full
    disk).
    """
    target = path + _PART if _renames(filesystem) else path
    sizes = _sizes(filesystem, target)
    for name, file in files.items():
        if sizes.get(name) != file.size:
            raise BrokenCheckpointError(
                f"{path}: of {name} {sizes.get(name, 0)} of {file.size} bytes were stored"
            )
    listed = {name: asdict(file) for name, file in sorted(files.items())}
    content = json.dumps({"files": listed}, indent=2).encode() + b"\n"
    with filesystem.open_output_stream(f"{target}/{COMPLETE}") as stream:
        stream.write(content)
    if not _renames(filesystem):
        return
    _sync(Path(target, COMPLETE))
    if os.path.isdir(path):  # left by an attempt that ended before it reported
        shutil.rmtree(path)
    os.rename(target, path)
    _sync(Path(path).parent)


def is_sealed(uri: str) -> bool:
    """True if the folder has a `COMPLETE`."""
    return storage.exists(storage.join(uri, COMPLETE))


def find_fault(uri: str, *, hashes: bool = False) -> str | None:
    """The reason why the checkpoint at a path or URI is not whole; None if it is whole.

    With `hashes`, every file is read; otherwise only sizes are compared.
    """
    filesystem, path = storage.filesystem(uri)
    sizes = _sizes(filesystem, path)
    if COMPLETE not in sizes:
        return _fault_without_marker(filesystem, path, sizes)
    try:
        files = read_marker(uri)
    except BrokenCheckpointError as error:
        return str(error)
    for name, file in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != file.size:
            return f"{name} has {sizes[name]} bytes instead of {file.size}"
    if hashes:
        for name, file in files.items():
            if _hash(filesystem, f"{path}/{name}") != file.sha256:
                return f"{name} is not what was written: its SHA-256 differs"
    return None


def read_marker(uri: str) -> dict[str, WrittenFile]:
    """The files that `COMPLETE` lists. Raises BrokenCheckpointError for unreadable content, and
    FileNotFoundError."""
    content = storage.read_bytes(storage.join(uri, COMPLETE))
    try:
        files = {
            str(name): WrittenFile(int(file["size"]), str(file["sha256"]))
            for name, file in json.loads(content)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpointError(f"{COMPLETE} is not readable: {error!r}") from error
    if not files:
        raise BrokenCheckpointError(f"{COMPLETE} lists no file")
    return files


def warn(uri: str, fault: str, consequence: str) -> None:
    """Logs that a checkpoint is not used, and what is done instead."""
    logging.getLogger(__name__).warning("checkpoint %s: %s; %s", uri, fault, consequence)


def _fault_without_marker(
    filesystem: fs.FileSystem, path: str, sizes: Mapping[str, int]
) -> str | None:
    """As `find_fault`, for a folder of code that wrote no `COMPLETE`."""
    for name in ("model.safetensors", "config.json"):
        if name not in sizes:
            return f"{name} is missing"
    for name in sizes:
        if name.endswith(".json"):
            try:
                content = json.loads(_read(filesystem, f"{path}/{name}"))
            except ValueError as error:
                return f"{name} is not readable: {error}"
            if name == "state/train_state.json" and "position" in content:
                return f"{COMPLETE} is missing: its writer was interrupted"
        if name.endswith(".safetensors"):
            expected = _length_by_header(filesystem, f"{path}/{name}", sizes[name])
            if expected != sizes[name]:
                return f"{name} has {sizes[name]} bytes, its header says {expected or 'nothing'}"
    if "state/deepspeed.json" in sizes:
        ranks = json.loads(_read(filesystem, f"{path}/state/deepspeed.json"))["world_size"]
        shards = [name for name in sizes if name.endswith("_optim_states.pt")]
        if len(shards) < ranks:
            return f"{len(shards)} of {ranks} shards of the optimizer are there"
    elif "state/train_state.json" in sizes and "state/optimizer.safetensors" not in sizes:
        return "state/optimizer.safetensors is missing"
    return None


def _length_by_header(filesystem: fs.FileSystem, path: str, size: int) -> int | None:
    """Bytes of a safetensors file as its header gives them; None without a header."""
    if size < 8:
        return None
    with filesystem.open_input_file(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            return None
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    return 8 + int(length) + max(ends, default=0)


def _sizes(filesystem: fs.FileSystem, path: str) -> dict[str, int]:
    """Bytes of the files below a folder; empty for a missing one."""
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    return {
        os.path.relpath(info.path, path): int(info.size)
        for info in infos
        if info.type == fs.FileType.File
    }


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_file(path) as file:
        return bytes(file.read())


def _hash(filesystem: fs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _renames(filesystem: fs.FileSystem) -> bool:
    """True where a folder can be renamed in one step."""
    return isinstance(filesystem, fs.LocalFileSystem) or filesystem.type_name == "local"


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
