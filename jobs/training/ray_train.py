"""The training loop on a Ray cluster: workers, checkpoints and restarts by Ray Train, metrics to
MLflow. The only file of this folder that imports Ray."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from valle.jobs.training import loop
from valle.jobs.training.trainee import Trainee, Worker
from valle.platform import resources, settings, tracking
from valle.platform.capacity import Cluster
from valle.platform.resources import Allocation, Placement

WORST_SCORE = 1e9
"""Score of a checkpoint that has none, worse than any. Ray compares all checkpoints by this number
and keeps it as JSON, which has no NaN."""


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
    before anything starts if the cluster can never hold the workers.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    scaling, processes = allocation_for(recipe, section).ray_train_configs(recipe.workers)
    with tracking.driver_run(name, asdict(recipe)) as run_id:
        worker_settings = WorkerSettings(
            threads=recipe.threads, score=score, run_id=run_id,
            tracking_uri=settings.read().tracking_uri,
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
    assert result.checkpoint is not None, "a finished run has reported its last step"
    return str(result.checkpoint.path)


def train_worker(make_trainee: Callable[[], Trainee[Any]], worker_settings: WorkerSettings) -> None:
    """Runs the loop as one worker of Ray Train, from the run's last checkpoint if there is one."""
    import ray.train
    from ray.train import Checkpoint

    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=resources.train_device(),
    )
    if worker.device.type == "cpu":
        torch.set_num_threads(worker_settings.threads)

    trainee = make_trainee()
    last = ray.train.get_checkpoint()
    with last.as_directory() if last else nullcontext() as folder:
        backend, state = loop.start(trainee, worker, Path(folder) if folder else None)

    def report(step: int, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Hands a checkpoint to Ray Train. A barrier: every rank reports equally often."""
        worst = {worker_settings.score: WORST_SCORE} if worker_settings.score else {}
        ray.train.report(
            {"step": step, **worst, **metrics},
            checkpoint=Checkpoint.from_directory(folder) if folder else None,
            checkpoint_dir_name=f"step_{step:08d}",
        )

    run_id = worker_settings.run_id if worker.rank == 0 else None
    tracker = tracking.worker_run(run_id, worker_settings.tracking_uri)
    loop.train(trainee, backend, state, worker, tracker, report)
    tracker.close()
