"""Placement of jobs: GPUs that only Ray counts, on other nodes than the head, living or added."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import clusters
from helpers.token_datasets import write_dataset

from valle.jobs.evaluate import EvaluateRecipe, evaluate
from valle.jobs.ingest.layouts import Source
from valle.jobs.prepare import PrepareRecipe, prepare
from valle.jobs.synthesize import SynthesizeRecipe, synthesize
from valle.jobs.train import fit, resolve_recipe
from valle.jobs.train_codec import CodecRecipe
from valle.jobs.train_codec import fit as fit_codec
from valle.jobs.train_quantizer import QuantizerRecipe
from valle.jobs.train_quantizer import fit as fit_quantizer
from valle.jobs.training.recipe import ModelSize, TrainRecipe
from valle.jobs.training.sampler import Batching
from valle.model.codec.encodec import Encodec
from valle.platform import checkpoint, resources, settings
from valle.platform.autoscaler import NodeShape
from valle.platform.capacity import inspect_cluster
from valle.platform.cluster import connect
from valle.platform.recipe import resolve_paths
from valle.platform.resources import Accelerator, Placement

AUTOSCALED = {"f" * 51 + "00001", "f" * 51 + "00002"}
"""The ids that Ray's fake provider gives to the first two nodes it adds."""


@contextmanager
def driver(head: clusters.Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connects this process as a driver outside the cluster, such as a laptop."""
    monkeypatch.setenv("RAY_ADDRESS", head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("VALLE_LOGICAL_GPUS", "1")
    with connect():
        yield


def actor_placements(head: clusters.Head, name: str) -> list[tuple[str, float]]:
    """(node id, share of a GPU) of every placed actor, dead or alive, of a class with `name`."""
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


def task_nodes(head: clusters.Head, name: str) -> set[str]:
    """Ids of the nodes that ran a task whose name contains `name`."""
    from ray.util.state import list_tasks

    tasks = list_tasks(head.jobs, detail=True, limit=1000)
    return {task.node_id for task in tasks if name in task.name and task.node_id}


def gpu_node() -> str:
    import ray

    (node,) = (n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU"))
    return str(node)


def make_prepare_recipe(
    home: Path, codec: Path, accelerator: Accelerator, shards: int = 1
) -> PrepareRecipe:
    """A recipe for eight recordings of noise, which are written."""
    generator = np.random.default_rng(0)
    for number in range(8):
        path = home / "speech" / f"s{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.normal(0, 0.1, 14_000 + 500 * number), 24_000)
        path.with_suffix(".txt").write_text("one two three")
    recipe = PrepareRecipe(
        out="tokens",
        sources=(Source(path="speech"),),
        codec=str(codec),
        utterances_per_shard=8 // shards,
        placement=Placement(accelerator=accelerator),
    )
    return resolve_paths(recipe)


def make_train_recipe(
    home: Path, codec: Path, data: str, placement: Placement, workers: int
) -> TrainRecipe:
    return resolve_recipe(
        TrainRecipe(
            data=data,
            run="placed",
            codec=str(codec),
            workers=workers,
            models=("ar",),
            model=ModelSize(width=16, n_heads=2, n_layers=1),
            steps={"ar": 2},
            samples=0,
            batching=Batching(max_tokens=300),
            prompt_seconds=0.3,
            validation_utterances=3,
            checkpoint_every=2,
            placement=placement,
        )
    )


@pytest.mark.ray
def test_jobs_run_on_the_labelled_node_and_share_its_gpus(
    home: Path,
    tiny_codec: Encodec,
    tiny_codec_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A head without a GPU, a node with two: `gpu` and `auto` alike leave the head alone, and with
    labels every stage does, also those that need no GPU."""
    import ray

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    write_dataset(str(home / "data"), tiny_codec)
    with (
        clusters.head(4) as head,
        clusters.worker_node(head, 3, 2, "role=train"),
        driver(head, monkeypatch),
    ):
        clusters.wait_for(lambda: ray.cluster_resources().get("GPU") == 2, 60, "the second node")
        node = gpu_node()
        labels = {"role": "train"}
        recipe = make_prepare_recipe(home, tiny_codec_folder, "gpu", shards=2)
        recipe = replace(recipe, placement=replace(recipe.placement, node_labels=labels))
        report = prepare(recipe)
        assert report["prepared"] == 8 and report["accelerator"] == "gpu"
        assert set(actor_placements(head, "EncodeShard")) == {(node, 1.0)}
        assert set(actor_placements(head, "Phonemize")) == {(node, 0.0)}
        assert task_nodes(head, "DecodeAudio") == {node}
        assert (
            "prepare: placement: 0.5 CPUs and 1 GPUs for each worker, "
            "on nodes with {'role': 'train'}; workers that fit now: 2, at most: 2"
            in capsys.readouterr().err
        )

        # three halves on two GPUs: at least two of them are one GPU's
        half = Placement(accelerator="auto", gpus_per_worker=0.5)
        uri = fit(make_train_recipe(home, tiny_codec_folder, "data", half, workers=3), "ar")
        assert checkpoint.load_state(Path(uri)).step == 2
        assert actor_placements(head, "RayTrainWorker") == [(node, 0.5)] * 3

        with pytest.raises(
            ValueError, match="train.workers: 4 worker.*the cluster holds 3: 2 node"
        ):
            fit(make_train_recipe(home, tiny_codec_folder, "data", half, workers=4), "ar")
        assert ray.util.placement_group([{"GPU": 1}] * 2).wait(60)
        capsys.readouterr()
        allocation = resources.resolve(Placement(), "evaluate", cpus=0.9)
        assert (allocation.fits_now, allocation.fits_at_most) == (0, 2)
        assert "evaluate: waiting: 2 of 2 GPUs are in use" in capsys.readouterr().err
        worker_env = ray.get(ray.remote(num_cpus=0)(settings.worker_environment).remote())
        assert worker_env["AWS_ENDPOINT_URL"] == "http://storage:9000"
        assert worker_env["VALLE_HOME"] == str(home) == os.environ["VALLE_HOME"]
        env_vars = ray.get_runtime_context().runtime_env["env_vars"]
        assert "planted" not in env_vars.values()


@pytest.mark.ray
def test_autoscaler_adds_the_nodes_of_a_job(
    home: Path, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that takes no work, and an autoscaler that may add two nodes with a GPU. `auto` counts
    nodes that are not there yet; the job's request makes the autoscaler add them; a pool of actors
    that has begun on the first node grows to the second."""
    import pyarrow as pa
    import ray

    class Slow:
        """A piece of work that is worth another node."""

        def __call__(self, rows: pa.Table) -> pa.Table:
            time.sleep(2)
            return pa.table({"node": [ray.get_runtime_context().get_node_id()]})

    with clusters.autoscaling_head({"CPU": 2, "GPU": 1}, 2) as head, driver(head, monkeypatch):
        cluster = inspect_cluster()
        assert [(node.cpus, node.gpus) for node in cluster.nodes] == [(0, 0)]
        assert cluster.node_types == (NodeShape(name="worker", cpus=2, gpus=1, max_count=2),)
        allocation = resources.resolve(Placement(), "train", cpus=1, workers=2, cluster=cluster)
        assert (allocation.gpus, allocation.fits_now, allocation.fits_at_most) == (1.0, 0, 2)
        with pytest.raises(ValueError, match="may be added: worker .2 CPUs, 1 GPUs; 2 at most"):
            resources.resolve(Placement(), "train", cpus=1, workers=3, cluster=cluster)

        allocation.configure_ray_data()
        blocks = ray.data.from_arrow([pa.table({"number": [number]}) for number in range(24)])
        rows = allocation.map_blocks(blocks, Slow, (), None, 24).take_all()
        assert len(rows) == 24 and {row["node"] for row in rows} == AUTOSCALED
        report = prepare(make_prepare_recipe(home, tiny_codec_folder, "auto"))
        assert report["prepared"] == 8 and report["accelerator"] == "gpu"
        ((node, gpus),) = set(actor_placements(head, "EncodeShard"))
        assert node in AUTOSCALED and gpus == 1.0
        # called on another node, it inspects the head's autoscaler all the same
        remote = ray.remote(num_gpus=0.1)(inspect_cluster)
        assert ray.get(remote.remote()).node_types == cluster.node_types


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_prepare_finishes_with_actors_of_half_a_core(home: Path, tiny_codec_folder: Path) -> None:
    """Four actors of half a core would take both cores and leave none for decoding."""
    half = Placement(accelerator="cpu", cpus_per_worker=0.5)
    recipe = replace(make_prepare_recipe(home, tiny_codec_folder, "cpu", shards=8), placement=half)
    with clusters.embedded_cluster(num_cpus=2):
        assert prepare(recipe)["prepared"] == 8


@pytest.mark.ray
def test_jobs_refuse_a_missing_gpu_before_work_starts(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> None:
    write_dataset(str(home / "data"), tiny_codec)
    gpu = Placement(accelerator="gpu")
    with clusters.embedded_cluster(num_cpus=2):
        for section, job in (
            ("prepare", lambda: prepare(make_prepare_recipe(home, tiny_codec_folder, "gpu"))),
            (
                "train",
                lambda: fit(make_train_recipe(home, tiny_codec_folder, "data", gpu, 1), "ar"),
            ),
            ("train_codec", lambda: fit_codec(CodecRecipe(data="x", out="codec", placement=gpu))),
            ("train_quantizer", lambda: fit_quantizer(QuantizerRecipe(
                corpora=("x",), out="codec", run="x", placement=gpu))),
            ("synthesize", lambda: synthesize(
                SynthesizeRecipe(manifest="absent.jsonl", out="spoken", placement=gpu))),
            ("evaluate", lambda: evaluate(EvaluateRecipe(
                items="quick", recordings="x", out="judged", placement=gpu))),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{section}.placement.accelerator: gpu, but") as e:
                job()
            assert "1 node(s) with 2 CPUs and 0 GPUs in all; no autoscaler" in str(e.value)
            assert f"set {section}.placement.accelerator to auto or cpu" in str(e.value)
        assert not [
            name
            for name in ("tokens", "runs", "spoken", "judged", "codec", "mlflow.db")
            if (home / name).exists()
        ]
        assert resources.resolve(Placement(), "train", cpus=1).gpus == 0


@pytest.mark.ray
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch can use this machine's GPU: nothing to refuse"
)
def test_device_refuses_a_gpu_that_torch_cannot_use(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> None:
    """A node with a broken driver must not train on its CPU silently; logical GPUs may."""
    import ray
    from ray.train import TrainingFailedError

    def remote_device(gpus: float, **env: str) -> str:
        task = ray.remote(num_gpus=gpus, runtime_env={"env_vars": env})(resources.device)
        device: str = ray.get(task.remote())
        return device

    with clusters.embedded_cluster(num_cpus=2, num_gpus=1):
        assert remote_device(0) == "cpu"
        assert remote_device(0.5, VALLE_LOGICAL_GPUS="1") == "cpu"
        with pytest.raises(RuntimeError, match="Ray gave this worker GPU 0 of node .*, but torch"):
            remote_device(0.5)
        # a worker of Ray Train has its GPU by a placement group
        write_dataset(str(home / "data"), tiny_codec)
        half = Placement(accelerator="gpu", gpus_per_worker=0.5)  # gloo: this torch has no NCCL
        recipe = make_train_recipe(home, tiny_codec_folder, "data", half, workers=2)
        with pytest.raises(TrainingFailedError, match="Ray gave this worker GPU 0 of node"):
            fit(replace(recipe, max_failures=0), "ar")
