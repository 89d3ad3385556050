"""The stages of `prepare` on Ray Data: each shard is one block until it is a file."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from valle.jobs.ingest.recipe import PrepareRecipe
from valle.jobs.ingest.source import SourceItem
from valle.jobs.ingest.stages import DecodeAudio, EncodeShard, Phonemize, schema
from valle.platform import resources
from valle.platform.capacity import Cluster
from valle.platform.resources import Allocation
from valle.platform.retries import StorageError

_DECODE_CPUS, _PHONEMIZE_CPUS = 0.5, 0.25
"""CPUs that Ray reserves for a decoding task, and for a phonemizing actor."""


def shard_items(items: Sequence[SourceItem], size: int, run: str = "") -> Iterator[pa.Table]:
    """Yields shards of `size` items, in order of speaker; their names are hashes of their ids."""
    ordered = sorted(items, key=lambda item: (item.speaker, item.id))
    for start in range(0, len(ordered), size):
        rows = [asdict(item) for item in ordered[start : start + size]]
        name = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:20]
        rows = [{**row, "shard": name, "run": run, "reason": None, "retries": 0} for row in rows]
        yield pa.Table.from_pylist(rows, schema=schema(["wave", "phonemes"]))


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

    `allocation` is that of the codec actors. Raises StorageError when storage fails a worker.
    """
    import ray
    from ray.data import ActorPoolStrategy

    allocation.configure_ray_data()
    blocks = {"batch_size": None, "batch_format": "pyarrow"}
    actors = ActorPoolStrategy(min_size=1, max_size=len(tables))
    # Texts first: what they reject is not decoded. Ray repeats the work of a process that ended
    # without a limit; `crashes.attempt` counts.
    phonemized = ray.data.from_arrow(list(tables)).map_batches(
        Phonemize,
        fn_constructor_args=(recipe,),
        **blocks,
        num_cpus=_PHONEMIZE_CPUS,
        compute=actors,
    )
    decoded = phonemized.map_batches(DecodeAudio(recipe), **blocks, num_cpus=_DECODE_CPUS)
    shards = allocation.map_blocks(decoded, EncodeShard, (recipe,), recipe.workers, len(tables))
    try:
        for row in shards.iter_rows():
            yield json.loads(row["result"])
    except Exception as error:
        if (cause := _storage_error(error)) is not None:
            raise StorageError(str(cause)) from error
        raise


def _storage_error(error: BaseException | None) -> StorageError | None:
    """The StorageError of a worker, found in the errors that Ray wraps around it; else None."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, StorageError):
            return current
        pending += [current.__cause__, current.__context__, getattr(current, "cause", None)]
    return None
