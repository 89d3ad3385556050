"""Tokenising: this project's batches on Ray actors against one file at a time, in one run.

The baseline is what research scripts do: a loop over files, each read, resampled and put through
EnCodec alone, with all threads. Both get the same recordings; the rounds alternate.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from valle.jobs.evaluate_codec import load_recordings
from valle.model.codec import encodec
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import settings
from valle.platform.cluster import connect


class CodecWorker:
    """One codec on one core."""

    def __init__(self, codec: str, batch_seconds: float) -> None:
        torch.set_num_threads(1)
        self._codec = encodec.load(codec, cache=settings.read().cache)
        self._batch_seconds = batch_seconds

    def encode(self, waves: list[Wave]) -> int:
        """Frames made of some waveforms."""
        return sum(c.shape[1] for c in self._codec.encode(waves, self._batch_seconds))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.bench.prepare`."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="nano", help="nano, encodec-24khz, or a path")
    parser.add_argument("--recordings", default="data/codec/corpus/asterisk-en", help="wav + txt")
    parser.add_argument("--count", type=int, default=200, help="recordings per round")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each")
    parser.add_argument("--workers", type=int, default=2, help="actors, one core each")
    parser.add_argument("--batch-seconds", type=float, default=10.0, help="padded audio at once")
    arguments = parser.parse_args(argv)
    _, waves = load_recordings(arguments.recordings, arguments.count, 0.5)
    seconds = sum(len(w) for w in waves) / SAMPLE_RATE
    torch.set_num_threads(arguments.workers)
    codec = encodec.load(arguments.codec, cache=settings.read().cache)
    ratios: dict[int, list[float]] = {}
    with connect():
        for workers in sorted({1, arguments.workers}):
            actor = ray.remote(num_cpus=1)(CodecWorker)
            pool = [actor.remote(arguments.codec, arguments.batch_seconds) for _ in range(workers)]
            shares = [waves[i::workers] for i in range(workers)]
            work = list(zip(pool, shares, strict=True))
            ray.get([a.encode.remote(share) for a, share in work])  # loads the codec
            ratios[workers] = []
            for _ in range(arguments.rounds):
                started = time.perf_counter()
                for wave in waves:
                    codec.encode([wave])
                one_by_one = time.perf_counter() - started
                started = time.perf_counter()
                ray.get([a.encode.remote(share) for a, share in work])
                ratios[workers].append(one_by_one / (time.perf_counter() - started))
            for a in pool:
                ray.kill(a)
    report = {
        "recordings": len(waves),
        "speech_seconds": round(seconds, 1),
        "one_at_a_time_threads": arguments.workers,
        "speedup": {
            f"{workers} worker(s)": {
                "median": round(statistics.median(values), 2),
                "rounds": [round(v, 2) for v in values],
            }
            for workers, values in ratios.items()
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
