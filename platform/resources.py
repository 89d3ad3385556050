"""CPUs and GPUs of a job's workers, allocated from the cluster, not from the driver's machine.

A driver often runs on a machine without a GPU (a CPU head node, a laptop), while nodes with GPUs
are elsewhere or are added by the autoscaler on demand. `resolve` therefore inspects the living
nodes and the node types that may be added, and fails before work starts if the cluster can never
satisfy a recipe. A worker calls `device` for the device to compute on.
"""

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from valle.platform import settings
from valle.platform.capacity import Cluster, Demand, inspect_cluster, total
from valle.platform.recipe import RecipeError

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, Dataset
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig

Accelerator = Literal["auto", "cpu", "gpu"]


MAX_RESTARTS = 16
"""How often Ray starts again an actor, or a block of rows, whose process has ended."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The device and the share of a node of each worker of a job."""

    accelerator: Accelerator = "auto"
    """auto (gpu if the cluster has GPUs or its autoscaler can add some, else cpu), cpu (no GPU,
    even if there are some) or gpu (an error, before work starts, if there are none)."""

    gpus_per_worker: float = 1.0
    """Share of a GPU per worker, at most 1: a worker computes on one GPU; at 0.25 four share one.
    Ray counts shares and does not enforce them: the workers' memory must fit together."""

    cpus_per_worker: float | None = None
    """CPU cores that Ray reserves per worker, with or without a GPU. They decide how many workers
    fit on a node, not how many threads a worker runs (`threads` of `train` and `train_codec`).
    None: the job's own number."""

    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels, such as `{role: train}`, that a node must have; keeps a job off the nodes that serve.
    The nodes of `cluster.yaml` have such labels."""

    def __post_init__(self) -> None:
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ValueError(
                f"placement.accelerator: {self.accelerator!r} is none of auto, cpu, gpu"
            )
        if not 0 < self.gpus_per_worker <= 1:
            raise ValueError(
                f"placement.gpus_per_worker: {self.gpus_per_worker:g} is not above 0 and at most "
                "1: a worker computes on one GPU, more GPUs take more `workers`; for workers "
                "without a GPU set placement.accelerator=cpu"
            )
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            raise ValueError(f"placement.cpus_per_worker: {self.cpus_per_worker:g} is not above 0")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The resources that Ray reserves per worker of a job, and how many workers fit."""

    gpus: float
    """GPUs per worker; 0: it computes on the CPU."""

    cpus: float

    fits_now: int
    """Workers that can start at once; 0: they wait for other jobs to end, or for new nodes."""

    fits_alone: int
    """Workers that fit on the running nodes if nothing else ran."""

    fits_at_most: int | None
    """Workers that fit on the largest cluster that may be; None: unknown."""

    resource_limits: tuple[float, float] | None = None
    """(CPUs, GPUs) that all stages of the job together may use; None: unknown."""

    labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""

    @property
    def accelerator(self) -> Accelerator:
        """`gpu` or `cpu`, for reports."""
        return "gpu" if self.gpus else "cpu"

    def __str__(self) -> str:
        """A line for the user of the job."""
        each = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs" if self.gpus else f"{self.cpus:g} CPUs"
        limit = "as many as the autoscaler adds" if self.fits_at_most is None else self.fits_at_most
        nodes = f", on nodes with {self.labels}" if self.labels else ""
        return (
            f"{each} for each worker{nodes}; workers that fit now: {self.fits_now}, "
            f"at most: {limit}"
        )

    @property
    def options(self) -> dict[str, Any]:
        """Options of Ray's tasks and actors."""
        selector = {"label_selector": self.labels} if self.labels else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **selector}

    def worker_count(self, requested: int | None, n_items: int) -> int:
        """Number of workers to start: `requested` (None: no limit), at most one per item, at most
        as many as will ever fit, and at least one."""
        return max(1, min(n_items, self.fits_at_most or n_items, requested or n_items))

    def actor_pool(self, requested: int | None, n_items: int) -> "ActorPoolStrategy":
        """A pool of Ray Data's actors: starts with what fits now, and grows as nodes join.

        `min_size` is 1, so that the job waits for one actor only: other jobs may have reserved the
        rest meanwhile, and the upstream stages, for which Ray Data keeps resources as the pool
        grows, must start as well.
        """
        from ray.data import ActorPoolStrategy

        max_size = self.worker_count(requested, n_items)
        return ActorPoolStrategy(
            min_size=1, initial_size=max(1, min(self.fits_now, max_size)), max_size=max_size
        )

    def configure_ray_data(self) -> None:
        """Configures Ray Data in this process for a dataset of the job.

        All stages run on nodes with the labels, new nodes are requested with them and within
        `resource_limits`, and blocks are not split.
        """
        from ray.data import DataContext, ExecutionOptions, ExecutionResources

        context = DataContext.get_current()
        context.enable_progress_bars = False  # jobs have bars that count utterances and lines
        context.target_max_block_size = None
        cpus, gpus = self.resource_limits or (None, None)
        context.execution_options = ExecutionOptions(
            resource_limits=ExecutionResources.for_limits(
                cpu=cpus, gpu=gpus if self.gpus else None
            ),
            label_selector=self.labels or None,
        )

    def map_blocks(
        self,
        blocks: "Dataset",
        actor: type,
        arguments: tuple[Any, ...],
        workers: int | None,
        n_items: int,
    ) -> "Dataset":
        """Maps each block of a dataset, as one Arrow table, through an actor of the pool.

        Calls Ray's developer API, which may change between versions: the public `map_batches`
        refuses whole blocks with GPUs because their sizes vary. Here a block is one unit of work,
        and its actor bounds the batches on the GPU.
        """
        mapped: Dataset = blocks.map_batches_internal(
            actor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=arguments,
            compute=self.actor_pool(workers, n_items),
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
            **self.options,
        )
        return mapped

    def ray_train_configs(self, workers: int) -> "tuple[ScalingConfig, TorchConfig]":
        """Ray Train's configuration of `workers` data-parallel workers."""
        from ray.train import ScalingConfig
        from ray.train.torch import TorchConfig

        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        # NCCL refuses two ranks on one GPU, and cannot use a GPU that only Ray counts
        own_gpu = self.gpus >= 1 or (self.gpus > 0 and workers == 1)
        nccl = own_gpu and not settings.read().logical_gpus
        return (
            ScalingConfig(
                num_workers=workers,
                use_gpu=self.gpus > 0,
                resources_per_worker=resources,
                label_selector=self.labels or None,
            ),
            TorchConfig(backend="nccl" if nccl else "gloo"),
        )


def resolve(
    placement: Placement,
    section: str,
    *,
    cpus: float,
    workers: int = 1,
    upstream_cpus: float = 0.0,
    cluster: Cluster | None = None,
) -> Allocation:
    """The allocation of a job on the connected cluster, which is also printed; or on `cluster`,
    without output.

    `section` is the recipe's section, for messages; `cpus` the cores per worker if the recipe sets
    none; `workers` the number that must run at the same time; `upstream_cpus` the cores of the
    stages that produce their input. Raises RecipeError if the workers can never fit; the message
    holds the field, the cluster's resources and the fix.
    """
    if cluster is None:
        return _resolve_and_print(
            placement, section, cpus=cpus, workers=workers, upstream_cpus=upstream_cpus
        )
    cluster = cluster.labelled(placement.node_labels)
    demand = _demand(placement, section, cpus, upstream_cpus, cluster)
    allocation = Allocation(
        gpus=demand.gpus,
        cpus=demand.cpus,
        fits_now=cluster.fits_now(demand),
        fits_alone=cluster.fits_alone(demand),
        fits_at_most=cluster.fits_at_most(demand),
        resource_limits=cluster.resource_limits(demand),
        labels=placement.node_labels,
    )
    if allocation.fits_at_most is not None and allocation.fits_at_most < workers:
        raise RecipeError(
            _too_many_workers(demand, placement, section, workers, cluster, allocation.fits_at_most)
        )
    return allocation


def _too_many_workers(
    demand: Demand,
    placement: Placement,
    section: str,
    workers: int,
    cluster: Cluster,
    fits_at_most: int,
) -> str:
    """The message of `resolve` for workers that never fit."""
    upstream = f", beside {demand.upstream_cpus:g} CPUs for the stages that feed them"
    return (
        f"{section}.{'workers' if fits_at_most else 'placement'}: {workers} worker(s) with "
        f"{demand.cpus:g} CPUs and {demand.gpus:g} GPUs each"
        f"{upstream if demand.upstream_cpus else ''} are requested, the cluster holds "
        f"{fits_at_most}{_where(placement, cluster)}. Lower {section}.workers, or "
        f"a worker's share: {section}.placement.cpus_per_worker"
        f"{' or gpus_per_worker' if demand.gpus else ''}"
    )


def _resolve_and_print(
    placement: Placement, section: str, *, cpus: float, workers: int, upstream_cpus: float
) -> Allocation:
    """`resolve` on the connected cluster; prints the allocation and its warnings to stderr."""
    for attempt in range(5):
        cluster = inspect_cluster()
        allocation = resolve(
            placement,
            section,
            cpus=cpus,
            workers=workers,
            upstream_cpus=upstream_cpus,
            cluster=cluster,
        )
        # resources of this driver's previous job are released within a second or two
        if allocation.fits_now >= min(workers, allocation.fits_alone):
            break
        time.sleep(0.5 if attempt < 4 else 0)
    warnings = placement_warnings(allocation, placement, section, workers, cluster)
    for line in (f"placement: {allocation}", *warnings):
        print(f"{section}: {line}", file=sys.stderr)  # noqa: T201  # the user of a command reads it
    return allocation


def _demand(
    placement: Placement, section: str, cpus: float, upstream_cpus: float, cluster: Cluster
) -> Demand:
    """The resources of a worker on `cluster`, the part of it with the labels.

    Raises RecipeError for a GPU that the cluster can never have.
    """
    on_gpu = placement.accelerator == "gpu" or (
        placement.accelerator == "auto" and cluster.has_gpus
    )
    if on_gpu and not cluster.has_gpus and cluster.node_types is not None:
        raise RecipeError(
            f"{section}.placement.accelerator: gpu, but the cluster has none"
            f"{_where(placement, cluster)}. Add a node with a GPU, or set "
            f"{section}.placement.accelerator to auto or cpu"
        )
    # a worker without a GPU keeps a core busy, even if the job reserves less of it to leave room
    # for the upstream stages; an explicit number in the recipe is taken as it is
    busy_cpus = 0.0 if on_gpu or placement.cpus_per_worker else 1.0
    return Demand(
        cpus=placement.cpus_per_worker or cpus,
        gpus=placement.gpus_per_worker if on_gpu else 0.0,
        busy_cpus=busy_cpus,
        upstream_cpus=upstream_cpus,
    )


def _where(placement: Placement, cluster: Cluster) -> str:
    """The cluster's resources and the labels, for messages."""
    labels = placement.node_labels
    return f"; nodes with {labels}: {cluster}" if labels else f": {cluster}"


def placement_warnings(
    allocation: Allocation, placement: Placement, section: str, workers: int, cluster: Cluster
) -> list[str]:
    """Warnings for the user of a job: that it waits, or that it may have missed a GPU.

    `workers` is the number that must run at the same time.
    """
    cluster = cluster.labelled(placement.node_labels)
    field_name = f"{section}.placement.accelerator"
    if cluster.node_types is None:
        if allocation.gpus or placement.accelerator == "cpu":
            return []
        return [
            f"{field_name}=auto became cpu: no node has a GPU now, and the autoscaler does not say "
            f"whether it can add one; {field_name}=gpu asks for it"
        ]
    if allocation.fits_now >= workers or allocation.fits_at_most != allocation.fits_alone:
        return []
    resource: Literal["cpus", "gpus"] = "gpus" if allocation.gpus else "cpus"
    present = total(cluster.nodes, resource)
    free = total(cluster.nodes if cluster.free is None else cluster.free, resource)
    in_use = f"{present - free:g} of {present:g} {resource[:-1].upper()}s are in use"
    return [
        f"waiting: {in_use}, {workers} worker(s) are needed and no node can be added"
        + (f"; {field_name}=cpu needs no GPU" if allocation.gpus else "")
    ]


def device() -> str:
    """The device of the calling Ray worker: `cuda` if Ray allocated a GPU or a part of one to it,
    else `cpu`.

    Raises RuntimeError if torch cannot use that GPU: a node with a broken driver, or a torch
    without CUDA, must not run a GPU's work on its CPU. With `VALLE_LOGICAL_GPUS` it does.
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
    """The torch.device of a worker of Ray Train, with the index of its GPU."""
    import ray.train.torch
    import torch

    return torch.device("cpu") if device() == "cpu" else ray.train.torch.get_device()
