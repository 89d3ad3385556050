"""CPUs, GPUs, fractions: what a job may use is asked of the cluster, never of the driver's torch.

A driver often sits where no GPU is (a CPU head node, a laptop) while the nodes that have one are
elsewhere, or do not exist yet: the autoscaler starts them when a job asks. So `resolve` looks at
the nodes that are there and at the node types that may be added, and fails before work starts
where a recipe asks for what the cluster will never have. A worker asks `device` where to compute.
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


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the workers of a job compute, and what share of a node each of them takes."""

    accelerator: Accelerator = "auto"
    """auto (gpu where the cluster has GPUs or its autoscaler can add some, else cpu), cpu (never a
    GPU, even where there are any) or gpu (an error, before work starts, where there are none)."""

    gpus_per_worker: float = 1.0
    """Share of a GPU for each worker, up to 1: a worker computes on one GPU; 0.25 lets four share
    one. Ray counts shares, it does not enforce them: the workers' memory must fit together."""

    cpus_per_worker: float | None = None
    """CPU cores that Ray sets aside for a worker, beside a GPU or without: how many workers find
    room, not how many threads one runs (`threads` of `train` and `codec`). None: what the job
    needs."""

    node_labels: dict[str, str] = field(default_factory=dict)
    """Only nodes with all of these labels, `{role: train}` for instance: keeps a job off the nodes
    that others answer requests on. `cluster.yaml` gives its nodes such labels."""

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
    """What Ray sets aside for each worker of a job, and how many of them the cluster holds."""

    gpus: float
    """0: the worker computes on the CPU."""

    cpus: float

    fits_now: int
    """Workers that can start at once; 0 where they wait for others to end, or for new nodes."""

    fits_alone: int
    """Workers that the nodes hold that are there, if nothing else ran."""

    fits_at_most: int | None
    """Workers that fit once all is there that may be added; None: not known."""

    resource_limits: tuple[float, float] | None = None
    """(CPUs, GPUs) that all of the job's stages together can ever have; None: not known."""

    labels: dict[str, str] = field(default_factory=dict)
    """Of the nodes that will do."""

    @property
    def accelerator(self) -> Accelerator:
        """For reports: `gpu` or `cpu`."""
        return "gpu" if self.gpus else "cpu"

    def __str__(self) -> str:
        """For whoever started the job."""
        each = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs" if self.gpus else f"{self.cpus:g} CPUs"
        limit = "as many as the autoscaler adds" if self.fits_at_most is None else self.fits_at_most
        nodes = f", on nodes with {self.labels}" if self.labels else ""
        return (
            f"{each} for each worker{nodes}; workers that fit now: {self.fits_now}, "
            f"at most: {limit}"
        )

    @property
    def options(self) -> dict[str, Any]:
        """For Ray's tasks and actors."""
        selector = {"label_selector": self.labels} if self.labels else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **selector}

    def worker_count(self, requested: int | None, n_items: int) -> int:
        """How many workers to start at most: as many as `requested` (None: as can be), but no more
        than there are items, nor than the cluster will ever hold."""
        return max(1, min(n_items, self.fits_at_most or n_items, requested or n_items))

    def actor_pool(self, requested: int | None, n_items: int) -> "ActorPoolStrategy":
        """Ray Data's actors: at first what fits now, growing with the nodes that join later.

        Only the first is waited for: others may have taken the rest meanwhile, and the stages
        that feed the actors need room as well, which Ray Data keeps for them as the pool grows.
        """
        from ray.data import ActorPoolStrategy

        largest = self.worker_count(requested, n_items)
        return ActorPoolStrategy(
            min_size=1, initial_size=max(1, min(self.fits_now, largest)), max_size=largest
        )

    def configure_ray_data(self) -> None:
        """Sets up Ray Data in this process for a dataset of the job: every stage on nodes with the
        labels, new nodes asked for with these labels and only as far as the job can use them, a
        block as one piece of work that is never split."""
        from ray.data import DataContext, ExecutionOptions, ExecutionResources

        context = DataContext.get_current()
        context.enable_progress_bars = False  # the jobs count utterances and lines
        context.target_max_block_size = None
        cpus, gpus = self.resource_limits or (None, None)
        context.execution_options = ExecutionOptions(
            resource_limits=ExecutionResources.for_limits(
                cpu=cpus, gpu=gpus if self.gpus else None
            ),
            label_selector=self.labels or None,
        )

    def map_blocks(
        self, blocks: "Dataset", actor: type, arguments: tuple[Any, ...], workers: int | None,
        n_items: int,
    ) -> "Dataset":  # fmt: skip
        """Each block of a dataset, whole and as an Arrow table, through an actor of the pool.

        The public `map_batches` refuses whole blocks where GPUs are asked for, since their sizes
        may vary; here a block is one piece of work, and its actor bounds its own batches. So it is
        Ray's developer API that is called, which may change with a version of Ray.
        """
        mapped: Dataset = blocks.map_batches_internal(
            actor, batch_size=None, batch_format="pyarrow", fn_constructor_args=arguments,
            compute=self.actor_pool(workers, n_items), **self.options,
        )  # fmt: skip
        return mapped

    def ray_train_configs(self, workers: int) -> "tuple[ScalingConfig, TorchConfig]":
        """Ray Train's settings for `workers` data-parallel workers."""
        from ray.train import ScalingConfig
        from ray.train.torch import TorchConfig

        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        # NCCL refuses two ranks on one GPU, and needs one that is more than a number
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
    """What each worker of a job gets on the connected cluster, which is also printed; or on
    `cluster`, without a word.

    `section` is the recipe's, for messages; `cpus` a worker's cores where the recipe leaves them
    open; `workers` those that have to be there at the same time; `upstream_cpus` the cores of the
    stages that feed them. Raises RecipeError, which names the field, what the cluster has and what
    to change, when the cluster will never have that.
    """
    if cluster is None:
        return _resolve_and_print(
            placement, section, cpus=cpus, workers=workers, upstream_cpus=upstream_cpus
        )
    cluster = cluster.labelled(placement.node_labels)
    demand = _demand(placement, section, cpus, upstream_cpus, cluster)
    allocation = Allocation(
        gpus=demand.gpus, cpus=demand.cpus, fits_now=cluster.fits_now(demand),
        fits_alone=cluster.fits_alone(demand), fits_at_most=cluster.fits_at_most(demand),
        resource_limits=cluster.resource_limits(demand), labels=placement.node_labels,
    )  # fmt: skip
    if allocation.fits_at_most is not None and allocation.fits_at_most < workers:
        upstream = (
            f", beside {upstream_cpus:g} CPUs for the stages that feed them"
            if upstream_cpus
            else ""
        )
        field_name = "workers" if allocation.fits_at_most else "placement"
        raise RecipeError(
            f"{section}.{field_name}: {workers} worker(s) with {demand.cpus:g} CPUs and "
            f"{demand.gpus:g} GPUs each{upstream} were asked for, the cluster holds "
            f"{allocation.fits_at_most}{_where(placement, cluster)}. Lower {section}.workers, or "
            f"a worker's share: {section}.placement.cpus_per_worker"
            f"{' or gpus_per_worker' if demand.gpus else ''}"
        )
    return allocation


def _resolve_and_print(
    placement: Placement, section: str, *, cpus: float, workers: int, upstream_cpus: float
) -> Allocation:
    """`resolve` on the connected cluster, with a line for whoever started the job."""
    for attempt in range(5):
        cluster = inspect_cluster()
        allocation = resolve(
            placement, section, cpus=cpus, workers=workers, upstream_cpus=upstream_cpus,
            cluster=cluster,
        )  # fmt: skip
        # what an earlier job of this driver had is given back within a second or two
        if allocation.fits_now >= min(workers, allocation.fits_alone):
            break
        time.sleep(0.5 if attempt < 4 else 0)
    warnings = placement_warnings(allocation, placement, section, workers, cluster)
    for line in (f"placement: {allocation}", *warnings):
        print(f"{section}: {line}", file=sys.stderr)  # noqa: T201  # for whoever typed the command
    return allocation


def _demand(
    placement: Placement, section: str, cpus: float, upstream_cpus: float, cluster: Cluster
) -> Demand:
    """A worker's share of `cluster`, the part of it with the labels. Raises RecipeError where a GPU
    is asked for that will never be there."""
    on_gpu = placement.accelerator == "gpu" or (
        placement.accelerator == "auto" and cluster.has_gpus
    )
    if on_gpu and not cluster.has_gpus and cluster.node_types is not None:
        raise RecipeError(
            f"{section}.placement.accelerator: gpu, but the cluster has none"
            f"{_where(placement, cluster)}. Add a node with a GPU, or set "
            f"{section}.placement.accelerator to auto or cpu"
        )
    # without a GPU a worker computes on a core, also where the job books part of one and leaves
    # the rest to what feeds it; a recipe that says how much it takes is believed
    busy = 0.0 if on_gpu or placement.cpus_per_worker else 1.0
    return Demand(
        cpus=placement.cpus_per_worker or cpus, gpus=placement.gpus_per_worker if on_gpu else 0.0,
        busy_cpus=busy, upstream_cpus=upstream_cpus,
    )  # fmt: skip


def _where(placement: Placement, cluster: Cluster) -> str:
    labels = placement.node_labels
    return f"; nodes with {labels}: {cluster}" if labels else f": {cluster}"


def placement_warnings(
    allocation: Allocation, placement: Placement, section: str, workers: int, cluster: Cluster
) -> list[str]:
    """What whoever started a job should know of its placement: that it waits, or that GPUs may
    have been left alone. `workers`: those that have to be there at the same time."""
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
