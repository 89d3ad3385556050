"""MLflow runs: the driver opens a run, the first worker logs to it.

The store is sqlite in `VALLE_HOME`, or the server at `MLFLOW_TRACKING_URI`.
"""

import io
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from valle import __version__
from valle.model.codec.interface import Wave
from valle.platform import audio, settings
from valle.platform.cluster import CODE_ROOT
from valle.platform.credentials import strip_credentials
from valle.platform.spectrogram import spectrogram_png

EXPERIMENT = "valle"


def code_version() -> str:
    """The package's version and, in a checkout, the commit, with `+dirty` for changed files."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty=+dirty", "--abbrev=12"],
            cwd=CODE_ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return __version__  # a submitted job's working directory has no .git
    return f"{__version__}-{git.stdout.strip()}"


def configure(uri: str | None = None) -> None:
    """Selects MLflow's store (default: this machine's settings) and the project's experiment.

    Workers and replicas have current folders and environments of their own; the process that
    starts them passes them the URI.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    machine = settings.read()
    mlflow.set_tracking_uri(uri or machine.tracking_uri)
    if mlflow.get_experiment_by_name(EXPERIMENT) is None:
        # without a server, MLflow would write artifacts to the current folder
        local = mlflow.get_tracking_uri().startswith("sqlite:")
        try:
            mlflow.create_experiment(EXPERIMENT, str(machine.home / "mlruns") if local else None)
        except MlflowException:
            # another process may have created it in between
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                raise
    mlflow.set_experiment(EXPERIMENT)


@contextmanager
def driver_run(name: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """An MLflow run during the block; yields its id.

    An unfinished run of the same name is continued, as the training itself is.
    """
    import mlflow

    configure()
    unfinished = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        max_results=1,
        output_format="list",
        filter_string=f"attributes.run_name = '{name}' and attributes.status != 'FINISHED'",
    )
    run_id = unfinished[0].info.run_id if unfinished else None
    with mlflow.start_run(run_id=run_id, run_name=name, log_system_metrics=False) as run:
        if run_id is None:
            shown = {k: _without_credentials(v) for k, v in flatten(parameters)}
            mlflow.log_params(shown)
        mlflow.set_tags({"code_version": code_version()})
        yield run.info.run_id


def metric_history(name: str, metric: str) -> list[tuple[float, float]]:
    """(time in hours, value) of a metric over all runs with a name, oldest first."""
    import mlflow

    configure()
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"attributes.run_name = '{name}'",
        output_format="list",
    )
    client = mlflow.MlflowClient()
    points = [m for run in runs for m in client.get_metric_history(run.info.run_id, metric)]
    return sorted((m.timestamp / 3_600_000, m.value) for m in points)


def log_report(name: str, metrics: Mapping[str, float], folder: str) -> str:
    """Logs a report as a finished run; returns its id.

    The tag `report` names the folder. The files of a local folder become artifacts of the run.
    """
    import mlflow

    configure()
    with mlflow.start_run(run_name=name, log_system_metrics=False) as run:
        mlflow.log_metrics(dict(metrics))
        report = strip_credentials(folder)
        mlflow.set_tags({"code_version": code_version(), "report": report})
        if "://" not in folder:
            mlflow.log_artifacts(folder, "report")
        return str(run.info.run_id)


def _without_credentials(value: Any) -> Any:
    """A parameter as it may be shown: text, and text inside lists, without credentials."""
    if isinstance(value, list | tuple):
        return [_without_credentials(entry) for entry in value]
    return strip_credentials(value) if isinstance(value, str) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of nested settings, with keys such as `a.b`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class WorkerRun(Protocol):
    """The MLflow run of a training loop."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs the metrics of a step, by name."""

    def log_audio(self, samples: Sequence[tuple[str, Wave]], step: int) -> None:
        """Logs named waves with their spectrograms."""

    def close(self) -> None:
        """Waits until all logged values are stored."""


class NullRun:
    """A run that ignores everything, for workers that do not log."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def log_audio(self, samples: Sequence[tuple[str, Wave]], step: int) -> None: ...

    def close(self) -> None: ...


class MlflowRun:
    """The driver's run, as the first worker logs to it, with its machine's system metrics."""

    def __init__(self, run_id: str, uri: str) -> None:
        import mlflow

        configure(uri)
        mlflow.set_system_metrics_sampling_interval(10)
        mlflow.start_run(run_id=run_id, log_system_metrics=True)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        import mlflow

        # a thread stores the values: a slow server must not hold up the step
        mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def log_audio(self, samples: Sequence[tuple[str, Wave]], step: int) -> None:
        """Stores `samples/{step}/{name}.wav` and `.png`."""
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
        import mlflow

        mlflow.flush_async_logging()


@contextmanager
def _artifact(client: Any, run_id: str, path: str) -> Iterator[io.BufferedWriter]:
    """A temporary file, uploaded as the artifact `path` of a run when the block ends."""
    target = PurePosixPath(path)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / target.name
        with local.open("wb") as file:
            yield file
        client.log_artifact(run_id, str(local), str(target.parent))


def worker_run(run_id: str | None, uri: str) -> WorkerRun:
    """The run with an id, for the worker that logs; a NullRun for None."""
    return NullRun() if run_id is None else MlflowRun(run_id, uri)
