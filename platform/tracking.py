"""MLflow runs: the driver opens one, the first worker writes to it.

The default store is sqlite in `VALLE_HOME`; `MLFLOW_TRACKING_URI` names a server instead.
"""

import io
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from valle import __version__
from valle.model.codec.interface import Wave
from valle.platform import audio, settings
from valle.platform.cluster import CODE_ROOT
from valle.platform.spectrogram import spectrogram_png

EXPERIMENT = "valle"


def code_version() -> str:
    """Package version and, in a checkout, the commit, with `+dirty` when files differ from it."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty=+dirty", "--abbrev=12"],
            cwd=CODE_ROOT, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return __version__  # a submitted job's working directory has no .git
    return f"{__version__}-{git.stdout.strip()}"


def configure(uri: str | None = None) -> None:
    """Points MLflow at a store (default: this machine's settings) and at our experiment.

    Workers and replicas run in folders and environments of their own, so they are told the URI
    by whoever started them.
    """
    import mlflow

    machine = settings.read()
    mlflow.set_tracking_uri(uri or machine.tracking_uri)
    if mlflow.get_experiment_by_name(EXPERIMENT) is None:
        # without a server, MLflow would keep artifacts in whatever folder it was started in
        local = mlflow.get_tracking_uri().startswith("sqlite:")
        mlflow.create_experiment(EXPERIMENT, str(machine.home / "mlruns") if local else None)
    mlflow.set_experiment(EXPERIMENT)


@contextmanager
def driver_run(name: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """One MLflow run around a training; yields its id.

    An earlier unfinished run of the same name is continued, as the training itself is.
    """
    import mlflow

    configure()
    unfinished = mlflow.search_runs(
        experiment_names=[EXPERIMENT], max_results=1, output_format="list",
        filter_string=f"attributes.run_name = '{name}' and attributes.status != 'FINISHED'",
    )  # fmt: skip
    run_id = unfinished[0].info.run_id if unfinished else None
    with mlflow.start_run(run_id=run_id, run_name=name, log_system_metrics=False) as run:
        if run_id is None:
            mlflow.log_params(dict(flatten(parameters)))
        mlflow.set_tags({"code_version": code_version()})
        yield run.info.run_id


def metric_history(name: str, metric: str) -> list[tuple[float, float]]:
    """(time in hours, value) of a metric over all runs of a name, oldest first."""
    import mlflow

    configure()
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT], filter_string=f"attributes.run_name = '{name}'",
        output_format="list",
    )  # fmt: skip
    client = mlflow.MlflowClient()
    points = [m for run in runs for m in client.get_metric_history(run.info.run_id, metric)]
    return sorted((m.timestamp / 3_600_000, m.value) for m in points)


def log_report(name: str, metrics: Mapping[str, float], folder: str) -> str:
    """A finished run of its own for figures and the folder they came with; returns its id.

    A folder that is not local stays where it is: the run then names it in the tag `report`.
    """
    import mlflow

    configure()
    with mlflow.start_run(run_name=name, log_system_metrics=False) as run:
        mlflow.log_metrics(dict(metrics))
        mlflow.set_tags({"code_version": code_version(), "report": folder})
        if "://" not in folder:
            mlflow.log_artifacts(folder, "report")
        return str(run.info.run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `a.b` and value, the form MLflow shows."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class WorkerRun(Protocol):
    """What the training loop tells its run."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers of a step."""

    def log_audio(self, samples: Sequence[tuple[str, Wave]], step: int) -> None:
        """Logs audio, each with its spectrogram."""

    def close(self) -> None:
        """Waits until everything is stored."""


class NullRun:
    """For the workers that do not log."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def log_audio(self, samples: Sequence[tuple[str, Wave]], step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class MlflowRun:
    """The first worker's end of the driver's run, with its machine's system metrics."""

    def __init__(self, run_id: str, uri: str) -> None:
        import mlflow

        configure(uri)
        mlflow.set_system_metrics_sampling_interval(10)
        mlflow.start_run(run_id=run_id, log_system_metrics=True)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queues the numbers; a thread stores them."""
        import mlflow

        mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def log_audio(self, samples: Sequence[tuple[str, Wave]], step: int) -> None:
        """Stores `samples/step/{name}.wav` and `.png`."""
        import mlflow

        client = mlflow.MlflowClient()
        run = mlflow.active_run()
        assert run is not None, "MlflowRun opened a run"
        for name, wave in samples:
            path = f"samples/{step:08d}/{name}"
            with _artifact(client, run.info.run_id, f"{path}.wav") as file:
                file.write(audio.wav_bytes(wave))
            with _artifact(client, run.info.run_id, f"{path}.png") as file:
                file.write(spectrogram_png(wave, name))

    def close(self) -> None:
        """Stores what is queued; the driver ends the run."""
        import mlflow

        mlflow.flush_async_logging()


@contextmanager
def _artifact(client: Any, run_id: str, path: str) -> Iterator[io.BufferedWriter]:
    """A local file that becomes the artifact `path` of a run."""
    import tempfile
    from pathlib import Path, PurePosixPath

    target = PurePosixPath(path)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / target.name
        with local.open("wb") as file:
            yield file
        client.log_artifact(run_id, str(local), str(target.parent))


def worker_run(run_id: str | None, uri: str) -> WorkerRun:
    """The run to log to; None gives one that ignores everything."""
    return NullRun() if run_id is None else MlflowRun(run_id, uri)
