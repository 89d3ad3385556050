"""The layout `manifest`: a JSONL file with a recording in each line."""

import posixpath
from collections.abc import Iterator

from valle.jobs.ingest.lines import parse_object, read_lines, string_field
from valle.jobs.ingest.source import Reject, Source, SourceItem
from valle.platform import storage
from valle.platform.retries import Retrier


def list_manifest(source: Source, retrier: Retrier) -> Iterator[SourceItem | Reject]:
    """Yields an item or a reject for each line that is not blank."""
    try:
        lines = list(read_lines(retrier.call(storage.read_bytes, source.path)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.path}: damaged UTF-16 ({error})") from error
    for number, line in lines:
        origin = f"{source.path}:{number}"
        try:
            if isinstance(line, UnicodeDecodeError):
                raise ValueError(f"not UTF-8 ({line})")
            yield _parse(line, source, origin)
        except ValueError as error:
            yield Reject(id=origin, source=origin, reason=f"bad manifest line: {error}")


def _parse(line: str, source: Source, origin: str) -> SourceItem:
    row = parse_object(line)
    audio = string_field(row, "audio")
    return SourceItem(
        id=string_field(row, "id", numbers=True)
        if "id" in row
        else f"{source.name}/{posixpath.normpath(audio) if '://' not in audio else audio}",
        speaker=string_field(row, "speaker", numbers=True),
        language=string_field(row, "language") if "language" in row else source.language,
        audio=locate(audio, source.path.rpartition("/")[0]),
        text=string_field(row, "text").strip(),
        text_uri=None,
        origin=origin,
        has_own_id="id" in row,
    )


def locate(audio: str, folder: str) -> str:
    """The absolute path or URI of `audio`; a relative one starts at the manifest's folder.

    Raises ValueError for a URI that storage cannot read, and for a path that leads out of the
    bucket.
    """
    try:
        if "://" in audio or audio.startswith(("/", "~/")):
            uri = storage.absolute(audio)
        else:
            scheme, mark, rest = folder.rpartition("://")
            path = posixpath.normpath(f"{rest}/{audio}")
            if mark and path.split("/")[0] != rest.split("/")[0]:
                raise ValueError("leads out of the bucket")
            uri = f"{scheme}{mark}{path}"
        storage.check_usable(uri)
    except ValueError as error:
        raise ValueError(f"audio: {error}") from error
    return uri


def stamp(*entries: storage.FileEntry) -> str:
    """A text of sizes and times, which changes when a file of the item changes."""
    return " ".join(f"{entry.size}@{entry.modified_ns}" for entry in entries)
