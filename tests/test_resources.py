"""Where work is placed: GPUs that Ray only counts, on nodes other than the head, present or not."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import clusters
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import write_dataset

from valle.jobs import codec
from valle.jobs import synthesize as synthesize_job
from valle.jobs import train as train_job
from valle.jobs.codec import CodecRecipe
from valle.jobs.codec import fit as fit_codec
from valle.jobs.evaluate import EvaluateRecipe, evaluate, share_of
from valle.jobs.prepare import PrepareRecipe, prepare
from valle.jobs.prepare import share_of as prepare_share
from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.sources import Source
from valle.jobs.synthesize import SynthesizeRecipe, synthesize
from valle.jobs.train import fit, prepare_run
from valle.jobs.train_recipe import Size, TrainRecipe
from valle.model.codec import Codec
from valle.platform import checkpoint, recipe, resources, settings
from valle.platform.autoscaler import NodeShape
from valle.platform.capacity import Cluster, Need, survey
from valle.platform.cluster import connect
from valle.platform.resources import Accelerator, Placement, Share
from valle.platform.sampler import Batching

AUTOSCALED = {"f" * 51 + "00001", "f" * 51 + "00002"}
"""The ids that Ray's fake provider gives to the first two nodes it adds."""


class Holder:
    """An actor that only takes what it was given."""

    def ready(self) -> None:
        """Returns once it is there."""


@contextmanager
def driver(head: clusters.Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a driver outside the cluster, as a laptop would be."""
    monkeypatch.setenv("RAY_ADDRESS", head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("VALLE_LOGICAL_GPUS", "1")
    with connect():
        yield


def placed(head: clusters.Head, name: str) -> list[tuple[str, float]]:
    """(node id, share of a GPU) of every actor whose class has `name` in it, dead ones included,
    but not those that were never placed."""
    from ray.util.state import list_actors

    actors = list_actors(head.jobs, detail=True, limit=1000)
    return [
        (actor.node_id, gpu_share(actor.required_resources))
        for actor in actors
        if name in actor.class_name and actor.node_id
    ]


def gpu_share(required: dict[str, float]) -> float:
    """In a placement group a GPU is called `GPU_group_0_...`."""
    return max((share for key, share in required.items() if key.startswith("GPU")), default=0.0)


def ran(head: clusters.Head, name: str) -> set[str]:
    """Nodes that ran a task whose name has `name` in it."""
    from ray.util.state import list_tasks

    tasks = list_tasks(head.jobs, detail=True, limit=1000)
    return {task.node_id for task in tasks if name in task.name and task.node_id}


def gpu_node() -> str:
    import ray

    (node,) = (n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU"))
    return str(node)


def preparation(
    home: Path, codec: Path, accelerator: Accelerator, shards: int = 1
) -> PrepareRecipe:
    """Eight recordings of noise."""
    generator = np.random.default_rng(0)
    for number in range(8):
        path = home / "speech" / f"s{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.normal(0, 0.1, 14_000 + 500 * number), 24_000)
        path.with_suffix(".txt").write_text("one two three")
    return PrepareRecipe(
        out="tokens", sources=(Source(path="speech"),), codec=str(codec),
        utterances_per_shard=8 // shards, placement=Placement(accelerator=accelerator),
    )  # fmt: skip


def training(home: Path, codec: Path, data: str, placement: Placement, workers: int) -> TrainRecipe:
    return prepare_run(
        TrainRecipe(
            data=data, run="placed", codec=str(codec), workers=workers, models=("ar",),
            model=Size(width=16, n_heads=2, n_layers=1), steps={"ar": 2}, samples=0,
            batching=Batching(tokens=300), prompt_seconds=0.3, validation_utterances=3,
            checkpoint_every=2, placement=placement,
        )
    )  # fmt: skip


@pytest.mark.ray
def test_work_goes_to_the_labelled_node_with_gpus_and_shares_them(
    home: Path, tiny_codec: Codec, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A head without a GPU, a node with two: `gpu` and `auto` alike leave the head alone, and with
    labels every stage does, also those that need no GPU."""
    import ray

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    write_dataset(str(home / "data"), tiny_codec)
    with (
        clusters.head(4) as head, clusters.joined(head, 3, 2, "role=train"),
        driver(head, monkeypatch),
    ):  # fmt: skip
        clusters.wait_for(lambda: ray.cluster_resources().get("GPU") == 2, 60, "the second node")
        there = gpu_node()
        labels = {"role": "train"}
        chosen = preparation(home, tiny_codec_folder, "gpu", shards=2)
        chosen = replace(chosen, placement=replace(chosen.placement, node_labels=labels))
        report = prepare(chosen)
        assert report["prepared"] == 8 and report["accelerator"] == "gpu"
        assert set(placed(head, "Quantise")) == {(there, 1.0)}
        assert set(placed(head, "Phonemise")) == {(there, 0.0)}
        assert ran(head, "Decode") == {there}
        assert (
            "prepare: placed: 0.5 CPUs and 1 GPUs for each worker, on nodes with {'role': 'train'};"
            " workers that fit now: 2, at most: 2" in capsys.readouterr().err
        )

        # three halves on two GPUs: at least two of them are one GPU's
        half = Placement(accelerator="auto", gpus_per_worker=0.5)
        uri = fit(training(home, tiny_codec_folder, "data", half, workers=3), "ar")
        assert checkpoint.load_state(Path(uri)).step == 2
        assert placed(head, "RayTrainWorker") == [(there, 0.5)] * 3

        with pytest.raises(
            ValueError, match="train.workers: 4 worker.*the cluster holds 3: 2 node"
        ):
            fit(training(home, tiny_codec_folder, "data", half, workers=4), "ar")
        held = [ray.remote(num_gpus=1, num_cpus=0)(Holder).remote() for _ in range(2)]
        ray.get([holder.ready.remote() for holder in held])
        capsys.readouterr()
        share = resources.resolve(Placement(), "evaluate", cpus=0.9)
        assert (share.fits_now, share.fits_at_most) == (0, 2)
        assert "evaluate: waiting: 2 of 2 GPUs are in use" in capsys.readouterr().err
        seen = ray.get(ray.remote(num_cpus=0)(settings.forwarded).remote())
        assert seen["AWS_ENDPOINT_URL"] == "http://storage:9000"
        assert seen["VALLE_HOME"] == str(home) == os.environ["VALLE_HOME"]
        shipped = ray.get_runtime_context().runtime_env["env_vars"]
        assert "planted" not in shipped.values()


@pytest.mark.ray
def test_a_job_brings_the_nodes_it_needs(
    home: Path, tiny_codec: Codec, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that takes no work, and an autoscaler that may add two nodes with a GPU: `auto` counts
    what is not there yet, and the autoscaler starts it because the job asks for it. A pool of
    actors that has begun on the first node goes on to the second."""
    import pyarrow as pa
    import ray

    class Slow:
        """A piece of work that is worth another node."""

        def __call__(self, rows: pa.Table) -> pa.Table:
            time.sleep(2)
            return pa.table({"node": [ray.get_runtime_context().get_node_id()]})

    write_dataset(str(home / "data"), tiny_codec)
    with clusters.autoscaled({"CPU": 2, "GPU": 1}, 2) as head, driver(head, monkeypatch):
        cluster = survey()
        assert [(node.cpus, node.gpus) for node in cluster.nodes] == [(0, 0)]
        assert cluster.node_types == (NodeShape(name="worker", cpus=2, gpus=1, most=2),)
        share = resources.resolve(Placement(), "train", cpus=1, workers=2, cluster=cluster)
        assert (share.gpus, share.fits_now, share.fits_at_most) == (1.0, 0, 2)
        with pytest.raises(ValueError, match="may be added: worker .2 CPUs, 1 GPUs; 2 at most"):
            resources.resolve(Placement(), "train", cpus=1, workers=3, cluster=cluster)

        share.bound_data()
        blocks = ray.data.from_arrow([pa.table({"number": [number]}) for number in range(24)])
        rows = share.map_blocks(blocks, Slow, (), None, 24).take_all()
        assert len(rows) == 24 and {row["node"] for row in rows} == AUTOSCALED
        report = prepare(preparation(home, tiny_codec_folder, "auto"))
        assert report["prepared"] == 8 and report["accelerator"] == "gpu"
        ((node, gpus),) = set(placed(head, "Quantise"))
        assert node in AUTOSCALED and gpus == 1.0
        # asked from a node other than the head, it is the head that is looked at
        remote = ray.remote(num_gpus=0.1)(survey)
        assert ray.get(remote.remote()).node_types == cluster.node_types
        fit(training(home, tiny_codec_folder, "data", Placement(), workers=2), "ar")
        assert set(placed(head, "RayTrainWorker")) == {(node, 1.0) for node in AUTOSCALED}


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_shares_of_a_core_leave_room_for_what_feeds_them(
    home: Path, tiny_codec_folder: Path
) -> None:
    """Four actors of half a core would take both cores, and nothing would ever be decoded."""
    half = Placement(accelerator="cpu", cpus_per_worker=0.5)
    chosen = replace(preparation(home, tiny_codec_folder, "cpu", shards=8), placement=half)
    with clusters.embedded(num_cpus=2):
        assert prepare(chosen)["prepared"] == 8


@pytest.mark.ray
def test_a_gpu_that_no_node_has_is_refused_before_work_starts(
    home: Path, tiny_codec: Codec, tiny_codec_folder: Path
) -> None:
    write_dataset(str(home / "data"), tiny_codec)
    gpu = Placement(accelerator="gpu")
    with clusters.embedded(num_cpus=2):
        for section, job in (
            ("prepare", lambda: prepare(preparation(home, tiny_codec_folder, "gpu"))),
            ("train", lambda: fit(training(home, tiny_codec_folder, "data", gpu, 1), "ar")),
            ("codec", lambda: fit_codec(CodecRecipe(data="x", out="codec", placement=gpu))),
            ("synthesize", lambda: synthesize(
                SynthesizeRecipe(manifest="absent.jsonl", out="spoken", placement=gpu))),
            ("evaluate", lambda: evaluate(EvaluateRecipe(
                items="quick", recordings="x", out="judged", placement=gpu))),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{section}.placement.accelerator: gpu, but") as e:
                job()
            assert "1 node(s) with 2 CPUs and 0 GPUs in all; no autoscaler" in str(e.value)
            assert f"set {section}.placement.accelerator to auto or cpu" in str(e.value)
        assert not [name for name in ("tokens", "runs", "spoken", "judged", "codec", "mlflow.db")
                    if (home / name).exists()]  # fmt: skip
        assert resources.resolve(Placement(), "train", cpus=1).gpus == 0


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use it")
def test_a_gpu_that_torch_cannot_use_is_an_error_unless_it_is_only_a_number(
    home: Path, tiny_codec: Codec, tiny_codec_folder: Path
) -> None:
    """A node whose driver is broken must not train on its CPU without a word."""
    import ray
    from ray.train import TrainingFailedError

    def ask(gpus: float, **env: str) -> str:
        task = ray.remote(num_gpus=gpus, runtime_env={"env_vars": env})(resources.device)
        answer: str = ray.get(task.remote())
        return answer

    with clusters.embedded(num_cpus=2, num_gpus=1):
        assert ask(0) == "cpu"
        assert ask(0.5, VALLE_LOGICAL_GPUS="1") == "cpu"
        with pytest.raises(RuntimeError, match="Ray gave this worker GPU 0 of node .*, but torch"):
            ask(0.5)
        # a worker of Ray Train has its GPU by a placement group
        write_dataset(str(home / "data"), tiny_codec)
        chosen = training(home, tiny_codec_folder, "data", Placement(accelerator="gpu"), 1)
        with pytest.raises(TrainingFailedError, match="Ray gave this worker GPU 0 of node"):
            fit(replace(chosen, max_failures=0), "ar")


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
    "codec": (CodecRecipe, codec.share_of),
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
