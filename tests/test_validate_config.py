"""Strict validation of Serve configurations."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from valle.serve.web.validate_config import config_errors, main

CONFIG = Path(__file__).resolve().parent.parent / "serve" / "config.yaml"


def test_the_shipped_configuration_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CONFIG)]) == 0
    assert "valid" in capsys.readouterr().out


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
