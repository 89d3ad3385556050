"""The training loop: next batch, loss, backward, clip, step, log, checkpoint.

It trains every model of the project (`Trainee`) with every backend, on one worker or as one of
several, and depends on neither Ray nor MLflow: `ray_train.py` runs it on a cluster, tests run it
in plain processes.

A resumed run equals an uninterrupted one, on a CPU to the last bit, if recipe, data and number of
workers are the same. Saved are weights, optimizer and `TrainState`. All else follows from them:
batches and random draws from (seed, position, rank), the learning rate from the step.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from valle.jobs.training.backends import Backend
from valle.jobs.training.trainee import StepRecord, Trainee, Worker, WrittenCheckpoint
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState
from valle.platform.progress import progress_bar
from valle.platform.tracking import WorkerRun

Report = Callable[[int, Mapping[str, float], Path | None], None]
"""Takes over a checkpoint: step, metrics and, on ranks that write one, its temporary folder. Every
rank calls it for every checkpoint."""


def start(trainee: Trainee[Any], worker: Worker, folder: Path | None) -> tuple[Backend, TrainState]:
    """Backend and state of a new run, or of one that resumes from the checkpoint in `folder`.

    Raises ValueError for a checkpoint of an earlier format.
    """
    if folder is not None and not (folder / checkpoint.WEIGHTS).is_file():
        raise ValueError(
            f"run: the last checkpoint of this run has no {checkpoint.WEIGHTS}: an earlier version "
            "wrote it; give the run another name"
        )
    backend = trainee.build_backend(worker, resumed=folder is not None)
    if folder is None:
        return backend, TrainState()
    backend.load(folder)
    state = checkpoint.load_state(folder)
    return backend, state


def train(
    trainee: Trainee[Any],
    backend: Backend,
    state: TrainState,
    worker: Worker,
    tracker: WorkerRun,
    report: Report,
) -> TrainState:
    """Trains from `state` to the trainee's last step; returns the final state."""
    total, rank_0 = trainee.steps, worker.rank == 0
    batches = trainee.batches(state, worker)
    bar = progress_bar(
        total=total, label=trainee.name, unit="step", initial=state.step, enabled=rank_0
    )
    while state.step < total:
        # next batch
        planned = next(batches)
        started = time.perf_counter()
        inputs = trainee.inputs(planned.data, state.step, worker)

        # loss
        backend.model.train()
        output = backend.forward(inputs)

        # backward: gradients are averaged over the workers
        backend.backward(output.loss)

        # clip, step
        learning_rate = trainee.optimization.learning_rate_at(state.step, total)
        gradient_norm = backend.update(learning_rate)

        # advance the state: the next batch is the one after this
        averages = _average(state.averages, output.terms, trainee.smoothing)
        state = TrainState(state.step + 1, planned.epoch, planned.index + 1, averages=averages)
        bar.update()

        # log
        last = state.step == total
        if rank_0 and (last or state.step % trainee.log_every == 0):
            seconds = time.perf_counter() - started
            terms = averages or {name: value.item() for name, value in output.terms.items()}
            record = StepRecord(
                step=state.step, planned=planned, terms=terms, seconds=seconds,
                model=backend.model, worker=worker,
            )  # fmt: skip
            metrics = {f"train/{name}": value for name, value in terms.items()}
            metrics["train/gradient_norm"] = gradient_norm
            metrics["train/learning_rate"] = learning_rate
            tracker.log_metrics(metrics | trainee.metrics(record), state.step)

        # checkpoint
        if last or state.step % trainee.checkpoint_every == 0:
            _save_checkpoint(trainee, backend, state, worker, tracker, report)
    bar.close()
    return state


def _average(
    averages: Mapping[str, float], terms: Mapping[str, Tensor], smoothing: float | None
) -> dict[str, float]:
    """Running averages with one more value of each term; empty without smoothing."""
    if smoothing is None:
        return {}
    values = {name: value.item() for name, value in terms.items()}
    return {
        name: smoothing * averages.get(name, value) + (1 - smoothing) * value
        for name, value in values.items()
    }


def _save_checkpoint(
    trainee: Trainee[Any],
    backend: Backend,
    state: TrainState,
    worker: Worker,
    tracker: WorkerRun,
    report: Report,
) -> None:
    """Writes a checkpoint, validates and exports it (rank 0), hands it over (every rank)."""
    weights = backend.weights()  # on every rank: ZeRO-3 gathers
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if worker.rank == 0:
            checkpoint.save(folder, weights, trainee.metadata())
            checkpoint.save_state(folder, state)
            written = WrittenCheckpoint(
                folder=folder, model=backend.model, state=state, worker=worker, tracker=tracker
            )
            metrics = trainee.validate(written)
            tracker.log_metrics(metrics, state.step)
            checkpoint.save_metrics(folder, metrics)
            trainee.export(written, metrics)
        writes = worker.rank == 0 or backend.writes_on_every_rank
        if writes:
            backend.save(folder)
        report(state.step, metrics, folder if writes else None)
