"""CPUs, GPUs, fractions: what a job may use is asked of the cluster, never of the driver's torch.

A driver often sits where no GPU is (a CPU head node, a laptop) while the nodes that have one are
elsewhere, or do not exist yet: the autoscaler starts them when a job asks. So `resolve` looks at
the nodes that are there and at the node types that may be added, and fails before work starts
where a recipe asks for what the cluster will never have. A worker asks `device` where to compute.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from valle.platform import autoscaler, settings
from valle.platform.autoscaler import NodeType
from valle.platform.recipe import RecipeError

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, Dataset
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig

Accelerator = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the workers of a job compute, and what share of a node each of them takes."""

    accelerator: Accelerator = "auto"
    """auto (gpu where the cluster has GPUs or its autoscaler can add some, else cpu), cpu (never a
    GPU, even where there are any) or gpu (an error, before work starts, where there are none)."""

    gpus_per_worker: float = 1.0
    """GPUs of a worker on a GPU; 0.25 lets four share one. Ray counts shares, it does not enforce
    them: the workers' memory must fit together. Above 1, a whole number."""

    cpus_per_worker: float | None = None
    """CPU cores that Ray sets aside for a worker, beside a GPU or without; None: what the job
    needs."""

    node_labels: dict[str, str] = field(default_factory=dict)
    """Only nodes with all of these labels, `{role: train}` for instance: keeps a job off the nodes
    that others answer requests on. `cluster.yaml` gives its nodes such labels."""

    def __post_init__(self) -> None:
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ValueError(
                f"placement.accelerator: {self.accelerator!r} is none of auto, cpu, gpu"
            )
        if self.gpus_per_worker <= 0 or (
            self.gpus_per_worker > 1 and self.gpus_per_worker % 1 != 0
        ):
            raise ValueError(
                f"placement.gpus_per_worker: {self.gpus_per_worker:g} is neither a fraction above "
                "0 nor a whole number; for workers without a GPU set placement.accelerator=cpu"
            )
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            raise ValueError(f"placement.cpus_per_worker: {self.cpus_per_worker:g} is not above 0")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster has, and what its autoscaler may add."""

    nodes: tuple[NodeType, ...]
    """Living nodes, each with `most` 1."""

    node_types: tuple[NodeType, ...] | None = ()
    """What the autoscaler may start, the nodes of it that are there already counted in; empty
    without an autoscaler; None where there is one that does not say (KubeRay)."""

    max_nodes: int = 0
    """Nodes, of all types together, that the autoscaler keeps at most beside the head."""

    def labelled(self, labels: Mapping[str, str]) -> "Cluster":
        """The part of it that has these labels."""
        types = self.node_types
        return replace(
            self, nodes=tuple(node for node in self.nodes if node.has(labels)),
            node_types=types and tuple(node for node in types if node.has(labels)),
        )  # fmt: skip

    @property
    def has_gpus(self) -> bool:
        """Whether there is a GPU on a node, or on one that may come."""
        return any(node.gpus > 0 for node in (*self.nodes, *(self.node_types or ())))

    def present(self, cpus: float, gpus: float) -> int:
        """Workers of this share that the nodes hold that are there, if nothing else ran."""
        return sum(node.holds(cpus, gpus) for node in self.nodes)

    def most(self, cpus: float, gpus: float) -> int | None:
        """The same with all that may be added; None where that is not known."""
        if self.node_types is None:
            return None
        room, added = self.max_nodes, 0
        # the types that hold most of them first: how many the largest permitted cluster holds
        for node_type in sorted(self.node_types, key=lambda node: -node.holds(cpus, gpus)):
            count = min(room, node_type.most)
            added += count * node_type.holds(cpus, gpus)
            room -= count
        head = sum(node.holds(cpus, gpus) for node in self.nodes if node.is_head)
        return max(self.present(cpus, gpus), head + added)

    def __str__(self) -> str:
        """For messages: what there is and what may come."""
        cpus, gpus = (sum(getattr(node, key) for node in self.nodes) for key in ("cpus", "gpus"))
        here = f"{len(self.nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"
        if self.node_types is None:
            return f"{here}; what its autoscaler may add is not known here"
        types = ", ".join(
            f"{node.name} ({node.cpus:g} CPUs, {node.gpus:g} GPUs; {node.most} at most)"
            for node in self.node_types
        )
        return f"{here}; " + (f"may be added: {types}" if types else "no autoscaler adds to them")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What Ray sets aside for each worker of a job, and how many of them the cluster holds."""

    gpus: float
    """0: the worker computes on the CPU."""

    cpus: float

    present: int
    """Workers that fit on the nodes that are there; 0 where nodes must be started first."""

    most: int | None
    """Workers that fit once all is there that may be added; None: not known."""

    labels: dict[str, str] = field(default_factory=dict)
    """Of the nodes that will do."""

    @property
    def accelerator(self) -> Accelerator:
        """For reports: `gpu` or `cpu`."""
        return "gpu" if self.gpus else "cpu"

    @property
    def options(self) -> dict[str, Any]:
        """For Ray's tasks and actors."""
        selector = {"label_selector": self.labels} if self.labels else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **selector}

    def count(self, wanted: int | None, work: int) -> int:
        """How many workers to start at most: as many as `wanted` (None: as can be), but no more
        than there are pieces of work, nor than the cluster will ever hold."""
        limits = [work, self.most or work, wanted or work]
        return max(1, min(limits))

    def pool(self, wanted: int | None, work: int) -> "ActorPoolStrategy":
        """Ray Data's actors: what fits now, growing with the nodes that join later."""
        from ray.data import ActorPoolStrategy

        largest = self.count(wanted, work)
        return ActorPoolStrategy(min_size=max(1, min(self.present, largest)), max_size=largest)

    def map_blocks(
        self, blocks: "Dataset", actor: type, arguments: tuple[Any, ...], workers: int | None,
        work: int,
    ) -> "Dataset":  # fmt: skip
        """Each block of a dataset, whole and as an Arrow table, through an actor of a `pool`.

        The public `map_batches` refuses whole blocks where GPUs are asked for, since their sizes
        may vary; here a block is one piece of work, and its actor bounds its own batches.
        """
        mapped: Dataset = blocks.map_batches_internal(
            actor, batch_size=None, batch_format="pyarrow", fn_constructor_args=arguments,
            compute=self.pool(workers, work), **self.options,
        )  # fmt: skip
        return mapped

    def training(self, workers: int) -> "tuple[ScalingConfig, TorchConfig]":
        """Ray Train's settings for `workers` data-parallel workers."""
        from ray.train import ScalingConfig
        from ray.train.torch import TorchConfig

        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        # NCCL refuses two ranks on one GPU, and needs one that is more than a number
        whole = self.gpus >= 1 and not settings.read().logical_gpus
        return (
            ScalingConfig(
                num_workers=workers,
                use_gpu=self.gpus > 0,
                resources_per_worker=resources,
                label_selector=self.labels or None,
            ),
            TorchConfig(backend="nccl" if whole else "gloo"),
        )


def survey() -> Cluster:
    """The connected cluster as it is now."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    report = autoscaler.report(nodes)
    return Cluster(
        nodes=tuple(
            NodeType.of(node["NodeName"], node["Resources"], node["Labels"], 1) for node in nodes
        ),
        node_types=report.node_types, max_nodes=report.max_nodes,
    )  # fmt: skip


def resolve(
    chosen: Placement,
    section: str,
    *,
    cpus: float,
    workers: int = 1,
    cluster: Cluster | None = None,
) -> Share:
    """What each worker of a job gets on the connected cluster (or on `cluster`).

    `section` is the recipe's, for messages; `cpus` a worker's cores where the recipe leaves them
    open; `workers` those that have to be there at the same time. Raises RecipeError, which names
    the field, what the cluster has and what to change, when the cluster will never have that.
    """
    cluster = (cluster or survey()).labelled(chosen.node_labels)
    unknown = cluster.node_types is None
    cpus = chosen.cpus_per_worker or cpus
    wanted = chosen.accelerator == "gpu" or (chosen.accelerator == "auto" and cluster.has_gpus)
    where = (
        f"; nodes with {chosen.node_labels}: {cluster}" if chosen.node_labels else f": {cluster}"
    )
    if wanted and not cluster.has_gpus and not unknown:
        raise RecipeError(
            f"{section}.placement.accelerator: gpu, but the cluster has none{where}. Add a node "
            f"with a GPU, or set {section}.placement.accelerator to auto or cpu"
        )
    gpus = chosen.gpus_per_worker if wanted else 0.0
    # a job that books part of a core leaves the rest to what feeds it: still one worker a core
    core = cpus if gpus or chosen.cpus_per_worker else max(1.0, cpus)
    share = Share(
        gpus=gpus, cpus=cpus, present=cluster.present(core, gpus), most=cluster.most(core, gpus),
        labels=chosen.node_labels,
    )  # fmt: skip
    if share.most is not None and share.most < workers:
        raise RecipeError(
            f"{section}.{'workers' if share.most else 'placement'}: {workers} worker(s) with "
            f"{cpus:g} CPUs and {gpus:g} GPUs each were asked for, the cluster holds "
            f"{share.most}{where}. Lower {section}.workers, or a worker's share: "
            f"{section}.placement.cpus_per_worker{' or gpus_per_worker' if gpus else ''}"
        )
    return share


def device() -> str:
    """Where the calling Ray worker computes: `cuda` if Ray gave it a GPU or a part of one, else
    `cpu`.

    Raises RuntimeError when torch cannot use the GPU: a node with a broken driver, or a torch
    without CUDA, must not do a GPU's work on its CPU. With `VALLE_LOGICAL_GPUS` it does so.
    """
    import ray
    import torch

    context = ray.get_runtime_context()
    ids = context.get_accelerator_ids().get("GPU", [])
    if not ids:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    problem = (
        f"Ray gave this worker GPU {','.join(ids)} of node {context.get_node_id()[:8]}, but torch "
        f"{torch.__version__} cannot use it (CUDA of this build: {torch.version.cuda})"
    )
    if settings.read().logical_gpus:
        logging.getLogger(__name__).warning(
            "%s; VALLE_LOGICAL_GPUS is set: computing on the CPU", problem
        )
        return "cpu"
    raise RuntimeError(
        f"{problem}; see what nvidia-smi and python -c 'import torch; torch.zeros(1).cuda()' say "
        "on that node. For tests with GPUs that only Ray counts, set VALLE_LOGICAL_GPUS=1"
    )


def train_device() -> Any:
    """`device` for a worker of Ray Train, as a torch.device with the index of its GPU."""
    import ray.train.torch
    import torch

    return torch.device("cpu") if device() == "cpu" else ray.train.torch.get_device()
