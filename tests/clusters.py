"""Ray for tests: a cluster of one's own, stopped by the handle that started it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

NO_AUTH = {"RAY_AUTH_MODE": "disabled"}
"""For a head and its clients alike: half of it set is a connection that hangs. Loopback only."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def embedded(num_cpus: int = 4) -> Iterator[None]:
    """Ray inside this process, with a temp-dir of its own."""
    import ray

    # the path of a unix socket has room for 107 characters: pytest's folders are too deep
    folder = tempfile.mkdtemp(prefix="valle-ray-")
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=folder,
        object_store_memory=300_000_000, log_to_driver=True,
        runtime_env={"env_vars": {
            "VALLE_CACHE": os.environ["VALLE_CACHE"], "VALLE_HOME": os.environ["VALLE_HOME"],
        }},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started(num_cpus: int = 4) -> Iterator[str]:
    """A head started by `ray start`; yields the address of its job server."""
    folder = tempfile.mkdtemp(prefix="valle-ray-")
    ports = [free_port() for _ in range(8)]
    names = (
        "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port", "metrics-export-port", "node-manager-port",
        "object-manager-port",
    )  # fmt: skip
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    ray = Path(sys.executable).parent / "ray"
    with (Path(folder) / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [
                str(ray), "start", "--head", "--block", f"--num-cpus={num_cpus}",
                f"--temp-dir={folder}", "--disable-usage-stats",
                "--object-store-memory=300000000", *options,
            ],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | NO_AUTH,
        )  # fmt: skip
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_for(lambda: answers(f"{address}/api/version"), 120, "the job server")
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def slots_wanted() -> int:
    """Requests that the endpoint's AR deployment runs or keeps waiting."""
    from ray import serve

    ar = serve.get_deployment_handle("AR", "valle")
    return int(ar.record_autoscaling_stats.remote().result(timeout_s=10)["slots_wanted"])


def idle() -> bool:
    """Whether it has had nothing to do for a second: between two sentences it is idle too."""
    return not any(time.sleep(0.05) or slots_wanted() for _ in range(20))


def answers(url: str) -> bool:
    """Whether a server gives 200."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: object, seconds: float, what: str) -> None:
    """Polls `condition` until it holds; fails with what was waited for."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
