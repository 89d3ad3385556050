"""The token dataset: Parquet shards below one URI, described by `dataset.json`.

A row is an utterance. Utterances of a speaker are adjacent, and row groups are bounded in frames.
Training reads a memory-mapped Arrow copy of each shard, which every node builds on first use and
names by the shard's hash.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from valle.model.codec.interface import CodecIdentity, Codes
from valle.model.normalize import TEXT_VERSION
from valle.model.text import INVENTORY, inventory_matches
from valle.platform import storage
from valle.platform.typed import from_dict

VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("speaker", pa.string(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("phonemes", pa.list_(pa.int16()), nullable=False),  # ids of the inventory
        pa.field("codes", pa.list_(pa.int16()), nullable=False),  # [Q, T] in C order
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("stamp", pa.string()),  # sizes and times of the source's files; older data: none
    ]
)
FRAMES_PER_ROW_GROUP = 60_000
"""About 13 minutes of speech, one megabyte of codes."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file, as listed in `dataset.json`."""

    name: str
    sha256: str
    utterances: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `dataset.json`."""

    codec: CodecIdentity
    inventory: list[str]
    """Phoneme symbols by id, at the time of `prepare`."""
    shards: list[Shard] = field(default_factory=list)
    utterances: int = 0
    hours: float = 0.0
    hours_by_speaker: dict[str, float] = field(default_factory=dict)
    hours_by_language: dict[str, float] = field(default_factory=dict)
    version: int = VERSION
    text_version: int = 1
    """Version of the text processing (`model/normalize.py`) that made the phonemes."""

    def content_hash(self) -> str:
        """SHA-256 of what training reads, the shards. Independent of the path."""
        return hash_listing((shard.name, shard.sha256) for shard in self.shards)


@dataclass(frozen=True)
class Utterance:
    """One row of a dataset, as a model takes it."""

    id: str
    speaker: str
    language: str
    text: str
    phonemes: NDArray[np.int16]
    codes: Codes
    """`[Q, T]`."""


def hash_listing(listing: Iterable[tuple[str, str | int]]) -> str:
    """SHA-256 of the names of files, each with its hash or length, in any order."""
    return hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()


def to_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """An Arrow table of rows with the fields of `SCHEMA`; `codes` are arrays `[Q, T]`."""
    flat = [{**row, "codes": np.asarray(row["codes"], np.int16).ravel()} for row in rows]
    return pa.Table.from_pylist(flat, schema=SCHEMA)


def write_shard(uri: str, name: str, rows: pa.Table) -> Shard:
    """Writes `shards/{name}.parquet` atomically; `FRAMES_PER_ROW_GROUP` bounds its row groups."""
    buffer = io.BytesIO()
    frames = rows.column("frames").to_numpy()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd") as writer:
        group_of_row = np.cumsum(frames) // FRAMES_PER_ROW_GROUP
        for group in np.unique(group_of_row):
            start, end = np.searchsorted(group_of_row, [group, group + 1])
            writer.write_table(rows.slice(start, end - start), row_group_size=end - start)
    data = buffer.getvalue()
    storage.write_bytes(storage.join(uri, "shards", f"{name}.parquet"), data)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=name, sha256=digest, utterances=len(rows), frames=int(frames.sum()))


def write_manifest(
    uri: str,
    codec: CodecIdentity,
    shards: Sequence[Shard],
    statistics: "Statistics",
) -> Manifest:
    """Writes `dataset.json`: from then on the dataset consists of `shards`."""
    manifest = Manifest(
        codec=codec,
        inventory=list(INVENTORY),
        shards=sorted(shards, key=lambda s: s.name),
        utterances=sum(s.utterances for s in shards),
        hours=round(sum(s.frames for s in shards) / codec.frame_rate / 3600, 4),
        hours_by_speaker=frames_to_hours(statistics.by_speaker, codec.frame_rate),
        hours_by_language=frames_to_hours(statistics.by_language, codec.frame_rate),
        text_version=statistics.text_version,
    )
    storage.write_json(storage.join(uri, "dataset.json"), asdict(manifest))
    return manifest


class Statistics:
    """Frames per speaker and per language, summed over shards."""

    def __init__(self) -> None:
        self.by_speaker: dict[str, int] = {}
        self.by_language: dict[str, int] = {}
        self.text_version = TEXT_VERSION

    def add(self, rows: pa.Table) -> None:
        """Adds a shard, of which `speaker`, `language` and `frames` are read."""
        for column, sums in (("speaker", self.by_speaker), ("language", self.by_language)):
            grouped = rows.group_by(column).aggregate([("frames", "sum")])
            for row in grouped.to_pylist():
                sums[row[column]] = sums.get(row[column], 0) + row["frames_sum"]


def frames_to_hours(frames: dict[str, int], frame_rate: int) -> dict[str, float]:
    """Hours of speech by name, from frames by name."""
    return {name: round(n / frame_rate / 3600, 4) for name, n in sorted(frames.items())}


def read_manifest(uri: str) -> Manifest:
    """The manifest of a dataset.

    Raises FileNotFoundError, and ValueError for another version or phoneme inventory.
    """
    path = storage.join(uri, "dataset.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"no dataset at {uri}: run `prepare` first (no dataset.json)")
    values = storage.read_json(path)
    if values.get("version") != VERSION:
        raise ValueError(f"{path}: version {values.get('version')}, this code reads {VERSION}")
    try:
        manifest = from_dict(Manifest, values)
    except dacite.DaciteError as error:
        raise ValueError(f"{path} is not a dataset's manifest: {error}") from error
    if not inventory_matches(manifest.inventory):
        raise ValueError(f"{path}: made with another phoneme inventory; prepare it again")
    return manifest


def check_text_version(version: int, uri: str) -> None:
    """Raises ValueError if the phonemes of a dataset were made by another version of the text
    processing than this code would add to it."""
    if version != TEXT_VERSION:
        raise ValueError(
            f"out: the dataset {uri} has phonemes of text version {version}, this code makes "
            f"version {TEXT_VERSION}; name another folder, so that no dataset holds both"
        )


def read_columns(uri: str, shard: str, names: Sequence[str]) -> pa.Table:
    """Some columns of a shard; the others are not read. A column that older data lack is null.

    Raises ValueError for a file that is no shard.
    """
    filesys, path = storage.filesystem(storage.join(uri, "shards", f"{shard}.parquet"))
    try:
        with pq.ParquetFile(path, filesystem=filesys) as file:
            present = set(file.schema_arrow.names)
            table = file.read(columns=[name for name in names if name in present])
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{uri}: shard {shard} is damaged ({error}); delete it, and `prepare` makes it again"
        ) from error
    for name in names:
        if name not in present:
            kind = SCHEMA.field(name).type
            table = table.append_column(name, pa.nulls(len(table), kind))
    return table.select(list(names))


class TokenDataset:
    """A dataset opened for training: utterances by number, from the node's cache.

    Raises ValueError for an empty dataset and for a shard that does not match its hash.
    """

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri = uri
        self.manifest = read_manifest(self.uri)
        if not self.manifest.utterances:
            raise ValueError(f"the dataset at {uri} is empty: see its rejects/ for the reasons")
        self._tables = [self._memory_map(shard, cache) for shard in self.manifest.shards]
        rows = [len(t) for t in self._tables]
        self._first_row = np.concatenate([[0], np.cumsum(rows)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, number: int) -> Utterance:
        shard = int(np.searchsorted(self._first_row, number, side="right")) - 1
        row = number - int(self._first_row[shard])
        values = self._tables[shard]

        def array(name: str) -> NDArray[np.int16]:
            return np.asarray(values.column(name)[row].values, np.int16)

        return Utterance(
            id=values.column("id")[row].as_py(),
            speaker=values.column("speaker")[row].as_py(),
            language=values.column("language")[row].as_py(),
            text=values.column("text")[row].as_py(),
            phonemes=array("phonemes"),
            codes=array("codes").reshape(self.manifest.codec.n_codebooks, -1),
        )

    def frames(self) -> NDArray[np.int64]:
        """Number of frames of every utterance."""
        return self._numbers(lambda t: t.column("frames"))

    def n_phonemes(self) -> NDArray[np.int64]:
        """Number of phonemes of every utterance."""
        return self._numbers(lambda t: pc.list_value_length(t.column("phonemes")))

    def speakers(self) -> NDArray[np.int64]:
        """The speaker of every utterance, as a number."""
        names = pa.chunked_array([c for t in self._tables for c in t.column("speaker").chunks])
        encoded = names.combine_chunks().dictionary_encode()
        return np.asarray(encoded.indices, np.int64)

    def _numbers(self, column: Any) -> NDArray[np.int64]:
        return np.concatenate([np.asarray(column(t), np.int64) for t in self._tables])

    def _memory_map(self, shard: Shard, cache: Path) -> pa.Table:
        """The shard as a memory-mapped table, whose pages all processes of a node share."""
        path = cache / "shards" / f"{shard.sha256}.arrow"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # one process per node builds the copy
                if not path.exists():
                    self._build(shard, path)
        with suppress(OSError):  # another user's cache is read all the same
            os.utime(path)  # `valle clean-cache` removes copies by the time of their last use
        # `_build` writes one chunk, so that a row is found without a search
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def _build(self, shard: Shard, path: Path) -> None:
        data = storage.read_bytes(storage.join(self.uri, "shards", f"{shard.name}.parquet"))
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise ValueError(
                f"{self.uri}: shard {shard.name} does not match its hash; it was changed or "
                "damaged after `prepare` wrote it"
            )
        rows = pq.read_table(io.BytesIO(data)).combine_chunks()
        handle, part = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        with pa.OSFile(part, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)
        os.replace(part, path)


def shard_names(uri: str) -> Iterator[str]:
    """Names of all shard files below `uri`, including those not listed in `dataset.json`."""
    for path in storage.list_files(storage.join(uri, "shards"), (".parquet",)):
        yield path.removesuffix(".parquet")
