"""The training loop on a Ray cluster: workers, checkpoints and restarts by Ray Train, metrics to
MLflow. With run_folder.py the only file of this folder that imports Ray."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.distributed as dist

from valle.jobs.training import loop, resume, run_folder
from valle.jobs.training.backends import Backend
from valle.jobs.training.trainee import SkippedBatch, Trainee, Worker
from valle.platform import checkpoint_files, resources, settings, storage, tracking
from valle.platform.capacity import Cluster
from valle.platform.recipe import RecipeError
from valle.platform.resources import Allocation, Placement

if TYPE_CHECKING:
    from ray.train import Checkpoint

WORST_SCORE = run_folder.WORST_SCORE

STOPPED = "stopped.json"
"""Why a run has ended before its last step, in its folder."""

SKIPPED = "skipped"
"""Folder of a run with a file for each batch that was skipped."""


class RunRecipe(Protocol):
    """The fields that the recipes of all training jobs share."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def storage_path(self) -> str: ...
    @property
    def keep_checkpoints(self) -> int: ...
    @property
    def max_failures(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def placement(self) -> Placement: ...


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings that the driver sends to every worker."""

    threads: int
    """Torch threads on a CPU."""

    score: str | None
    """Metric by which Ray ranks checkpoints, lower is better; None: by age."""

    run_id: str
    """The driver's MLflow run."""

    tracking_uri: str

    folder: str
    """The run's folder, a path or URI."""


def allocation_for(recipe: RunRecipe, section: str, cluster: Cluster | None = None) -> Allocation:
    """A worker's share of the connected cluster, or of `cluster`."""
    return resources.resolve(
        recipe.placement, section, cpus=recipe.threads, workers=recipe.workers, cluster=cluster
    )


def fit(
    recipe: RunRecipe,
    make_trainee: Callable[[], Trainee[Any]],
    *,
    section: str,
    name: str,
    score: str | None = None,
) -> str:
    """Trains on the connected cluster; returns the URI of the last checkpoint.

    `recipe` is the dataclass of the recipe's `section`; `name` is that of the run: a run of the
    same name resumes from its last checkpoint. `make_trainee` is called on every worker. With a
    `score`, the best checkpoint by this metric is kept besides the last ones. Raises ValueError
    before anything starts if the cluster can never hold the workers, and RecipeError for a run
    that must not resume or cannot go on.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    scaling, processes = allocation_for(recipe, section).ray_train_configs(recipe.workers)
    folder = storage.join(recipe.storage_path, name)
    run_folder.repair(folder, score)
    storage.delete(storage.join(folder, STOPPED))
    with tracking.driver_run(name, asdict(recipe)) as run_id:
        worker_settings = WorkerSettings(
            threads=recipe.threads, score=score, run_id=run_id,
            tracking_uri=settings.read().tracking_uri, folder=folder,
        )  # fmt: skip
        trainer = TorchTrainer(
            lambda: train_worker(make_trainee, worker_settings),
            scaling_config=scaling,
            torch_config=processes,
            run_config=RunConfig(
                name=name,
                storage_path=recipe.storage_path,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=recipe.keep_checkpoints,
                    checkpoint_score_attribute=score,
                    checkpoint_score_order="min",
                ),
                failure_config=FailureConfig(max_failures=recipe.max_failures),
            ),
        )
        result = trainer.fit()
        if storage.exists(storage.join(folder, STOPPED)):
            raise RecipeError(storage.read_json(storage.join(folder, STOPPED))["reason"])
    assert result.checkpoint is not None, "a finished run has reported its last step"
    return str(result.checkpoint.path)


def train_worker(make_trainee: Callable[[], Trainee[Any]], worker_settings: WorkerSettings) -> None:
    """Runs the loop as one worker of Ray Train, from the run's last checkpoint if there is one.

    A run that has to end, or must not resume, ends here on every rank without an error and writes
    the reason to the file `STOPPED`. Ray would restart a worker that raises, only to fail again.
    """
    import ray.train

    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=resources.train_device(),
    )
    if worker.device.type == "cpu":
        torch.set_num_threads(worker_settings.threads)
    try:
        _train(make_trainee(), worker, worker_settings)
    except (loop.TrainingStoppedError, resume.ResumeError) as error:
        if worker.rank == 0:
            path = storage.join(worker_settings.folder, STOPPED)
            storage.write_json(path, {"reason": str(error)})


def _train(trainee: Trainee[Any], worker: Worker, worker_settings: WorkerSettings) -> None:
    """`train_worker` with errors."""
    import ray.train

    last = ray.train.get_checkpoint()
    with last.as_directory() if last else nullcontext() as folder:
        backend, state = loop.start(trainee, worker, Path(folder) if folder else None)

    def report(step: int, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Stores a checkpoint and tells Ray Train. A barrier: every rank reports equally often."""
        worst = {worker_settings.score: WORST_SCORE} if worker_settings.score else {}
        name = f"step_{step:08d}"
        ray.train.report(
            {"step": step, **worst, **metrics},
            checkpoint=_store(folder, name, worker, backend) if folder else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def report_skipped(skipped: SkippedBatch) -> None:
        name = f"{skipped.epoch:04d}-{skipped.position:08d}-rank{skipped.rank}.json"
        storage.write_json(storage.join(worker_settings.folder, SKIPPED, name), asdict(skipped))
        loop.log_skipped(skipped)

    run_id = worker_settings.run_id if worker.rank == 0 else None
    tracker = tracking.worker_run(run_id, worker_settings.tracking_uri)
    try:
        loop.train(trainee, backend, state, worker, tracker, report, report_skipped)
    finally:
        tracker.close()


def _store(folder: Path, name: str, worker: Worker, backend: Backend) -> "Checkpoint":
    """Stores a rank's part of a checkpoint in the run's folder, and as the first rank `COMPLETE`.

    Ray's own upload would copy the files in any order into the place where they are looked for.
    """
    import ray.train
    from ray.train import Checkpoint

    run = ray.train.get_context().get_storage()
    filesystem, path = run.storage_filesystem, run.build_checkpoint_path_from_name(name)
    if not backend.writes_on_every_rank:
        checkpoint_files.write(folder, filesystem, path)
        return Checkpoint(path, filesystem)
    if worker.rank == 0:
        checkpoint_files.begin(filesystem, path)
    dist.barrier()
    files = checkpoint_files.copy(folder, filesystem, path)
    parts: list[dict[str, checkpoint_files.WrittenFile]] = [{} for _ in range(worker.world_size)]
    dist.all_gather_object(parts, files)
    if worker.rank == 0:
        merged = {name: file for part in parts for name, file in part.items()}
        checkpoint_files.finish(filesystem, path, merged)
    return Checkpoint(path, filesystem)
