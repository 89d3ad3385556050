"""Strict validation of Serve configurations."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from valle.serve import run
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs
from valle.serve.web.validate_config import config_errors, main

CONFIG = Path(__file__).resolve().parent.parent / "serve" / "config.yaml"


@pytest.fixture
def key_file(home: Path) -> Path:
    """The file of keys that the shipped configuration names."""
    file = home / "keys.yaml"
    file.write_text(yaml.safe_dump([{"name": "web", "sha256": "0" * 64}]))
    return file


def test_the_shipped_configuration_is_valid_and_closed(
    key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(CONFIG)]) == 0
    printed = capsys.readouterr().out
    assert "valid" in printed
    assert "warning: applications.0.args.voices: data/voices is a path of one machine" in printed
    assert "warning: applications.0.args.tracking_uri: unset" in printed
    key_file.unlink()
    assert main([str(CONFIG)]) == 1
    assert "api_keys: there is no keys.yaml: make a key" in capsys.readouterr().out


OPEN = [
    # host, proxy_location, other arguments, refused
    ("0.0.0.0", "EveryNode", {}, True),
    ("0.0.0.0", "HeadOnly", {}, True),
    ("::", "EveryNode", {}, True),
    ("10.0.0.7", "EveryNode", {}, True),
    ("example.com", "EveryNode", {}, True),
    (None, "EveryNode", {}, True),  # Serve's default is every interface
    ("0.0.0.0", "EveryNode", {"open": True}, False),
    ("0.0.0.0", "EveryNode", {"api_keys": "keys.yaml"}, False),
    ("0.0.0.0", "Disabled", {}, False),
    ("127.0.0.1", "EveryNode", {}, False),
    ("localhost", "EveryNode", {}, False),
    ("::1", "EveryNode", {}, False),
]


@pytest.mark.parametrize(("host", "location", "fields", "refused"), OPEN)
def test_an_open_application_is_an_error(
    key_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str | None,
    location: str,
    fields: dict[str, Any],
    refused: bool,
) -> None:
    """The check and the builder that `serve deploy` runs give the same verdict."""
    content: Any = yaml.safe_load(CONFIG.read_text())
    content["proxy_location"] = location
    content["http_options"] = {} if host is None else {"host": host}
    args = {"model": "/some/bundle#" + "0" * 64, "voices": "s3://b/voices", **fields}
    content["applications"][0]["args"] = args
    errors = list(config_errors(content))
    assert bool(errors) is refused, errors
    listening = None if location == "Disabled" else host or "0.0.0.0"
    monkeypatch.setattr("valle.serve.app.listening_host", lambda: listening)
    if refused:
        assert errors[0].startswith("applications.0.args.api_keys: missing, and ")
        with pytest.raises(ValueError, match="can be reached from other machines"):
            build_app(AppArgs(**args))
    else:
        build_app(AppArgs(**args))


@pytest.mark.parametrize("content", ["", "[]", "- name: x", "["])
def test_a_bad_file_of_keys_is_an_error(key_file: Path, content: str) -> None:
    key_file.write_text(content)
    configuration = yaml.safe_load(CONFIG.read_text())
    assert any("applications.0.args.api_keys" in line for line in config_errors(configuration))
    with pytest.raises(ValueError, match="api_keys"):
        build_app(AppArgs(api_keys="keys.yaml"))


def test_serve_refuses_to_listen_for_everybody_without_keys(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", ""):
        with pytest.raises(SystemExit) as stop:
            run.main(["--host", host])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "valle keys NAME" in message and "--open" in message
    with pytest.raises(SystemExit) as stop:
        run.main(["--host", "0.0.0.0", "--api-keys", "missing.yaml"])
    assert stop.value.code == 2 and "there is no missing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("proxy", "x", "proxy: no such key"),
        ("http_options.prt", 1, "http_options.prt: no such key"),
        ("applications.0.routeprefix", "/", "applications.0.routeprefix: no such key"),
        ("applications.0.args.modl", "x", "applications.0.args.modl: Extra inputs"),
        ("applications.0.args.slots", 0, "applications.0.args.slots: Input should be greater"),
        (
            "applications.0.deployments",
            [{"name": "AR", "max_queud_requests": 3}],
            "applications.0.deployments.0.max_queud_requests: no such key",
        ),
        (
            "applications.0.args.nar_slots",
            4,
            "applications.0.args.: Value error, nar_slots is called",
        ),
        ("http_options.port", "many", "http_options.port: Input should be a valid integer"),
    ],
)
def test_config_errors_name_the_key(path: str, value: object, problem: str) -> None:
    content: Any = yaml.safe_load(CONFIG.read_text())
    *parents, key = path.split(".")
    mapping = content
    for part in parents:
        mapping = mapping[int(part) if part.isdigit() else part]
    mapping[key] = value
    errors = list(config_errors(content))
    assert any(line.startswith(problem) for line in errors), errors
    assert list(config_errors([])) == ["the configuration is not a mapping"]
