"""Converts recordings with transcripts into the token dataset, on Ray Data.

Recordings are decoded, resampled to 24 kHz mono and checked; texts become phonemes; the codec
encodes the waves, batched by duration. Unusable inputs are left out and listed under `rejects/`
with the reason. A second run processes only the missing inputs. A killed run leaves a valid
dataset of the finished shards.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from valle.jobs.ingest.layouts import Reject, Source, SourceItem, list_items
from valle.jobs.recipes import parse_arguments
from valle.model.codec.interface import CodecIdentity
from valle.model.codec.loading import CODEC_NAMES, load_codec
from valle.model.languages import espeak_voice
from valle.model.text import phoneme_ids
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, dataset, resources, settings, storage
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.dataset import Shard, Statistics
from valle.platform.decoder_pool import DecoderPool
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location, resolve_paths
from valle.platform.resources import Allocation, Placement


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Sources, codec, limits and destination of a token dataset."""

    out: str = field(metadata=location())
    """Folder or URI of the token dataset."""

    sources: tuple[Source, ...]
    """Roots of recordings with transcripts."""

    codec: str = field(default="nano", metadata=location(names=CODEC_NAMES))
    """nano, nano2, encodec-24khz, or a path to weights."""

    min_seconds: float = 0.5
    """Shorter recordings are left out."""

    max_seconds: float = 20.0
    """Longer recordings are left out."""

    min_phonemes: int = 2
    """Texts with fewer symbols are left out."""

    max_phonemes: int = 512
    """Texts with more symbols are left out."""

    min_rms_dbfs: float = field(default=-50.0, metadata=formerly("min_loudness"))
    """RMS level in dBFS; quieter recordings are left out."""

    max_clipped: float = audio.MAX_CLIPPED
    """Recordings with a larger share of samples cut off at full scale are left out."""

    utterances_per_shard: int = 512
    """Recordings per unit of work and Parquet file; a file lacks the rejected ones."""

    batch_seconds: float | None = None
    """Padded seconds per batch of the codec; default: 10 on a CPU, where larger batches exceed the
    cache (60 is half as fast), 120 on a GPU."""

    workers: int | None = None
    """Limit on codec actors; None: as many as the cluster can hold, nodes that join later included
    (without a GPU: one per core)."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU of the codec, and the share per actor. Decoding and phonemization always run on
    CPUs, on nodes with the same labels."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        if not 0 < self.min_seconds < self.max_seconds:
            raise ValueError("min_seconds: must lie between 0 and max_seconds")


Row = dict[str, Any]


def map_rows(rows: pa.Table, function: Callable[[Row], Row], drop: Sequence[str] = ()) -> pa.Table:
    """Merges `function(row)` into each row without a `reason`; an error becomes the `reason`."""
    mapped = []
    for row in rows.to_pylist():
        if row["reason"] is None:
            try:
                row |= function(row)
            except (ValueError, OSError) as error:  # AudioError among them
                row["reason"] = str(error)
        mapped.append({key: value for key, value in row.items() if key not in drop})
    return pa.Table.from_pylist(mapped, schema=_schema(drop))


_COLUMNS = {
    "id": pa.string(), "speaker": pa.string(), "language": pa.string(), "audio": pa.string(),
    "text": pa.string(), "text_uri": pa.string(), "shard": pa.string(), "reason": pa.string(),
    "wave": pa.large_binary(), "phonemes": pa.list_(pa.int16()),
}  # fmt: skip


def _schema(drop: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, kind) for name, kind in _COLUMNS.items() if name not in drop])


class DecodeAudio:
    """Reads transcript and wave (24 kHz mono) of each row; checks duration and level."""

    def __init__(self, recipe: PrepareRecipe) -> None:
        self._recipe = recipe

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Adds `text` and `wave` (bytes of float32 samples)."""
        with DecoderPool() as decoders:  # a crash rejects the recording
            decode = partial(self._decode, decode=decoders.decode)
            return map_rows(rows, decode, drop=["phonemes"])

    def _decode(self, row: Row, decode: audio.Decode) -> Row:
        recipe = self._recipe
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
        wave = audio.read(
            storage.read_bytes(row["audio"]),
            max_seconds=recipe.max_seconds,
            max_clipped=recipe.max_clipped,
            decode=decode,
        )
        seconds = len(wave) / SAMPLE_RATE
        if seconds < recipe.min_seconds:
            raise ValueError(f"too short: {seconds:.2f} s, limit {recipe.min_seconds:g} s")
        if (level := audio.rms_dbfs(wave)) < recipe.min_rms_dbfs:
            raise ValueError(f"too quiet: {level:.0f} dB, limit {recipe.min_rms_dbfs:g} dB")
        return {"text": text.strip(), "wave": wave.tobytes()}


class Phonemize:
    """Converts texts to phoneme ids, with one espeak per actor."""

    def __init__(self, recipe: PrepareRecipe) -> None:
        self._recipe = recipe

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Adds `phonemes`; `language` becomes the name of espeak's voice."""
        return map_rows(rows, self._phonemize)

    def _phonemize(self, row: Row) -> Row:
        ids = phoneme_ids(row["text"], row["language"])
        least, most = self._recipe.min_phonemes, self._recipe.max_phonemes
        if not least <= len(ids) <= most:
            raise ValueError(f"phoneme count out of range: {len(ids)}, limits {least} and {most}")
        return {"phonemes": ids, "language": espeak_voice(row["language"])}


class EncodeShard:
    """Encodes the waves of a shard in batches of similar duration, and writes the shard."""

    def __init__(self, recipe: PrepareRecipe) -> None:
        import torch

        device = resources.device()
        if device == "cpu":
            torch.set_num_threads(1)  # one actor per core
        self._codec = load_codec(recipe.codec, device=device, cache=settings.read().cache)
        self._recipe = recipe
        self._batch_seconds = recipe.batch_seconds or (10.0 if device == "cpu" else 120.0)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Returns one row: the shard's counts, rejects and times as JSON in `result`."""
        started = time.perf_counter()
        items = rows.to_pylist()
        # Encode the accepted rows only; a reject has no wave.
        accepted = [row for row in items if row["reason"] is None]
        waves = [np.frombuffer(row["wave"], np.float32) for row in accepted]
        codes = self._codec.encode(waves, self._batch_seconds)
        utterances = [
            {key: row[key] for key in ("id", "speaker", "language", "text", "phonemes")}
            | {"codes": code, "frames": code.shape[1], "source": row["audio"]}
            for row, code in zip(accepted, codes, strict=True)
        ]
        name = items[0]["shard"]
        rejects = [
            Reject(id=row["id"], source=row["audio"], reason=row["reason"])
            for row in items
            if row["reason"] is not None
        ]
        # The shard is written last: its ids mark these inputs as done for the next run.
        write_rejects(self._recipe.out, name, rejects)
        shard = None
        if utterances:
            shard = asdict(
                dataset.write_shard(self._recipe.out, name, dataset.to_table(utterances))
            )
        result = {
            "inputs": len(items),
            "rejects": [asdict(r) for r in rejects],
            "shard": shard,
            "speech_seconds": sum(len(w) for w in waves) / SAMPLE_RATE,
            "codec_seconds": time.perf_counter() - started,
        }
        return pa.table({"result": [json.dumps(result)]})


def write_rejects(out: str, name: str, rejects: Sequence[Reject]) -> None:
    """Writes `rejects/{name}.jsonl`, one line per reject; no file without rejects."""
    if rejects:
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects)
        storage.write_bytes(storage.join(out, "rejects", f"{name}.jsonl"), lines.encode())


@dataclass
class DatasetState:
    """Shards, statistics and ids that earlier runs have written."""

    shards: list[Shard]
    statistics: Statistics
    ids: set[str]
    """Ids of all utterances and rejects."""


def scan_output(out: str, codec: CodecIdentity) -> DatasetState:
    """Reads what is done, shards that a killed run has not listed in the manifest included."""
    manifest_shards: dict[str, Shard] = {}
    state = DatasetState([], Statistics(), set())
    if storage.exists(storage.join(out, "dataset.json")):
        manifest = dataset.read_manifest(out)
        codec.check(manifest.codec, f"the dataset {out}")
        manifest_shards = {shard.name: shard for shard in manifest.shards}
        if manifest.shards:
            state.statistics.text_version = manifest.text_version
    for name in dataset.shard_names(out):
        rows = dataset.read_columns(out, name, ["id", "speaker", "language", "frames"])
        state.shards.append(manifest_shards.get(name) or _adopt(out, name, rows))
        state.statistics.add(rows)
        state.ids.update(rows.column("id").to_pylist())
    for path in storage.list_files(storage.join(out, "rejects"), (".jsonl",)):
        for line in storage.read_bytes(storage.join(out, "rejects", path)).decode().splitlines():
            state.ids.add(json.loads(line)["id"])
    return state


def _adopt(out: str, name: str, rows: pa.Table) -> Shard:
    """Entry of a shard that the manifest does not list; it is complete, as writes are atomic."""
    data = storage.read_bytes(storage.join(out, "shards", f"{name}.parquet"))
    digest = hashlib.sha256(data).hexdigest()
    frames = int(np.sum(rows.column("frames").to_numpy()))
    return Shard(name=name, sha256=digest, utterances=len(rows), frames=frames)


def shard_items(items: Sequence[SourceItem], size: int) -> Iterator[pa.Table]:
    """Yields shards of `size` items, in order of speaker; their names are hashes of their ids."""
    ordered = sorted(items, key=lambda item: (item.speaker, item.id))
    for start in range(0, len(ordered), size):
        rows = [asdict(item) for item in ordered[start : start + size]]
        name = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:20]
        rows = [{**row, "shard": name, "reason": None} for row in rows]
        yield pa.Table.from_pylist(rows, schema=_schema(["wave", "phonemes"]))


_DECODE_CPUS, _PHONEMIZE_CPUS = 0.5, 0.25
"""CPUs that Ray reserves for a decoding task, and for a phonemizing actor."""


def allocation_for(recipe: PrepareRecipe, cluster: Cluster | None = None) -> Allocation:
    """The allocation of codec actors on `cluster`, by default the connected one. An actor reserves
    half a core only, so that the stages before it fit on a small machine."""
    upstream_cpus = _DECODE_CPUS + _PHONEMIZE_CPUS
    return resources.resolve(
        recipe.placement, "prepare", cpus=0.5, upstream_cpus=upstream_cpus, cluster=cluster
    )


def pipeline(
    tables: Sequence[pa.Table], recipe: PrepareRecipe, allocation: Allocation
) -> Iterator[dict[str, Any]]:
    """Runs the stages on Ray Data; yields the result of each shard when it has been written.

    `allocation` is that of the codec actors.
    """
    import ray
    from ray.data import ActorPoolStrategy

    allocation.configure_ray_data()
    blocks = {"batch_size": None, "batch_format": "pyarrow"}
    decoded = ray.data.from_arrow(list(tables)).map_batches(
        DecodeAudio(recipe), **blocks, num_cpus=_DECODE_CPUS
    )
    actors = ActorPoolStrategy(min_size=1, max_size=len(tables))
    phonemized = decoded.map_batches(
        Phonemize, fn_constructor_args=(recipe,), **blocks, num_cpus=_PHONEMIZE_CPUS, compute=actors
    )
    shards = allocation.map_blocks(phonemized, EncodeShard, (recipe,), recipe.workers, len(tables))
    for row in shards.iter_rows():
        yield json.loads(row["result"])


def prepare(recipe: PrepareRecipe) -> dict[str, Any]:
    """Processes the missing inputs on the connected cluster; returns the report (`report.json`).

    Raises ValueError before any work starts when the cluster cannot hold the codec's actors.
    """
    started = time.perf_counter()
    recipe = resolve_paths(recipe)  # a worker's folder and home may differ from the driver's
    allocation = allocation_for(recipe)
    identity = load_codec(recipe.codec, cache=settings.read().cache).identity
    items, unlisted = _list(recipe)
    state = scan_output(recipe.out, identity)
    missing = [item for item in items if item.id not in state.ids]
    if missing:
        dataset.check_text_version(state.statistics.text_version, recipe.out)
    write_rejects(recipe.out, "listing", unlisted)
    dataset.write_manifest(recipe.out, identity, state.shards, state.statistics)

    # Process the others shard by shard; the driver lists finished shards in the manifest.
    reasons = Counter(reject.reason.split(":")[0] for reject in unlisted)
    speech_seconds = codec_seconds = 0.0
    last_manifest = time.perf_counter()
    tables = list(shard_items(missing, recipe.utterances_per_shard))
    with progress_bar(total=len(missing), label="prepare", unit="utterance") as bar:
        for result in pipeline(tables, recipe, allocation) if tables else ():
            bar.update(result["inputs"])
            reasons.update(reject["reason"].split(":")[0] for reject in result["rejects"])
            speech_seconds += result["speech_seconds"]
            codec_seconds += result["codec_seconds"]
            if result["shard"]:
                shard = Shard(**result["shard"])
                state.shards.append(shard)
                state.statistics.add(
                    dataset.read_columns(recipe.out, shard.name, ["speaker", "language", "frames"])
                )
            if time.perf_counter() - last_manifest > 30:  # so that a killed run has a manifest
                dataset.write_manifest(recipe.out, identity, state.shards, state.statistics)
                last_manifest = time.perf_counter()
    manifest = dataset.write_manifest(recipe.out, identity, state.shards, state.statistics)
    seconds = time.perf_counter() - started
    report = {
        "out": recipe.out,
        "inputs": len(items) + len(unlisted),
        "already_done": len(items) - len(missing),
        "prepared": len(missing) - sum(reasons.values()) + len(unlisted),
        "rejected": dict(reasons.most_common()),
        "utterances": manifest.utterances,
        "hours": manifest.hours,
        "accelerator": allocation.accelerator,
        "speech_seconds": round(speech_seconds, 1),
        "codec_seconds": round(codec_seconds, 1),
        "wall_seconds": round(seconds, 1),
        "speech_seconds_per_second": round(speech_seconds / seconds, 1),
    }
    storage.write_json(storage.join(recipe.out, "report.json"), report)
    return report


def _list(recipe: PrepareRecipe) -> tuple[list[SourceItem], list[Reject]]:
    """Items and rejects of all sources. Raises ValueError when two items have the same id."""
    items: dict[str, SourceItem] = {}
    rejects: list[Reject] = []
    for source in recipe.sources:
        for entry in list_items(source):
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
    recipe = parse_arguments(argv, "prepare", PrepareRecipe, __doc__ or "")
    with exit_on_error(), connect():
        report = prepare(recipe)
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
