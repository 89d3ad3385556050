"""Two ingress replicas on Ray Serve: limits that hold over both, and one killed under load."""

import hashlib
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from helpers import clusters

from valle.jobs.bench.replicas import replica_processes
from valle.serve.app_args import AppArgs

N_CLIENTS = 4

BODY = {"input": "hello", "voice": "ann", "response_format": "pcm", "seed": 1}

pytestmark = pytest.mark.ray


@pytest.fixture
def app_args(tmp_path_factory: pytest.TempPathFactory) -> AppArgs:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("busy", "rare")}
    limits = {"busy": "requests_per_minute: 100000, concurrent: 100", "rare": "concurrent: 9"}
    limits["rare"] += ", requests_per_minute: 6"
    file.write_text(
        "\n".join(f"- {{name: {n}, sha256: '{digests[n]}', {limits[n]}}}" for n in digests)
    )
    return AppArgs(
        voices="voices",
        max_replicas=1,
        ingress_replicas=2,
        max_sentence_seconds=1.0,
        registry_poll_seconds=5.0,
        api_keys=str(file),
    )


def get(endpoint: str, path: str, key: str) -> httpx.Response:
    return httpx.get(f"{endpoint}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=60)


def replicas_that_answer(endpoint: str) -> set[str]:
    """The replicas that a few requests for metrics reach."""
    texts = [get(endpoint, "/metrics", "busy").text for _ in range(20)]
    return {text.partition('replica="')[2].partition('"')[0] for text in texts}


class Load:
    """Clients that send one request after another, each on a connection of its own."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self.stop = threading.Event()
        self.outcomes: list[tuple[float, float, str]] = []
        """Begin, end, and status or error of each request."""

    def send(self) -> None:
        while not self.stop.is_set():
            begin = time.monotonic()
            try:
                headers = {"Authorization": "Bearer busy"}
                url = f"{self._endpoint}/v1/audio/speech"
                response = httpx.post(url, json=BODY, headers=headers, timeout=60)
                outcome = str(response.status_code)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self.outcomes.append((begin, time.monotonic(), outcome))


def test_limits_hold_over_both_replicas(endpoint: str) -> None:
    clusters.wait_for(lambda: len(replicas_that_answer(endpoint)) == 2, 60, "two replicas")
    statuses = Counter(get(endpoint, "/v1/audio/voices", "rare").status_code for _ in range(12))
    assert statuses == {200: 6, 429: 6}


def test_a_killed_ingress_replica_takes_only_its_own_requests(endpoint: str, home: Path) -> None:
    clusters.wait_for(lambda: len(replicas_that_answer(endpoint)) == 2, 60, "two replicas")
    load = Load(endpoint)
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        try:
            for _ in range(N_CLIENTS):
                pool.submit(load.send)
            clusters.wait_for(lambda: len(load.outcomes) >= 10, 60, "the load")
            victim = replica_processes("Ingress")[0]
            killed = time.monotonic()
            os.kill(victim.pid, signal.SIGKILL)
            clusters.wait_for(
                lambda: sum(begin > killed for begin, _, _ in load.outcomes) >= 30, 120, "30 more"
            )
            clusters.wait_for(lambda: len(replica_processes("Ingress")) == 2, 60, "a new replica")
        finally:
            load.stop.set()
    before = [outcome for begin, _, outcome in load.outcomes if begin <= killed]
    after = [outcome for begin, _, outcome in load.outcomes if begin > killed]
    lost = [outcome for outcome in before if outcome != "200"]
    next_success = min(e for b, e, outcome in load.outcomes if b > killed and outcome == "200")
    assert len(lost) <= N_CLIENTS, lost  # those that were in flight
    assert set(after[N_CLIENTS:]) == {"200"}, Counter(after)
    (home / "killed_ingress.txt").write_text(
        f"lost in flight {len(lost)} {lost}, begun after the kill {Counter(after)}, next success "
        f"after {next_success - killed:.2f} s, requests {len(load.outcomes)}\n"
    )
    clusters.wait_for(lambda: len(replicas_that_answer(endpoint)) == 2, 60, "both replicas")
