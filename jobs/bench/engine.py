"""Decoding the first codebook: no cache, a cache, and many streams at once, in one run.

    python -m valle.jobs.bench.engine --model release/nano --plot docs/bench-engine.png

Beside them the bandwidth limit: each step has to read all weights once, so no single stream can
make more groups a second than the memory gives weights (in float32). Every variant speaks the same
text to the same length (the model may not stop), one torch thread, rounds in turn, without guidance
except in the rows called so; the model's shape matters, its weights do not: `--size full` takes
untrained ones.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from valle.jobs.bench.gpu.workload import Workload
from valle.jobs.bench.timing import median_ratio, time_interleaved
from valle.model.ar import AR
from valle.model.config import SIZES, ARConfig
from valle.model.quantize import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import CODEBOOK_SIZE, EOS, N_CODEBOOKS
from valle.model.valle import GUIDANCE_SCALE
from valle.platform import registry
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

N_PHONEMES, PROMPT_FRAMES = 60, 225
"""A sentence of four seconds, and three seconds of a voice."""

SAMPLING = Sampling(top_p=0.9, repetition_threshold=0.1)
GUIDED_SAMPLING = replace(SAMPLING, guidance_scale=GUIDANCE_SCALE)


def generate_uncached(ar: AR, workload: Workload) -> None:
    """The whole sequence again for every group: what research scripts do."""
    _generate(ar, workload, use_cache=False)


def generate_cached(ar: AR, workload: Workload) -> None:
    """`AR.generate`, the reference, with its cache."""
    _generate(ar, workload, use_cache=True)


def _generate(ar: AR, workload: Workload, use_cache: bool) -> None:
    output = ar.generate(
        torch.tensor(workload.phonemes), torch.from_numpy(workload.prompt.astype(np.int64)),
        sampling=SAMPLING, seed=0, max_frames=workload.frames,
        use_cache=use_cache,
    )  # fmt: skip
    assert len(output.codes) == workload.frames, "the model was not to stop"


@dataclass(frozen=True)
class EngineVariant:
    """An engine to measure."""

    ar: AR
    sampling: Sampling = SAMPLING
    compiled: bool = False

    def build(self, workload: Workload, streams: int) -> Engine:
        """The engine for so many streams, warm."""
        positions = self.ar.capacity(len(workload.phonemes), PROMPT_FRAMES, workload.frames)
        runner = Runner(
            self.ar, slots=streams, max_positions=positions, guided=self.sampling.guided,
            compiled=self.compiled,
        )  # fmt: skip
        engine = Engine(runner, Scheduler(streams))
        run_streams(engine, workload, streams, self.sampling)
        return engine


def engine_variants(
    ar: AR, precisions: Sequence[Precision], compiled: bool
) -> dict[str, EngineVariant]:
    """The engines by name: as it is, guided, and each as well in other precisions."""
    engines = {"engine": EngineVariant(ar), "guided": EngineVariant(ar, GUIDED_SAMPLING)}
    for precision in precisions:
        other = convert(copy.deepcopy(ar), precision)
        engines |= {
            precision: EngineVariant(other),
            f"guided {precision}": EngineVariant(other, GUIDED_SAMPLING),
        }
    return engines | ({"compiled": EngineVariant(ar, compiled=True)} if compiled else {})


def run_streams(engine: Engine, workload: Workload, streams: int, sampling: Sampling) -> None:
    """The engine with so many streams."""
    for number in range(streams):
        engine.add(
            Request(
                id=str(number), phonemes=workload.phonemes, prompt=workload.prompt,
                sampling=sampling, max_frames=workload.frames, seed=number,
            )
        )  # fmt: skip
    while not engine.idle:
        engine.step()


def read_bandwidth(n_bytes: int, seconds: float = 0.5) -> float:
    """Bytes a second that one thread reads from an array of this size, summed up again and again:
    weights that fit into a cache are read as fast as it allows."""
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
    """Frames a second of each variant, a figure a round; the variants take turns."""
    variants: dict[str, tuple[int, Callable[[], None]]] = {
        "uncached": (1, lambda: generate_uncached(ar, workload)),
        "cached": (1, lambda: generate_cached(ar, workload)),
    }
    for (name, variant), n in itertools.product(engines.items(), streams):
        engine = variant.build(workload, n)
        variants[f"{name}, {n}"] = (n, partial(run_streams, engine, workload, n, variant.sampling))
    seconds = time_interleaved(
        {name: run for name, (_, run) in variants.items()}, rounds, "bench.engine"
    )
    return {
        name: [n * workload.frames / elapsed for elapsed in seconds[name]]
        for name, (n, _) in variants.items()
    }


def summarize(speeds: dict[str, list[float]], limit: float) -> dict[str, dict[str, float]]:
    """Medians, and the ratios in which they are claimed (each round its own ratio)."""
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
    """Bars of frames a second, and the limit of a single stream."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 1 + 0.22 * len(figures)), layout="constrained")
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
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--size", choices=SIZES, help="instead: an untrained model of this size")
    parser.add_argument("--frames", type=int, default=300, help="length of the speech")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precisions", nargs="+", choices=("bf16", "int8"), default=[], help="besides fp32"
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    parser.add_argument("--plot", type=Path, help="picture to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.size:
        ar = AR(ARConfig.from_shared(SIZES[arguments.size])).eval()
    else:
        ar = registry.load_ar(registry.resolve(arguments.model))
    with torch.no_grad():
        ar.head.bias[EOS] = -1e9
    random = np.random.default_rng(0)
    workload = Workload(
        random.integers(2, ar.config.n_phonemes, N_PHONEMES).tolist(),
        random.integers(0, CODEBOOK_SIZE, (N_CODEBOOKS, PROMPT_FRAMES)).astype(np.int16),
        arguments.frames,
    )
    # a step looks up single rows of the embeddings, and reads everything else whole
    read = sum(
        p.numel()
        for n, p in ar.named_parameters()
        if not n.endswith(("embedding.weight", "tables"))
    )
    read *= ar.head.weight.element_size()
    engines = engine_variants(ar, arguments.precisions, arguments.compiled)
    speeds = measure(ar, workload, engines, arguments.streams, arguments.rounds)
    limit = read_bandwidth(read) / read * ar.config.group_size
    figures = summarize(speeds, limit)
    report = {
        "frames": arguments.frames, "weights_read_megabytes": round(read / 1e6, 1),
        "limit_frames_per_second": round(limit, 1), "variants": figures,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if arguments.plot:
        plot(figures, limit, arguments.plot)


if __name__ == "__main__":
    main()
