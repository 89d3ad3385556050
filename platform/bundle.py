"""A bundle: the folder of a voice model that can be served, and the check that it is unchanged.

    ar/ nar/            checkpoints (weights and metadata)
    codec/              weights of the codec, unless it is the official one
    bundle.json         identity of the codec, URIs of the checkpoints, hash and size of every file
    sample.wav          a sentence spoken by the model
    report.json, .md    the evaluation, if there was one

`bundle.json` lists all files but itself, `report.json`, which is added later, and documents
(`.md`) and hidden files, which nothing loads. Its own hash therefore identifies the model.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import dacite

from valle.model.codec.interface import CodecIdentity
from valle.platform import settings
from valle.platform.typed import from_dict

BUNDLE = "bundle.json"
REPORT = "report.json"

MAX_BUNDLE_BYTES = 4_000_000
"""Of `bundle.json`: ten thousand files."""

logger = logging.getLogger(__name__)


class BundleError(ValueError):
    """A bundle whose files are not those that its `bundle.json` lists."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a bundle as it was when the bundle was made."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The contents of `bundle.json`."""

    codec: CodecIdentity
    official_codec: bool
    """True for `encodec-24khz`, whose weights are not copied."""
    ar: str
    """URI of the AR checkpoint."""
    nar: str
    """URI of the NAR checkpoint."""
    text_version: int = 1
    """Version of the text processing (`model/normalize.py`) that both models learnt."""
    languages: tuple[str, ...] = ()
    """Languages of the training data, as espeak names them; empty if unknown."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Every listed file by its path below the folder; empty in bundles of earlier versions."""


def read_bundle(folder: Path) -> Bundle:
    """The parsed `bundle.json` of a folder.

    Raises FileNotFoundError for a folder without one, BundleError for one that cannot be read.
    """
    path = folder / BUNDLE
    if not path.is_file():
        raise FileNotFoundError(f"no model bundle at {folder}: {BUNDLE} is missing")
    if path.stat().st_size > MAX_BUNDLE_BYTES:
        raise BundleError(f"{path} cannot be read: it has {path.stat().st_size} bytes")
    try:
        return from_dict(Bundle, json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, RecursionError, dacite.DaciteError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Writes `bundle.json` with the hashes and sizes of the files that the folder has now."""
    complete = replace(bundle, files=dict(_entries(folder)))
    part = folder / f".{BUNDLE}.{uuid.uuid4().hex}.part"
    part.write_text(json.dumps(asdict(complete), indent=2) + "\n")
    os.replace(part, folder / BUNDLE)


def verify(folder: Path) -> str:
    """Checks every file of a bundle; returns the hash that identifies the model.

    The files are read once for each state of the folder (sizes and times of all files); a marker in
    the node's cache records the result. Raises FileNotFoundError for a folder without
    `bundle.json`, BundleError that names a changed, missing or extra file. A bundle of an earlier
    version, which lists no files, is accepted with a warning.
    """
    bundle = read_bundle(folder)
    marker = settings.read().cache / "verified" / _state(folder)
    try:
        return marker.read_text()
    except OSError:
        pass  # not checked yet on this node
    entries = dict(_entries(folder))
    if bundle.files:
        _compare(folder, bundle.files, entries)
        digest = hashlib.sha256((folder / BUNDLE).read_bytes()).hexdigest()
    else:
        logger.warning(
            "%s lists no hashes, so its files are not checked: it is of an earlier version; "
            "`valle export` or `valle publish` makes one that lists them",
            folder / BUNDLE,
        )
        listing = json.dumps({name: entry.sha256 for name, entry in sorted(entries.items())})
        own = hashlib.sha256((folder / BUNDLE).read_bytes()).hexdigest()
        digest = hashlib.sha256(f"{own} {listing}".encode()).hexdigest()
    _write_marker(marker, digest)
    return digest


def _compare(folder: Path, listed: dict[str, FileEntry], present: dict[str, FileEntry]) -> None:
    """Raises BundleError with every difference."""
    problems = [f"{name} is missing" for name in sorted(listed.keys() - present.keys())]
    problems += [f"{name} is not listed" for name in sorted(present.keys() - listed.keys())]
    for name in sorted(listed.keys() & present.keys()):
        was, now = listed[name], present[name]
        if was.bytes != now.bytes:
            problems.append(f"{name} has {now.bytes} bytes instead of {was.bytes}")
        elif was.sha256 != now.sha256:
            problems.append(f"{name} has changed (SHA-256 {now.sha256[:12]}, {was.sha256[:12]})")
    if problems:
        raise BundleError(
            f"{folder} is not the bundle that its {BUNDLE} describes: {'; '.join(problems[:5])}; "
            "publish, export or download it again"
        )


def _entries(folder: Path) -> Iterator[tuple[str, FileEntry]]:
    for name, path in _files(folder):
        if name not in (BUNDLE, REPORT) and not name.endswith(".md"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield name, FileEntry(sha256=digest, bytes=path.stat().st_size)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path below the folder, path) of every file, sorted; without hidden ones (`.DS_Store`)."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _state(folder: Path) -> str:
    """A name for the folder and the sizes and times of its files."""
    stats = [(name, path.stat()) for name, path in _files(folder)]
    state = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    return hashlib.sha256(f"{folder.resolve()} {state}".encode()).hexdigest()[:32]


def _write_marker(marker: Path, digest: str) -> None:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        part = marker.with_name(f"{marker.name}.{uuid.uuid4().hex}.part")
        part.write_text(digest)
        os.replace(part, marker)
    except OSError as error:  # a cache that cannot be written costs time, nothing else
        logger.warning("%s cannot be written (%s): bundles are checked anew", marker, error)
