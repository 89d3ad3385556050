"""Processes of the replicas of an endpoint: which they are, their memory and their CPU time.

Only descendants of this process are counted, so an endpoint of another program on the same machine
is left out; a cluster at an address runs elsewhere and has no process here.
"""

import contextlib
from collections.abc import Iterator

import psutil

from valle.serve.deployments.handles import APP_NAME

REPLICA_TITLE = f"ray::ServeReplica:{APP_NAME}:"
"""Beginning of the process title that Ray gives to a replica; the deployment's name follows."""


def replica_processes(deployment: str = "") -> list[psutil.Process]:
    """Processes of all replicas, or of those of one deployment."""
    return [process for process, name in _titled(REPLICA_TITLE) if deployment in ("", name)]


def replica_memory() -> dict[str, float]:
    """Resident megabytes of each replica, by deployment and process id."""
    megabytes = {}
    for process, deployment in _titled(REPLICA_TITLE):
        with contextlib.suppress(psutil.NoSuchProcess):
            megabytes[f"{deployment} {process.pid}"] = round(process.memory_info().rss / 1e6, 1)
    return megabytes


def serve_cpu_seconds() -> float:
    """CPU seconds so far of the replicas of every application and of the proxies."""
    total = 0.0
    for prefix in ("ray::ServeReplica:", "ray::ProxyActor"):
        for process, _ in _titled(prefix):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _titled(prefix: str) -> Iterator[tuple[psutil.Process, str]]:
    """Processes whose title begins with `prefix`, each with the next word of its title.

    While an actor runs a method, Ray appends the method's name after a dot.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            title = " ".join(process.cmdline())
            if title.startswith(prefix):
                yield process, title.removeprefix(prefix).split(".")[0].split(" ")[0]
