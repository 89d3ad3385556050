"""Speech and text to the token dataset, on Ray Data.

Recordings are decoded, resampled to 24 kHz mono and checked; texts become phonemes; EnCodec turns
the waveforms into codes, batched by duration. What cannot be used is left out and recorded under
`rejects/` with its reason. A second run does only what is missing, and a run killed half-way
leaves a valid dataset of what was done.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from valle.jobs.ingest.layouts import Item, Reject, Source, listing
from valle.model import text as phonemes
from valle.model.codec.interface import CodecIdentity
from valle.model.codec.loading import load_codec
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, dataset, recipe, resources, settings, storage
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.dataset import Shard, Statistics
from valle.platform.progress import progress
from valle.platform.resources import Placement, Share


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """What to read, what to keep, and where the tokens go."""

    out: str
    """Folder or URI of the token dataset."""

    sources: tuple[Source, ...]
    """Roots of speech."""

    codec: str = "nano"
    """nano, nano2, encodec-24khz, or a path to weights."""

    min_seconds: float = 0.5
    """Shorter recordings are left out."""

    max_seconds: float = 20.0
    """Longer recordings are left out."""

    min_phonemes: int = 2
    """Texts with fewer symbols are left out."""

    max_phonemes: int = 512
    """Texts with more symbols are left out."""

    min_loudness: float = -50.0
    """dB of full scale (RMS); quieter recordings are left out."""

    utterances_per_shard: int = 512
    """Recordings that travel together and end in one Parquet file."""

    batch_seconds: float | None = None
    """Padded audio that goes through the codec at once; default: 10 on a CPU, where more falls out
    of the cache (60 is half as fast), 120 on a GPU."""

    workers: int | None = None
    """Codec actors at most; None: as many as the cluster holds, nodes that join later included
    (without a GPU: one a core)."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU for the codec, and how much of one each actor takes; reading and phonemes are
    always the CPUs' work, on nodes with the same labels."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        if not 0 < self.min_seconds < self.max_seconds:
            raise ValueError("min_seconds: must lie between 0 and max_seconds")


Row = dict[str, Any]


def each(rows: pa.Table, work: Callable[[Row], Row], drop: Sequence[str] = ()) -> pa.Table:
    """Applies `work` to the rows that are still good; an error becomes the row's `reason`."""
    done = []
    for row in rows.to_pylist():
        if row["reason"] is None:
            try:
                row |= work(row)
            except (ValueError, OSError) as error:  # AudioError among them
                row["reason"] = str(error)
        done.append({key: value for key, value in row.items() if key not in drop})
    return pa.Table.from_pylist(done, schema=_schema(drop))


_COLUMNS = {
    "id": pa.string(), "speaker": pa.string(), "language": pa.string(), "audio": pa.string(),
    "text": pa.string(), "text_uri": pa.string(), "shard": pa.string(), "reason": pa.string(),
    "wave": pa.large_binary(), "phonemes": pa.list_(pa.int16()),
}  # fmt: skip


def _schema(drop: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, kind) for name, kind in _COLUMNS.items() if name not in drop])


class Decode:
    """Reads text and sound of each row: 24 kHz mono, checked for length and level."""

    def __init__(self, chosen: PrepareRecipe) -> None:
        self._chosen = chosen

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Adds `text` and `wave`."""
        return each(rows, self._decode, drop=["phonemes"])

    def _decode(self, row: Row) -> Row:
        chosen = self._chosen
        text = row["text"]
        if text is None:
            if not storage.exists(row["text_uri"]):
                raise ValueError("no transcript beside the recording")
            try:
                text = storage.read_bytes(row["text_uri"]).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"text is not UTF-8: {error}") from error
        if not text.strip():
            raise ValueError("empty text")
        wave = audio.read(storage.read_bytes(row["audio"]), max_seconds=chosen.max_seconds)
        seconds = len(wave) / SAMPLE_RATE
        if seconds < chosen.min_seconds:
            raise ValueError(f"too short: {seconds:.2f} s, limit {chosen.min_seconds:g} s")
        if (level := audio.loudness(wave)) < chosen.min_loudness:
            raise ValueError(f"too quiet: {level:.0f} dB, limit {chosen.min_loudness:g} dB")
        return {"text": text.strip(), "wave": wave.tobytes()}


class Phonemise:
    """Texts to phoneme ids; holds one espeak per language."""

    def __init__(self, chosen: PrepareRecipe) -> None:
        self._chosen = chosen

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Adds `phonemes`."""
        return each(rows, self._phonemise)

    def _phonemise(self, row: Row) -> Row:
        spoken = phonemes.phonemize([row["text"]], row["language"])[0]
        ids = phonemes.encode(spoken)
        if not self._chosen.min_phonemes <= len(ids) <= self._chosen.max_phonemes:
            raise ValueError(
                f"phoneme count out of range: {len(ids)}, "
                f"limits {self._chosen.min_phonemes} and {self._chosen.max_phonemes}"
            )
        return {"phonemes": ids}


class Quantise:
    """Waveforms to codes, in batches of similar duration; writes the finished shard."""

    def __init__(self, chosen: PrepareRecipe) -> None:
        import torch

        device = resources.device()
        if device == "cpu":
            torch.set_num_threads(1)  # one actor per core
        self._codec = load_codec(chosen.codec, device=device, cache=settings.read().cache)
        self._chosen = chosen
        self._batch_seconds = chosen.batch_seconds or (10.0 if device == "cpu" else 120.0)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One row of bookkeeping for the whole shard."""
        started = time.perf_counter()
        items = rows.to_pylist()
        good = [row for row in items if row["reason"] is None]
        waves = [np.frombuffer(row["wave"], np.float32) for row in good]
        codes = self._codec.encode(waves, self._batch_seconds)
        finished = [
            {
                "id": row["id"], "speaker": row["speaker"], "language": row["language"],
                "text": row["text"], "phonemes": row["phonemes"], "codes": code,
                "frames": code.shape[1], "source": row["audio"],
            }
            for row, code in zip(good, codes, strict=True)
        ]  # fmt: skip
        name = items[0]["shard"]
        rejects = [
            Reject(id=row["id"], source=row["audio"], reason=row["reason"])
            for row in items
            if row["reason"] is not None
        ]
        # rejects first: the shard's file is what marks the work as done
        write_rejects(self._chosen.out, name, rejects)
        shard = None
        if finished:
            shard = asdict(dataset.write_shard(self._chosen.out, name, dataset.table(finished)))
        result = {
            "inputs": len(items),
            "rejects": [asdict(r) for r in rejects],
            "shard": shard,
            "speech_seconds": sum(len(w) for w in waves) / SAMPLE_RATE,
            "codec_seconds": time.perf_counter() - started,
        }
        return pa.table({"result": [json.dumps(result)]})


def write_rejects(out: str, name: str, rejects: Sequence[Reject]) -> None:
    """`rejects/{name}.jsonl`, one line an input that was left out."""
    if rejects:
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects)
        storage.write_bytes(storage.join(out, "rejects", f"{name}.jsonl"), lines.encode())


@dataclass
class Progress:
    """What earlier runs left behind."""

    shards: list[Shard]
    statistics: Statistics
    done: set[str]
    """Ids in shards or rejects."""


def survey(out: str, codec: CodecIdentity) -> Progress:
    """Finds finished work, also of a run that was killed before it could list its shards."""
    listed: dict[str, Shard] = {}
    if storage.exists(storage.join(out, "dataset.json")):
        manifest = dataset.read_manifest(out)
        codec.check(manifest.codec, f"the dataset {out}")
        listed = {shard.name: shard for shard in manifest.shards}
    found = Progress([], Statistics(), set())
    for name in dataset.shard_names(out):
        rows = dataset.columns(out, name, ["id", "speaker", "language", "frames"])
        found.shards.append(listed.get(name) or _adopt(out, name, rows))
        found.statistics.add(rows)
        found.done.update(rows.column("id").to_pylist())
    for path in storage.list_files(storage.join(out, "rejects"), (".jsonl",)):
        for line in storage.read_bytes(storage.join(out, "rejects", path)).decode().splitlines():
            found.done.add(json.loads(line)["id"])
    return found


def _adopt(out: str, name: str, rows: pa.Table) -> Shard:
    """A shard that is complete (writes are atomic) but was never listed."""
    data = storage.read_bytes(storage.join(out, "shards", f"{name}.parquet"))
    digest = hashlib.sha256(data).hexdigest()
    frames = int(np.sum(rows.column("frames").to_numpy()))
    return Shard(name=name, sha256=digest, utterances=len(rows), frames=frames)


def group(items: Sequence[Item], size: int) -> Iterator[pa.Table]:
    """Items by speaker, cut into shards; a shard is named by the hash of its ids."""
    ordered = sorted(items, key=lambda item: (item.speaker, item.id))
    for start in range(0, len(ordered), size):
        rows = [asdict(item) for item in ordered[start : start + size]]
        name = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:20]
        rows = [{**row, "shard": name, "reason": None} for row in rows]
        yield pa.Table.from_pylist(rows, schema=_schema(["wave", "phonemes"]))


_DECODE_CPUS, _PHONEMISE_CPUS = 0.5, 0.25
"""What Ray sets aside for a task that decodes, and for an actor that phonemises."""


def share_of(chosen: PrepareRecipe, cluster: Cluster | None = None) -> Share:
    """A codec actor's share of the connected cluster, or of `cluster`: half a core in the books,
    since the stages before it need room on a small machine."""
    return resources.resolve(
        chosen.placement, "prepare", cpus=0.5, beside=_DECODE_CPUS + _PHONEMISE_CPUS,
        cluster=cluster,
    )  # fmt: skip


def pipeline(
    tables: Sequence[pa.Table], chosen: PrepareRecipe, share: Share
) -> Iterator[dict[str, Any]]:
    """Runs the stages on Ray Data; yields a result per shard as it is written. `share`: a codec
    actor's."""
    import ray
    from ray.data import ActorPoolStrategy

    share.bound_data()
    whole = {"batch_size": None, "batch_format": "pyarrow"}
    spoken = (
        ray.data.from_arrow(list(tables))
        .map_batches(Decode(chosen), **whole, num_cpus=_DECODE_CPUS)
        .map_batches(
            Phonemise, fn_constructor_args=(chosen,), **whole, num_cpus=_PHONEMISE_CPUS,
            compute=ActorPoolStrategy(min_size=1, max_size=len(tables)),
        )
    )  # fmt: skip
    shards = share.map_blocks(spoken, Quantise, (chosen,), chosen.workers, len(tables))
    for row in shards.iter_rows():
        yield json.loads(row["result"])


def prepare(chosen: PrepareRecipe) -> dict[str, Any]:
    """Does what is missing on the connected cluster; returns the report (`report.json`).

    Raises ValueError before anything starts when the cluster will never hold the codec's actors.
    """
    started = time.perf_counter()
    share = share_of(chosen)
    chosen = replace(chosen, out=storage.absolute(chosen.out))
    if Path(chosen.codec).exists():
        chosen = replace(chosen, codec=str(Path(chosen.codec).absolute()))
    identity = load_codec(chosen.codec, cache=settings.read().cache).identity
    items, unlisted = _list(chosen)
    found = survey(chosen.out, identity)
    missing = [item for item in items if item.id not in found.done]
    write_rejects(chosen.out, "listing", unlisted)
    dataset.write_manifest(chosen.out, identity, found.shards, found.statistics)

    reasons = Counter(reject.reason.split(":")[0] for reject in unlisted)
    speech = codec_seconds = 0.0
    written = time.perf_counter()
    tables = list(group(missing, chosen.utterances_per_shard))
    with progress(total=len(missing), label="prepare", unit="utterance") as bar:
        for result in pipeline(tables, chosen, share) if tables else ():
            bar.update(result["inputs"])
            reasons.update(reject["reason"].split(":")[0] for reject in result["rejects"])
            speech += result["speech_seconds"]
            codec_seconds += result["codec_seconds"]
            if result["shard"]:
                shard = Shard(**result["shard"])
                found.shards.append(shard)
                found.statistics.add(
                    dataset.columns(chosen.out, shard.name, ["speaker", "language", "frames"])
                )
            if time.perf_counter() - written > 30:  # a killed run leaves what it had
                dataset.write_manifest(chosen.out, identity, found.shards, found.statistics)
                written = time.perf_counter()
    manifest = dataset.write_manifest(chosen.out, identity, found.shards, found.statistics)
    seconds = time.perf_counter() - started
    report = {
        "out": chosen.out,
        "inputs": len(items) + len(unlisted),
        "already_done": len(items) - len(missing),
        "prepared": len(missing) - sum(reasons.values()) + len(unlisted),
        "rejected": dict(reasons.most_common()),
        "utterances": manifest.utterances,
        "hours": manifest.hours,
        "accelerator": share.accelerator,
        "speech_seconds": round(speech, 1),
        "codec_cpu_seconds": round(codec_seconds, 1),
        "wall_seconds": round(seconds, 1),
        "speech_seconds_per_second": round(speech / seconds, 1),
    }
    storage.write_json(storage.join(chosen.out, "report.json"), report)
    return report


def _list(chosen: PrepareRecipe) -> tuple[list[Item], list[Reject]]:
    """All inputs of all sources. Raises ValueError when two share an id."""
    items: dict[str, Item] = {}
    rejects: list[Reject] = []
    for source in chosen.sources:
        for entry in listing(source):
            if isinstance(entry, Reject):
                rejects.append(entry)
            elif entry.id in items:
                raise ValueError(
                    f"sources: {entry.audio} and {items[entry.id].audio} have the same id "
                    f"{entry.id!r}; rename one of the roots, or name ids in a manifest"
                )
            else:
                items[entry.id] = entry
    return list(items.values()), rejects


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.prepare --recipe demo`."""
    chosen = recipe.parse_arguments(argv, "prepare", PrepareRecipe, __doc__ or "")
    with recipe.reported(), connect():
        report = prepare(chosen)
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
