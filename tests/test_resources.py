"""Where work is placed: GPUs that Ray only counts, on nodes other than the head, present or not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import clusters
import numpy as np
import pytest
import soundfile
import torch
from conftest import write_dataset

from valle.jobs.codec import CodecRecipe
from valle.jobs.codec import fit as fit_codec
from valle.jobs.evaluate import EvaluateRecipe, evaluate
from valle.jobs.prepare import PrepareRecipe, prepare
from valle.jobs.sources import Source
from valle.jobs.synthesize import SynthesizeRecipe, synthesize
from valle.jobs.train import fit, prepare_run
from valle.jobs.train_recipe import Size, TrainRecipe
from valle.model.codec import Codec
from valle.platform import checkpoint, resources, settings
from valle.platform.autoscaler import NodeType
from valle.platform.cluster import connect
from valle.platform.resources import Accelerator, Placement
from valle.platform.sampler import Batching

AUTOSCALED = "f" * 51 + "00001"
"""The id that Ray's fake provider gives to the first node it adds."""


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


def gpu_node() -> str:
    import ray

    (node,) = (n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU"))
    return str(node)


def preparation(home: Path, codec: Path, accelerator: Accelerator) -> PrepareRecipe:
    """One shard of noise."""
    generator = np.random.default_rng(0)
    for number in range(8):
        path = home / "speech" / f"s{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.normal(0, 0.1, 14_000 + 500 * number), 24_000)
        path.with_suffix(".txt").write_text("one two three")
    return PrepareRecipe(
        out="tokens", sources=(Source(path="speech"),), codec=str(codec), utterances_per_shard=8,
        placement=Placement(accelerator=accelerator),
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
def test_work_goes_to_the_node_with_gpus_and_shares_them(
    home: Path, tiny_codec: Codec, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without a GPU, a node with two: `gpu` and `auto` alike leave the head alone."""
    import ray

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:9000")
    write_dataset(str(home / "data"), tiny_codec)
    with clusters.head(2) as head, clusters.joined(head, 3, 2), driver(head, monkeypatch):
        clusters.wait_for(lambda: ray.cluster_resources().get("GPU") == 2, 60, "the second node")
        there = gpu_node()
        report = prepare(preparation(home, tiny_codec_folder, "gpu"))
        assert report["prepared"] == 8 and report["accelerator"] == "gpu"
        assert set(placed(head, "Quantise")) == {(there, 1.0)}
        assert {share for _, share in placed(head, "Phonemise")} == {0.0}

        # three halves on two GPUs: at least two of them are one GPU's
        half = Placement(accelerator="auto", gpus_per_worker=0.5)
        uri = fit(training(home, tiny_codec_folder, "data", half, workers=3), "ar")
        assert checkpoint.load_state(Path(uri)).step == 2
        assert placed(head, "RayTrainWorker") == [(there, 0.5)] * 3

        with pytest.raises(
            ValueError, match="train.workers: 4 worker.*the cluster holds 3: 2 node"
        ):
            fit(training(home, tiny_codec_folder, "data", half, workers=4), "ar")
        seen = ray.get(ray.remote(num_cpus=0)(settings.forwarded).remote())
        assert seen["AWS_ENDPOINT_URL"] == "http://storage:9000"
        assert seen["VALLE_HOME"] == str(home) == os.environ["VALLE_HOME"]


@pytest.mark.ray
def test_a_job_brings_the_node_it_needs(
    home: Path, tiny_codec: Codec, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that takes no work, and an autoscaler that may add one node with GPUs: `auto` counts
    what is not there yet, and the autoscaler starts it because the job asks for it."""
    import ray

    write_dataset(str(home / "data"), tiny_codec)
    with clusters.autoscaled({"CPU": 2, "GPU": 2}, 1) as head, driver(head, monkeypatch):
        cluster = resources.survey()
        assert [(node.cpus, node.gpus) for node in cluster.nodes] == [(0, 0)]
        assert cluster.node_types == (NodeType(name="worker", cpus=2, gpus=2, most=1),)
        share = resources.resolve(Placement(), "train", cpus=1, workers=2, cluster=cluster)
        assert (share.gpus, share.present, share.most) == (1.0, 0, 2)
        with pytest.raises(ValueError, match="may be added: worker .2 CPUs, 2 GPUs; 1 at most"):
            resources.resolve(Placement(), "train", cpus=1, workers=3, cluster=cluster)

        report = prepare(preparation(home, tiny_codec_folder, "auto"))
        assert report["prepared"] == 8 and report["accelerator"] == "gpu"
        assert set(placed(head, "Quantise")) == {(AUTOSCALED, 1.0)}
        # asked from a node other than the head, it is the head that is looked at
        remote = ray.remote(num_gpus=0.1)(resources.survey)
        assert ray.get(remote.remote()).node_types == cluster.node_types
        fit(training(home, tiny_codec_folder, "data", Placement(), workers=2), "ar")
        assert placed(head, "RayTrainWorker") == [(AUTOSCALED, 1.0)] * 2


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
def test_a_gpu_that_torch_cannot_use_is_an_error_unless_it_is_only_a_number() -> None:
    """A node whose driver is broken must not train on its CPU without a word."""
    import ray

    def ask(gpus: float, **env: str) -> str:
        task = ray.remote(num_gpus=gpus, runtime_env={"env_vars": env})(resources.device)
        answer: str = ray.get(task.remote())
        return answer

    with clusters.embedded(num_cpus=2, num_gpus=1):
        assert ask(0) == "cpu"
        assert ask(0.5, VALLE_LOGICAL_GPUS="1") == "cpu"
        with pytest.raises(RuntimeError, match="Ray gave this worker GPU 0 of node .*, but torch"):
            ask(0.5)


GPU_NODE = NodeType(name="gpu", cpus=8, gpus=2, most=4)


def test_shares_that_fit_on_a_node() -> None:
    assert GPU_NODE.holds(1, 1) == 2 and GPU_NODE.holds(1, 2) == 1 and GPU_NODE.holds(1, 4) == 0
    assert GPU_NODE.holds(1, 0.25) == 8 and GPU_NODE.holds(2, 0.25) == 4
    assert GPU_NODE.holds(1, 0.4) == 4, "a share never spans two GPUs"
    assert GPU_NODE.holds(0.5, 0.1) == 16 and GPU_NODE.holds(0.1, 1 / 3) == 6
    assert GPU_NODE.holds(0.5, 0) == 16 and GPU_NODE.holds(3, 0) == 2
    cluster = resources.Cluster(nodes=(GPU_NODE,))
    cpu = Placement(accelerator="cpu")
    share = resources.resolve(cpu, "prepare", cpus=0.5, cluster=cluster)
    assert (share.present, share.cpus) == (8, 0.5), "one worker a core, unless the recipe says"
    halves = replace(cpu, cpus_per_worker=0.5)
    assert resources.resolve(halves, "train", cpus=1, workers=16, cluster=cluster).most == 16


def test_the_largest_cluster_that_is_permitted() -> None:
    head = NodeType(name="head", cpus=3, gpus=0, most=1, is_head=True)
    spot = replace(GPU_NODE, name="spot", gpus=8, most=2)
    cluster = resources.Cluster(nodes=(head,), node_types=(GPU_NODE, spot), max_nodes=3)
    assert cluster.most(1, 1) == 8 + 8 + 2 and cluster.present(1, 1) == 0
    assert cluster.most(1, 0) == 3 + 3 * 8 and cluster.present(1, 0) == 3
    grown = replace(cluster, nodes=(head, GPU_NODE, spot, spot))
    assert grown.most(1, 0) == 3 + 3 * 8, "what has been added is not counted twice"
    share = resources.resolve(Placement(), "train", cpus=1, cluster=cluster)
    assert share.count(None, 100) == 18 and share.count(4, 100) == 4 and share.count(None, 2) == 2
    pool = share.pool(None, 100)
    assert (pool.min_size, pool.max_size) == (1, 18)
    here = resources.Cluster(nodes=(GPU_NODE, GPU_NODE), node_types=())
    pool = resources.resolve(Placement(), "prepare", cpus=1, cluster=here).pool(None, 100)
    assert (pool.min_size, pool.max_size) == (4, 4)


@pytest.mark.parametrize(
    ("placement", "gpus"),
    [({}, 1.0), ({"accelerator": "cpu"}, 0.0), ({"gpus_per_worker": 0.25}, 0.25)],
)
def test_cpu_never_takes_a_gpu(placement: dict[str, Any], gpus: float) -> None:
    cluster = resources.Cluster(nodes=(GPU_NODE,))
    share = resources.resolve(Placement(**placement), "train", cpus=1, cluster=cluster)
    assert share.options == {"num_cpus": 1, "num_gpus": gpus}
    scaling, processes = share.training(1)
    assert scaling.use_gpu is (gpus > 0)
    assert scaling.resources_per_worker == {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    assert processes.backend == ("nccl" if gpus == 1 else "gloo")


def test_an_autoscaler_that_does_not_say_what_it_may_add_is_believed() -> None:
    """KubeRay's node types are not to be seen from a job."""
    head = NodeType(name="head", cpus=2, gpus=0, most=1)
    cluster = resources.Cluster(nodes=(head,), node_types=None)
    asked = resources.resolve(
        Placement(accelerator="gpu"), "train", cpus=1, workers=9, cluster=cluster
    )
    assert (asked.gpus, asked.most, asked.count(None, 5)) == (1.0, None, 5)
    assert resources.resolve(Placement(), "train", cpus=1, cluster=cluster).gpus == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator": "cuda"}, "placement.accelerator: 'cuda' is none of auto, cpu, gpu"),
        ({"gpus_per_worker": 0}, "placement.gpus_per_worker: 0 is neither a fraction above 0"),
        ({"gpus_per_worker": 1.5}, "placement.gpus_per_worker: 1.5 is neither"),
        ({"cpus_per_worker": 0}, "placement.cpus_per_worker: 0 is not above 0"),
    ],
)
def test_a_bad_placement_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**fields)


def test_only_nodes_with_the_labels_are_taken() -> None:
    trains = replace(GPU_NODE, labels={"role": "train", "zone": "a"})
    answers = replace(GPU_NODE, labels={"role": "serve"})
    cluster = resources.Cluster(nodes=(trains, answers), node_types=(trains,), max_nodes=2)
    placement = Placement(node_labels={"role": "train"})
    share = resources.resolve(placement, "train", cpus=1, cluster=cluster)
    assert (share.present, share.most) == (2, 4)
    assert share.options["label_selector"] == {"role": "train"}
    assert share.training(1)[0].label_selector == {"role": "train"}
    elsewhere = Placement(node_labels={"role": "train", "zone": "b"})
    with pytest.raises(ValueError, match="train.placement: .*; nodes with {'role'"):
        resources.resolve(elsewhere, "train", cpus=1, cluster=cluster)


def test_what_no_node_holds_is_refused() -> None:
    cluster = resources.Cluster(nodes=(GPU_NODE,))
    with pytest.raises(ValueError, match="train.placement: 1 worker.s. with 1 CPUs and 4 GPUs"):
        resources.resolve(Placement(gpus_per_worker=4), "train", cpus=1, cluster=cluster)
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
        NodeType(name="gpu", cpus=8, gpus=1, most=5), NodeType(name="cpu", cpus=16, gpus=0, most=5)
    )  # fmt: skip
