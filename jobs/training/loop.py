"""The training loop: next batch, loss, backward, clip, step, log, checkpoint.

It trains every model of the project (`Trainee`) with every backend, on one worker or as one of
several, and depends on neither Ray nor MLflow: `ray_train.py` runs it on a cluster, tests run it
in plain processes.

A resumed run equals an uninterrupted one, on a CPU to the last bit, if recipe, data and number of
workers are the same. Saved are weights, optimizer and `TrainState`. All else follows from them:
batches and random draws from (seed, position, rank), the learning rate from the step.

A batch whose loss or gradient is not finite is skipped on every rank: the next batch takes its
step, as if the plan had not held the skipped one. A checkpoint whose validation or weights are
not finite is not handed over, so that the last good one stays.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from valle.jobs.training import resume
from valle.jobs.training.backends import Backend, Update
from valle.jobs.training.sampler import Planned
from valle.jobs.training.trainee import (
    SkippedBatch,
    StepRecord,
    Trainee,
    Worker,
    WrittenCheckpoint,
)
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState
from valle.platform.progress import progress_bar
from valle.platform.tracking import WorkerRun

Report = Callable[[int, Mapping[str, float], Path | None], None]
"""Takes over a checkpoint: step, metrics and, on ranks that write one, its temporary folder. Every
rank calls it for every checkpoint."""

ReportSkipped = Callable[[SkippedBatch], None]
"""Stores what a rank's skipped batch consisted of."""

MAX_BAD_VALIDATIONS = 2
"""Checkpoints in a row with a validation that is not finite, after which a run stops."""


class TrainingStoppedError(RuntimeError):
    """A run that has to end, because another attempt would fail in the same way."""


def log_skipped(skipped: SkippedBatch) -> None:
    """The `ReportSkipped` of a run without a folder: a warning."""
    logging.getLogger(__name__).warning("skipped: %s", skipped)


def start(trainee: Trainee[Any], worker: Worker, folder: Path | None) -> tuple[Backend, TrainState]:
    """Backend and state of a new run, or of one that resumes from the checkpoint in `folder`.

    Raises ResumeError (a ValueError) for a checkpoint of another run, see `resume.check`, and for
    one of an earlier format.
    """
    if folder is None:
        return trainee.build_backend(worker, resumed=False), TrainState()
    if not (folder / checkpoint.WEIGHTS).is_file():
        raise resume.ResumeError(
            f"run: the last checkpoint of this run has no {checkpoint.WEIGHTS}: an earlier version "
            "wrote it; give the run another name"
        )
    changed = resume.check(folder, trainee.metadata(), worker)
    backend = trainee.build_backend(worker, resumed=True)
    backend.load(folder)
    state = checkpoint.load_state(folder)
    return backend, replace(state, resumed_anyway=(*state.resumed_anyway, *changed))


def train(
    trainee: Trainee[Any],
    backend: Backend,
    state: TrainState,
    worker: Worker,
    tracker: WorkerRun,
    report: Report,
    report_skipped: ReportSkipped = log_skipped,
) -> TrainState:
    """Trains from `state` to the trainee's last step; returns the final state.

    Raises TrainingStoppedError, on every rank, after too many skipped batches in a row, and where
    validation stays without a finite result.
    """
    total, rank_0 = trainee.steps, worker.rank == 0
    batches = trainee.batches(state, worker)
    skipped_in_row = bad_validations = 0
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
        update = backend.update(learning_rate)

        # skip: only the position moves on
        if not update.taken:
            skipped_in_row += 1
            state = replace(
                state, epoch=planned.epoch, position=planned.position, skipped=state.skipped + 1
            )
            skipped = _describe(trainee, planned, worker, state, output.loss, update)
            report_skipped(skipped)
            if rank_0:
                tracker.log_metrics({"train/skipped_batches": state.skipped}, state.step)
            if skipped_in_row > trainee.max_skipped_in_row:
                raise TrainingStoppedError(_explain(trainee, skipped, skipped_in_row))
            continue
        skipped_in_row = 0

        # advance the state: the next batch is the one after this
        averages = _average(state.averages, output.terms, trainee.smoothing)
        state = replace(
            state, step=state.step + 1, epoch=planned.epoch, position=planned.position,
            averages=averages,
        )  # fmt: skip
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
            metrics["train/gradient_norm"] = update.gradient_norm
            metrics["train/learning_rate"] = learning_rate
            metrics["train/skipped_batches"] = state.skipped
            tracker.log_metrics(metrics | trainee.metrics(record), state.step)

        # checkpoint
        if last or state.step % trainee.checkpoint_every == 0:
            good = _save_checkpoint(trainee, backend, state, worker, tracker, report)
            bad_validations = 0 if good else bad_validations + 1
            if bad_validations and (last or bad_validations == MAX_BAD_VALIDATIONS):
                raise TrainingStoppedError(
                    f"{trainee.name}: the validation at step {state.step} is not finite, or a "
                    "weight; the last good checkpoint is kept. Lower optimization.learning_rate or "
                    "look at the held-out data, and start a new run"
                )
    bar.close()
    return state


def _describe(
    trainee: Trainee[Any],
    planned: Planned[Any],
    worker: Worker,
    state: TrainState,
    loss: Tensor,
    update: Update,
) -> SkippedBatch:
    return SkippedBatch(
        step=state.step + 1, epoch=planned.epoch, position=planned.position, rank=worker.rank,
        loss=loss.item(), gradient_norm=update.gradient_norm,
        items=trainee.items(planned, worker),
    )  # fmt: skip


def _explain(trainee: Trainee[Any], skipped: SkippedBatch, count: int) -> str:
    return (
        f"{trainee.name}: the loss or the gradient of {count} batches in a row is not finite "
        f"(max_skipped_in_row: {trainee.max_skipped_in_row}), the last at step {skipped.step} with "
        f"loss {skipped.loss} and gradient norm {skipped.gradient_norm}, items "
        f"{', '.join(skipped.items[:3])} ...; lower the learning rate, use precision=fp32, or "
        "leave these items out of the data"
    )


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
) -> bool:
    """Writes a checkpoint, validates and exports it (rank 0), hands it over (every rank).

    Without a finite validation it is neither exported nor handed over, and False is returned.
    """
    weights = backend.weights()  # on every rank: ZeRO-3 gathers
    metrics: dict[str, float] = {}
    good = True
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
            bad = [key for key, value in metrics.items() if not math.isfinite(value)]
            bad += [key for key, value in weights.items() if not value.isfinite().all()]
            good = not bad
            if bad:
                logging.getLogger(__name__).warning(
                    "%s: %s at step %d is not finite: this checkpoint is not kept",
                    trainee.name, bad[0], state.step,
                )  # fmt: skip
            else:
                checkpoint.save_metrics(folder, metrics)
                trainee.export(written, metrics)
        if backend.writes_on_every_rank:
            good = _agree(good, worker)  # saving is a collective
        writes = good and (worker.rank == 0 or backend.writes_on_every_rank)
        if writes:
            backend.save(folder)
        report(state.step, metrics if good else {}, folder if writes else None)
    # only now: ranks that wait in a collective give up when rank 0 validates for half an hour
    return good if backend.writes_on_every_rank else _agree(good, worker)


def _agree(good: bool, worker: Worker) -> bool:
    """True on every rank if it is so on all."""
    if worker.world_size == 1:
        return good
    flag = torch.tensor(float(good), device=worker.device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
