"""Where recordings and their texts come from: the layouts that `prepare` can read.

Each source lists `SourceItem`s without opening a recording; reading happens on the workers. A line
or file name that cannot even be listed becomes a `Reject`.
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
    """One root of speech."""

    path: str = field(metadata=location())
    """Folder or URI; for `manifest`, the JSONL file."""

    layout: Literal["folder", "ljspeech", "libritts", "manifest"] = "folder"
    """folder: audio files, each with a `.txt` of the same name beside it. ljspeech: metadata.csv
    and wavs/. libritts: `{speaker}/{chapter}/{id}.wav` with `.normalized.txt`. manifest: one JSON
    object a line with audio, text, speaker and, where they differ, language and id."""

    speaker_pattern: str = field(default="{speaker}/*", metadata=formerly("speaker"))
    """folder: how the end of a path names its speaker. `{speaker}` marks a folder that counts
    (several are joined by `_`), `*` one that does not; the last part is the file."""

    language: str = "en-us"
    """espeak voice name, for all that does not name its own."""

    def __post_init__(self) -> None:
        if self.layout == "folder":
            compile_speaker_pattern(self.speaker_pattern)


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """A recording to prepare."""

    id: str
    speaker: str
    language: str
    audio: str
    """URI of the sound file."""
    text: str | None
    """The transcript, or None when it is in `text_uri`."""
    text_uri: str | None


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An input that was left out, and why."""

    id: str
    source: str
    reason: str


def compile_speaker_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a path pattern such as `{speaker}/*` or `{speaker}/{speaker}/*`.

    Raises ValueError when it holds anything but `{speaker}` and `*`, or no speaker at all.
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
    """All items of a source. Raises FileNotFoundError when it is not there."""
    root = source.path
    if not storage.exists(root):
        raise FileNotFoundError(f"prepare.sources: {source.path} does not exist")
    readers = {
        "folder": _folder, "ljspeech": _ljspeech, "libritts": _libritts, "manifest": _manifest,
    }  # fmt: skip
    yield from readers[source.layout](source, root)


def _prefix(root: str) -> str:
    """First part of an id: the root's own name keeps ids of several roots apart."""
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
            id=identity, speaker="_".join(match.groups()), language=source.language,
            audio=uri, text=None, text_uri=storage.join(root, f"{stem}.txt"),
        )  # fmt: skip


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
            id=identity, speaker=_prefix(root), language=source.language,
            audio=storage.join(root, "wavs", f"{fields[0]}.wav"), text=fields[-1], text_uri=None,
        )  # fmt: skip


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
            id=identity, speaker=match[1], language=source.language, audio=uri, text=None,
            text_uri=storage.join(root, f"{stem}.normalized.txt"),
        )  # fmt: skip


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
        is_relative = "://" not in audio and not audio.startswith("/")
        yield SourceItem(
            id=str(row.get("id", f"{_prefix(root)}/{number}")), speaker=speaker,
            language=str(row.get("language", source.language)),
            audio=storage.join(folder, audio) if is_relative else audio, text=text, text_uri=None,
        )  # fmt: skip
