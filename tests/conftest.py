"""Shared fixtures: a codec of random weights, a tiny token dataset, an isolated home."""

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
from helpers import clusters
from helpers.asgi import asgi_client
from helpers.deployments import FakeDeployments
from helpers.endpoints import RunningEndpoint, SharedEndpoint
from helpers.engines import short_ar
from helpers.mlflow_servers import MlflowServer
from helpers.recordings import speech
from helpers.tiny_bundles import EOS_BIAS, write_publish_recipe
from helpers.tiny_models import TINY_CODEC, tiny_nar
from hypothesis import settings as hypothesis_settings

from valle.jobs.publish import PublishRecipe, publish
from valle.model.codec import encodec
from valle.model.codec.encodec import Encodec
from valle.platform import registry
from valle.platform.audio import wav_bytes
from valle.serve.app_args import AppArgs
from valle.serve.web.api import create_api


def pytest_configure() -> None:
    """Property tests: the same few examples in each run, or many others in `make faults`."""
    common = {"deadline": None, "database": None}
    hypothesis_settings.register_profile("short", derandomize=True, max_examples=30, **common)
    hypothesis_settings.register_profile("long", max_examples=3000, **common)
    hypothesis_settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the endpoint come last, those that share one after each other."""

    def endpoint_order(item: pytest.Item) -> tuple[bool, float]:
        callspec = getattr(item, "callspec", None)
        eos_bias = callspec.params.get("eos_bias", EOS_BIAS) if callspec else EOS_BIAS
        return "endpoint" in getattr(item, "fixturenames", ()), -eos_bias

    items.sort(key=endpoint_order)


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, a cache and an MLflow store for each test; a test of the endpoint has those of the
    endpoint."""
    shares_endpoint = "endpoint" in request.fixturenames
    folder = request.getfixturevalue("running_endpoint").home if shares_endpoint else tmp_path
    monkeypatch.setenv("VALLE_HOME", str(folder))
    monkeypatch.setenv("VALLE_CACHE", str(folder / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: to making one takes seconds."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("database")
    store = SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder))
    store.engine.dispose()
    return folder / "mlflow.db"


@pytest.fixture
def database(home: Path, empty_database: Path) -> Path:
    """An empty registry in `VALLE_HOME`."""
    return Path(shutil.copy(empty_database, home / "mlflow.db"))


@pytest.fixture
def args(tmp_path: Path) -> AppArgs:
    """Configuration of `http`: one voice, and a model that stand-ins replace."""
    (tmp_path / "ann.wav").write_bytes(wav_bytes(speech(2)))
    return AppArgs(model="/some/böndle#" + "1a2b3c4d" * 8, voices=str(tmp_path))


@pytest.fixture
async def http(args: AppArgs) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the web layer with stand-ins for the models, in the process of the test."""
    async with asgi_client(create_api(args, FakeDeployments())) as http_client:
        yield http_client


@pytest.fixture(scope="session")
def started_mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def mlflow_server(
    started_mlflow_server: MlflowServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowServer:
    """A real MLflow server, the registry of this test. One for all tests, which start it again if
    it is down, and find what the others have published."""
    started_mlflow_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started_mlflow_server.address)
    return started_mlflow_server


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Of a tiny model's work a second thread mostly waits for the first, and takes its core."""
    torch.set_num_threads(1)


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
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # of an earlier test
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
    return write_publish_recipe(home, tiny_codec_folder, tiny_codec.identity, eos_bias)


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deployments in this process load untrained models, without a registry."""
    for name in ("pin", "resolve"):
        monkeypatch.setattr(registry, name, lambda model, *_, **__: model)
    monkeypatch.setattr(registry, "load_ar", lambda *_: short_ar(2))
    monkeypatch.setattr(registry, "load_nar", lambda *_: tiny_nar())


@pytest.fixture
def app_args() -> AppArgs:
    """Configuration of `endpoint`."""
    return AppArgs(
        voices="voices",
        max_replicas=1,
        max_sentence_seconds=1.0,
        max_body_bytes=1_000_000,
        registry_poll_seconds=0.5,
    )


@pytest.fixture(scope="session")
def shared_endpoint(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedEndpoint]:
    shared = SharedEndpoint(lambda: tmp_path_factory.mktemp("endpoint"))
    yield shared
    shared.close()


@pytest.fixture
def running_endpoint(
    shared_endpoint: SharedEndpoint,
    app_args: AppArgs,
    tiny_codec: Encodec,
    tiny_codec_folder: Path,
    empty_database: Path,
    eos_bias: float,
) -> RunningEndpoint:
    """Serves untrained models; tests of the same `eos_bias` and `app_args` that follow each other
    share it, with what they leave in its registry and among its voices."""

    def fill(home: Path) -> None:
        shutil.copy(empty_database, home / "mlflow.db")
        publish(write_publish_recipe(home, tiny_codec_folder, tiny_codec.identity, eos_bias))

    key = (eos_bias, app_args.model_dump_json())
    return shared_endpoint.get(key, app_args, fill)


@pytest.fixture
def endpoint(running_endpoint: RunningEndpoint) -> str:
    """The URL of the endpoint."""
    return running_endpoint.url
