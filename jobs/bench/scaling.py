"""Autoscaling: replicas over time while clients come and go, on several Ray nodes of this machine.

    python -m valle.jobs.bench.scaling

One client, then many, then one again. Reports when each deployment had how many replicas, and the
time to the first audio before, during and after the load.
"""

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray import serve

from valle.jobs.bench.clients import SPEECH_ROUTE, run_load_for
from valle.jobs.bench.command_line import build_parser, endpoint_args, print_report
from valle.jobs.evaluation.items import load_items
from valle.serve.deployments.handles import APP_NAME
from valle.serve.run import endpoint


class ReplicaMonitor:
    """A thread that records every change in the number of running replicas of each deployment."""

    def __init__(self) -> None:
        self.changes: dict[str, list[tuple[float, int]]] = {}
        """By deployment, (seconds since the start, running replicas)."""
        self._stop = threading.Event()
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(0.25):
            for name, status in serve.status().applications[APP_NAME].deployments.items():
                running = next((n for s, n in status.replica_states.items() if s == "RUNNING"), 0)
                changes = self.changes.setdefault(name, [])
                if not changes or changes[-1][1] != running:
                    changes.append((round(self.elapsed, 1), running))


@contextmanager
def local_nodes(count: int) -> Iterator[None]:
    """A Ray cluster of `count` one-core nodes on this machine; a connection to Ray that exists
    already is used as it is, as by `connect()`."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        yield
        return
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(
    url: str, sentences: Sequence[str], phases: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Loads the endpoint in phases of (clients, seconds); returns a row for each phase, and the
    changes in the number of replicas."""
    monitor = ReplicaMonitor()
    rows = []
    try:
        for clients, seconds in phases:
            started = monitor.elapsed
            load = run_load_for(seconds, url + SPEECH_ROUTE, sentences, clients, voice="joe")
            first_audio = asyncio.run(load).first_audio_seconds
            last_third = first_audio[-max(1, len(first_audio) // 3) :]
            rows.append(
                {
                    "started_at": round(started, 1),
                    "clients": clients,
                    "responses": len(first_audio),
                    "first_audio_p50": round(statistics.median(first_audio), 2),
                    "first_audio_p50_last_third": round(statistics.median(last_third), 2),
                }
            )
    finally:
        monitor.close()
    return {"phases": rows, "replica_changes": monitor.changes}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, serves=True)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16, help="during the load")
    parser.add_argument("--before", type=float, default=10, help="seconds of one client before it")
    parser.add_argument("--seconds", type=float, default=60, help="of the load")
    parser.add_argument("--after", type=float, default=40, help="seconds of one client after it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its report."""
    arguments = parse_arguments(argv)
    args = endpoint_args(
        arguments.model, slots=4, max_replicas=4, upscale_delay_s=2, downscale_delay_s=10
    )
    sentences = [item.text for item in load_items("quick")]
    phases = (
        (1, arguments.before),
        (arguments.clients, arguments.seconds),
        (1, arguments.after),
    )
    with local_nodes(arguments.nodes), endpoint(args, arguments.port) as url:
        report = measure(url, sentences, phases)
    print_report({"nodes": arguments.nodes, **report})


if __name__ == "__main__":
    main()
