"""The results of earlier runs, compared with the inputs of this one."""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from valle.jobs.ingest.lines import read_lines
from valle.jobs.ingest.recipe import PrepareRecipe
from valle.jobs.ingest.source import Reject, SourceItem
from valle.model.codec.interface import CodecIdentity
from valle.model.languages import espeak_voice
from valle.model.normalize import TEXT_VERSION
from valle.platform import dataset, storage
from valle.platform.dataset import Shard, Statistics
from valle.platform.retries import Retrier

_COLUMNS = ("id", "speaker", "language", "text", "phonemes", "frames", "source", "stamp")
_LINE_ID = re.compile(r"/\d+$")
"""End of the ids that manifests without ids once gave: the numbers of their lines."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The columns of an existing utterance that are compared with its input."""

    shard: str
    speaker: str
    language: str
    text: str
    source: str
    stamp: str
    frames: int
    n_phonemes: int


@dataclass
class DatasetState:
    """Shards and utterances that earlier runs have written. Rejects are not among them: an input
    that was rejected is tried again."""

    shards: dict[str, Shard] = field(default_factory=dict)
    rows: dict[str, Prepared] = field(default_factory=dict)
    """By id."""
    obsolete: dict[str, set[str]] = field(default_factory=dict)
    """By shard, ids of rows to remove: second rows of an id, and rows to be prepared again."""
    text_version: int = TEXT_VERSION
    """Version of the text processing that made the phonemes."""

    def add_shard(self, shard: Shard, ids: Iterable[str], item_of: dict[str, SourceItem]) -> None:
        """Adds a shard that was written now.

        Raises ValueError for an id that another shard has: two runs wrote at the same time.
        """
        for name in ids:
            if name in self.rows:
                raise ValueError(
                    f"{name!r} is in shard {shard.name} and in shard {self.rows[name].shard}: has "
                    "another run written there? Run `prepare` again, alone: it removes one of them"
                )
            item = item_of[name]
            self.rows[name] = Prepared(
                shard.name, item.speaker, item.language, "", item.audio, item.stamp, 0, 0
            )
        self.shards[shard.name] = shard


def scan_output(out: str, codec: CodecIdentity, retrier: Retrier) -> DatasetState:
    """Reads the finished utterances, also those of shards that no manifest lists (of killed
    runs)."""
    listed: dict[str, Shard] = {}
    if retrier.call(storage.exists, storage.join(out, "dataset.json")):
        manifest = retrier.call(dataset.read_manifest, out)
        codec.check(manifest.codec, f"the dataset {out}")
        listed = {shard.name: shard for shard in manifest.shards}
    state = DatasetState()
    if listed:
        state.text_version = manifest.text_version
    for name in retrier.call(lambda: list(dataset.shard_names(out))):
        table = retrier.call(dataset.read_columns, out, name, _COLUMNS)
        entry = listed.get(name)
        if entry is None or entry.utterances != len(table):  # unlisted, or killed while rewritten
            entry = _adopt(out, name, table, retrier)
        state.shards[name] = entry
        n_phonemes = pc.list_value_length(table.column("phonemes"))
        rows = table.drop_columns("phonemes").append_column("n_phonemes", n_phonemes).to_pylist()
        for row in rows:
            identity = row.pop("id")
            if identity in state.rows:
                state.obsolete.setdefault(name, set()).add(identity)
                continue
            row["stamp"] = row["stamp"] or ""
            state.rows[identity] = Prepared(shard=name, **row)
    return state


def _adopt(out: str, name: str, rows: pa.Table, retrier: Retrier) -> Shard:
    """Entry of a shard that the manifest does not list; it is complete, as writes are atomic."""
    data = retrier.call(storage.read_bytes, storage.join(out, "shards", f"{name}.parquet"))
    digest = hashlib.sha256(data).hexdigest()
    frames = int(np.sum(rows.column("frames").to_numpy()))
    return Shard(name=name, sha256=digest, utterances=len(rows), frames=frames)


@dataclass
class Comparison:
    """The items of a run, grouped by what has to be done."""

    to_prepare: list[SourceItem] = field(default_factory=list)
    """New ones, rejected ones and changed ones."""
    n_unchanged: int = 0
    changed: list[str] = field(default_factory=list)
    """Ids of changed items, whether they are prepared again or kept."""


def compare(
    items: Sequence[SourceItem], state: DatasetState, recipe: PrepareRecipe, frame_rate: int
) -> Comparison:
    """Compares the inputs with the utterances; notes in `state` the rows that become obsolete."""
    result = Comparison()
    by_source = {
        _place(row.source): identity
        for identity, row in state.rows.items()
        if _LINE_ID.search(identity)
    }
    for item in items:
        identity = item.id
        if identity not in state.rows and not item.has_own_id:
            former = by_source.get(_place(item.audio), "")
            if item.text is not None and former.rpartition("/")[0] == item.id.partition("/")[0]:
                identity = former  # an id of the time when lines were numbered
        row = state.rows.get(identity)
        if row is None:
            result.to_prepare.append(item)
            continue
        if _has_changed(item, row, recipe, frame_rate):
            result.changed.append(item.id)
            if recipe.on_change == "prepare":
                state.obsolete.setdefault(row.shard, set()).add(identity)
                del state.rows[identity]
                result.to_prepare.append(item)
                continue
        result.n_unchanged += 1
    return result


def _has_changed(item: SourceItem, row: Prepared, recipe: PrepareRecipe, frame_rate: int) -> bool:
    """Whether a row was made from other inputs, or would be a reject today."""
    return (
        item.speaker != row.speaker
        or row.language not in (item.language, _voice(item.language))
        or (item.text is not None and item.text.strip() != row.text)
        or (item.has_own_id and _place(item.audio) != _place(row.source))
        or bool(item.stamp and row.stamp and item.stamp != row.stamp)
        or (row.frames - 1) / frame_rate > recipe.max_seconds
        or (row.frames + 1) / frame_rate < recipe.min_seconds
        or not recipe.min_phonemes <= row.n_phonemes <= recipe.max_phonemes
    )


def _place(uri: str) -> str:
    """A recording's path or URI in one form: earlier rows hold what their manifests say, with
    `file://`, `./` and `../`."""
    return posixpath.normpath(uri.removeprefix("file://"))


@lru_cache(maxsize=1000)
def _voice(language: str) -> str | None:
    """The espeak voice that rows hold for a language; None for an unknown language."""
    try:
        return espeak_voice(language)
    except ValueError:
        return None


def remove_obsolete(out: str, state: DatasetState, retrier: Retrier) -> int:
    """Rewrites the shards that hold obsolete rows, without them; returns the number of rows.

    A run that is killed here leaves a shard with fewer rows than its entry says: the next run
    notices that, and prepares what is missing.
    """
    removed = 0
    for name, ids in state.obsolete.items():
        path = storage.join(out, "shards", f"{name}.parquet")
        table = retrier.call(dataset.read_columns, out, name, dataset.SCHEMA.names)
        seen: set[str] = set()
        keep = []
        for identity in table.column("id").to_pylist():
            known = state.rows.get(identity)
            keep.append(known is not None and known.shard == name and identity not in seen)
            seen.add(identity)
        assert ids <= seen, "scan_output() has read these ids from this shard"
        removed += len(keep) - sum(keep)
        kept = table.filter(pa.array(keep)).cast(dataset.SCHEMA)
        if len(kept):
            state.shards[name] = retrier.call(dataset.write_shard, out, name, kept)
        else:
            retrier.call(storage.delete, path)
            del state.shards[name]
    state.obsolete.clear()
    return removed


def statistics_of(out: str, shards: Iterable[str], retrier: Retrier) -> Statistics:
    """Frames per speaker and language of some shards."""
    statistics = Statistics()
    for name in shards:
        columns = ("speaker", "language", "frames")
        statistics.add(retrier.call(dataset.read_columns, out, name, columns))
    return statistics


def write_rejects(out: str, name: str, rejects: Sequence[Reject]) -> None:
    """Writes `rejects/{name}.jsonl`, one line per reject; no file without rejects."""
    uri = storage.join(out, "rejects", f"{name}.jsonl")
    lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects)
    if rejects:  # half a surrogate pair becomes its JSON escape
        storage.write_bytes(uri, lines.encode("utf-8", "backslashreplace"))


def former_rejects(out: str, retrier: Retrier) -> dict[str, set[str]]:
    """Ids in the reject files of earlier runs, by file."""
    folder = storage.join(out, "rejects")
    found: dict[str, set[str]] = {}
    for name in retrier.call(lambda: list(storage.list_files(folder, (".jsonl",)))):
        ids = found[name] = set()
        for _, line in read_lines(retrier.call(storage.read_bytes, storage.join(folder, name))):
            try:
                ids.add(str(json.loads(str(line))["id"]))
            except (ValueError, KeyError, TypeError):  # an edited file: only a count depends on it
                continue
    return found


def delete_rejects(out: str, names: Iterable[str], retrier: Retrier) -> None:
    """Removes reject files of earlier runs."""
    for name in names:
        retrier.call(storage.delete, storage.join(out, "rejects", name))
