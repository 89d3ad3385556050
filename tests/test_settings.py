"""The environment that a driver gives its workers."""

import os
from pathlib import Path

import pytest

from valle.platform import settings


def test_worker_environment_holds_addresses_and_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "VALLE_"))]:
        monkeypatch.delenv(name)
    shared = {
        "AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": "http://s3:9000", "AWS_ENDPOINT_URL_S3": "http://s3:9000",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_S3_ENDPOINT_URL": "http://s3:9000",
        "VALLE_LOGICAL_GPUS": "1",
    }  # fmt: skip
    withheld = (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
        "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_BEARER_TOKEN",
        "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
        "VALLE_CACHE", "VALLE_SOMETHING_NEW", "SECRET",
    )  # fmt: skip
    for name, value in {"VALLE_HOME": "here", **shared, **dict.fromkeys(withheld, "mine")}.items():
        monkeypatch.setenv(name, value)
    # their folder is another one: paths are absolute
    assert settings.worker_environment() == {**shared, "VALLE_HOME": str(tmp_path / "here")}
    assert not caplog.records

    monkeypatch.setenv("VALLE_FORWARD", "AWS_SECRET_ACCESS_KEY")
    assert settings.worker_environment()["AWS_SECRET_ACCESS_KEY"] == "mine"
    assert "readable in Ray's logs and on its dashboard: AWS_SECRET_ACCESS_KEY" in caplog.text
    monkeypatch.delenv("VALLE_FORWARD")
    caplog.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    settings.worker_environment()
    assert caplog.text.rstrip().endswith("dashboard: MLFLOW_TRACKING_URI")
    for name, message in (
        ("VALLE_CACHE", "each node's own"), ("NOT_THERE", "NOT_THERE is not set"),
    ):  # fmt: skip
        monkeypatch.setenv("VALLE_FORWARD", name)
        with pytest.raises(ValueError, match=message):
            settings.worker_environment()
