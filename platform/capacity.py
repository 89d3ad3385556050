"""What a cluster has, what its autoscaler may add, and how many workers of a job that holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from valle.platform import autoscaler
from valle.platform.autoscaler import NodeShape


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a worker of a job takes, and what else of the job must find room beside its workers."""

    cpus: float
    """Cores that Ray sets aside for a worker."""

    gpus: float = 0.0
    """GPUs that Ray sets aside for a worker, at most 1."""

    busy_cpus: float = 0.0
    """Cores that a worker keeps busy, where that is more than is set aside."""

    upstream_cpus: float = 0.0
    """Cores, on any one node, for the stages that feed the workers; they cannot start without."""

    def workers_that_fit(self, nodes: Sequence[tuple[NodeShape, int]]) -> int:
        """Workers that fit on these nodes, of which there are so many each."""
        busy = max(self.cpus, self.busy_cpus)
        room = sum(count * node.workers_that_fit(busy, self.gpus) for node, count in nodes)
        if not self.upstream_cpus:
            return room
        full = sum(count * node.workers_that_fit(self.cpus, self.gpus) for node, count in nodes)
        # the feeding stages go where they displace the fewest workers
        displaced = min(
            (
                node.workers_that_fit(self.cpus, self.gpus)
                - node.without(self.upstream_cpus).workers_that_fit(self.cpus, self.gpus)
                for node, count in nodes
                if count and node.cpus >= self.upstream_cpus
            ),
            default=full,
        )
        return min(room, full - displaced)


def total(nodes: Sequence[NodeShape], resource: Literal["cpus", "gpus"]) -> float:
    """Of all nodes together."""
    return float(sum(getattr(node, resource) for node in nodes))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster has, and what its autoscaler may add."""

    nodes: tuple[NodeShape, ...]
    """Living nodes, each with `max_count` 1."""

    free: tuple[NodeShape, ...] | None = None
    """The same nodes with only what nobody has been given yet; None: all of it."""

    node_types: tuple[NodeShape, ...] | None = ()
    """What the autoscaler may start, the nodes of it that are there already counted in; empty
    without an autoscaler; None where there is one that does not say (KubeRay)."""

    max_nodes: int = 0
    """Nodes, of all types together, that the autoscaler keeps at most beside the head."""

    def labelled(self, labels: Mapping[str, str]) -> "Cluster":
        """The part of it that has these labels."""
        types, free = self.node_types, self.free
        return replace(
            self, nodes=tuple(node for node in self.nodes if node.has_labels(labels)),
            free=free and tuple(node for node in free if node.has_labels(labels)),
            node_types=types and tuple(node for node in types if node.has_labels(labels)),
        )  # fmt: skip

    @property
    def has_gpus(self) -> bool:
        """Whether there is a GPU on a node, or on one that may come."""
        return any(node.gpus > 0 for node in (*self.nodes, *(self.node_types or ())))

    def fits_alone(self, demand: Demand) -> int:
        """Workers that the nodes hold that are there, if nothing else ran."""
        return demand.workers_that_fit([(node, 1) for node in self.nodes])

    def fits_now(self, demand: Demand) -> int:
        """Workers that can start at once."""
        return demand.workers_that_fit(
            [(node, 1) for node in (self.nodes if self.free is None else self.free)]
        )

    def fits_at_most(self, demand: Demand) -> int | None:
        """Workers that fit once all is there that may be added; None where that is not known."""
        if self.node_types is None:
            return None
        # what feeds the workers may be on nodes of another type
        alone = replace(demand, upstream_cpus=0.0)
        largest = self._largest(demand.gpus > 0, lambda node: alone.workers_that_fit([(node, 1)]))
        return max(self.fits_alone(demand), demand.workers_that_fit(largest))

    def resource_limits(self, demand: Demand) -> tuple[float, float] | None:
        """(CPUs, GPUs) for all stages of a job once all is added, without what others have been
        given, but enough for one worker; None where that is not known.

        What others give back later is not counted: a job that took it for its own while they have
        it would fill the rest with workers, and leave nothing for the stages that feed them.
        """
        if self.node_types is None:
            return None
        return (
            max(self._obtainable(demand.gpus > 0, "cpus"), demand.cpus + demand.upstream_cpus),
            max(self._obtainable(True, "gpus"), demand.gpus),
        )

    def _obtainable(self, with_gpus: bool, resource: Literal["cpus", "gpus"]) -> float:
        """Of the largest cluster that is permitted, without what others have been given."""
        largest = self._largest(with_gpus, lambda node: float(getattr(node, resource)))
        present = total(self.nodes, resource)
        free = present if self.free is None else total(self.free, resource)
        permitted = sum(count * float(getattr(node, resource)) for node, count in largest)
        return max(permitted, present) - (present - free)

    def _largest(
        self, with_gpus: bool, value: Callable[[NodeShape], float]
    ) -> list[tuple[NodeShape, int]]:
        """The permitted nodes of which the sum of `value` is the largest, and how many of each.

        Types with GPUs are not for CPU work, as long as others are of any value for it.
        """
        types = [node for node in self.node_types or () if with_gpus or not node.gpus]
        if not any(value(node) for node in types):
            types = list(self.node_types or ())
        nodes = [(node, 1) for node in self.nodes if node.is_head]
        room = self.max_nodes
        for node in sorted(types, key=value, reverse=True):
            nodes.append((node, min(room, node.max_count)))
            room -= nodes[-1][1]
        return nodes

    def __str__(self) -> str:
        """For messages: what there is and what may come."""
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
        head = {key: 1.0 for key in node["Resources"] if key == autoscaler.HEAD_RESOURCE}
        return NodeShape.from_ray(node["NodeName"], {**resources, **head}, node["Labels"], 1)

    return Cluster(
        nodes=tuple(shape(node, node["Resources"]) for node in nodes),
        free=tuple(shape(node, free.get(node["NodeID"], {})) for node in nodes),
        node_types=limits.node_types, max_nodes=limits.max_nodes,
    )  # fmt: skip
