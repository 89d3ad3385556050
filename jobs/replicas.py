"""The processes behind an endpoint on this machine: who they are, what they have used."""

import contextlib

import psutil

APP = "ray::ServeReplica:valle:"


def replicas(deployment: str = "") -> list[psutil.Process]:
    """Processes of this machine's replicas, or of those of one deployment."""
    return [p for p in psutil.process_iter() if _name(p).startswith(APP + deployment)]


def memory() -> dict[str, float]:
    """Megabytes of each replica, by deployment and process number."""
    found = {}
    for process in replicas():
        deployment = _name(process).removeprefix(APP).split()[0]
        found[f"{deployment} {process.pid}"] = round(process.memory_info().rss / 1e6, 1)
    return found


def cpu_seconds() -> float:
    """Of every application's replicas and of the proxies, so far."""
    total = 0.0
    for process in psutil.process_iter():
        if _name(process).startswith(("ray::ServeReplica", "ray::ProxyActor")):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""
