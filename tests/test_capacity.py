"""How many workers a cluster holds, what each gets, what is refused: reckoned, without Ray."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from valle.jobs import synthesize as synthesize_job
from valle.jobs import train as train_job
from valle.jobs import train_codec
from valle.jobs.evaluate import EvaluateRecipe, share_of
from valle.jobs.ingest.layouts import Source
from valle.jobs.prepare import PrepareRecipe
from valle.jobs.prepare import share_of as prepare_share
from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.synthesize import SynthesizeRecipe
from valle.jobs.train_codec import CodecRecipe
from valle.jobs.training.recipe import TrainRecipe
from valle.platform import recipe, resources
from valle.platform.autoscaler import NodeShape
from valle.platform.capacity import Cluster, Need
from valle.platform.resources import Placement, Share

GPU_NODE = NodeShape(name="gpu", cpus=8, gpus=2, most=4)
CPU = Placement(accelerator="cpu")


def test_shares_that_fit_on_a_node() -> None:
    assert GPU_NODE.holds(1, 1) == 2 and GPU_NODE.holds(5, 1) == 1
    assert GPU_NODE.holds(1, 0.25) == 8 and GPU_NODE.holds(2, 0.25) == 4
    assert GPU_NODE.holds(1, 0.4) == 4, "a share never spans two GPUs"
    assert GPU_NODE.holds(0.5, 0.1) == 16 and GPU_NODE.holds(0.1, 1 / 3) == 6
    assert GPU_NODE.holds(0.5, 0) == 16 and GPU_NODE.holds(3, 0) == 2
    half_free = replace(GPU_NODE, gpus=0.5)
    assert half_free.holds(1, 1) == 0 and half_free.holds(1, 0.25) == 2
    cluster = Cluster(nodes=(GPU_NODE,))
    share = resources.resolve(CPU, "prepare", cpus=0.5, cluster=cluster)
    assert (share.fits_now, share.cpus) == (8, 0.5), "one worker a core, unless the recipe says"
    halves = replace(CPU, cpus_per_worker=0.5)
    share = resources.resolve(halves, "train", cpus=1, workers=16, cluster=cluster)
    assert share.fits_at_most == 16


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
def test_codec_actors_leave_room_for_the_stages_that_feed_them(
    cpus: int, gpus: int, placement: dict[str, Any], workers: int
) -> None:
    node = NodeShape(name="only", cpus=cpus, gpus=gpus, most=1)
    chosen = PrepareRecipe(
        out="x", sources=(Source(path="y"),), placement=Placement(**placement)
    )  # fmt: skip
    share = prepare_share(chosen, Cluster(nodes=(node,)))
    pool = share.pool(None, 100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, workers, workers)
    # the feeders go to a node without GPUs, where they displace nobody
    beside = NodeShape(name="other", cpus=1, gpus=0, most=1)
    if gpus:
        assert prepare_share(chosen, Cluster(nodes=(node, beside))).fits_now == 8
        types = (replace(node, cpus=0.5, most=3), replace(beside, most=1))
        started = Cluster(nodes=(), node_types=types, max_nodes=4)
        assert prepare_share(chosen, started).fits_at_most == 3, "two types together"
    with pytest.raises(ValueError, match="prepare.placement: .* beside 0.75 CPUs for the stages"):
        prepare_share(replace(chosen, placement=CPU), Cluster(nodes=(beside,)))


def test_what_others_hold_is_not_asked_for_at_the_start() -> None:
    free = replace(GPU_NODE, cpus=3.0, gpus=0.5)
    cluster = Cluster(nodes=(GPU_NODE,), free=(free,))
    share = resources.resolve(CPU, "prepare", cpus=0.5, cluster=cluster)
    assert (share.fits_now, share.fits_alone, share.fits_at_most) == (3, 8, 8)
    pool = share.pool(None, 100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 3, 8)
    assert share.limits == (3.0, 0.5)
    full = replace(free, cpus=0.0, gpus=0.0)
    waits = resources.resolve(
        Placement(), "prepare", cpus=0.5, beside=0.75, cluster=replace(cluster, free=(full,))
    )
    assert waits.limits == (1.25, 1.0), "when others end, one worker can begin"
    busy = resources.resolve(Placement(), "evaluate", cpus=1, cluster=cluster)
    assert (busy.fits_now, busy.fits_alone) == (0, 2)
    assert busy.pool(None, 100).initial_size == 1


def test_the_largest_cluster_that_is_permitted() -> None:
    head = NodeShape(name="head", cpus=3, gpus=0, most=1, is_head=True)
    spot = replace(GPU_NODE, name="spot", gpus=8, most=2)
    cluster = Cluster(nodes=(head,), node_types=(GPU_NODE, spot), max_nodes=3)
    one, core = Need(cpus=1, gpus=1), Need(cpus=1)
    assert cluster.fits_at_most(one) == 8 + 8 + 2 and cluster.fits(one) == 0
    assert cluster.fits_at_most(core) == 3 + 3 * 8 and cluster.fits(core) == 3
    grown = replace(cluster, nodes=(head, GPU_NODE, spot, spot))
    assert grown.fits_at_most(core) == 3 + 3 * 8, "what has been added is not counted twice"
    share = resources.resolve(Placement(), "train", cpus=1, cluster=cluster)
    assert share.count(None, 100) == 18 and share.count(4, 100) == 4 and share.count(None, 2) == 2
    pool = share.pool(None, 100)
    assert (pool.min_size, pool.initial_size, pool.max_size) == (1, 1, 18)
    assert share.limits == (3 + 3 * 8, 18)


def test_nodes_with_gpus_are_not_started_for_work_on_cpus() -> None:
    """As in `cluster.yaml`: types with GPUs have the most cores."""
    cpu = NodeShape(name="prepare", cpus=16, gpus=0, most=8)
    gpu = NodeShape(name="train", cpus=48, gpus=4, most=4)
    cluster = Cluster(nodes=(), node_types=(gpu, cpu), max_nodes=24)
    share = resources.resolve(CPU, "prepare", cpus=0.5, cluster=cluster)
    assert share.fits_at_most == 8 * 16 and share.limits and share.limits[0] == 8 * 16
    big = resources.resolve(CPU, "train", cpus=48, cluster=cluster)
    assert big.fits_at_most == 4, "what no other type holds goes to them"
    only = replace(cluster, node_types=(gpu,))
    assert resources.resolve(CPU, "prepare", cpus=0.5, cluster=only).fits_at_most == 4 * 48
    here = replace(cluster, nodes=(gpu,) * 4)
    assert resources.resolve(CPU, "prepare", cpus=0.5, cluster=here).fits_at_most == 4 * 48


def test_ray_data_keeps_to_the_labels_and_to_what_the_job_can_use() -> None:
    from ray.data import DataContext

    trains = replace(GPU_NODE, labels={"role": "train"}, most=2)
    answers = replace(GPU_NODE, labels={"role": "serve"})
    cluster = Cluster(nodes=(answers,), node_types=(trains, answers), max_nodes=8)
    placement = Placement(node_labels={"role": "train"})
    before = DataContext.get_current()
    try:
        DataContext._set_current(before.copy())
        resources.resolve(placement, "prepare", cpus=1, cluster=cluster).bound_data()
        options = DataContext.get_current().execution_options
        assert options.label_selector == {"role": "train"}
        assert (options.resource_limits.cpu, options.resource_limits.gpu) == (16, 4)
        resources.resolve(CPU, "prepare", cpus=1, cluster=Cluster(nodes=(), node_types=None)
                          ).bound_data()  # fmt: skip
        options = DataContext.get_current().execution_options
        assert options.label_selector is None and options.is_resource_limits_default()
    finally:
        DataContext._set_current(before)


SHARES: dict[str, tuple[type, Callable[[Any, Cluster], Share]]] = {
    "codec": (CodecRecipe, train_codec.share_of),
    "evaluate": (EvaluateRecipe, lambda chosen, cluster: share_of(chosen, cluster=cluster)),
    "prepare": (PrepareRecipe, prepare_share),
    "publish": (PublishRecipe, lambda chosen, cluster: share_of(
        chosen.evaluation, "publish.evaluation", cluster)),
    "synthesize": (SynthesizeRecipe, synthesize_job.share_of),
    "train": (TrainRecipe, train_job.share_of),
}  # fmt: skip
SHIPPED = [
    (path.stem, section)
    for path in sorted(recipe.RECIPES.glob("*.yaml"))
    for section in yaml.safe_load(path.read_text())
    if section in SHARES
]


@pytest.mark.parametrize(("name", "section"), SHIPPED)
@pytest.mark.parametrize("gpus", [0, 1])
def test_shipped_recipes_find_room_on_a_workstation(name: str, section: str, gpus: int) -> None:
    schema, place = SHARES[section]
    chosen = recipe.load(name, section, schema)
    if section == "publish" and chosen.evaluation is None:
        return
    box = NodeShape(name="box", cpus=16, gpus=gpus, most=1)
    share = place(chosen, Cluster(nodes=(box,)))
    assert share.fits_now >= (chosen.workers if section in ("train", "codec") else 1)


def test_a_version_is_not_registered_when_it_cannot_be_judged(home: Path) -> None:
    """Nothing of the recipe exists but its placement, which is looked at first."""
    judged = EvaluateRecipe(
        items="quick", recordings="x", out="judged", placement=Placement(accelerator="gpu")
    )
    chosen = PublishRecipe(ar="no", nar="no", sample_prompt="no.wav", evaluation=judged)
    box = Cluster(nodes=(NodeShape(name="box", cpus=16, gpus=0, most=1),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "survey", lambda: box)
        with pytest.raises(ValueError, match="publish.evaluation.placement.accelerator: gpu, but"):
            publish(chosen)
    assert not (home / "mlflow.db").exists()


def test_waiting_and_gpus_left_alone_are_said() -> None:
    node = NodeShape(name="box", cpus=16, gpus=1, most=1)
    box = Cluster(nodes=(node,), free=(replace(node, cpus=4, gpus=0),))

    def said(placement: Placement, cluster: Cluster, workers: int = 1) -> list[str]:
        share = resources.resolve(placement, "job", cpus=1, workers=workers, cluster=cluster)
        return resources.remarks(share, placement, "job", workers, cluster)

    assert said(Placement(), box) == [
        "waiting: 1 of 1 GPUs are in use, 1 worker(s) are needed and no node can be added; "
        "job.placement.accelerator=cpu needs no GPU"
    ]
    assert said(CPU, box, 4) == []
    assert said(CPU, box, 5) == [
        "waiting: 12 of 16 CPUs are in use, 5 worker(s) are needed and no node can be added"
    ]
    growing = replace(box, node_types=(replace(node, most=2),), max_nodes=2)
    assert said(Placement(), growing) == [], "a node comes"
    assert said(Placement(), replace(growing, max_nodes=1)) != [], "all that may come are there"
    kuberay = Cluster(nodes=(replace(node, gpus=0),), node_types=None)
    (line,) = said(Placement(), kuberay)
    assert line.startswith("job.placement.accelerator=auto became cpu: no node has a GPU now")
    assert said(CPU, kuberay) == [] and said(Placement(accelerator="gpu"), kuberay) == []


@pytest.mark.parametrize(
    ("placement", "gpus"),
    [({}, 1.0), ({"accelerator": "cpu"}, 0.0), ({"gpus_per_worker": 0.25}, 0.25)],
)
def test_cpu_never_takes_a_gpu(placement: dict[str, Any], gpus: float) -> None:
    cluster = Cluster(nodes=(GPU_NODE,))
    share = resources.resolve(Placement(**placement), "train", cpus=1, cluster=cluster)
    assert share.options == {"num_cpus": 1, "num_gpus": gpus}
    scaling, processes = share.training(1)
    assert scaling.use_gpu is (gpus > 0)
    assert scaling.resources_per_worker == {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    assert processes.backend == ("nccl" if gpus else "gloo")
    assert share.training(2)[1].backend == ("nccl" if gpus == 1 else "gloo"), "two on one GPU"


def test_an_autoscaler_that_does_not_say_what_it_may_add_is_believed() -> None:
    """KubeRay's node types are not to be seen from a job."""
    head = NodeShape(name="head", cpus=2, gpus=0, most=1)
    cluster = Cluster(nodes=(head,), node_types=None)
    asked = resources.resolve(
        Placement(accelerator="gpu"), "train", cpus=1, workers=9, cluster=cluster
    )
    assert (asked.gpus, asked.fits_at_most, asked.count(None, 5)) == (1.0, None, 5)
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
def test_a_bad_placement_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**fields)


def test_only_nodes_with_the_labels_are_taken() -> None:
    trains = replace(GPU_NODE, labels={"role": "train", "zone": "a"})
    answers = replace(GPU_NODE, labels={"role": "serve"})
    cluster = Cluster(nodes=(trains, answers), node_types=(trains,), max_nodes=2)
    placement = Placement(node_labels={"role": "train"})
    share = resources.resolve(placement, "train", cpus=1, cluster=cluster)
    assert (share.fits_now, share.fits_at_most) == (2, 4)
    assert share.options["label_selector"] == {"role": "train"}
    assert share.training(1)[0].label_selector == {"role": "train"}
    elsewhere = Placement(node_labels={"role": "train", "zone": "b"})
    with pytest.raises(ValueError, match="train.placement: .*; nodes with {'role'"):
        resources.resolve(elsewhere, "train", cpus=1, cluster=cluster)


def test_what_no_node_holds_is_refused() -> None:
    cluster = Cluster(nodes=(GPU_NODE,))
    with pytest.raises(ValueError, match="train.placement: 1 worker.s. with 9 CPUs and 1 GPUs"):
        resources.resolve(Placement(cpus_per_worker=9), "train", cpus=1, cluster=cluster)
    with pytest.raises(ValueError, match="16 CPUs and 0 GPUs .*Lower train.workers, or a worker's"):
        resources.resolve(Placement(accelerator="cpu"), "train", cpus=16, cluster=cluster)
    with pytest.raises(ValueError, match="DeepSpeed's workers need a whole GPU each"):
        TrainRecipe(
            data="x", run="y", workers=2, backend="deepspeed",
            placement=Placement(gpus_per_worker=0.5),
        )  # fmt: skip


def test_the_configuration_is_that_of_this_cluster_s_autoscaler(tmp_path: Path) -> None:
    from valle.platform.autoscaler import configuration_path, parse

    lines = [
        ["ray", "start", "--head", "--autoscaling-config=/not/a/monitor"],
        ["python", "monitor.py", "--gcs-address=10.0.0.1:7000", "--autoscaling-config=/other"],
        ["python", "monitor.py", "--gcs-address=10.0.0.1:6379", "--autoscaling-config=/this"],
    ]
    assert configuration_path(lines, "10.0.0.1:6379") == Path("/this")
    assert configuration_path(lines[:2], "10.0.0.1:6379") is None
    found = parse(
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
    assert found.max_nodes == 5
    assert found.node_types == (
        NodeShape(name="gpu", cpus=8, gpus=1, most=5),
        NodeShape(name="cpu", cpus=16, gpus=0, most=5),
    )
