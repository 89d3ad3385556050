"""The layouts that `prepare` reads: how recordings and transcripts lie under a source.

Listing a source opens no recording; the workers of `prepare` read them. A line or path that does
not fit the layout becomes a `Reject`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from valle.jobs.ingest.lines import is_utf8, read_lines
from valle.jobs.ingest.manifest import list_manifest, stamp
from valle.jobs.ingest.source import Reject, Source, SourceItem, compile_speaker_pattern
from valle.platform import storage
from valle.platform.retries import Retrier
from valle.platform.storage import FileEntry

AUDIO_SUFFIXES = (
    ".wav", ".flac", ".aiff", ".aif", ".w64", ".au", ".ogg", ".oga", ".opus", ".m4a", ".mp4",
    ".webm", ".aac", ".mp3", ".wma", ".amr", ".3gp",
)  # fmt: skip
"""Names of recordings, those that lose least first: of two formats the first one is used."""

__all__ = ["Reject", "Source", "SourceItem", "compile_speaker_pattern", "list_items"]


def list_items(source: Source, retrier: Retrier | None = None) -> Iterator[SourceItem | Reject]:
    """Yields all items of a source; no two files or lines yield the same item.

    Raises FileNotFoundError when its path does not exist, and StorageError.
    """
    retrier = retrier or Retrier(0)
    if not retrier.call(storage.exists, source.path):
        raise FileNotFoundError(f"prepare.sources: {source.path} does not exist")
    readers: dict[str, Callable[[Source, Retrier], Iterator[SourceItem | Reject]]] = {
        "folder": _folder,
        "ljspeech": _ljspeech,
        "libritts": _libritts,
        "manifest": list_manifest,
    }
    yield from readers[source.layout](source, retrier)


def _folder(source: Source, retrier: Retrier) -> Iterator[SourceItem | Reject]:
    mismatch = f"path does not match the speaker pattern: {source.speaker_pattern}"
    yield from _tree(source, retrier, source.speaker_pattern, mismatch, AUDIO_SUFFIXES, ".txt")


def _libritts(source: Source, retrier: Retrier) -> Iterator[SourceItem | Reject]:
    mismatch = "path is not speaker/chapter/file"
    yield from _tree(source, retrier, "{speaker}/*/*", mismatch, (".wav",), ".normalized.txt")


def _tree(
    source: Source,
    retrier: Retrier,
    speaker_pattern: str,
    mismatch: str,
    suffixes: Sequence[str],
    text_suffix: str,
) -> Iterator[SourceItem | Reject]:
    """Recordings in folders, each with a transcript beside it. `mismatch` is the reason for a path
    that the pattern does not fit."""
    pattern = compile_speaker_pattern(speaker_pattern)
    entries = retrier.call(storage.list_entries, source.path, (*suffixes, text_suffix))
    recordings: dict[str, list[FileEntry]] = defaultdict(list)
    texts: dict[str, FileEntry] = {}
    for entry in entries:
        if entry.path.lower().endswith(text_suffix):
            texts[entry.path[: -len(text_suffix)]] = entry
        else:
            recordings[entry.path.rpartition(".")[0]].append(entry)
    for stem, formats in recordings.items():
        entry, *others = sorted(formats, key=lambda e: _preference(e.path, suffixes))
        yield from _other_formats(source, source.path, others, entry.path)
        identity, uri = f"{source.name}/{stem}", storage.join(source.path, entry.path)
        match = pattern.search(entry.path)
        if match is None:
            yield Reject(id=identity, source=uri, reason=mismatch)
        elif problem := _problem(entry):
            yield Reject(id=identity, source=uri, reason=problem)
        elif stem not in texts:
            missing = storage.join(source.path, f"{stem}{text_suffix}")
            reason = f"no transcript beside the recording: {missing} does not exist"
            yield Reject(id=identity, source=uri, reason=reason)
        else:
            yield SourceItem(
                id=identity,
                speaker="_".join(match.groups()),
                language=source.language,
                audio=uri,
                text=None,
                text_uri=storage.join(source.path, texts[stem].path),
                origin=uri,
                stamp=stamp(entry, texts[stem]),
            )


def _ljspeech(source: Source, retrier: Retrier) -> Iterator[SourceItem | Reject]:
    table = storage.join(source.path, "metadata.csv")
    try:
        lines = list(read_lines(retrier.call(storage.read_bytes, table)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"prepare.sources: {table} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: damaged UTF-16 ({error})") from error
    folder = storage.join(source.path, "wavs")
    recordings: dict[str, list[FileEntry]] = defaultdict(list)
    for entry in retrier.call(storage.list_entries, folder, AUDIO_SUFFIXES):
        for name in (entry.path, entry.path.rpartition(".")[0]):  # a line names either
            recordings[name].append(entry)
    for number, line in lines:
        origin = f"{table}:{number}"
        try:
            name, text = _columns(line)
        except ValueError as error:
            yield Reject(id=origin, source=origin, reason=f"bad metadata line: {error}")
            continue
        identity = f"{source.name}/{name}"
        formats = sorted(recordings[name], key=lambda e: _preference(e.path, AUDIO_SUFFIXES))
        if not formats:
            reason = f"no recording: {storage.join(folder, name)} does not exist, with no suffix"
            yield Reject(id=identity, source=origin, reason=reason)
            continue
        entry, *others = formats
        yield from _other_formats(source, folder, others, entry.path)
        if problem := _problem(entry):
            yield Reject(id=identity, source=origin, reason=problem)
            continue
        yield SourceItem(
            id=identity,
            speaker=source.name,
            language=source.language,
            audio=storage.join(folder, entry.path),
            text=text,
            text_uri=None,
            origin=origin,
            stamp=stamp(entry),
        )


def _columns(line: str | UnicodeDecodeError) -> tuple[str, str]:
    """Name and text of a line of metadata.csv: `name|text` or `name|text|normalized text`.

    Raises ValueError.
    """
    if isinstance(line, UnicodeDecodeError):
        raise ValueError(f"not UTF-8 ({line}); convert the file to UTF-8")
    name, *texts = (column.strip() for column in line.split("|"))
    if not name:
        raise ValueError("the first column, the recording's name, is empty")
    if len(texts) not in (1, 2):
        raise ValueError(f"{len(texts) + 1} columns; name|text or name|text|normalized text")
    text = texts[-1] or texts[0]  # the normalized text, where there are two
    if not text:
        raise ValueError("the text is empty")
    if "\0" in line:
        raise ValueError("holds a zero byte")
    return name, text


def _preference(path: str, suffixes: Sequence[str]) -> tuple[int, str]:
    """Order among the formats of one recording."""
    return next(n for n, suffix in enumerate(suffixes) if path.lower().endswith(suffix)), path


def _other_formats(
    source: Source, folder: str, others: Sequence[FileEntry], used: str
) -> Iterator[Reject]:
    for entry in others:
        yield Reject(
            id=f"{source.name}/{entry.path}",
            source=storage.join(folder, entry.path),
            reason=f"another format of a recording: {used} is used",
        )


def _problem(entry: FileEntry) -> str | None:
    """Why a file in a listing cannot be an input."""
    if entry.size is None:
        return "not a file: a pipe, a device or a broken link"
    return None if is_utf8(entry.path) else "file name is not UTF-8"
