"""Encoding recordings: batches on Ray actors against one file at a time, in one run.

    python -m valle.jobs.bench.prepare --recordings data/codec/corpus/asterisk-en

The baseline is the loop of research scripts: each recording goes through the codec alone, with all
threads. Both sides encode the same recordings, in alternating rounds.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from valle.jobs.bench.command_line import print_report
from valle.jobs.bench.timing import time_interleaved
from valle.jobs.evaluate_codec import load_recordings
from valle.model.codec import encodec
from valle.model.codec.encodec import Encodec
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import settings
from valle.platform.cluster import connect

MIN_SECONDS = 0.5
"""Shorter recordings are skipped."""


class CodecWorker:
    """A codec on one core, as an actor."""

    def __init__(self, codec: str, batch_seconds: float) -> None:
        torch.set_num_threads(1)
        self._codec = encodec.load(codec, cache=settings.read().cache)
        self._batch_seconds = batch_seconds

    def encode(self, waves: list[Wave]) -> int:
        """Encodes some waveforms; returns the number of frames."""
        return sum(codes.shape[1] for codes in self._codec.encode(waves, self._batch_seconds))


def measure(
    codec: Encodec, waves: Sequence[Wave], workers: int, arguments: argparse.Namespace
) -> list[float]:
    """Speed of so many workers by the baseline's, one ratio a round."""
    import ray

    actor = ray.remote(num_cpus=1)(CodecWorker)
    pool = [actor.remote(arguments.codec, arguments.batch_seconds) for _ in range(workers)]

    def encode_one_by_one() -> None:
        for wave in waves:
            codec.encode([wave])

    def encode_on_actors() -> None:
        shares = [list(waves[number::workers]) for number in range(workers)]
        ray.get([one.encode.remote(share) for one, share in zip(pool, shares, strict=True)])

    encode_on_actors()  # the first call waits for the actors to load the codec
    variants = {"one by one": encode_one_by_one, "actors": encode_on_actors}
    seconds = time_interleaved(variants, arguments.rounds, f"bench.prepare, {workers} workers")
    for one in pool:
        ray.kill(one)
    return [a / b for a, b in zip(seconds["one by one"], seconds["actors"], strict=True)]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", default="nano", help="nano, encodec-24khz, or a path")
    parser.add_argument("--recordings", default="data/codec/corpus/asterisk-en", help="wav + txt")
    parser.add_argument("--count", type=int, default=200, help="recordings per round")
    parser.add_argument("--rounds", type=int, default=5, help="of each side")
    parser.add_argument("--workers", type=int, default=2, help="actors, one core each")
    parser.add_argument("--batch-seconds", type=float, default=10.0, help="padded audio per batch")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its report."""
    arguments = parse_arguments(argv)
    _, waves = load_recordings(arguments.recordings, arguments.count, MIN_SECONDS)
    torch.set_num_threads(arguments.workers)  # the baseline's
    codec = encodec.load(arguments.codec, cache=settings.read().cache)
    with connect():
        ratios = {
            workers: measure(codec, waves, workers, arguments)
            for workers in sorted({1, arguments.workers})
        }
    speedup: dict[str, Any] = {
        f"{workers} worker(s)": {
            "median": round(statistics.median(values), 2),
            "rounds": [round(value, 2) for value in values],
        }
        for workers, values in ratios.items()
    }
    print_report(
        {
            "recordings": len(waves),
            "speech_seconds": round(sum(map(len, waves)) / SAMPLE_RATE, 1),
            "one_at_a_time_threads": arguments.workers,
            "speedup": speedup,
        }
    )


if __name__ == "__main__":
    main()
