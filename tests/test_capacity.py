"""Allocation of workers on clusters that exist only as data: what fits, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from valle.jobs import synthesize as synthesize_job
from valle.jobs.evaluate import EvaluateRecipe, allocation_for
from valle.jobs.ingest.layouts import Source
from valle.jobs.prepare import PrepareRecipe
from valle.jobs.prepare import allocation_for as prepare_allocation
from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.recipes import RECIPES, load
from valle.jobs.synthesize import SynthesizeRecipe
from valle.jobs.train_codec import CodecRecipe
from valle.jobs.train_quantizer import QuantizerRecipe
from valle.jobs.training import ray_train
from valle.jobs.training.recipe import TrainRecipe
from valle.platform import resources
from valle.platform.autoscaler import NodeShape, configuration_path, parse_limits
from valle.platform.capacity import Cluster, Demand
from valle.platform.resources import Allocation, Placement

GPU_NODE = NodeShape(name="gpu", cpus=8, gpus=2, max_count=4)
CPU = Placement(accelerator="cpu")


def test_workers_that_fit_on_a_node_by_their_share() -> None:
    assert GPU_NODE.workers_that_fit(1, 1) == 2 and GPU_NODE.workers_that_fit(5, 1) == 1
    assert GPU_NODE.workers_that_fit(1, 0.25) == 8 and GPU_NODE.workers_that_fit(2, 0.25) == 4
    assert GPU_NODE.workers_that_fit(1, 0.4) == 4, "a share never spans two GPUs"
    assert GPU_NODE.workers_that_fit(0.5, 0.1) == 16 and GPU_NODE.workers_that_fit(0.1, 1 / 3) == 6
    assert GPU_NODE.workers_that_fit(0.5, 0) == 16 and GPU_NODE.workers_that_fit(3, 0) == 2
    half_free = replace(GPU_NODE, gpus=0.5)
    assert half_free.workers_that_fit(1, 1) == 0 and half_free.workers_that_fit(1, 0.25) == 2
    cluster = Cluster(nodes=(GPU_NODE,))
    allocation = resources.resolve(CPU, "prepare", cpus=0.5, cluster=cluster)
    assert allocation.cpus == 0.5
    assert allocation.fits_now == 8, "one worker a core, unless the recipe says"
    halves = replace(CPU, cpus_per_worker=0.5)
    allocation = resources.resolve(halves, "train", cpus=1, workers=16, cluster=cluster)
    assert allocation.fits_at_most == 16


@pytest.mark.parametrize(
    ("cpus", "gpus", "placement", "workers"),
    [
        (2, 0, {}, 2),  # half a core each in the books
        (2, 0, {"cpus_per_worker": 0.5}, 2),  # not 4: those would leave nothing
        (4, 1, {"gpus_per_worker": 0.125}, 6),
        (8, 1, {"gpus_per_worker": 0.125}, 8),
        (1, 0, {"cpus_per_worker": 0.25}, 1),
    ],
)
def test_fits_now_leaves_room_for_upstream_stages(
    cpus: int, gpus: int, placement: dict[str, Any], workers: int
) -> None:
    node = NodeShape(name="only", cpus=cpus, gpus=gpus, max_count=1)
    recipe = PrepareRecipe(out="x", sources=(Source(path="y"),), placement=Placement(**placement))
    allocation = prepare_allocation(recipe, Cluster(nodes=(node,)))
    pool = allocation.actor_pool(None, 100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, workers, workers)
    # the upstream stages go to a node without GPUs, where they displace no worker
    other = NodeShape(name="other", cpus=1, gpus=0, max_count=1)
    if gpus:
        assert prepare_allocation(recipe, Cluster(nodes=(node, other))).fits_now == 8
        types = (replace(node, cpus=0.5, max_count=3), replace(other, max_count=1))
        empty = Cluster(nodes=(), node_types=types, max_nodes=4)
        assert prepare_allocation(recipe, empty).fits_at_most == 3, "two types together"
    with pytest.raises(ValueError, match="prepare.placement: .* beside 0.75 CPUs for the stages"):
        prepare_allocation(replace(recipe, placement=CPU), Cluster(nodes=(other,)))


def test_actor_pool_starts_with_what_others_leave_free() -> None:
    free = replace(GPU_NODE, cpus=3.0, gpus=0.5)
    cluster = Cluster(nodes=(GPU_NODE,), free=(free,))
    allocation = resources.resolve(CPU, "prepare", cpus=0.5, cluster=cluster)
    assert (allocation.fits_now, allocation.fits_alone, allocation.fits_at_most) == (3, 8, 8)
    pool = allocation.actor_pool(None, 100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 3, 8)
    assert allocation.resource_limits == (3.0, 0.5)
    full = replace(free, cpus=0.0, gpus=0.0)
    waits = resources.resolve(
        Placement(), "prepare", cpus=0.5, upstream_cpus=0.75, cluster=replace(cluster, free=(full,))
    )
    assert waits.resource_limits == (1.25, 1.0), "one worker can begin when others end"
    busy = resources.resolve(Placement(), "evaluate", cpus=1, cluster=cluster)
    assert (busy.fits_now, busy.fits_alone) == (0, 2)
    assert busy.actor_pool(None, 100).initial_size == 1


def test_fits_at_most_counts_the_largest_cluster() -> None:
    head = NodeShape(name="head", cpus=3, gpus=0, max_count=1, is_head=True)
    spot = replace(GPU_NODE, name="spot", gpus=8, max_count=2)
    cluster = Cluster(nodes=(head,), node_types=(GPU_NODE, spot), max_nodes=3)
    one, core = Demand(cpus=1, gpus=1), Demand(cpus=1)
    assert cluster.fits_at_most(one) == 8 + 8 + 2 and cluster.fits_alone(one) == 0
    assert cluster.fits_at_most(core) == 3 + 3 * 8 and cluster.fits_alone(core) == 3
    grown = replace(cluster, nodes=(head, GPU_NODE, spot, spot))
    assert grown.fits_at_most(core) == 3 + 3 * 8, "what has been added is not counted twice"
    allocation = resources.resolve(Placement(), "train", cpus=1, cluster=cluster)
    for requested, n_items, count in ((None, 100, 18), (4, 100, 4), (None, 2, 2)):
        assert allocation.worker_count(requested, n_items) == count
    pool = allocation.actor_pool(None, 100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 1, 18)
    assert allocation.resource_limits == (3 + 3 * 8, 18)


def test_fits_at_most_counts_no_gpu_nodes_for_work_on_cpus() -> None:
    """As in `cluster.yaml`: types with GPUs have the most cores."""
    cpu = NodeShape(name="prepare", cpus=16, gpus=0, max_count=8)
    gpu = NodeShape(name="train", cpus=48, gpus=4, max_count=4)
    cluster = Cluster(nodes=(), node_types=(gpu, cpu), max_nodes=24)
    allocation = resources.resolve(CPU, "prepare", cpus=0.5, cluster=cluster)
    assert allocation.fits_at_most == 8 * 16
    assert allocation.resource_limits and allocation.resource_limits[0] == 8 * 16
    big = resources.resolve(CPU, "train", cpus=48, cluster=cluster)
    assert big.fits_at_most == 4, "no other type holds such a worker"
    only = replace(cluster, node_types=(gpu,))
    assert resources.resolve(CPU, "prepare", cpus=0.5, cluster=only).fits_at_most == 4 * 48
    present = replace(cluster, nodes=(gpu,) * 4)
    assert resources.resolve(CPU, "prepare", cpus=0.5, cluster=present).fits_at_most == 4 * 48


def test_configure_ray_data_sets_labels_and_limits() -> None:
    from ray.data import DataContext

    trains = replace(GPU_NODE, labels={"role": "train"}, max_count=2)
    answers = replace(GPU_NODE, labels={"role": "serve"})
    cluster = Cluster(nodes=(answers,), node_types=(trains, answers), max_nodes=8)
    placement = Placement(node_labels={"role": "train"})
    before = DataContext.get_current()
    try:
        DataContext._set_current(before.copy())
        resources.resolve(placement, "prepare", cpus=1, cluster=cluster).configure_ray_data()
        options = DataContext.get_current().execution_options
        assert options.label_selector == {"role": "train"}
        assert (options.resource_limits.cpu, options.resource_limits.gpu) == (16, 4)
        unknown = Cluster(nodes=(), node_types=None)
        resources.resolve(CPU, "prepare", cpus=1, cluster=unknown).configure_ray_data()
        options = DataContext.get_current().execution_options
        assert options.label_selector is None and options.is_resource_limits_default()
    finally:
        DataContext._set_current(before)


def train_allocation(section: str) -> Callable[[Any, Cluster], Allocation]:
    return lambda recipe, cluster: ray_train.allocation_for(recipe, section, cluster)


ALLOCATIONS: dict[str, tuple[type, Callable[[Any, Cluster], Allocation]]] = {
    "train_codec": (CodecRecipe, train_allocation("train_codec")),
    "evaluate": (EvaluateRecipe, lambda recipe, cluster: allocation_for(recipe, cluster=cluster)),
    "prepare": (PrepareRecipe, prepare_allocation),
    "publish": (
        PublishRecipe,
        lambda recipe, cluster: allocation_for(recipe.evaluation, "publish.evaluation", cluster),
    ),
    "synthesize": (SynthesizeRecipe, synthesize_job.allocation_for),
    "train": (TrainRecipe, train_allocation("train")),
    "train_quantizer": (QuantizerRecipe, train_allocation("train_quantizer")),
}  # fmt: skip
SHIPPED = [
    (path.stem, section)
    for path in sorted(RECIPES.glob("*.yaml"))
    for section in yaml.safe_load(path.read_text())
    if section in ALLOCATIONS
]


@pytest.mark.parametrize(("name", "section"), SHIPPED)
@pytest.mark.parametrize("gpus", [0, 1])
def test_shipped_recipes_fit_on_a_workstation(name: str, section: str, gpus: int) -> None:
    schema, allocate = ALLOCATIONS[section]
    recipe = load(name, section, schema)
    if section == "publish" and recipe.evaluation is None:
        return
    box = NodeShape(name="box", cpus=16, gpus=gpus, max_count=1)
    allocation = allocate(recipe, Cluster(nodes=(box,)))
    assert allocation.fits_now >= (recipe.workers if section.startswith("train") else 1)


def test_publish_registers_nothing_when_its_evaluation_cannot_run(home: Path) -> None:
    """Of the recipe's inputs none exists: the allocation comes first."""
    evaluation = EvaluateRecipe(
        items="quick", recordings="x", out="judged", placement=Placement(accelerator="gpu")
    )
    recipe = PublishRecipe(ar="no", nar="no", sample_prompt="no.wav", evaluation=evaluation)
    box = Cluster(nodes=(NodeShape(name="box", cpus=16, gpus=0, max_count=1),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "inspect_cluster", lambda: box)
        with pytest.raises(ValueError, match="publish.evaluation.placement.accelerator: gpu, but"):
            publish(recipe)
    assert not (home / "mlflow.db").exists()


def test_placement_warnings_for_waiting_and_unused_gpus() -> None:
    node = NodeShape(name="box", cpus=16, gpus=1, max_count=1)
    box = Cluster(nodes=(node,), free=(replace(node, cpus=4, gpus=0),))

    def warnings(placement: Placement, cluster: Cluster, workers: int = 1) -> list[str]:
        allocation = resources.resolve(placement, "job", cpus=1, workers=workers, cluster=cluster)
        return resources.placement_warnings(allocation, placement, "job", workers, cluster)

    assert warnings(Placement(), box) == [
        "waiting: 1 of 1 GPUs are in use, 1 worker(s) are needed and no node can be added; "
        "job.placement.accelerator=cpu needs no GPU"
    ]
    assert warnings(CPU, box, 4) == []
    assert warnings(CPU, box, 5) == [
        "waiting: 12 of 16 CPUs are in use, 5 worker(s) are needed and no node can be added"
    ]
    growing = replace(box, node_types=(replace(node, max_count=2),), max_nodes=2)
    assert warnings(Placement(), growing) == [], "a node comes"
    assert warnings(Placement(), replace(growing, max_nodes=1)) != [], "all that may come are there"
    kuberay = Cluster(nodes=(replace(node, gpus=0),), node_types=None)
    (line,) = warnings(Placement(), kuberay)
    assert line.startswith("job.placement.accelerator=auto became cpu: no node has a GPU now")
    assert warnings(CPU, kuberay) == [] and warnings(Placement(accelerator="gpu"), kuberay) == []


@pytest.mark.parametrize(
    ("placement", "gpus"),
    [({}, 1.0), ({"accelerator": "cpu"}, 0.0), ({"gpus_per_worker": 0.25}, 0.25)],
)
def test_resolve_takes_a_gpu_only_as_the_placement_says(
    placement: dict[str, Any], gpus: float
) -> None:
    cluster = Cluster(nodes=(GPU_NODE,))
    allocation = resources.resolve(Placement(**placement), "train", cpus=1, cluster=cluster)
    assert allocation.options == {"num_cpus": 1, "num_gpus": gpus}
    scaling, processes = allocation.ray_train_configs(1)
    assert scaling.use_gpu is (gpus > 0)
    assert scaling.resources_per_worker == {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    assert processes.backend == ("nccl" if gpus else "gloo")
    _, processes = allocation.ray_train_configs(2)
    assert processes.backend == ("nccl" if gpus == 1 else "gloo"), "two on one GPU"


def test_resolve_accepts_any_number_for_an_unknown_autoscaler() -> None:
    """KubeRay's node types are not to be seen from a job."""
    head = NodeShape(name="head", cpus=2, gpus=0, max_count=1)
    cluster = Cluster(nodes=(head,), node_types=None)
    allocation = resources.resolve(
        Placement(accelerator="gpu"), "train", cpus=1, workers=9, cluster=cluster
    )
    assert (allocation.gpus, allocation.fits_at_most) == (1.0, None)
    assert allocation.worker_count(None, 5) == 5
    assert resources.resolve(Placement(), "train", cpus=1, cluster=cluster).gpus == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator": "cuda"}, "placement.accelerator: 'cuda' is none of auto, cpu, gpu"),
        ({"gpus_per_worker": 0}, "placement.gpus_per_worker: 0 is not above 0 and at most 1"),
        ({"gpus_per_worker": 2}, "placement.gpus_per_worker: 2 is not .* one GPU, more GPUs take"),
        ({"cpus_per_worker": 0}, "placement.cpus_per_worker: 0 is not above 0"),
    ],
)
def test_placement_names_the_field_in_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**fields)


def test_resolve_counts_only_nodes_with_the_labels() -> None:
    trains = replace(GPU_NODE, labels={"role": "train", "zone": "a"})
    answers = replace(GPU_NODE, labels={"role": "serve"})
    cluster = Cluster(nodes=(trains, answers), node_types=(trains,), max_nodes=2)
    placement = Placement(node_labels={"role": "train"})
    allocation = resources.resolve(placement, "train", cpus=1, cluster=cluster)
    assert (allocation.fits_now, allocation.fits_at_most) == (2, 4)
    assert allocation.options["label_selector"] == {"role": "train"}
    assert allocation.ray_train_configs(1)[0].label_selector == {"role": "train"}
    elsewhere = Placement(node_labels={"role": "train", "zone": "b"})
    with pytest.raises(ValueError, match="train.placement: .*; nodes with {'role'"):
        resources.resolve(elsewhere, "train", cpus=1, cluster=cluster)


def test_resolve_refuses_what_no_node_holds() -> None:
    cluster = Cluster(nodes=(GPU_NODE,))
    with pytest.raises(ValueError, match="train.placement: 1 worker.s. with 9 CPUs and 1 GPUs"):
        resources.resolve(Placement(cpus_per_worker=9), "train", cpus=1, cluster=cluster)
    with pytest.raises(ValueError, match="16 CPUs and 0 GPUs .*Lower train.workers, or a worker's"):
        resources.resolve(Placement(accelerator="cpu"), "train", cpus=16, cluster=cluster)
    with pytest.raises(ValueError, match="DeepSpeed's workers need a whole GPU each"):
        TrainRecipe(
            data="x",
            run="y",
            workers=2,
            backend="deepspeed",
            placement=Placement(gpus_per_worker=0.5),
        )


def test_configuration_path_is_that_of_this_cluster(tmp_path: Path) -> None:
    lines = [
        ["ray", "start", "--head", "--autoscaling-config=/not/a/monitor"],
        ["python", "monitor.py", "--gcs-address=10.0.0.1:7000", "--autoscaling-config=/other"],
        ["python", "monitor.py", "--gcs-address=10.0.0.1:6379", "--autoscaling-config=/this"],
    ]
    assert configuration_path(lines, "10.0.0.1:6379") == Path("/this")
    assert configuration_path(lines[:2], "10.0.0.1:6379") is None


def test_parse_limits_reads_worker_types() -> None:
    limits = parse_limits(
        {
            "max_workers": 5, "head_node_type": "head",
            "available_node_types": {
                "head": {"resources": {"CPU": 2}, "max_workers": 0},
                "gpu": {"resources": {"CPU": 8, "GPU": 1}, "min_workers": 0, "max_workers": 9},
                "cpu": {"resources": {"CPU": 16}},
                "off": {"resources": {"CPU": 16}, "max_workers": 0},
            },
        }
    )  # fmt: skip
    assert limits.max_nodes == 5
    assert limits.node_types == (
        NodeShape(name="gpu", cpus=8, gpus=1, max_count=5),
        NodeShape(name="cpu", cpus=16, gpus=0, max_count=5),
    )
