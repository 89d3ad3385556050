"""Sources of recordings with transcripts, and what a listing of them yields."""

import re
from dataclasses import dataclass, field
from typing import Literal

from valle.platform.recipe import formerly, location


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
    """BCP 47 tag, or an espeak voice, for items without a language of their own."""

    def __post_init__(self) -> None:
        if self.layout == "folder":
            compile_speaker_pattern(self.speaker_pattern)

    @property
    def name(self) -> str:
        """Last part of the path, the first part of an id: it separates the ids of several roots."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One recording with speaker, language and transcript, not opened yet."""

    id: str
    """Depends on the recording's path, or is named in a manifest; never on the order of lines."""
    speaker: str
    language: str
    audio: str
    """URI of the sound file."""
    text: str | None
    """The transcript, or None when it is in the file `text_uri`."""
    text_uri: str | None
    origin: str = ""
    """Where the item was found: a file, or a line of one."""
    stamp: str = ""
    """Sizes and times of the item's files, which change with them; empty if unknown."""
    has_own_id: bool = False
    """True if a manifest names the id, False if it was derived from the path."""


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
