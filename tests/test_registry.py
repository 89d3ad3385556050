"""The model registry, on untrained models: versions, aliases, bundles, a real server."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.mlflow_servers import MlflowServer
from helpers.tiny_bundles import pack_bundle

from valle.jobs.publish import PublishRecipe, publish
from valle.model.codec.encodec import Encodec
from valle.model.valle import Synthesis
from valle.platform import audio, bundle, registry, tracking
from valle.platform.registry_client import MissingModelError


@pytest.mark.usefixtures("database")
def test_publish_registers_plain_files_and_moves_the_alias(
    publish_recipe: PublishRecipe, home: Path
) -> None:
    import mlflow

    assert [publish(publish_recipe).version for _ in range(2)] == [1, 2]
    folder = registry.resolve(registry.CHAMPION)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "ar/config.json", "ar/model.safetensors", "nar/config.json", "nar/model.safetensors",
        "codec/config.json", "codec/model.safetensors", "bundle.json", "sample.wav", "sample.png",
    }  # fmt: skip
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("valle", "champion")
    assert int(version.version) == 2
    assert version.tags["ar"].endswith("runs/test-ar/step_00000020")
    assert version.tags["bundle_sha256"] == bundle.verify(folder)


def log_as_worker(run_id: str, address: str) -> None:
    """What the first worker of a training does, in a process of its own."""
    worker = tracking.worker_run(run_id, address)
    worker.log_metrics({"train/loss": 2.5}, step=3)
    worker.log_audio([("hello", np.zeros(2_400, np.float32))], step=3)
    worker.close()


@pytest.mark.slow
def test_runs_and_registry_on_a_real_mlflow_server(
    publish_recipe: PublishRecipe, home: Path, mlflow_server: MlflowServer
) -> None:
    import mlflow

    with (
        tracking.driver_run("served", {"optimization": {"warmup": 5}}) as run_id,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other,
    ):
        other.submit(log_as_worker, run_id, mlflow_server.address).result()
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 2.5)
    assert run.data.params == {"optimization.warmup": "5"}
    artifacts = {a.path for a in client.list_artifacts(run_id, "samples/00000003")}
    assert artifacts == {"samples/00000003/hello.wav", "samples/00000003/hello.png"}

    publish(publish_recipe)
    folder = registry.resolve(registry.CHAMPION)
    assert (folder / "codec/model.safetensors").read_bytes() == (
        Path(publish_recipe.codec) / "model.safetensors"
    ).read_bytes()
    prompt = audio.read((home / "voices/ann.wav").read_bytes(), max_seconds=10)
    result = registry.load_synthesizer(folder).synthesize(
        "hello", prompt, Synthesis(max_seconds=0.2)
    )
    assert result.codes.shape[0] == 8
    # artifacts went through the server, not into a folder of this process
    assert any(mlflow_server.artifacts.rglob("sample.wav"))
    assert not (home / "mlruns").exists() and not (home / "mlflow.db").exists()


def test_pack_refuses_parts_that_do_not_belong_together(
    publish_recipe: PublishRecipe, home: Path
) -> None:
    with pytest.raises(ValueError, match="ar: the checkpoint holds a model of kind 'nar'"):
        publish(replace(publish_recipe, ar="runs/test-nar"))
    with pytest.raises(ValueError, match="codec mismatch: the AR checkpoint"):
        publish(replace(publish_recipe, codec="nano"))


def test_resolve_and_pin_accept_a_bundle_s_folder(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> None:
    folder = pack_bundle(home, tiny_codec_folder, tiny_codec.identity)
    assert registry.resolve("bundle") == folder, "relative to VALLE_HOME"
    assert registry.pin("bundle") == f"{folder}#{bundle.verify(folder)}"
    for find in (registry.resolve, registry.pin):
        with pytest.raises(FileNotFoundError, match=f"no model bundle at {home}/none: bundle.json"):
            find("none")
    with pytest.raises(FileNotFoundError, match="train and publish one"):
        registry.resolve("models:/valle/1")
    for uri in (
        "models:/valle", "models:/", "models:/valle/", "models:/valle/-1", "models:/valle@a b",
        "models:/valle/1#x", "models:/valle/9999999999", "models://valle/1", "models:/a/b/1",
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"' is not models:/name@alias or models:/name/version"
        ):
            registry.pin(uri)
    with pytest.raises(ValueError, match="s3://bucket/x is no local folder; copy the bundle"):
        registry.resolve("s3://bucket/x")
    for uri in ("models:/valle/1#m-" + "0" * 32, "models:/valle/1"):
        with pytest.raises(MissingModelError, match="has no models:/valle/1; train and publish"):
            registry.resolve(uri)
    assert not (home / "mlflow.db").exists(), "a look-up creates no database"
