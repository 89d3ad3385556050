"""The processes behind an endpoint on a Ray that this process has started: who they are, what they
have used. (Others may serve on the same machine; a cluster's own replicas are not seen.)"""

import contextlib
from collections.abc import Iterator

import psutil

REPLICA_TITLE = "ray::ServeReplica:valle:"


def replica_processes(deployment: str = "") -> list[psutil.Process]:
    """Processes of all replicas, or of those of one deployment."""
    return [process for process, name in _named(REPLICA_TITLE) if deployment in ("", name)]


def replica_memory() -> dict[str, float]:
    """Megabytes of each replica, by deployment and process number."""
    megabytes = {}
    for process, deployment in _named(REPLICA_TITLE):
        with contextlib.suppress(psutil.NoSuchProcess):
            megabytes[f"{deployment} {process.pid}"] = round(process.memory_info().rss / 1e6, 1)
    return megabytes


def serve_cpu_seconds() -> float:
    """Of every application's replicas and of the proxies, so far."""
    total = 0.0
    for start in ("ray::ServeReplica:", "ray::ProxyActor"):
        for process, _ in _named(start):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _named(start: str) -> Iterator[tuple[psutil.Process, str]]:
    """Processes whose title starts so, and what comes next in it: up to the method that an actor
    works on, which Ray appends after a dot."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            title = " ".join(process.cmdline())
            if title.startswith(start):
                yield process, title.removeprefix(start).split(".")[0].split(" ")[0]
