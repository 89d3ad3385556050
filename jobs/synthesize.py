"""Synthesizes the lines of a manifest to audio files and a result manifest, on Ray Data.

    valle synthesize --recipe demo manifest=lines.jsonl recordings=voices out=spoken

A line (JSONL, or a row of Parquet) has `text` and `prompt` (a recording, relative to `recordings`)
and, optionally, `id`, `language` and `seed`. Texts are split into sentences as in the endpoint;
equal seeds give equal speech. Audio is written under `audio/`, one row per line under `manifest/`.
A line that cannot be synthesized gets a row with its `error`. A second run synthesizes the missing
and the changed lines.
"""

import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from valle.jobs.ingest.lines import is_utf8, parse_object
from valle.jobs.ingest.lines import read_lines as split_lines
from valle.jobs.recipes import parse_arguments
from valle.model.codec.interface import Codes
from valle.model.languages import espeak_voice
from valle.model.sentences import join_waves, phoneme_budget, sentence_phoneme_ids
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Synthesis, SynthesisResult
from valle.platform import registry, resources, settings, storage
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.decoder_pool import DecoderPool
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location, resolve_paths
from valle.platform.reference import ReferenceReader
from valle.platform.resources import Allocation, Placement
from valle.platform.retries import (
    Retrier,
    StorageError,
    is_forbidden_file,
    storage_errors_of_workers,
)
from valle.serve.engine.offline import OfflineSynthesizer
from valle.serve.engine.request import Request
from valle.serve.web.audio_formats import AudioFormat, encode_audio

STORAGE_RETRY_SECONDS = 120.0
"""How long a read or write that storage fails is tried again before the run stops."""
ID_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,149}")


@dataclass(frozen=True, kw_only=True)
class SynthesizeRecipe:
    """Manifest, model, settings and destination of a synthesis."""

    manifest: str = field(metadata=location())
    """`.jsonl` or `.parquet` file or URI."""

    recordings: str = field(default=".", metadata=location())
    """Folder or URI of the prompts."""

    out: str = field(metadata=location())
    """Folder or URI of audio and result manifest."""

    model: str = field(default=registry.CHAMPION, metadata=location())
    """`models:/valle@alias`, `models:/valle/3`, or a bundle's folder."""

    language: str = "en-us"
    """BCP 47 tag, for lines without a language of their own."""

    format: str = "flac"
    """mp3, opus, aac, flac, wav or pcm."""

    synthesis: Synthesis = field(default_factory=Synthesis)
    """Sampling and limits; a line's `seed` and `language` take precedence."""

    workers: int | None = None
    """Limit on actors, each with its own model; None: as many as the cluster can hold, nodes that
    join later included (without a GPU: one per core)."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU, and the share per actor."""

    slots: int = 16
    """Sentences that one actor generates at the same time."""

    max_phonemes: int = 1000
    """Most phonemes of a sentence; a longer one is synthesized in parts."""

    lines_per_shard: int = field(default=64, metadata=formerly("lines_per_part"))
    """Lines per unit of work; their rows are written together."""

    retry_errors: bool = field(default=False, metadata=formerly("retry"))
    """Synthesizes again the lines that ended in an error."""

    def __post_init__(self) -> None:
        if self.format not in get_args(AudioFormat):
            raise ValueError(f"format: {self.format!r} is none of {get_args(AudioFormat)}")
        espeak_voice(self.language)


Line = dict[str, Any]

_SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("text", pa.string()), ("prompt", pa.string()),
        ("language", pa.string()), ("seed", pa.int64()), ("model", pa.string()),
        ("audio", pa.string()),
        ("seconds", pa.float64()), ("hit_limit", pa.bool_()), ("error", pa.string()),
    ]
)  # fmt: skip


def read_lines(recipe: SynthesizeRecipe) -> list[Line]:
    """Reads the manifest's lines and fills in their defaults; an id defaults to the line's hash.

    Raises ValueError, with the line's number, for a line that cannot have a row of its own: without
    text or prompt, with a bad seed, or with an id that is unusable or repeated.
    """
    data = storage.read_bytes(recipe.manifest)
    if recipe.manifest.endswith(".parquet"):
        rows = list(enumerate(pq.read_table(io.BytesIO(data)).to_pylist(), 1))
    else:
        rows = [(number, _parse_line(number, line)) for number, line in split_lines(data)]
    # A Parquet column has a value in every row: None there means a missing field.
    lines: dict[str, Line] = {}
    for number, row in rows:
        location = f"manifest: line {number}"
        if not isinstance(row, dict) or not all(
            isinstance(row.get(field), str) and is_utf8(row[field]) for field in ("text", "prompt")
        ):
            raise ValueError(f"{location}: needs text and prompt, both strings")
        line = {
            "text": row["text"],
            "prompt": row["prompt"],
            "language": row.get("language") or recipe.language,
            "seed": recipe.synthesis.seed if row.get("seed") is None else row["seed"],
        }
        if not isinstance(line["language"], str):
            raise ValueError(f"{location}: language {line['language']!r} is no string")
        if not isinstance(line["seed"], int) or not 0 <= line["seed"] < 2**63:
            raise ValueError(
                f"{location}: seed {line['seed']!r} is no whole number from 0 to 2**63"
            )
        digest = hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:20]
        name = str(row.get("id") or digest)
        if not ID_PATTERN.fullmatch(name):
            raise ValueError(f"{location}: id {name!r}: letters, digits, _ . and - only")
        if name in lines:
            raise ValueError(
                f"{location}: id {name!r} is there twice; give each line an id of its own"
            )
        lines[name] = {"id": name, **line}
    return list(lines.values())


def _parse_line(number: int, line: str | UnicodeDecodeError) -> Any:
    try:
        if isinstance(line, UnicodeDecodeError):
            raise ValueError(f"not UTF-8 ({line})")
        return parse_object(line)
    except ValueError as error:
        raise ValueError(f"manifest: line {number}: {error}") from error


class SynthesizeShard:
    """A Ray Data actor that synthesizes the lines of a shard with continuous batching."""

    def __init__(self, recipe: SynthesizeRecipe, tracking_uri: str) -> None:
        import torch

        device = resources.device()
        if device == "cpu":
            torch.set_num_threads(1)  # one actor per core
        synthesizer = registry.load_synthesizer(
            registry.resolve(recipe.model, tracking_uri), device
        )
        self._recipe = recipe
        self._budget = phoneme_budget(recipe.synthesis.max_seconds, recipe.max_phonemes)
        self._retrier = Retrier(STORAGE_RETRY_SECONDS)
        self._offline = OfflineSynthesizer(
            synthesizer, recipe.synthesis, slots=recipe.slots, max_phonemes=recipe.max_phonemes
        )
        self._prompts: dict[str, Codes] = {}
        self._references = ReferenceReader(DecoderPool().decode)

    def __call__(self, shard: pa.Table) -> pa.Table:
        """Writes audio and rows of a shard; returns its counts and times as JSON in `result`."""
        started = time.perf_counter()
        lines = shard.to_pylist()
        # All sentences of the shard enter the engine together: its slots stay full.
        requests: dict[str, list[Request]] = {}
        for line in lines:
            try:
                requests[line["id"]] = self._requests(line)
            except StorageError:
                raise  # no line is to blame: the run ends, and nothing is recorded
            except Exception as error:  # whatever a line does, the others are synthesized
                line["error"] = _describe(error)
        flat = [request for sentences in requests.values() for request in sentences]
        results = dict(zip([r.id for r in flat], self._offline.synthesize(flat), strict=True))
        # Audio first: a line with a row in the manifest has its audio.
        for line in lines:
            if line["error"] is None:
                try:
                    line |= self._write(line["id"], [results[r.id] for r in requests[line["id"]]])
                except StorageError:
                    raise
                except Exception as error:
                    line["error"] = _describe(error)
        name = hashlib.sha256("\n".join(line["id"] for line in lines).encode()).hexdigest()[:20]
        rows = [{field: line[field] for field in _SCHEMA.names} for line in lines]
        self._retrier.call(_write_shard, self._recipe.out, f"{name}.parquet", rows)
        result = {
            "lines": len(lines),
            "errors": sum(line["error"] is not None for line in lines),
            "seconds": sum(line["seconds"] or 0.0 for line in lines),
            "work_seconds": time.perf_counter() - started,
        }
        return pa.table({"result": [json.dumps(result)]})

    def _requests(self, line: Line) -> list[Request]:
        prompt = self._prompt(line["prompt"])
        return [
            Request(
                id=f"{line['id']}/{number}",
                phonemes=ids,
                prompt=prompt,
                sampling=self._recipe.synthesis.ar,
                max_frames=self._offline.max_frames,
                seed=(line["seed"] + number) % 2**63,
            )
            for number, ids in enumerate(
                sentence_phoneme_ids(line["text"], line["language"], self._budget)
            )
        ]

    def _prompt(self, name: str) -> Codes:
        """Codes of a recording; the cache holds about a thousand recordings."""
        if name not in self._prompts:
            if len(self._prompts) > 1000:
                self._prompts.clear()
            uri = storage.join(self._recipe.recordings, name)
            try:
                data = self._retrier.call(storage.read_bytes, uri)
            except StorageError as error:  # one file's own mode ends its lines, not the run
                if error.__cause__ is not None and is_forbidden_file(uri, error.__cause__):
                    raise ValueError(f"prompt: no permission for {uri}") from error
                raise
            wave = self._references.read(data)
            codes = self._offline.synthesizer.encode_prompt(wave, self._recipe.synthesis)
            self._prompts[name] = codes
        return self._prompts[name]

    def _write(self, name: str, results: Sequence[SynthesisResult | ValueError]) -> Line:
        """Writes a line's sentences as one file; returns fields of its row, or the `error`."""
        for result in results:
            if isinstance(result, ValueError):
                return {"error": str(result)}
        sentences = [result for result in results if isinstance(result, SynthesisResult)]
        wave = join_waves([sentence.wave for sentence in sentences])
        path = f"audio/{name}.{self._recipe.format}"
        data = encode_audio(wave, self._recipe.format)  # type: ignore[arg-type]  # checked by the recipe
        self._retrier.call(storage.write_bytes, storage.join(self._recipe.out, path), data)
        return {
            "audio": path,
            "seconds": round(len(wave) / SAMPLE_RATE, 3),
            "hit_limit": any(sentence.hit_limit for sentence in sentences),
        }


def _describe(error: Exception) -> str:
    """The error of a line; a message alone may say nothing."""
    return str(error) if isinstance(error, ValueError | OSError) else repr(error)


def _shards(lines: Sequence[Line], model: str, size: int) -> Iterator[pa.Table]:
    """Yields shards of lines of similar length, so that few slots idle at their ends."""
    ordered = sorted(lines, key=lambda line: len(line["text"]))
    blank = {"model": model, "audio": None, "seconds": None, "hit_limit": None, "error": None}
    for start in range(0, len(ordered), size):
        rows = [{**blank, **line} for line in ordered[start : start + size]]
        yield pa.Table.from_pylist(rows, _SCHEMA)


def _write_shard(out: str, name: str, rows: Sequence[Line]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), _SCHEMA), buffer)
    storage.write_bytes(storage.join(out, "manifest", name), buffer.getvalue())


def _completed_ids(recipe: SynthesizeRecipe, lines: Sequence[Line]) -> set[str]:
    """Ids of the lines whose rows are up to date.

    Stale rows are removed from the result manifest, so that no id has two rows. Raises ValueError
    when `out` contains speech of another model.
    """
    folder = storage.join(recipe.out, "manifest")
    current = {line["id"]: line for line in lines}
    completed: set[str] = set()
    for name in list(storage.list_files(folder, (".parquet",))):
        rows = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, name)))).to_pylist()
        valid = [
            row for row in rows if not _is_stale(row, current.get(row["id"]), recipe.retry_errors)
        ]
        others = {row["model"] for row in valid if not registry.is_same(row["model"], recipe.model)}
        if others:
            raise ValueError(
                f"out: {recipe.out} has speech of {others.pop()}, not of {recipe.model}: "
                "name another folder, or that model"
            )
        completed |= {row["id"] for row in valid}
        if len(valid) < len(rows):
            _write_shard(recipe.out, name, valid)
    return completed


def _is_stale(row: Line, line: Line | None, retry_errors: bool) -> bool:
    """Whether a row differs from its line, or has an error to retry."""
    if line is None:  # its line was removed from the manifest: the row stays
        return False
    return (retry_errors and row["error"] is not None) or any(row[key] != line[key] for key in line)


def allocation_for(recipe: SynthesizeRecipe, cluster: Cluster | None = None) -> Allocation:
    """The allocation of actors on `cluster`, by default the connected one."""
    return resources.resolve(recipe.placement, "synthesize", cpus=0.5, cluster=cluster)


def synthesize(recipe: SynthesizeRecipe) -> dict[str, Any]:
    """Synthesizes the missing lines on the connected cluster; returns the report (`report.json`).

    Raises ValueError before any work starts when the cluster cannot hold the actors, and
    StorageError.
    """
    import ray

    started = time.perf_counter()
    recipe = resolve_paths(recipe)  # a worker's folder and home may differ from the driver's
    allocation = allocation_for(recipe)
    # Pinned: all rows, also those of later runs, come from one model version.
    recipe = replace(recipe, model=registry.pin(recipe.model))
    lines = read_lines(recipe)
    completed = _completed_ids(recipe, lines)
    missing = [line for line in lines if line["id"] not in completed]
    shards = list(_shards(missing, recipe.model, recipe.lines_per_shard))
    allocation.configure_ray_data()
    tracking_uri = settings.read().tracking_uri
    totals = {"lines": 0, "errors": 0, "seconds": 0.0, "work_seconds": 0.0}
    with progress_bar(total=len(missing), label="synthesize", unit="line") as bar:
        if shards:
            results = allocation.map_blocks(
                ray.data.from_arrow(shards),
                SynthesizeShard,
                (recipe, tracking_uri),
                recipe.workers,
                len(shards),
            )
            with storage_errors_of_workers():
                for row in results.iter_rows():
                    result = json.loads(row["result"])
                    totals = {key: totals[key] + result[key] for key in totals}
                    bar.update(result["lines"])
    wall = time.perf_counter() - started
    report = {
        "out": recipe.out,
        "model": recipe.model,
        "lines": len(lines),
        "already_done": len(lines) - len(missing),
        "errors": totals["errors"],
        "accelerator": allocation.accelerator,
        "speech_seconds": round(totals["seconds"], 1),
        "wall_seconds": round(wall, 1),
        "speech_seconds_per_second": round(totals["seconds"] / wall, 2),
    }
    storage.write_json(storage.join(recipe.out, "report.json"), report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.synthesize --recipe demo manifest=lines.jsonl`."""
    recipe = parse_arguments(argv, "synthesize", SynthesizeRecipe, __doc__ or "")
    try:
        with exit_on_error(), connect():
            report = synthesize(recipe)
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
