"""How many workers of a job fit on a cluster, now and after its autoscaler has added nodes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from valle.platform import autoscaler
from valle.platform.autoscaler import NodeShape


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The resources of one worker of a job, and of the job's stages that run beside them."""

    cpus: float
    """Cores that Ray reserves for a worker."""

    gpus: float = 0.0
    """GPUs that Ray reserves for a worker, at most 1."""

    busy_cpus: float = 0.0
    """Cores that a worker keeps busy, if more than Ray reserves."""

    upstream_cpus: float = 0.0
    """Cores on any one node for the upstream stages, which produce the workers' input."""

    def workers_that_fit(self, nodes: Sequence[tuple[NodeShape, int]]) -> int:
        """Number of workers that fit on `nodes`, given as shapes with their counts."""
        busy = max(self.cpus, self.busy_cpus)
        unloaded = sum(count * node.workers_that_fit(busy, self.gpus) for node, count in nodes)
        if not self.upstream_cpus:
            return unloaded
        full = sum(count * node.workers_that_fit(self.cpus, self.gpus) for node, count in nodes)
        # the upstream stages run on the node where they displace the fewest workers
        displaced = min(
            (
                node.workers_that_fit(self.cpus, self.gpus)
                - node.without(self.upstream_cpus).workers_that_fit(self.cpus, self.gpus)
                for node, count in nodes
                if count and node.cpus >= self.upstream_cpus
            ),
            default=full,
        )
        return min(unloaded, full - displaced)


def total(nodes: Sequence[NodeShape], resource: Literal["cpus", "gpus"]) -> float:
    """Sum of a resource over all nodes."""
    return float(sum(getattr(node, resource) for node in nodes))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The nodes of a cluster, and those that its autoscaler may add."""

    nodes: tuple[NodeShape, ...]
    """Living nodes, each with `max_count` 1."""

    free: tuple[NodeShape, ...] | None = None
    """The same nodes with their unreserved resources only; None: nothing is reserved."""

    node_types: tuple[NodeShape, ...] | None = ()
    """The types that the autoscaler may add; `max_count` includes running nodes of a type. Empty
    without an autoscaler, None if the types are unknown (KubeRay)."""

    max_nodes: int = 0
    """Upper limit of nodes of all types together, the head not counted."""

    def labelled(self, labels: Mapping[str, str]) -> "Cluster":
        """The part of the cluster with these labels."""
        types, free = self.node_types, self.free
        return replace(
            self,
            nodes=tuple(node for node in self.nodes if node.has_labels(labels)),
            free=free and tuple(node for node in free if node.has_labels(labels)),
            node_types=types and tuple(node for node in types if node.has_labels(labels)),
        )

    @property
    def has_gpus(self) -> bool:
        """True if a running node has a GPU, or one that may be added."""
        return any(node.gpus > 0 for node in (*self.nodes, *(self.node_types or ())))

    def fits_alone(self, demand: Demand) -> int:
        """Workers that fit on the running nodes if nothing else ran."""
        return demand.workers_that_fit([(node, 1) for node in self.nodes])

    def fits_now(self, demand: Demand) -> int:
        """Workers that can start at once."""
        return demand.workers_that_fit(
            [(node, 1) for node in (self.nodes if self.free is None else self.free)]
        )

    def fits_at_most(self, demand: Demand) -> int | None:
        """Workers that fit on the largest cluster that may be; None if that is unknown."""
        if self.node_types is None:
            return None
        # the upstream stages may run on nodes of another type
        alone = replace(demand, upstream_cpus=0.0)
        largest = self._largest(demand.gpus > 0, lambda node: alone.workers_that_fit([(node, 1)]))
        return max(self.fits_alone(demand), demand.workers_that_fit(largest))

    def resource_limits(self, demand: Demand) -> tuple[float, float] | None:
        """(CPUs, GPUs) that all stages of a job may use on the largest cluster; None if unknown.

        Resources reserved by others are not counted, not even if they are released later: the job
        would fill its own share with workers and leave nothing for the upstream stages. The limits
        always allow one worker.
        """
        if self.node_types is None:
            return None
        return (
            max(self._obtainable(demand.gpus > 0, "cpus"), demand.cpus + demand.upstream_cpus),
            max(self._obtainable(True, "gpus"), demand.gpus),
        )

    def _obtainable(self, with_gpus: bool, resource: Literal["cpus", "gpus"]) -> float:
        """A resource of the largest cluster that may be, less what others have reserved."""
        largest = self._largest(with_gpus, lambda node: float(getattr(node, resource)))
        present = total(self.nodes, resource)
        free = present if self.free is None else total(self.free, resource)
        obtainable = sum(count * float(getattr(node, resource)) for node, count in largest)
        return max(obtainable, present) - (present - free)

    def _largest(
        self, with_gpus: bool, value: Callable[[NodeShape], float]
    ) -> list[tuple[NodeShape, int]]:
        """The nodes, with their counts, that the limits allow and whose sum of `value` is largest.

        For work on CPUs, types with GPUs count only if no other type has any value.
        """
        types = [node for node in self.node_types or () if with_gpus or not node.gpus]
        if not any(value(node) for node in types):
            types = list(self.node_types or ())
        nodes = [(node, 1) for node in self.nodes if node.is_head]
        remaining = self.max_nodes
        for node in sorted(types, key=value, reverse=True):
            nodes.append((node, min(remaining, node.max_count)))
            remaining -= nodes[-1][1]
        return nodes

    def __str__(self) -> str:
        """The running nodes and those that may be added, for messages."""
        cpus, gpus = total(self.nodes, "cpus"), total(self.nodes, "gpus")
        present = f"{len(self.nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"
        if self.node_types is None:
            return f"{present}; what its autoscaler may add is not known here"
        types = ", ".join(
            f"{node.name} ({node.cpus:g} CPUs, {node.gpus:g} GPUs; {node.max_count} at most)"
            for node in self.node_types
        )
        additions = f"may be added: {types}" if types else "no autoscaler adds to them"
        return f"{present}; {additions}"


def inspect_cluster() -> Cluster:
    """The connected cluster as it is now."""
    import ray
    from ray._private.state import available_resources_per_node

    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    limits = autoscaler.find_limits(nodes)

    def shape(node: Mapping[str, Any], resources: Mapping[str, float]) -> NodeShape:
        # the free resources of a head in use may lack the one that marks it
        head = {key: 1.0 for key in node["Resources"] if key == autoscaler.HEAD_RESOURCE}
        return NodeShape.from_ray(node["NodeName"], {**resources, **head}, node["Labels"], 1)

    return Cluster(
        nodes=tuple(shape(node, node["Resources"]) for node in nodes),
        free=tuple(shape(node, free.get(node["NodeID"], {})) for node in nodes),
        node_types=limits.node_types,
        max_nodes=limits.max_nodes,
    )
