"""Decoding the first codebook without a cache, with one, and in batches of streams, in one run.

    python -m valle.jobs.bench.engine --model release/nano --plot docs/bench-engine.png

The bandwidth limit stands beside the figures: a decode step reads all weights once, so a single
stream cannot make more steps per second than memory delivers weights (in float32). Every variant
decodes the same text to the same length with EOS excluded, on one torch thread, in alternating
rounds, without guidance except in the rows called so. The shape of the model matters, its weights
do not: `--size full` takes untrained ones.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from valle.jobs.bench.charts import new_figure
from valle.jobs.bench.command_line import build_parser, print_report
from valle.jobs.bench.gpu.synthetic import GUIDED_SAMPLING, SAMPLING
from valle.jobs.bench.gpu.workload import (
    Workload,
    add_streams,
    build_engine,
    exclude_eos,
    generate,
    matrix_bytes,
    run_until_idle,
)
from valle.jobs.bench.timing import median_ratio, time_interleaved
from valle.model.ar import AR
from valle.model.config import SIZES, ARConfig
from valle.model.quantize import Precision, convert
from valle.model.sampling import Sampling
from valle.platform import registry
from valle.serve.engine.engine import Engine


def run_generate(ar: AR, workload: Workload, use_cache: bool) -> None:
    """`AR.generate`, the reference; without a cache, each step computes the whole sequence again,
    as research scripts do."""
    codes = generate(ar, workload, SAMPLING, workload.frames, use_cache=use_cache)
    assert len(codes) == workload.frames, "EOS is excluded"


@dataclass(frozen=True)
class EngineVariant:
    """An engine to measure."""

    ar: AR
    sampling: Sampling = SAMPLING
    compiled: bool = False

    def build(self, workload: Workload, streams: int) -> Engine:
        """An engine with a slot for every stream, after a first run of the workload."""
        engine, _ = build_engine(
            self.ar, workload, streams, guided=self.sampling.guided, compiled=self.compiled
        )
        self.run(engine, workload, streams)
        return engine

    def run(self, engine: Engine, workload: Workload, streams: int) -> None:
        """Decodes the workload in so many streams at once."""
        add_streams(engine, workload, streams, self.sampling, workload.frames)
        run_until_idle(engine)


def engine_variants(
    ar: AR, precisions: Sequence[Precision], compiled: bool
) -> dict[str, EngineVariant]:
    """The engines by name: float32, guided, and both again in every other precision."""
    engines = {"engine": EngineVariant(ar), "guided": EngineVariant(ar, GUIDED_SAMPLING)}
    for precision in precisions:
        other = convert(copy.deepcopy(ar), precision)
        engines |= {
            precision: EngineVariant(other),
            f"guided {precision}": EngineVariant(other, GUIDED_SAMPLING),
        }
    return engines | ({"compiled": EngineVariant(ar, compiled=True)} if compiled else {})


def read_bandwidth(n_bytes: int, seconds: float = 0.5) -> float:
    """Bytes per second that one thread reads from an array of this size, summed repeatedly: an
    array that fits into a cache is read at the cache's speed, as the weights would be."""
    values = torch.ones(n_bytes // 4)
    values.sum()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        values.sum()
        rounds += 1
    return rounds * n_bytes / (time.perf_counter() - started)


def measure(
    ar: AR,
    workload: Workload,
    engines: dict[str, EngineVariant],
    streams: Sequence[int],
    rounds: int,
) -> dict[str, list[float]]:
    """Frames per second of each variant, one value a round; the variants alternate."""
    variants: dict[str, tuple[int, Callable[[], None]]] = {
        "uncached": (1, partial(run_generate, ar, workload, use_cache=False)),
        "cached": (1, partial(run_generate, ar, workload, use_cache=True)),
    }
    for (name, variant), count in itertools.product(engines.items(), streams):
        engine = variant.build(workload, count)
        variants[f"{name}, {count}"] = (count, partial(variant.run, engine, workload, count))
    seconds = time_interleaved(
        {name: run for name, (_, run) in variants.items()}, rounds, "bench.engine"
    )
    return {
        name: [count * workload.frames / elapsed for elapsed in seconds[name]]
        for name, (count, _) in variants.items()
    }


def summarize(speeds: dict[str, list[float]], limit: float) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and medians of each round's ratios. `speeds` needs the variant
    `engine, 1`."""
    one = speeds["engine, 1"]
    return {
        name: {
            "frames_per_second": round(statistics.median(values), 1),
            "speedup_over_uncached": round(median_ratio(values, speeds["uncached"]), 2),
            "speedup_over_one_stream": round(median_ratio(values, one), 2),
            "share_of_fp32_limit": round(statistics.median(values) / limit, 3),
        }
        for name, values in speeds.items()
    }


def plot(figures: dict[str, dict[str, float]], limit: float, path: Path) -> None:
    """Draws bars of frames per second, and the limit of a single stream."""
    figure = new_figure(7, 1 + 0.22 * len(figures))
    axis = figure.subplots()
    names = list(figures)
    bars = axis.barh(names, [figures[name]["frames_per_second"] for name in names])
    axis.bar_label(
        bars, [f"{figures[n]['speedup_over_uncached']:g} x uncached" for n in names], padding=4
    )
    axis.axvline(limit, color="0.4", linestyle="--", label="one stream's bandwidth limit, float32")
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set(xlabel="frames a second, one thread")
    axis.legend(loc="lower right")
    figure.savefig(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument(
        "--size", choices=SIZES, help="an untrained model of this size, instead of --model"
    )
    parser.add_argument("--frames", type=int, default=300, help="length of the speech")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 4, 16, 32], help="1 is always measured"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precisions", nargs="+", choices=("bf16", "int8"), default=[], help="besides fp32"
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    parser.add_argument("--plot", type=Path, help="picture to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its report."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    if arguments.size:
        ar = AR(ARConfig.from_shared(SIZES[arguments.size])).eval()
    else:
        ar = registry.load_ar(registry.resolve(arguments.model))
    exclude_eos(ar)
    workload = Workload.random(np.random.default_rng(0), frames=arguments.frames)
    engines = engine_variants(ar, arguments.precisions, arguments.compiled)
    streams = sorted({1, *arguments.streams})
    speeds = measure(ar, workload, engines, streams, arguments.rounds)

    read = matrix_bytes(ar)
    limit = read_bandwidth(read) / read * ar.config.group_size
    figures = summarize(speeds, limit)
    print_report(
        {
            "frames": arguments.frames,
            "weights_read_megabytes": round(read / 1e6, 1),
            "limit_frames_per_second": round(limit, 1),
            "variants": figures,
        }
    )
    if arguments.plot:
        plot(figures, limit, arguments.plot)


if __name__ == "__main__":
    main()
