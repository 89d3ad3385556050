"""Replicas over time while clients come and go, on a Ray cluster of several nodes on this machine.

    python -m valle.jobs.bench.scaling

One client, then many, then one again. Reports when each deployment had how many replicas, and how
long the first sound took before, during and after.
"""

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
from ray import serve
from ray.cluster_utils import Cluster

from valle.jobs.bench.baselines import SpeechBody
from valle.jobs.bench.serve import LoadResult, send_request
from valle.jobs.evaluation.items import load_items
from valle.jobs.starter_voices import make_starter_voices
from valle.platform import registry, settings
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs


class ReplicaMonitor:
    """Notes every change in the number of running replicas of each deployment."""

    def __init__(self) -> None:
        self.changes: dict[str, list[tuple[float, int]]] = {}
        self._stop = threading.Event()
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def close(self) -> None:
        """Looks no more."""
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(0.25):
            for name, status in serve.status().applications["valle"].deployments.items():
                running = next((n for s, n in status.replica_states.items() if s == "RUNNING"), 0)
                changes = self.changes.setdefault(name, [])
                if not changes or changes[-1][1] != running:
                    changes.append((round(self.elapsed, 1), running))


async def run_clients(url: str, sentences: Sequence[str], count: int, seconds: float) -> LoadResult:
    """So many clients for so long, each asking again when answered."""
    result, end = LoadResult(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(timeout=300) as http:
            while time.perf_counter() < end:
                body = SpeechBody(input=sentences[number % len(sentences)], voice="joe")
                await send_request(http, url, body, result)
                number += count

    await asyncio.gather(*(client(number) for number in range(count)))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    import ray

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16, help="at the busy time")
    parser.add_argument("--seconds", type=float, default=60, help="of the busy time")
    parser.add_argument("--port", type=int, default=8100)
    arguments = parser.parse_args(argv)
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    model = registry.pin(arguments.model)
    sentences = [item.text for item in load_items("quick")]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(arguments.nodes - 1):
        cluster.add_node(num_cpus=1)
    report: dict[str, Any] = {"nodes": arguments.nodes, "phases": []}
    try:
        ray.init(address=cluster.address, logging_level="warning")
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        args = AppArgs(
            model=model, voices=voices, slots=4, max_replicas=4, upscale_delay_s=2,
            downscale_delay_s=10,
        )  # fmt: skip
        serve.run(build_app(args), name="valle")
        url = f"http://127.0.0.1:{arguments.port}/v1/audio/speech"
        monitor = ReplicaMonitor()
        for count, seconds in ((1, 10), (arguments.clients, arguments.seconds), (1, 40)):
            started = monitor.elapsed
            result = asyncio.run(run_clients(url, sentences, count, seconds))
            report["phases"].append(
                {
                    "started_at": round(started, 1),
                    "clients": count,
                    "responses": len(result.first_audio_seconds),
                    "first_audio_p50": round(statistics.median(result.first_audio_seconds), 2),
                    "first_audio_p50_last_third": round(
                        statistics.median(
                            result.first_audio_seconds[
                                -max(1, len(result.first_audio_seconds) // 3) :
                            ]
                        ),
                        2,
                    ),
                }
            )
        monitor.close()
        report["replica_changes"] = monitor.changes
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
