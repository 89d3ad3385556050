"""What Ray's autoscaler may add: its node types, read where it runs.

Ray keeps the nodes that are there, but open-source Ray does not tell a driver which ones may come
(only Anyscale's fills `ClusterConfig`). The autoscaler, a process on the head node, was started
with the cluster's configuration as a file: that is read here, on the head node itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from valle.platform import settings

HEAD_RESOURCE = "node:__internal_head__"
"""The resource that only the head node has."""


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """What a living node, or each node of a kind that may be started, has."""

    name: str
    cpus: float
    gpus: float

    max_count: int
    """How many of it there may be."""

    labels: Mapping[str, str] = field(default_factory=dict)

    is_head: bool = False
    """Whether it is the head node, of which there is one and which no autoscaler starts."""

    @classmethod
    def from_ray(
        cls, name: str, resources: Mapping[str, float], labels: Mapping[str, str], max_count: int
    ) -> "NodeShape":
        """From Ray's resources and labels."""
        cpus, gpus = (float(resources.get(key, 0)) for key in ("CPU", "GPU"))
        return cls(
            name=name, cpus=cpus, gpus=gpus, max_count=max_count, labels=labels,
            is_head=HEAD_RESOURCE in resources,
        )  # fmt: skip

    def has_labels(self, labels: Mapping[str, str]) -> bool:
        """Whether it carries all of `labels`."""
        return labels.items() <= self.labels.items()

    def workers_that_fit(self, cpus: float, gpus: float) -> int:
        """Workers of so many cores and GPUs (at most 1) that fit on one such node; a fraction of a
        GPU never spans two."""
        by_cpu = int(self.cpus / cpus + 1e-6)
        if not gpus:
            return by_cpu
        # of a GPU that is partly taken, what is left of it
        full_gpus, partial_gpu = divmod(self.gpus, 1)
        by_gpu = int(full_gpus) * int(1 / gpus + 1e-6) + int(partial_gpu / gpus + 1e-6)
        return min(by_cpu, by_gpu)

    def without(self, cpus: float) -> "NodeShape":
        """The same with so many cores less."""
        return replace(self, cpus=max(0.0, self.cpus - cpus))


@dataclass(frozen=True, kw_only=True)
class AutoscalerLimits:
    """What may be added to a cluster."""

    node_types: tuple[NodeShape, ...] | None
    """Empty without an autoscaler; None when one may exist but keeps it to itself."""

    max_nodes: int


def find_limits(nodes: Sequence[Mapping[str, Any]]) -> AutoscalerLimits:
    """What may be added to the connected cluster, whose living `nodes` `ray.nodes()` lists."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    head = next(node["NodeID"] for node in nodes if HEAD_RESOURCE in node["Resources"])
    if head == context.get_node_id():
        return read_limits(context.gcs_address)
    on_head = NodeAffinitySchedulingStrategy(head, soft=False)
    # no CPUs: a head that takes no work has none
    task = ray.remote(num_cpus=0, scheduling_strategy=on_head)(read_limits)
    limits: AutoscalerLimits = ray.get(task.remote(context.gcs_address))
    return limits


def read_limits(gcs_address: str) -> AutoscalerLimits:
    """Read on the head node: the node types of the autoscaler that serves this cluster."""
    import psutil

    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    path = configuration_path(lines, gcs_address)
    if path is not None:
        return parse_limits(yaml.safe_load(path.read_text()))  # JSON too
    if settings.read().on_kuberay:  # the autoscaler is another container's process
        return AutoscalerLimits(node_types=None, max_nodes=0)
    return AutoscalerLimits(node_types=(), max_nodes=0)


def configuration_path(command_lines: Iterable[Sequence[str]], gcs_address: str) -> Path | None:
    """The file named by the autoscaler's command line, of the cluster with this address: several
    clusters may share a machine, and then differ in their ports."""
    port = gcs_address.rpartition(":")[2]
    for line in command_lines:
        options = dict(part.split("=", 1) for part in line if part.startswith("--") and "=" in part)
        path = options.get("--autoscaling-config")
        if path and options.get("--gcs-address", "").rpartition(":")[2] == port:
            return Path(path).expanduser()
    return None


def parse_limits(configuration: Mapping[str, Any]) -> AutoscalerLimits:
    """The worker types of a cluster launcher's configuration (`available_node_types`)."""
    max_nodes = int(configuration.get("max_workers", 2))  # the launcher's own default
    types = []
    for name, node in configuration.get("available_node_types", {}).items():
        max_count = min(int(node.get("max_workers", max_nodes)), max_nodes)
        if name != configuration.get("head_node_type") and max_count > 0:
            node_resources, labels = node.get("resources", {}), node.get("labels", {})
            types.append(NodeShape.from_ray(name, node_resources, labels, max_count))
    return AutoscalerLimits(node_types=tuple(types), max_nodes=max_nodes)
