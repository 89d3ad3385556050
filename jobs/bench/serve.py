"""Speech over HTTP: ours against a lock and against `@serve.batch`, in one run on one Ray.

    python -m valle.jobs.bench.serve --clients 1 4 16 --plot docs/bench-serve.png

The baselines are what one writes first: replicas that speak one request at a time, and replicas
whose `@serve.batch` speaks what has come in together; three of each, as ours is three processes.
They run the same weights with the same engine code, each on one torch thread. Clients ask for
sentences one after the other, read 16-bit samples as they come and note when: first audio,
real-time factor, and the share of chunks that were there before playback needed them. Variants take
turns; each round is a ratio of its own. (Sizes of first chunks are tried once each.)
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from ray import serve

from valle.jobs.bench.baselines import MAX_BATCH, SpeechBody, baseline_apps
from valle.jobs.bench.replicas import serve_cpu_seconds
from valle.jobs.evaluation.items import load_items
from valle.jobs.starter_voices import make_starter_voices
from valle.model.text import phoneme_ids
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.model.valle import Synthesis
from valle.platform import audio, registry, settings, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs
from valle.serve.engine.offline import OfflineSynthesizer
from valle.serve.engine.request import Request

BYTES_PER_SECOND = 2 * SAMPLE_RATE


@dataclass
class LoadResult:
    """What the clients of one variant saw in one round."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    first_audio_seconds: list[float] = field(default_factory=list)
    real_time_factors: list[float] = field(default_factory=list)
    speech_seconds: float = 0.0
    in_time: list[bool] = field(default_factory=list)

    @property
    def speech_per_second(self) -> float:
        """Seconds of speech a second, all clients together."""
        return self.speech_seconds / self.wall_seconds


async def send_request(
    http: httpx.AsyncClient, url: str, body: SpeechBody, result: LoadResult
) -> None:
    """One request; a chunk is in time if it is there when all before it has been played."""
    started = time.perf_counter()
    first, received = 0.0, 0
    async with http.stream("POST", url, json=body.model_dump()) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            now = time.perf_counter()
            if not received:
                first = now
                result.first_audio_seconds.append(now - started)
            else:
                result.in_time.append(now - first <= received / BYTES_PER_SECOND)
            received += len(chunk)
    seconds = received / BYTES_PER_SECOND
    result.speech_seconds += seconds
    result.real_time_factors.append((time.perf_counter() - started) / seconds)


async def run_load(url: str, bodies: Sequence[SpeechBody], clients: int) -> LoadResult:
    """All requests, by so many clients that each ask again when answered."""
    result, waiting = LoadResult(), list(reversed(bodies))
    cpu, started = serve_cpu_seconds(), time.perf_counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:

        async def client() -> None:
            while waiting:
                await send_request(http, url, waiting.pop(), result)

        await asyncio.gather(*(client() for _ in range(clients)))
    result.wall_seconds, result.cpu_seconds = (
        time.perf_counter() - started,
        serve_cpu_seconds() - cpu,
    )
    return result


def compare_with_engine(
    model: str, sentences: Sequence[str], prompt: np.ndarray, rounds: int
) -> list[float]:
    """Frames a second of the AR deployment over those of its bare engine, 16 streams each."""
    handle = serve.get_deployment_handle("AR", "valle")
    torch.set_num_threads(1)
    version = registry.pin(model)
    bare = OfflineSynthesizer(
        registry.load_synthesizer(registry.resolve(version)), Synthesis(), slots=MAX_BATCH,
        max_phonemes=1000,
    )  # fmt: skip
    ratios = []
    for number in range(rounds):
        requests = [
            Request(
                id=f"{number}/{n}", phonemes=phoneme_ids(text, "en-us"), prompt=prompt,
                sampling=Synthesis().ar, max_frames=4 * FRAME_RATE, seed=n,
            )
            for n, text in enumerate(sentences[:MAX_BATCH])
        ]  # fmt: skip
        started = time.perf_counter()
        responses = [handle.generate.remote(version, request) for request in requests]
        frames = sum(len(response.result().codes) for response in responses)
        served = frames / (time.perf_counter() - started)
        started = time.perf_counter()
        frames = sum(map(len, bare.first_codebooks(requests).values()))
        ratios.append(served / (frames / (time.perf_counter() - started)))
    return ratios


def table(results: dict[tuple[str, int], list[LoadResult]]) -> list[dict[str, Any]]:
    """A row a variant and number of clients, with medians over the rounds."""
    rows = []
    for (variant, clients), rounds in results.items():
        first = sorted(value for result in rounds for value in result.first_audio_seconds)
        on_time = [value for result in rounds for value in result.in_time]
        base = results["one at a time", clients]
        pairs = zip(rounds, base, strict=True)
        rows.append(
            {
                "variant": variant,
                "clients": clients,
                "first_audio_p50": round(statistics.median(first), 2),
                "first_audio_p95": round(float(np.quantile(first, 0.95)), 2),
                "real_time_factor": round(
                    statistics.median(
                        value for result in rounds for value in result.real_time_factors
                    ),
                    2,
                ),
                "speech_per_second": round(
                    statistics.median(result.speech_per_second for result in rounds), 2
                ),
                "speedup_over_unbatched": round(
                    statistics.median(a.speech_per_second / b.speech_per_second for a, b in pairs),
                    2,
                ),
                "speech_per_cpu_second": round(
                    statistics.median(
                        result.speech_seconds / result.cpu_seconds for result in rounds
                    ),
                    2,
                ),
                "chunks_in_time": round(float(np.mean(on_time)), 3) if on_time else None,
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """First audio and throughput over the number of clients."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, label in (
        (axes[0], "first_audio_p50", "seconds to the first audio, median"),
        (axes[1], "speech_per_second", "seconds of speech a second"),
    ):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            mine = [row for row in rows if row["variant"] == variant]
            axis.plot([r["clients"] for r in mine], [r[key] for r in mine], "o-", label=variant)
        axis.set(xlabel="clients", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks([row["clients"] for row in rows], [str(row["clients"]) for row in rows])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=4, help="a client and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-chunks", type=int, nargs="*", default=[], help="sizes to compare")
    parser.add_argument("--items", default="quick", help="evaluation set to take sentences from")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--plot", type=Path, help="picture to write")
    arguments = parser.parse_args(argv)
    model = registry.pin(arguments.model)
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    sentences = [item.text for item in load_items(arguments.items)]
    recording = storage.read_bytes(storage.join(voices, "joe.wav"))
    url = f"http://127.0.0.1:{arguments.port}"
    variants = {
        "in chunks": (f"{url}/v1/audio/speech", True),
        "whole sentences": (f"{url}/v1/audio/speech", False),
        "one at a time": (f"{url}/one/", False),
        "serve.batch": (f"{url}/batch/", False),
    }
    results: dict[tuple[str, int], list[LoadResult]] = {
        (variant, clients): [] for clients in arguments.clients for variant in variants
    }

    def make_bodies(count: int, chunked: bool) -> list[SpeechBody]:
        return [
            SpeechBody(input=sentences[n % len(sentences)], seed=n, voice="joe", chunked=chunked)
            for n in range(count)
        ]

    def deploy(args: AppArgs) -> None:
        serve.run(build_app(args), name="valle")

    with connect():
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        same = {"model": model, "voices": voices, "max_replicas": 1, "slots": MAX_BATCH}
        deploy(AppArgs.model_validate(same))
        baseline_arguments = (model, settings.read().tracking_uri, recording)
        for name, app in baseline_apps(*baseline_arguments).items():
            serve.run(app, name=name, route_prefix=f"/{name}")
        for address, chunked in variants.values():  # warm
            asyncio.run(run_load(address, make_bodies(2, chunked), 2))
        with progress_bar(
            total=arguments.rounds * len(results), label="bench.serve", unit="run"
        ) as bar:
            for _ in range(arguments.rounds):
                for (variant, clients), rounds in results.items():
                    address, chunked = variants[variant]
                    count = arguments.requests * clients
                    rounds.append(
                        asyncio.run(run_load(address, make_bodies(count, chunked), clients))
                    )
                    bar.update()
        synthesizer = registry.load_synthesizer(registry.resolve(model))
        prompt = synthesizer.encode_prompt(audio.read(recording, max_seconds=30), Synthesis())
        ratios = compare_with_engine(model, sentences, prompt, 3)
        sweep = {}
        for size in arguments.first_chunks:
            deploy(AppArgs.model_validate({**same, "first_chunk": size}))
            asyncio.run(run_load(variants["in chunks"][0], make_bodies(2, True), 2))
            sweep[size] = [
                asyncio.run(
                    run_load(variants["in chunks"][0], make_bodies(arguments.requests * n, True), n)
                )
                for n in arguments.clients
            ]
        serve.shutdown()
    rows = table(results)
    report = {
        "model": model, "rows": rows,
        "served_over_bare_engine": [round(ratio, 3) for ratio in ratios],
        "first_chunk_sweep": {
            size: {
                clients: {
                    "first_audio_p50": round(statistics.median(result.first_audio_seconds), 2),
                    "speech_per_second": round(result.speech_per_second, 2),
                    "chunks_in_time": round(float(np.mean(result.in_time)), 3),
                }
                for clients, result in zip(arguments.clients, per_clients, strict=True)
            }
            for size, per_clients in sweep.items()
        },
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
