"""Converts recordings with transcripts into the token dataset, on Ray Data.

Texts become phonemes; recordings are decoded, resampled to 24 kHz mono and checked; the codec
encodes the waves, batched by duration. Unusable inputs are left out and listed under `rejects/`
with the reason; the next run tries them again. A second run processes the missing and the changed
inputs. A killed run leaves a valid dataset of the finished shards. A failed read or write of
storage is repeated; if it keeps failing, the run ends.
"""

import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from valle.jobs.ingest import crashes, output
from valle.jobs.ingest.listing import add_stamps, list_sources
from valle.jobs.ingest.output import DatasetState
from valle.jobs.ingest.pipeline import allocation_for, pipeline, shard_items
from valle.jobs.ingest.recipe import PrepareRecipe
from valle.jobs.ingest.source import Reject, SourceItem
from valle.jobs.recipes import parse_arguments
from valle.model.codec.interface import CodecIdentity
from valle.model.codec.loading import load_codec
from valle.platform import dataset, settings, storage
from valle.platform.cluster import connect
from valle.platform.dataset import Manifest, Shard
from valle.platform.lease import Lease, LeaseError, lease
from valle.platform.progress import progress_bar
from valle.platform.recipe import RecipeError, exit_on_error, resolve_paths
from valle.platform.resources import Allocation
from valle.platform.retries import Retrier, StorageError

__all__ = ["PrepareRecipe", "allocation_for", "main", "pipeline", "prepare", "shard_items"]

LEASE = "prepare.lease"
MANIFEST_SECONDS = 30.0
"""Time between two manifests, so that a killed run has one."""
STALE_PART_SECONDS = 3600.0
"""Age after which an unfinished file is what a killed run has left."""


class _Run:
    """One run on one output: its counts, and the objects by which it writes."""

    def __init__(self, recipe: PrepareRecipe, identity: CodecIdentity, retrier: Retrier) -> None:
        self.recipe, self.identity, self.retrier = recipe, identity, retrier
        self.reasons: Counter[str] = Counter()
        self.rejected: set[str] = set()
        self.reject_files: set[str] = set()
        self.prepared = self.storage_retries = 0
        self.speech_seconds = self.codec_seconds = 0.0

    def reject(self, name: str, rejects: Sequence[Reject]) -> None:
        """Counts the rejects in the file `rejects/{name}.jsonl`."""
        self.reasons.update(reject.reason.split(":")[0] for reject in rejects)
        self.rejected.update(reject.id for reject in rejects)
        if rejects:
            self.reject_files.add(f"{name}.jsonl")

    def write_manifest(self, state: DatasetState, statistics: dataset.Statistics) -> Manifest:
        return self.retrier.call(
            dataset.write_manifest,
            self.recipe.out,
            self.identity,
            list(state.shards.values()),
            statistics,
        )

    def process(
        self,
        items: Sequence[SourceItem],
        state: DatasetState,
        statistics: dataset.Statistics,
        allocation: Allocation,
        held: Lease,
    ) -> None:
        """Processes items shard by shard; lists finished shards in the manifest."""
        recipe, last_manifest = self.recipe, time.perf_counter()
        item_of = {item.id: item for item in items}
        tables = list(shard_items(items, recipe.shard_size, uuid.uuid4().hex))
        with progress_bar(total=len(items), label="prepare", unit="utterance") as bar:
            for result in pipeline(tables, recipe, allocation) if tables else ():
                held.check()
                bar.update(result["inputs"])
                self.reject(result["name"], [Reject(**reject) for reject in result["rejects"]])
                self.storage_retries += result["retries"]
                self.speech_seconds += result["speech_seconds"]
                self.codec_seconds += result["codec_seconds"]
                self.prepared += len(result["ids"])
                if result["shard"]:
                    shard = Shard(**result["shard"])
                    state.add_shard(shard, result["ids"], item_of)
                    columns = ("speaker", "language", "frames")
                    statistics.add(
                        self.retrier.call(dataset.read_columns, recipe.out, shard.name, columns)
                    )
                if time.perf_counter() - last_manifest > MANIFEST_SECONDS:
                    self.write_manifest(state, statistics)
                    last_manifest = time.perf_counter()


def prepare(recipe: PrepareRecipe) -> dict[str, Any]:
    """Processes the missing inputs on the connected cluster; returns the report (`report.json`).

    Raises ValueError before any work starts when the cluster cannot hold the codec's actors,
    LeaseError when another run writes to the same output, and StorageError.
    """
    started = time.perf_counter()
    recipe = resolve_paths(recipe)  # a worker's folder and home may differ from the driver's
    allocation = allocation_for(recipe)
    identity = load_codec(recipe.codec, cache=settings.read().cache).identity
    retrier = Retrier(recipe.storage_retry_seconds)
    run = _Run(recipe, identity, retrier)
    with lease(storage.join(recipe.out, LEASE), "prepare", retrier) as held:
        report = _prepare(run, allocation, held)
        seconds = time.perf_counter() - started
        report |= {
            "wall_seconds": round(seconds, 1),
            "speech_seconds_per_second": round(run.speech_seconds / seconds, 1),
        }
        retrier.call(storage.write_json, storage.join(recipe.out, "report.json"), report)
    return report


def _prepare(run: _Run, allocation: Allocation, held: Lease) -> dict[str, Any]:
    recipe, retrier, out = run.recipe, run.retrier, run.recipe.out
    storage.sweep_parts(out, older_than_seconds=STALE_PART_SECONDS)
    crashes.sweep(out, retrier)
    # Compare the inputs with what earlier runs have written.
    items, unlisted = list_sources(recipe.sources, retrier)
    items = add_stamps(items, retrier)
    state = output.scan_output(out, run.identity, retrier)
    former = output.former_rejects(out, retrier)
    comparison = output.compare(items, state, recipe, run.identity.frame_rate)
    if comparison.to_prepare:
        try:
            dataset.check_text_version(state.text_version, out)
        except ValueError as error:
            raise RecipeError(str(error)) from error
    if comparison.changed:
        fate = "are prepared again" if recipe.on_change == "prepare" else "stay as they are"
        print(
            f"prepare: {len(comparison.changed)} inputs have changed since they were prepared, and "
            f"{fate} (on_change={recipe.on_change}): {comparison.changed[0]!r} ...",
            file=sys.stderr,
        )
    # From here on the dataset is what is listed below; changed and doubled rows are gone.
    held.check()  # the comparison may have taken long
    run.reject("listing", unlisted)
    retrier.call(output.write_rejects, out, "listing", unlisted)
    removed = output.remove_obsolete(out, state, retrier)
    statistics = output.statistics_of(out, state.shards, retrier)
    statistics.text_version = state.text_version
    run.write_manifest(state, statistics)

    run.process(comparison.to_prepare, state, statistics, allocation, held)
    held.check()
    if strange := set(retrier.call(lambda: list(dataset.shard_names(out)))) - set(state.shards):
        raise ValueError(
            f"{out}: another run has written {len(strange)} shards meanwhile, among them "
            f"{strange.pop()}; run `prepare` again, alone"
        )
    manifest = run.write_manifest(state, statistics)
    output.delete_rejects(out, former.keys() - run.reject_files, retrier)
    former_ids = set().union(*former.values())
    tried = {item.id for item in comparison.to_prepare} | {reject.id for reject in unlisted}
    return {
        "out": out,
        "inputs": len(items) + len(unlisted),
        "already_done": comparison.n_unchanged,
        "prepared": run.prepared,
        "rejected": dict(run.reasons.most_common()),
        "rejects_tried_again": len(former_ids & tried),
        "rejects_cured": len(former_ids & tried - run.rejected),
        "changed": len(comparison.changed),
        "rows_removed": removed,
        "storage_retries": run.storage_retries + retrier.retries,
        "utterances": manifest.utterances,
        "hours": manifest.hours,
        "accelerator": allocation.accelerator,
        "speech_seconds": round(run.speech_seconds, 1),
        "codec_seconds": round(run.codec_seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.prepare --recipe demo`. Exits with 1 when storage ends
    the run, another run holds the output, or no input could be used."""
    recipe = parse_arguments(argv, "prepare", PrepareRecipe, __doc__ or "")
    try:
        with exit_on_error(), connect():
            report = prepare(recipe)
    except (StorageError, LeaseError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if not report["utterances"]:
        reason = next(iter(report["rejected"]), "no recordings were found")
        print(
            f"error: none of {report['inputs']} inputs could be used, most often: {reason}. See "
            f"{storage.join(report['out'], 'rejects')}",
            file=sys.stderr,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
