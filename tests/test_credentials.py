"""Credentials inside addresses: refused for data, stripped wherever an address is shown."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valle.jobs.evaluate import EvaluateRecipe
from valle.platform import storage, tracking
from valle.platform.credentials import refuse_credentials, strip_credentials
from valle.platform.recipe import RecipeError, parse_section

WITH_SECRETS = [
    "s3://AKIAKEY:hunter2secret@bucket/data",
    "s3://AKIAKEY:hunter2/se+cr/et@bucket/data",
    "S3://AKIAKEY:hunter2@bucket",
    "s3a://AKIAKEY:hunter2@bucket",
    "http://ann:hunter2@mlflow:5000",
    "https://hunter2token@mlflow/path?x=1",
    "postgresql+psycopg2://ann:hunter2@db/mlflow",
    "http://storage/a.wav?X-Amz-Signature=hunter2&X-Amz-Expires=3",
    "https://account.blob/a?sv=1&sig=hunter2",
    "s3://bucket/key?access_key=AKIAKEY&secret_key=hunter2",
]
WITHOUT = [
    "s3://bucket/a:b@c/d.wav", "s3://bucket/mail@example.org.wav", "models:/valle@champion",
    "http://mlflow:5000/a@b", "http://mlflow:5000/#x@y", "sqlite:////home/ann/mlflow.db",
    "/home/ann@work/a:b@c.wav", "file:///home/a@b", "ann@example.org", "s3://bucket?region=eu",
]  # fmt: skip


@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_credentials_are_stripped_and_refused(uri: str) -> None:
    message = strip_credentials(f"cannot read '{uri}': denied ({uri})")
    assert "hunter2" not in message and "AKIAKEY:" not in message and "denied" in message
    with pytest.raises(ValueError, match="must not hold credentials") as refusal:
        refuse_credentials(uri)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("uri", WITHOUT)
def test_addresses_without_credentials_stay(uri: str) -> None:
    assert strip_credentials(uri) == uri
    refuse_credentials(uri)


def test_recipe_and_storage_refuse_them_without_showing_them() -> None:
    uri = "s3://AKIAKEY:hunter2/x@bucket/speech"
    content = {"evaluate": {"items": "demo", "recordings": uri, "out": "o"}}
    for error, call in (
        (RecipeError, lambda: parse_section(content, "evaluate", EvaluateRecipe, source="r.yaml")),
        (ValueError, lambda: storage.read_bytes(uri)),
        (ValueError, lambda: storage.absolute(uri)),
    ):
        with pytest.raises(error, match="AWS_SECRET_ACCESS_KEY") as refusal:
            call()
        assert "hunter2" not in str(refusal.value)


def test_parameters_of_a_run_hold_none(database: Path) -> None:
    with tracking.driver_run("name", {"a": {"b": WITH_SECRETS[0], "c": [WITH_SECRETS[1], 3]}}) as r:
        pass
    import mlflow

    assert mlflow.MlflowClient().get_run(r).data.params == {
        "a.b": "s3://***@bucket/data", "a.c": "['s3://***@bucket/data', 3]",
    }  # fmt: skip


@pytest.mark.fuzz
@given(st.text(max_size=200))
def test_strip_credentials_ends_and_changes_nothing_twice(text: str) -> None:
    once = strip_credentials(text)
    assert strip_credentials(once) == once
