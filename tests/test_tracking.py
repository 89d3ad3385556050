"""MLflow runs: one run per training, continued after an interruption."""

from pathlib import Path

import numpy as np
import pytest

from valle.platform import tracking


@pytest.mark.usefixtures("database")
def test_driver_run_continues_an_unfinished_run(home: Path) -> None:
    with pytest.raises(RuntimeError), tracking.driver_run("name", {"model": {"width": 4}}) as first:
        raise RuntimeError("interrupted")
    with tracking.driver_run("name", {"model": {"width": 4}}) as second:
        assert second == first
    with tracking.driver_run("name", {}) as third:
        assert third != first, "a finished run is not continued"


@pytest.mark.usefixtures("database")
def test_metric_history_joins_the_runs_of_a_name(home: Path) -> None:
    import mlflow

    for value in (3.0, 2.0):
        with tracking.driver_run("name", {}):
            mlflow.log_metric("train/loss", value)
    history = tracking.metric_history("name", "train/loss")
    assert [value for _, value in history] == [3.0, 2.0]
    assert history[0][0] <= history[1][0]


@pytest.mark.usefixtures("database")
def test_log_report_names_a_folder_and_uploads_a_local_one(home: Path) -> None:
    import mlflow

    (home / "report").mkdir()
    (home / "report/report.md").write_text("fine")
    client = mlflow.MlflowClient
    for folder, artifacts in ((str(home / "report"), ["report/report.md"]), ("s3://b/r", [])):
        run_id = tracking.log_report("evaluate", {"wer": 0.5}, folder)
        run = client().get_run(run_id)
        assert (run.data.metrics, run.data.tags["report"]) == ({"wer": 0.5}, folder)
        assert [a.path for a in client().list_artifacts(run_id, "report")] == artifacts


def test_worker_run_without_an_id_logs_nothing(home: Path) -> None:
    run = tracking.worker_run(None, "sqlite:///nowhere.db")
    run.log_metrics({"train/loss": 1.0}, step=1)
    run.log_audio([("hello", np.zeros(10, np.float32))], step=1)
    run.close()
    assert not list(home.iterdir())


def test_flatten_joins_keys_with_dots() -> None:
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": [3]}
    assert dict(tracking.flatten(values)) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_code_version_names_the_package() -> None:
    assert tracking.code_version().startswith("0.1.0")
