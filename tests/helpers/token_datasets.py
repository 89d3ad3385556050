"""Small token datasets of random codes."""

import numpy as np

from valle.model.codec.encodec import Encodec
from valle.platform import dataset
from valle.platform.dataset import Statistics


def random_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Utterances of three speakers with random codes and phonemes."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        frames = int(generator.integers(20, 60))
        rows.append(
            {
                "id": f"u{number:04d}",
                "speaker": f"s{number * 3 // count}",
                "language": "en-us",
                "text": f"sentence {number}",
                "phonemes": generator.integers(2, 100, size=frames // 4).tolist(),
                "codes": generator.integers(0, 1024, size=(8, frames)).astype(np.int16),
                "frames": frames,
                "source": f"/corpus/{number}.wav",
            }
        )
    return rows


def write_dataset(uri: str, codec: Encodec, count: int = 60, per_shard: int = 25) -> list[dict]:
    """A token dataset of `random_rows` in a few shards."""
    rows = random_rows(count)
    statistics = Statistics()
    shards = []
    for start in range(0, count, per_shard):
        table = dataset.to_table(rows[start : start + per_shard])
        statistics.add(table)
        shards.append(dataset.write_shard(uri, f"part{start:04d}", table))
    dataset.write_manifest(uri, codec.identity, shards, statistics)
    return rows
