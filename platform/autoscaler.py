"""The node types that Ray's autoscaler may add, read from its configuration file.

Open-source Ray lists the running nodes to a driver, not the types that may be added (only Anyscale
fills `ClusterConfig`). The autoscaler is a process on the head node, and its command line names
the cluster's configuration file; the functions here read that file on the head node.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from valle.platform import settings

HEAD_RESOURCE = "node:__internal_head__"
"""A resource of the head node alone."""


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """The resources of a running node, or of each node of a type that may be added."""

    name: str
    cpus: float
    gpus: float

    max_count: int
    """Upper limit of such nodes; 1 for a running node."""

    labels: Mapping[str, str] = field(default_factory=dict)

    is_head: bool = False
    """True for the head node, which no autoscaler adds."""

    @classmethod
    def from_ray(
        cls, name: str, resources: Mapping[str, float], labels: Mapping[str, str], max_count: int
    ) -> "NodeShape":
        """The shape of a node with Ray's `resources` and `labels`."""
        cpus, gpus = (float(resources.get(key, 0)) for key in ("CPU", "GPU"))
        return cls(
            name=name,
            cpus=cpus,
            gpus=gpus,
            max_count=max_count,
            labels=labels,
            is_head=HEAD_RESOURCE in resources,
        )

    def has_labels(self, labels: Mapping[str, str]) -> bool:
        """True if the node has all of `labels`."""
        return labels.items() <= self.labels.items()

    def workers_that_fit(self, cpus: float, gpus: float) -> int:
        """Number of workers with `cpus` cores and `gpus` GPUs (at most 1) that fit on one node.

        A fraction of a GPU never spans two GPUs.
        """
        by_cpu = int(self.cpus / cpus + 1e-6)
        if not gpus:
            return by_cpu
        # a fractional count is one GPU of which others hold a part
        full_gpus, partial_gpu = divmod(self.gpus, 1)
        by_gpu = int(full_gpus) * int(1 / gpus + 1e-6) + int(partial_gpu / gpus + 1e-6)
        return min(by_cpu, by_gpu)

    def without(self, cpus: float) -> "NodeShape":
        """The same node with `cpus` fewer cores."""
        return replace(self, cpus=max(0.0, self.cpus - cpus))


@dataclass(frozen=True, kw_only=True)
class AutoscalerLimits:
    """The nodes that an autoscaler may add to a cluster."""

    node_types: tuple[NodeShape, ...] | None
    """Empty without an autoscaler; None if there may be one whose types are unknown (KubeRay)."""

    max_nodes: int
    """Upper limit of nodes of all types together, the head not counted."""


def find_limits(nodes: Sequence[Mapping[str, Any]]) -> AutoscalerLimits:
    """The nodes that may be added to the connected cluster; `nodes` are Ray's running ones."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    head = next(node["NodeID"] for node in nodes if HEAD_RESOURCE in node["Resources"])
    if head == context.get_node_id():
        return read_limits(context.gcs_address)
    on_head = NodeAffinitySchedulingStrategy(head, soft=False)
    # a head node that runs no jobs has no CPUs to give
    task = ray.remote(num_cpus=0, scheduling_strategy=on_head)(read_limits)
    limits: AutoscalerLimits = ray.get(task.remote(context.gcs_address))
    return limits


def read_limits(gcs_address: str) -> AutoscalerLimits:
    """The limits of the autoscaler of the cluster at `gcs_address`; runs on its head node."""
    import psutil

    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    path = configuration_path(lines, gcs_address)
    if path is not None:
        return parse_limits(yaml.safe_load(path.read_text()))  # JSON too
    if settings.read().on_kuberay:  # the autoscaler is another container's process
        return AutoscalerLimits(node_types=None, max_nodes=0)
    return AutoscalerLimits(node_types=(), max_nodes=0)


def configuration_path(command_lines: Iterable[Sequence[str]], gcs_address: str) -> Path | None:
    """The configuration file of the autoscaler of the cluster at `gcs_address`, or None.

    Several clusters may share a machine; their ports tell them apart.
    """
    port = gcs_address.rpartition(":")[2]
    for line in command_lines:
        options = dict(part.split("=", 1) for part in line if part.startswith("--") and "=" in part)
        path = options.get("--autoscaling-config")
        if path and options.get("--gcs-address", "").rpartition(":")[2] == port:
            return Path(path).expanduser()
    return None


def parse_limits(configuration: Mapping[str, Any]) -> AutoscalerLimits:
    """The limits that a cluster launcher's configuration sets (`available_node_types`)."""
    max_nodes = int(configuration.get("max_workers", 2))  # the launcher's own default
    types = []
    for name, node in configuration.get("available_node_types", {}).items():
        max_count = min(int(node.get("max_workers", max_nodes)), max_nodes)
        if name != configuration.get("head_node_type") and max_count > 0:
            node_resources, labels = node.get("resources", {}), node.get("labels", {})
            types.append(NodeShape.from_ray(name, node_resources, labels, max_count))
    return AutoscalerLimits(node_types=tuple(types), max_nodes=max_nodes)
