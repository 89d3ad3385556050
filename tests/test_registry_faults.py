"""The endpoint while its MLflow server is killed: under load, and with replicas that start anew."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from helpers import clusters
from helpers.mlflow_servers import MlflowServer

from valle.jobs.bench.replicas import replica_processes
from valle.jobs.publish import PublishRecipe, publish
from valle.serve.app_args import AppArgs

pytestmark = [pytest.mark.ray, pytest.mark.faults]

BODY = {"input": "Hello there.", "voice": "ann", "seed": 1, "response_format": "pcm"}


@contextmanager
def load(url: str) -> Iterator[list[httpx.Response | Exception]]:
    """Four clients that send request after request; yields what they got."""
    results: list[httpx.Response | Exception] = []
    stop = threading.Event()

    def run_client() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                try:
                    results.append(client.post("/v1/audio/speech", json=BODY))
                except httpx.HTTPError as error:
                    results.append(error)

    with ThreadPoolExecutor(4) as clients:
        for _ in range(4):
            clients.submit(run_client)
        try:
            clusters.wait_for(lambda: len(results) > 8, 60, "the first responses")
            yield results
        finally:
            stop.set()


def lost(results: list[httpx.Response | Exception]) -> int:
    return sum(isinstance(r, Exception) or r.status_code != 200 for r in results)


def served(results: list[httpx.Response | Exception]) -> str:
    last = results[-1]
    return "" if isinstance(last, Exception) else last.headers.get("x-model", "").split("#")[0]


def test_an_endpoint_outlives_its_registry(
    ray_cluster: None,
    mlflow_server: MlflowServer,
    publish_recipe: PublishRecipe,
    home: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Killed under load: no request is lost. Replicas that are killed meanwhile come back from the
    node's cache. With the registry back, the alias moves on."""
    from valle.serve.run import endpoint

    version = publish(publish_recipe).version
    args = AppArgs(
        voices=str(home / "voices"),
        tracking_uri=mlflow_server.address,
        max_replicas=1,
        max_sentence_seconds=1.0,
        registry_poll_seconds=0.5,
    )
    with endpoint(args, clusters.free_port()) as url:
        with load(url) as results:
            mlflow_server.kill()
            n = len(results)
            clusters.wait_for(lambda: len(results) > n + 40, 120, "responses without MLflow")
        record_property("requests, MLflow killed under load", (len(results), lost(results)))
        assert lost(results) == 0 and served(results) == f"models:/valle/{version}"

        old = replica_processes()
        for process in old:  # ingress, AR, NAR, codec
            os.kill(process.pid, signal.SIGKILL)
        started = time.monotonic()

        def speaks() -> bool:
            try:
                return httpx.post(f"{url}/v1/audio/speech", json=BODY, timeout=60).is_success
            except httpx.HTTPError:
                return False

        clusters.wait_for(speaks, 180, "replicas from the node's cache")
        record_property("seconds until the next success", time.monotonic() - started)
        assert not {p.pid for p in old} & {p.pid for p in replica_processes()}
        assert httpx.get(f"{url}/health/ready", timeout=60).json()["status"] == "ready"

        mlflow_server.start()
        assert publish(publish_recipe).version == version + 1
        with load(url) as results:
            started = time.monotonic()
            clusters.wait_for(lambda: served(results) == f"models:/valle/{version + 1}", 180, "it")
            record_property("seconds until the alias has moved", time.monotonic() - started)
        assert lost(results) == 0
