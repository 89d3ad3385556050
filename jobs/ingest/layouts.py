"""Sources of recordings with transcripts, and the layouts that `prepare` reads.

Listing a source opens no recording; the workers of `prepare` read them. A line or path that does
not fit the layout becomes a `Reject`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from valle.platform import storage
from valle.platform.recipe import formerly, location

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One root of recordings with transcripts."""

    path: str = field(metadata=location())
    """Folder or URI; for `manifest`, the JSONL file."""

    layout: Literal["folder", "ljspeech", "libritts", "manifest"] = "folder"
    """folder: audio files, each with a `.txt` of the same name beside it. ljspeech: metadata.csv
    and wavs/. libritts: `{speaker}/{chapter}/{id}.wav` with `.normalized.txt`. manifest: one JSON
    object per line with audio, text, speaker and, optionally, language and id."""

    speaker_pattern: str = field(default="{speaker}/*", metadata=formerly("speaker"))
    """folder: pattern of the end of a path. `{speaker}` marks a folder that is part of the
    speaker's name (several are joined by `_`), `*` any other folder and, last, the file."""

    language: str = "en-us"
    """espeak voice name, for items without a language of their own."""

    def __post_init__(self) -> None:
        if self.layout == "folder":
            compile_speaker_pattern(self.speaker_pattern)


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One recording with speaker, language and transcript, not opened yet."""

    id: str
    speaker: str
    language: str
    audio: str
    """URI of the sound file."""
    text: str | None
    """The transcript, or None when it is in the file `text_uri`."""
    text_uri: str | None


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An input that was left out, with the reason."""

    id: str
    source: str
    reason: str


def compile_speaker_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a path pattern such as `{speaker}/*` or `{speaker}/{speaker}/*`.

    Raises ValueError for a pattern without a `{speaker}` folder, or with parts other than
    `{speaker}` and `*`.
    """
    parts = pattern.split("/")
    if "{speaker}" not in parts[:-1] or not set(parts) <= {"{speaker}", "*"}:
        raise ValueError(
            f"speaker_pattern: {pattern!r} must be folders of `{{speaker}}` and `*` with the file "
            "last, for instance `{speaker}/*` or `{speaker}/{speaker}/*`"
        )
    expression = "/".join("([^/]+)" if part == "{speaker}" else "[^/]+" for part in parts)
    return re.compile(rf"(?:^|/){expression}$")


def list_items(source: Source) -> Iterator[SourceItem | Reject]:
    """Yields all items of a source. Raises FileNotFoundError when its path does not exist."""
    root = source.path
    if not storage.exists(root):
        raise FileNotFoundError(f"prepare.sources: {source.path} does not exist")
    readers = {
        "folder": _folder,
        "ljspeech": _ljspeech,
        "libritts": _libritts,
        "manifest": _manifest,
    }
    yield from readers[source.layout](source, root)


def _prefix(root: str) -> str:
    """Name of the root, the first part of an id: it separates the ids of several roots."""
    return root.rstrip("/").rsplit("/", 1)[-1]


def _folder(source: Source, root: str) -> Iterator[SourceItem | Reject]:
    pattern = compile_speaker_pattern(source.speaker_pattern)
    for path in storage.list_files(root, AUDIO_SUFFIXES):
        stem = path.rsplit(".", 1)[0]
        uri = storage.join(root, path)
        identity = f"{_prefix(root)}/{stem}"
        match = pattern.search(path)
        if match is None:
            reason = f"path does not match the speaker pattern: {source.speaker_pattern}"
            yield Reject(id=identity, source=uri, reason=reason)
            continue
        yield SourceItem(
            id=identity,
            speaker="_".join(match.groups()),
            language=source.language,
            audio=uri,
            text=None,
            text_uri=storage.join(root, f"{stem}.txt"),
        )


def _ljspeech(source: Source, root: str) -> Iterator[SourceItem | Reject]:
    content = storage.read_bytes(storage.join(root, "metadata.csv")).decode("utf-8-sig")
    for number, line in enumerate(content.splitlines(), 1):
        fields = line.split("|")
        identity = f"{_prefix(root)}/{fields[0]}"
        if len(fields) < 2:
            source_line = f"{root}/metadata.csv:{number}"
            yield Reject(id=identity, source=source_line, reason="metadata line without a text")
            continue
        yield SourceItem(
            id=identity,
            speaker=_prefix(root),
            language=source.language,
            audio=storage.join(root, "wavs", f"{fields[0]}.wav"),
            text=fields[-1],  # the normalized text, where there are two
            text_uri=None,
        )


def _libritts(source: Source, root: str) -> Iterator[SourceItem | Reject]:
    pattern = compile_speaker_pattern("{speaker}/*/*")
    for path in storage.list_files(root, (".wav",)):
        stem = path.removesuffix(".wav")
        uri, identity = storage.join(root, path), f"{_prefix(root)}/{stem}"
        match = pattern.search(path)
        if match is None:
            yield Reject(id=identity, source=uri, reason="path is not speaker/chapter/file")
            continue
        yield SourceItem(
            id=identity,
            speaker=match[1],
            language=source.language,
            audio=uri,
            text=None,
            text_uri=storage.join(root, f"{stem}.normalized.txt"),
        )


def _manifest(source: Source, root: str) -> Iterator[SourceItem | Reject]:
    folder = root.rsplit("/", 1)[0]
    for number, line in enumerate(storage.read_bytes(root).decode().splitlines(), 1):
        location = f"{root}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text, speaker = str(row["audio"]), str(row["text"]), str(row["speaker"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            reason = f"bad manifest line: needs JSON with audio, text, speaker ({error})"
            yield Reject(id=location, source=location, reason=reason)
            continue
        # A relative path starts at the manifest's folder.
        is_relative = "://" not in audio and not audio.startswith("/")
        yield SourceItem(
            id=str(row.get("id", f"{_prefix(root)}/{number}")),
            speaker=speaker,
            language=str(row.get("language", source.language)),
            audio=storage.join(folder, audio) if is_relative else audio,
            text=text,
            text_uri=None,
        )
