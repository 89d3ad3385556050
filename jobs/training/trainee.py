"""Interface of a model to the training loop: the `Trainee` protocol and its types."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from valle.jobs.training.backends import Backend, Inputs
from valle.jobs.training.optimizer import Optimization
from valle.jobs.training.sampler import Planned
from valle.platform.checkpoint import CheckpointMetadata, CodecCheckpointMetadata, TrainState
from valle.platform.tracking import WorkerRun

Data = TypeVar("Data")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process of a training run."""

    rank: int = 0

    world_size: int = 1

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class StepRecord(Generic[Data]):
    """One step whose metrics are logged."""

    step: int
    """Number of steps taken, this one included."""

    planned: Planned[Data]

    terms: Mapping[str, float]
    """Terms of the objective: this step's, or their running averages (`Trainee.smoothing`)."""

    seconds: float
    """Duration of the step, from the batch to the updated weights."""

    model: nn.Module

    worker: Worker


@dataclass(frozen=True, kw_only=True)
class SkippedBatch:
    """One rank's batch of a step that was skipped, because the loss or the gradient of some rank
    was not finite."""

    step: int
    """Number of the step that would have been taken."""

    epoch: int

    position: int
    """`TrainState.position` after the batch."""

    rank: int

    loss: float
    """This rank's: if it is finite, another rank's batch may be to blame."""

    gradient_norm: float
    """Of the gradient averaged over the ranks."""

    items: list[str]
    """Ids of the utterances, or names of the recordings."""


@dataclass(frozen=True, kw_only=True)
class WrittenCheckpoint:
    """A checkpoint whose weights have been written and that is to be validated."""

    folder: Path

    model: nn.Module
    """The model in training, with the same weights."""

    state: TrainState

    worker: Worker

    tracker: WorkerRun


class Trainee(Protocol[Data]):
    """What differs between the models that the loop trains.

    `Data` is what one batch consists of. Every random draw of `batches` and `inputs` is a function
    of the seed, the position (`TrainState`) and the rank, so that a checkpoint needs no state of a
    random generator.
    """

    name: str
    """Label of the progress bar."""

    steps: int
    """Optimizer steps in all."""

    log_every: int
    """Steps between logged metrics."""

    checkpoint_every: int
    """Steps between checkpoints."""

    max_skipped_in_row: int
    """Batches in a row that may be skipped; one more stops the run."""

    optimization: Optimization

    smoothing: float | None
    """Decay of the running averages of the objective's terms, which are then logged instead of the
    terms of single steps; None: no averages."""

    def build_backend(self, worker: Worker, *, resumed: bool) -> Backend:
        """A fresh model, the same on every rank, in its backend.

        With `resumed`, the weights are about to be replaced by a checkpoint's: initialisation from
        data or from other weights is skipped.
        """

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[Data]]:
        """Endless batches of one rank, from the position in `state` on."""

    def items(self, planned: Planned[Data], worker: Worker) -> list[str]:
        """Names of what one rank's batch consists of, for a batch that is reported as bad."""

    def inputs(self, data: Data, step: int, worker: Worker) -> Inputs:
        """Augments a batch and moves it to the worker's device; `step` is counted from 0."""

    def metrics(self, record: StepRecord[Data]) -> dict[str, float]:
        """Metrics to log beside the objective's terms. Called on rank 0."""

    def metadata(self) -> CheckpointMetadata | CodecCheckpointMetadata:
        """The checkpoint's `config.json`."""

    def validate(self, written: WrittenCheckpoint) -> dict[str, float]:
        """Held-out metrics of a checkpoint. Called on rank 0; draws no global random numbers."""

    def export(self, written: WrittenCheckpoint, metrics: Mapping[str, float]) -> None:
        """Writes what other jobs use beside the checkpoint. Called on rank 0."""
