"""Speech over HTTP: the endpoint against a lock and against `@serve.batch`, in one run on one Ray.

    python -m valle.jobs.bench.serve --clients 1 4 16 --plot docs/bench-serve.png

The baselines are replicas that synthesize one request at a time, and replicas whose `@serve.batch`
synthesizes the requests that have arrived together; each has three replicas, because the endpoint
has three processes with a model. All run the same weights with the same engine code, on one torch
thread each. Clients send sentences one after the other and read 16-bit samples as they arrive:
first audio, real-time factor, and the share of chunks that arrive before playback needs them. The
variants alternate; each round gives one ratio. (The sizes of first chunks are tried once each.)
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve

from valle.jobs.bench.baselines import MAX_BATCH, REPLICAS, baseline_apps
from valle.jobs.bench.charts import new_figure
from valle.jobs.bench.clients import SPEECH_ROUTE, LoadResult, SpeechBody, run_load
from valle.jobs.bench.command_line import build_parser, endpoint_args, print_report
from valle.jobs.bench.offline import encode_voice, english_request, load_offline
from valle.jobs.evaluation.items import load_items
from valle.model.tokens import FRAME_RATE
from valle.platform import settings, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.serve.app_args import AppArgs
from valle.serve.deployments.handles import APP_NAME, AR
from valle.serve.run import deploy, endpoint

VOICE = "joe"

VARIANTS: Mapping[str, tuple[str, bool]] = {
    "in chunks": (SPEECH_ROUTE, True),
    "whole sentences": (SPEECH_ROUTE, False),
    "one at a time": ("/one/", False),
    "serve.batch": ("/batch/", False),
}
"""Route and `chunked` of every variant that is compared."""

Results = dict[tuple[str, int], list[LoadResult]]
"""By variant and number of clients, one result a round."""


def measure_variants(
    url: str, sentences: Sequence[str], clients: Sequence[int], requests: int, rounds: int
) -> Results:
    """Loads every variant with every number of clients, `requests` per client and round."""
    for variant in VARIANTS:  # warm-up: every replica has read the prompt
        load_variant(url, variant, sentences, 2, 2)
    results: Results = {(variant, count): [] for count in clients for variant in VARIANTS}
    with progress_bar(total=rounds * len(results), label="bench.serve", unit="run") as bar:
        for _ in range(rounds):
            for (variant, count), measured in results.items():
                measured.append(load_variant(url, variant, sentences, requests * count, count))
                bar.update()
    return results


def load_variant(
    url: str, variant: str, sentences: Sequence[str], requests: int, clients: int
) -> LoadResult:
    """Sends `requests` sentences to one variant; request n has seed n."""
    route, chunked = VARIANTS[variant]
    bodies = [
        SpeechBody(input=sentences[n % len(sentences)], seed=n, voice=VOICE, chunked=chunked)
        for n in range(requests)
    ]
    return asyncio.run(run_load(url + route, bodies, clients))


def compare_with_engine(
    model: str, sentences: Sequence[str], recording: bytes, rounds: int
) -> list[float]:
    """Frames per second of the AR deployment by those of a bare engine, 16 streams each."""
    handle = serve.get_deployment_handle(AR, APP_NAME)
    torch.set_num_threads(1)
    bare = load_offline(model, MAX_BATCH)
    prompt = encode_voice(bare, recording)
    ratios = []
    for number in range(rounds):
        requests = [
            english_request(f"{number}/{n}", text, prompt, n, 4 * FRAME_RATE)
            for n, text in enumerate(sentences[:MAX_BATCH])
        ]
        started = time.perf_counter()
        responses = [handle.generate.remote(model, request) for request in requests]
        frames = sum(len(response.result().codes) for response in responses)
        served = frames / (time.perf_counter() - started)

        started = time.perf_counter()
        frames = sum(map(len, bare.first_codebooks(requests).values()))
        ratios.append(served / (frames / (time.perf_counter() - started)))
    return ratios


def sweep_first_chunks(
    url: str,
    args: AppArgs,
    sizes: Sequence[int],
    sentences: Sequence[str],
    clients: Sequence[int],
    requests: int,
) -> dict[int, dict[int, dict[str, float | None]]]:
    """Figures by size of the first chunk and number of clients, each measured once.

    Every size is another deployment of the application, which replaces the one before.
    """
    sweep: dict[int, dict[int, dict[str, float | None]]] = {}
    for size in sizes:
        deploy(args.model_copy(update={"first_chunk": size}))
        load_variant(url, "in chunks", sentences, 2, 2)  # warm-up
        sweep[size] = {}
        for count in clients:
            result = load_variant(url, "in chunks", sentences, requests * count, count)
            sweep[size][count] = {
                "first_audio_p50": round(statistics.median(result.first_audio_seconds), 2),
                "speech_per_second": round(result.speech_per_second, 2),
                "chunks_in_time": in_time_share(result.in_time),
            }
    return sweep


def in_time_share(in_time: Sequence[bool]) -> float | None:
    """Share of chunks that arrived in time; None where every answer was one chunk."""
    return round(float(np.mean(in_time)), 3) if in_time else None


def table(results: Results) -> list[dict[str, Any]]:
    """A row for every variant and number of clients: percentiles over all requests, medians over
    the rounds of throughput and of its ratio to the unbatched baseline."""
    rows = []
    for (variant, clients), rounds in results.items():
        first_audio = [value for result in rounds for value in result.first_audio_seconds]
        factors = [value for result in rounds for value in result.real_time_factors]
        in_time = [value for result in rounds for value in result.in_time]
        unbatched = results["one at a time", clients]
        speedups = [
            result.speech_per_second / base.speech_per_second
            for result, base in zip(rounds, unbatched, strict=True)
        ]
        throughput = [result.speech_per_second for result in rounds]
        per_cpu_second = [result.speech_seconds / result.cpu_seconds for result in rounds]
        rows.append(
            {
                "variant": variant,
                "clients": clients,
                "first_audio_p50": round(statistics.median(first_audio), 2),
                "first_audio_p95": round(float(np.quantile(first_audio, 0.95)), 2),
                "real_time_factor": round(statistics.median(factors), 2),
                "speech_per_second": round(statistics.median(throughput), 2),
                "speedup_over_unbatched": round(statistics.median(speedups), 2),
                "speech_per_cpu_second": round(statistics.median(per_cpu_second), 2),
                "chunks_in_time": in_time_share(in_time),
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws first audio and throughput over the number of clients."""
    figure = new_figure(9, 3.2)
    axes = figure.subplots(1, 2)
    for axis, key, label in (
        (axes[0], "first_audio_p50", "seconds to the first audio, median"),
        (axes[1], "speech_per_second", "seconds of speech a second"),
    ):
        for variant in VARIANTS:
            own = [row for row in rows if row["variant"] == variant]
            axis.plot(
                [row["clients"] for row in own], [row[key] for row in own], "o-", label=variant
            )
        axis.set(xlabel="clients", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks([row["clients"] for row in rows], [str(row["clients"]) for row in rows])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, serves=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=4, help="per client and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-chunks", type=int, nargs="*", default=[], help="sizes to compare")
    parser.add_argument(
        "--baseline-replicas", type=int, default=REPLICAS, help="of each baseline (%(default)s)"
    )
    parser.add_argument("--items", default="quick", help="evaluation set to take sentences from")
    parser.add_argument("--plot", type=Path, help="picture to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its report."""
    arguments = parse_arguments(argv)
    args = endpoint_args(arguments.model, max_replicas=1, slots=MAX_BATCH)
    sentences = [item.text for item in load_items(arguments.items)]
    recording = storage.read_bytes(storage.join(args.voices, f"{VOICE}.wav"))
    with connect(), endpoint(args, arguments.port) as url:
        baselines = baseline_apps(
            args.model, settings.read().tracking_uri, recording, arguments.baseline_replicas
        )
        for name, app in baselines.items():
            serve.run(app, name=name, route_prefix=f"/{name}")
        load = (sentences, arguments.clients, arguments.requests)
        rows = table(measure_variants(url, *load, arguments.rounds))
        ratios = compare_with_engine(args.model, sentences, recording, 3)
        sweep = sweep_first_chunks(url, args, arguments.first_chunks, *load)
    print_report(
        {
            "model": args.model,
            "rows": rows,
            "served_over_bare_engine": [round(ratio, 3) for ratio in ratios],
            "first_chunk_sweep": sweep,
        }
    )
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
