"""Shared fixtures: a codec of random weights, a tiny token dataset, an isolated home."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import clusters
from helpers.tiny_bundles import EOS_BIAS, save_checkpoints
from helpers.tiny_models import TINY_CODEC

from valle.jobs.publish import PublishRecipe, publish
from valle.model.codec import encodec
from valle.model.codec.encodec import Encodec
from valle.platform import audio, storage
from valle.serve.app_args import AppArgs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has a home, a cache and an MLflow store of its own."""
    monkeypatch.setenv("VALLE_HOME", str(tmp_path))
    monkeypatch.setenv("VALLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One embedded Ray for every test of this process: four CPUs, and one GPU that is only a
    number.

    Its workers share a home and a cache: what belongs to one test reaches them as an argument, as
    it reaches workers on other machines. A test of CPU work sets `accelerator="cpu"`.
    """
    home = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # until the cluster runs
            patch.setenv("VALLE_HOME", str(home))
            patch.setenv("VALLE_CACHE", str(home / "cache"))
            patch.setenv("VALLE_LOGICAL_GPUS", "1")
            stack.enter_context(clusters.embedded_cluster(num_gpus=1))
        yield


@pytest.fixture(scope="session")
def tiny_codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a very narrow EnCodec: noise in, noise out, but all the plumbing is real."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    model = encodec.build(TINY_CODEC)
    for layer in model.quantizer.vq.layers:
        torch.nn.init.normal_(layer._codebook.embed, std=0.05)
    encodec.save(model, TINY_CODEC, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_codec(tiny_codec_folder: Path) -> Encodec:
    return encodec.load(str(tiny_codec_folder))


@pytest.fixture
def eos_bias() -> float:
    """Bias of the AR model's EOS logit; a test may set another."""
    return EOS_BIAS


@pytest.fixture
def publish_recipe(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path, eos_bias: float
) -> PublishRecipe:
    """A recipe over untrained checkpoints that speak noise for at most a second."""
    for step in (5, 20):
        folders = {kind: home / f"runs/test-{kind}/step_{step:08d}" for kind in ("ar", "nar")}
        save_checkpoints(folders, tiny_codec.identity, eos_bias)
    noise = np.random.default_rng(0).normal(0, 0.1, 36_000).astype(np.float32)
    storage.write_bytes("voices/ann.wav", audio.wav_bytes(noise))
    return PublishRecipe(
        ar="runs/test-ar", nar="runs/test-nar", codec=str(tiny_codec_folder),
        sample_prompt="voices/ann.wav", sample_seconds=1.0,
    )  # fmt: skip


@pytest.fixture
def app_args() -> AppArgs:
    """How the endpoint is set up."""
    return AppArgs(
        voices="voices", max_replicas=1, max_sentence_seconds=1.0, max_body_bytes=1_000_000,
        registry_poll_seconds=0.5,
    )  # fmt: skip


@pytest.fixture
def endpoint(ray_cluster: None, publish_recipe: PublishRecipe, app_args: AppArgs) -> Iterator[str]:
    from valle.serve import run

    publish(publish_recipe)
    with run.endpoint(app_args, clusters.free_port()) as url:
        yield url
