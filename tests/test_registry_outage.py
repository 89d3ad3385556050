"""The model registry when it fails: an outage is never absence, and is known within seconds."""

import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from helpers import clusters
from helpers.evaluations import replace_evaluation
from helpers.mlflow_servers import MlflowServer

from valle.jobs import model_versions as command
from valle.jobs.evaluate import EvaluateRecipe
from valle.jobs.publish import GateError, PublishRecipe, publish
from valle.platform import bundle, node_cache, registry, settings
from valle.platform import model_versions as versions
from valle.platform.registry_client import RegistryUnavailableError

CALLS: list[Callable[[], object]] = [
    lambda: registry.pin(registry.CHAMPION),
    lambda: registry.pin("models:/valle/3"),
    lambda: registry.pin("models:/valle/latest"),
    lambda: registry.resolve(registry.CHAMPION, allow_cached=True),
    lambda: registry.current_version(registry.CHAMPION, None, None, None),
    lambda: registry.current_version(registry.CHAMPION, None, None, "models:/valle/1"),
    versions.champion_version,
    versions.list_versions,
    lambda: versions.promote(1, "why"),
    lambda: versions.roll_back("why"),
    lambda: versions.read_report(1),
]


class Answers(BaseHTTPRequestHandler):
    """The same answer to every request."""

    status, body = 200, b""

    def answer(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # names of the base class

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bytes], str]]:
    """Starts a server that gives one answer; it is the registry then."""
    servers = []

    def start(status: int, body: bytes) -> str:
        handler = type("Handler", (Answers,), {"status": status, "body": body})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        address = f"http://ann:hunter2@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        return address

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def error(code: str) -> bytes:
    return json.dumps({"error_code": code, "message": f"{code} at ann:hunter2"}).encode()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, error("PERMISSION_DENIED")),
        (401, b"You are not authenticated"),
        (500, error("INTERNAL_ERROR")),
        (400, error("BAD_REQUEST")),
        (502, b"<html>Bad Gateway</html>"),
        (404, b"<html>not MLflow</html>"),
        (200, b"<html>some other server</html>"),
    ],
)
def test_an_outage_is_never_absence(
    answering: Callable[[int, bytes], str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a user's own value is kept
    answering(status, body)
    for call in CALLS:
        with pytest.raises(RegistryUnavailableError) as refusal:
            call()
        message = str(refusal.value)
        assert message.startswith("the registry at http://***@127.0.0.1:")
        assert "did not answer: " in message and "ann:hunter2@" not in message


def test_a_refused_connection_is_known_within_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{clusters.free_port()}")
    for call in CALLS:
        with pytest.raises(RegistryUnavailableError, match="did not answer: "):
            call()
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in settings.child_environment(), "bounds are gone"
    with pytest.raises(SystemExit) as status:
        command.main(["history"])
    assert status.value.code == 2 and "did not answer" in capsys.readouterr().err


def test_a_registry_that_hangs_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers; a node that knows a version goes on with it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        address = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(RegistryUnavailableError, match="did not answer: .* timeout"):
            registry.pin(registry.CHAMPION, allow_cached=True)
        last = "models:/valle/3#m-" + "0" * 32
        node_cache.remember(address, registry.CHAMPION, last)
        assert registry.pin(registry.CHAMPION, allow_cached=True) == last
        assert registry.current_version(registry.CHAMPION, None, None, None) == last
        for call in (
            lambda: registry.pin(registry.CHAMPION),
            lambda: registry.current_version(registry.CHAMPION, None, None, last),
        ):
            with pytest.raises(RegistryUnavailableError):
                call()
    deployed = "models:/valle/2#m-" + "1" * 32
    assert registry.current_version("models:/valle@x", address, deployed, None) == deployed


@pytest.mark.parametrize("code", ["RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"])
def test_absence_is_no_outage(answering: Callable[[int, bytes], str], code: str) -> None:
    body = json.dumps({"error_code": code, "message": "Registered model alias x not found."})
    answering(404, body.encode())
    with pytest.raises(FileNotFoundError, match=r"the registry at http://\*\*\*@.* has no models:"):
        registry.pin("models:/valle@nobody")


def test_an_unusable_database_is_an_outage(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "broken.db").write_bytes(b"no database" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/broken.db")
    with pytest.raises(RegistryUnavailableError, match="did not answer: "):
        registry.pin(registry.CHAMPION)


def test_bounds_overlap_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    outer, inner = (settings.bounded_mlflow_requests(n, 0) for n in (3, 4))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert settings.child_environment()[name] == "3"
    inner.__exit__(None, None, None)
    assert name not in settings.child_environment()
    monkeypatch.setenv(name, "60")
    with settings.bounded_mlflow_requests(3, 0):
        assert settings.child_environment()[name] == "60"
    assert settings.child_environment()[name] == "60"


IN_ANOTHER_PROCESS = """
import json, sys, time
from valle.platform import registry
started = time.monotonic()
version = registry.pin(registry.CHAMPION, allow_cached=True)
folder = registry.resolve(version)
registry.load_ar(folder)
print(json.dumps([version, str(folder), time.monotonic() - started]))
"""


@pytest.mark.slow
def test_a_new_process_starts_from_the_node_s_cache_while_the_server_is_down(
    publish_recipe: PublishRecipe,
    mlflow_server: MlflowServer,
    home: Path,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    """Killed, and hanging; and when it is back, the alias moves on."""
    first = publish(publish_recipe).version
    pinned = registry.pin(registry.CHAMPION)
    folder = registry.resolve(pinned)
    assert folder.is_relative_to(home / "cache/bundles") and pinned.split("#")[1][:2] == "m-"
    for name, stop, go_on in (
        ("killed", mlflow_server.kill, mlflow_server.start),
        (
            "hanging",
            lambda: mlflow_server.signal(signal.SIGSTOP),
            lambda: mlflow_server.signal(signal.SIGCONT),
        ),
    ):
        stop()
        try:
            result = subprocess.run(
                [sys.executable, "-c", IN_ANOTHER_PROCESS],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            )
            version, copy, elapsed = json.loads(result.stdout)
            record_property(f"seconds, server {name}", elapsed)
            assert (version, copy) == (pinned, str(folder))
            assert "did not answer" in result.stderr
            assert "its last answer to this node" in result.stderr
            # a version that is known by its number needs no registry at all
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert registry.resolve(pinned) == folder
            assert "did not answer" not in caplog.text
            # but nothing is promoted, and a strict look-up says what is the matter
            with pytest.raises(RegistryUnavailableError):
                registry.current_version(registry.CHAMPION, None, None, pinned)
        finally:
            go_on()
    clusters.wait_for(lambda: clusters.responds(f"{mlflow_server.address}/health"), 60, "MLflow")
    assert publish(publish_recipe).version == first + 1
    moved = registry.current_version(registry.CHAMPION, None, None, pinned)
    assert moved.startswith(f"models:/valle/{first + 1}#")


@pytest.mark.slow
def test_the_gate_reads_the_champion_s_report_from_the_server(
    publish_recipe: PublishRecipe,
    mlflow_server: MlflowServer,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The node's cache was filled before the report was added; the comparison takes place."""
    errors = replace_evaluation(monkeypatch)
    evaluation = EvaluateRecipe(items="demo", recordings="r", out="reports")
    recipe = replace(publish_recipe, force=None, evaluation=evaluation)
    before = versions.champion_version()
    if before is not None:  # of the other tests: nothing to compare with
        recipe = replace(recipe, force="a new beginning")
    first = publish(recipe).version
    recipe = replace(recipe, force=None)
    assert not (registry.resolve(registry.CHAMPION) / "report.json").exists()
    errors[0] = 4
    with pytest.raises(GateError, match=r"word_errors is worse .* by 0\.300"):
        publish(recipe)
    assert versions.champion_version() == first
    errors[0] = 0
    assert publish(recipe).version == first + 2 == versions.champion_version()
    assert versions.list_versions()[0].tags["replaced"] == str(first)


@pytest.mark.slow
def test_a_reset_registry_never_serves_old_weights(
    publish_recipe: PublishRecipe, mlflow_server: MlflowServer, home: Path
) -> None:
    """The same address, the same number, another model; and a look-up changes nothing."""
    publish(publish_recipe)
    old = registry.pin("models:/valle/1")
    weights = (registry.resolve(old) / "nar/model.safetensors").read_bytes()
    mlflow_server.reset()
    assert registry.pin(registry.CHAMPION).startswith(str(registry.SHIPPED_BUNDLE)), "it is empty"
    with pytest.raises(
        FileNotFoundError, match=r"has no champion any more, but had models:/valle/1#"
    ):
        registry.current_version(registry.CHAMPION, None, None, old)
    client = mlflow.MlflowClient(tracking_uri=mlflow_server.address)
    assert {e.name for e in client.search_experiments()} == {"Default"}, "nothing is created"

    publish(publish_recipe)
    new = registry.pin("models:/valle/1")
    assert new != old and registry.resolve(new) != registry.resolve(old)
    assert (registry.resolve(old) / "nar/model.safetensors").read_bytes() == weights
    # a node without the copy is told, and gets no other model under the old name
    shutil.rmtree(home / "cache")
    with pytest.raises(FileNotFoundError, match="has been replaced"):
        registry.resolve(old)


@pytest.mark.slow
def test_a_download_is_checked(
    publish_recipe: PublishRecipe, mlflow_server: MlflowServer, home: Path
) -> None:
    """Weights that were replaced on the server are refused by name, and not kept."""
    before = set(mlflow_server.artifacts.rglob("ar/model.safetensors"))
    publish(publish_recipe)
    [weights] = set(mlflow_server.artifacts.rglob("ar/model.safetensors")) - before
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(bundle.BundleError, match="ar/model.safetensors has changed"):
            registry.resolve(registry.CHAMPION)
    weights.write_bytes(original)
    registry.resolve(registry.CHAMPION)
    assert not list((home / "cache/bundles").glob("*.part"))
