"""The address that the cluster's Serve listens on, and how many ingress replicas it needs."""

import ray
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client

SEVERAL_CPUS = 8
"""CPUs of a cluster on which a second ingress replica takes nothing from the models."""


def listening_host() -> str | None:
    """Address that Serve's proxies listen on, or will; None for no HTTP.

    Before Serve runs this is the address at which `serve run` starts it. Ray's public interface has
    no way to ask for it, so this function uses an internal name of Ray.
    """
    client = _get_global_client(raise_if_no_controller_running=False) if _connected() else None
    options = client.http_config if client is not None else HTTPOptions()
    return None if options.location == ProxyLocation.Disabled else options.host


def default_ingress_replicas() -> int:
    """Two on several nodes or many CPUs, where one may fail while the other answers; else one."""
    if not _connected():
        return 1
    nodes = [node for node in ray.nodes() if node["Alive"]]
    n_cpus = ray.cluster_resources().get("CPU", 0)
    return 2 if len(nodes) > 1 or n_cpus >= SEVERAL_CPUS else 1


def _connected() -> bool:
    return bool(ray.is_initialized())
