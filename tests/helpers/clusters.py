"""Ray clusters for tests, each with its own ports and folder, stopped by what started it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from valle.platform import settings

NO_AUTH = {"RAY_AUTH_MODE": "disabled"}
"""For a head and for its clients: set on one side only, a connection hangs. Loopback only."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def embedded_cluster(num_cpus: int = 4, num_gpus: int = 0) -> Iterator[None]:
    """A Ray cluster embedded in this process, in its own folder; Ray only counts its GPUs."""
    import ray

    # a unix socket's path has at most 107 characters: pytest's folders are too deep
    folder = tempfile.mkdtemp(prefix="valle-ray-")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=300_000_000,
        log_to_driver=True,
        runtime_env={"env_vars": settings.worker_environment()},
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Head:
    """A running head node."""

    jobs: str
    """Address of the job server and of the state API."""

    gcs: str
    """Address that other nodes join."""


@contextmanager
def _started(
    name: str, folder: str, options: Sequence[str], env: Mapping[str, str]
) -> Iterator[None]:
    """Runs `ray start`; all its processes are one process group, which is terminated at the end."""
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "start", "--block", "--disable-usage-stats", *options]
    log = Path(folder) / f"{name}.log"
    with log.open("wb") as output:
        node = subprocess.Popen(
            [*command, "--object-store-memory=300000000"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **NO_AUTH, **env},
        )
    try:
        # the job server answers before the autoscaler runs
        wait_for(lambda: "Ray runtime started" in log.read_text(), 120, f"{log}")
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(timeout=60)


@contextmanager
def head(
    num_cpus: int = 4, *, autoscaling: Mapping[str, Any] | None = None, **env: str
) -> Iterator[Head]:
    """A head node started by `ray start`, without GPUs; `autoscaling`: a cluster configuration."""
    folder = tempfile.mkdtemp(prefix="valle-ray-")
    ports = [free_port() for _ in range(8)]
    names = (
        "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port", "metrics-export-port", "node-manager-port",
        "object-manager-port",
    )  # fmt: skip
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    options += [f"--num-cpus={num_cpus}", "--num-gpus=0", f"--temp-dir={folder}"]
    if autoscaling:
        provider = {**autoscaling["provider"], "gcs_address": f"127.0.0.1:{ports[0]}"}
        path = Path(folder) / "cluster.json"
        path.write_text(json.dumps({**autoscaling, "provider": provider}))
        options.append(f"--autoscaling-config={path}")
    ready_head = Head(f"http://127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}")
    try:
        with _started("head", folder, ["--head", *options], env):
            wait_for(lambda: responds(f"{ready_head.jobs}/api/version"), 120, "the job server")
            yield ready_head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def worker_node(
    cluster_head: Head, num_cpus: int, num_gpus: int, labels: str = "", **env: str
) -> Iterator[None]:
    """Another node on this machine, with labels such as `role=train`; Ray only counts its GPUs."""
    folder = tempfile.mkdtemp(prefix="valle-ray-")
    options = [
        f"--address={cluster_head.gcs}",
        f"--num-cpus={num_cpus}",
        f"--num-gpus={num_gpus}",
        f"--temp-dir={folder}",
        f"--labels={labels}",
    ]
    try:
        with _started("node", folder, options, env):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def autoscaling_head(resources: Mapping[str, float], max_nodes: int) -> Iterator[Head]:
    """A head node without CPUs, with an autoscaler whose fake provider may start up to `max_nodes`
    nodes with these resources on this machine."""
    identity = "f" * 51 + "00000"  # of the head, for the fake provider
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    memory = {"object_store_memory": 300_000_000}
    empty = (
        "setup_commands", "head_setup_commands", "worker_setup_commands",
        "initialization_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files",
    )  # fmt: skip
    configuration = {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "idle_timeout_minutes": 5,
        "auth": {},
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": provider,
            "head_node_id": identity,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {**resources, **memory},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        **{name: [] for name in empty},
    }
    with head(
        0,
        autoscaling=configuration,
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=identity,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=identity,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    ) as ready_head:
        yield ready_head


@contextmanager
def job_server(num_cpus: int = 4) -> Iterator[str]:
    """A head node started by `ray start`; yields the address of its job server."""
    with head(num_cpus) as ready_head:
        yield ready_head.jobs


def slot_demand() -> int:
    """Number of requests that the AR deployment runs or queues."""
    from ray import serve

    from valle.serve.deployments.handles import APP_NAME, AR

    ar = serve.get_deployment_handle(AR, APP_NAME)
    return int(ar.record_autoscaling_stats.remote().result(timeout_s=10)["slot_demand"])


def endpoint_idle() -> bool:
    """True if the AR deployment is idle for a second; between two sentences it is idle for less."""
    return not any(time.sleep(0.05) or slot_demand() for _ in range(20))


def audio_seconds(endpoint: str) -> float:
    """Seconds of speech that the endpoint has synthesized for responses that have ended; of one
    ingress replica."""
    metrics = httpx.get(f"{endpoint}/metrics", timeout=60).text
    [line] = [x for x in metrics.splitlines() if x.startswith("valle_audio_seconds_total{replica=")]
    return float(line.split()[1])


def responds(url: str) -> bool:
    """True if a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: object, seconds: float, what: str) -> None:
    """Polls `condition` until it holds; fails after `seconds`, naming `what`."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
