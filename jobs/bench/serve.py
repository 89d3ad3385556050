"""Speech over HTTP: ours against a lock and against `@serve.batch`, in one run on one Ray.

    python -m valle.jobs.bench.serve --clients 1 4 16 --plot docs/bench-serve.png

The opponents are what one writes first: replicas that speak one request at a time, and replicas
whose `@serve.batch` speaks what has come in together; three of each, as ours is three processes.
They run the same weights with the same engine code, each on one torch thread. Clients ask for
sentences one after the other, read 16-bit samples as they come and note when: first audio,
real-time factor, and the share of chunks that were there before playback needed them. Ways take
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

from valle.jobs.bench.baselines import TOGETHER, Ask, applications
from valle.jobs.bench.replicas import cpu_seconds
from valle.jobs.evaluation.items import load_items
from valle.jobs.starter_voices import make_starter_voices
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.model.valle import Synthesis, text_ids
from valle.platform import audio, registry, settings, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress
from valle.serve.app import build_app
from valle.serve.engine.offline import Offline
from valle.serve.engine.request import Request
from valle.serve.web.schema import AppArgs

BYTES_A_SECOND = 2 * SAMPLE_RATE


@dataclass
class Run:
    """What the clients of one way saw in one round."""

    wall: float = 0.0
    cpu: float = 0.0
    first: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    speech: float = 0.0
    in_time: list[bool] = field(default_factory=list)

    @property
    def speech_per_second(self) -> float:
        """Seconds of speech a second, all clients together."""
        return self.speech / self.wall


async def ask_once(http: httpx.AsyncClient, url: str, ask: Ask, run: Run) -> None:
    """One request; a chunk is in time if it is there when all before it has been played."""
    started = time.perf_counter()
    first, received = 0.0, 0
    async with http.stream("POST", url, json=ask.model_dump()) as answer:
        answer.raise_for_status()
        async for chunk in answer.aiter_raw():
            now = time.perf_counter()
            if not received:
                first = now
                run.first.append(now - started)
            else:
                run.in_time.append(now - first <= received / BYTES_A_SECOND)
            received += len(chunk)
    seconds = received / BYTES_A_SECOND
    run.speech += seconds
    run.factors.append((time.perf_counter() - started) / seconds)


async def load(url: str, asks: Sequence[Ask], clients: int) -> Run:
    """All requests, by so many clients that each ask again when answered."""
    run, waiting = Run(), list(reversed(asks))
    cpu, started = cpu_seconds(), time.perf_counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:

        async def client() -> None:
            while waiting:
                await ask_once(http, url, waiting.pop(), run)

        await asyncio.gather(*(client() for _ in range(clients)))
    run.wall, run.cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return run


def against_engine(
    model: str, sentences: Sequence[str], prompt: np.ndarray, rounds: int
) -> list[float]:
    """Frames a second of the AR deployment over those of its bare engine, 16 streams each."""
    handle = serve.get_deployment_handle("AR", "valle")
    torch.set_num_threads(1)
    version = registry.pin(model)
    bare = Offline(
        registry.load_voice(registry.resolve(version)), Synthesis(), slots=TOGETHER,
        max_phonemes=1000,
    )  # fmt: skip
    ratios = []
    for number in range(rounds):
        requests = [
            Request(
                id=f"{number}/{n}", phonemes=text_ids(text, "en-us"), prompt=prompt,
                sampling=Synthesis().ar, max_frames=4 * FRAME_RATE, seed=n,
            )
            for n, text in enumerate(sentences[:TOGETHER])
        ]  # fmt: skip
        started = time.perf_counter()
        answers = [handle.generate.remote(version, request) for request in requests]
        frames = sum(len(answer.result()[0]) for answer in answers)
        served = frames / (time.perf_counter() - started)
        started = time.perf_counter()
        frames = sum(map(len, bare.first_codebooks(requests).values()))
        ratios.append(served / (frames / (time.perf_counter() - started)))
    return ratios


def table(runs: dict[tuple[str, int], list[Run]]) -> list[dict[str, Any]]:
    """A row a way and number of clients, with medians over the rounds."""
    rows = []
    for (way, clients), found in runs.items():
        first = sorted(value for run in found for value in run.first)
        on_time = [value for run in found for value in run.in_time]
        base = runs["one at a time", clients]
        pairs = zip(found, base, strict=True)
        rows.append(
            {
                "way": way,
                "clients": clients,
                "first_audio_p50": round(statistics.median(first), 2),
                "first_audio_p95": round(float(np.quantile(first, 0.95)), 2),
                "real_time_factor": round(
                    statistics.median(value for run in found for value in run.factors), 2
                ),
                "speech_per_second": round(
                    statistics.median(run.speech_per_second for run in found), 2
                ),
                "times_one_at_a_time": round(
                    statistics.median(a.speech_per_second / b.speech_per_second for a, b in pairs),
                    2,
                ),
                "speech_per_cpu_second": round(
                    statistics.median(run.speech / run.cpu for run in found), 2
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
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = [row for row in rows if row["way"] == way]
            axis.plot([r["clients"] for r in mine], [r[key] for r in mine], "o-", label=way)
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
    model = registry.pin(registry.absolute(arguments.model))
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    sentences = [item.text for item in load_items(arguments.items)]
    recording = storage.read_bytes(storage.join(voices, "joe.wav"))
    url = f"http://127.0.0.1:{arguments.port}"
    ways = {
        "in chunks": (f"{url}/v1/audio/speech", True),
        "whole sentences": (f"{url}/v1/audio/speech", False),
        "one at a time": (f"{url}/one/", False),
        "serve.batch": (f"{url}/batch/", False),
    }
    runs: dict[tuple[str, int], list[Run]] = {
        (way, clients): [] for clients in arguments.clients for way in ways
    }

    def asks(count: int, chunked: bool) -> list[Ask]:
        return [
            Ask(input=sentences[n % len(sentences)], seed=n, voice="joe", chunked=chunked)
            for n in range(count)
        ]

    def deploy(args: AppArgs) -> None:
        serve.run(build_app(args), name="valle")

    with connect():
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        same = {"model": model, "voices": voices, "max_replicas": 1, "slots": TOGETHER}
        deploy(AppArgs.model_validate(same))
        given = (model, settings.read().tracking_uri, recording)
        for name, app in applications(*given).items():
            serve.run(app, name=name, route_prefix=f"/{name}")
        for address, chunked in ways.values():  # warm
            asyncio.run(load(address, asks(2, chunked), 2))
        with progress(total=arguments.rounds * len(runs), label="bench_serve", unit="run") as bar:
            for _ in range(arguments.rounds):
                for (way, clients), found in runs.items():
                    address, chunked = ways[way]
                    count = arguments.requests * clients
                    found.append(asyncio.run(load(address, asks(count, chunked), clients)))
                    bar.update()
        voice = registry.load_voice(registry.resolve(model))
        prompt = voice.encode_prompt(audio.read(recording, max_seconds=30), Synthesis())
        ratios = against_engine(model, sentences, prompt, 3)
        sweep = {}
        for size in arguments.first_chunks:
            deploy(AppArgs.model_validate({**same, "first_chunk": size}))
            asyncio.run(load(ways["in chunks"][0], asks(2, True), 2))
            sweep[size] = [
                asyncio.run(load(ways["in chunks"][0], asks(arguments.requests * n, True), n))
                for n in arguments.clients
            ]
        serve.shutdown()
    rows = table(runs)
    report = {
        "model": model, "rows": rows,
        "served_over_bare_engine": [round(ratio, 3) for ratio in ratios],
        "first_chunk_sweep": {
            size: {
                clients: {
                    "first_audio_p50": round(statistics.median(run.first), 2),
                    "speech_per_second": round(run.speech_per_second, 2),
                    "chunks_in_time": round(float(np.mean(run.in_time)), 3),
                }
                for clients, run in zip(arguments.clients, found, strict=True)
            }
            for size, found in sweep.items()
        },
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
