"""The training loop in plain processes: torch.distributed with gloo, no Ray."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.token_datasets import write_dataset
from valle.jobs.train import resolve_recipe
from valle.jobs.training import loop
from valle.jobs.training.backends import Backend, DDPBackend, Inputs
from valle.jobs.training.language_model import LanguageModelTrainee
from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization
from valle.jobs.training.recipe import ModelSize, TrainRecipe
from valle.jobs.training.sampler import Batching, Planned
from valle.jobs.training.trainee import StepRecord, Trainee, Worker
from valle.model.codec.encodec import Encodec
from valle.model.sequence import Batch
from valle.platform import audio, checkpoint_files
from valle.platform.checkpoint import TrainState
from valle.platform.resources import Placement

TIMES = ("train/tokens_per_second", "train/audio_seconds_per_second")
"""Metrics that differ between equal runs."""


class Interruption(Exception):
    """Ends a run between two checkpoints."""


class RecordingTracker:
    """Keeps the logged metrics by step; raises Interruption when `interrupt_at` is logged."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self._interrupt_at = interrupt_at

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.metrics.setdefault(step, {}).update(values)
        if step == self._interrupt_at:
            raise Interruption

    def log_audio(self, samples: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        pass

    def close(self) -> None:
        pass


def run_plain(
    trainee: Trainee[Any],
    folder: Path,
    worker: Worker | None = None,
    interrupt_at: int | None = None,
    report_skipped: loop.ReportSkipped = loop.log_skipped,
) -> dict[int, dict[str, float]]:
    """One worker, from the newest checkpoint in `folder` on; returns the metrics by step."""
    worker = worker or Worker()
    torch.set_num_threads(1)
    tracker = RecordingTracker(interrupt_at)

    def report(step: int, metrics: Mapping[str, float], written: Path | None) -> None:
        if written is not None:
            target = folder / f"step_{step:08d}"
            if backend.writes_on_every_rank:
                shutil.copytree(written, target, dirs_exist_ok=True)
            else:
                checkpoint_files.write(written, LocalFileSystem(), str(target))

    saved = sorted(folder.glob("step_*"))
    backend, state = loop.start(trainee, worker, saved[-1] if saved else None)
    loop.train(trainee, backend, state, worker, tracker, report, report_skipped)
    return tracker.metrics


def run_two_ranks(
    make_trainee: Callable[[], Trainee[Any]], folder: Path
) -> dict[int, dict[str, float]]:
    """Two workers in processes of their own; returns rank 0's metrics by step."""
    folder.mkdir(parents=True)
    torch.multiprocessing.spawn(_run_rank, (make_trainee, folder), nprocs=2)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {int(step): values for step, values in metrics.items()}


def _run_rank(rank: int, make_trainee: Callable[[], Trainee[Any]], folder: Path) -> None:
    join_two_ranks(rank, folder)
    metrics = run_plain(make_trainee(), folder, Worker(rank=rank, world_size=2))
    if rank == 0:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    leave_ranks()


def join_two_ranks(rank: int, folder: Path) -> None:
    """Makes this process one of two ranks, which meet in `folder`."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)


def leave_ranks() -> None:
    dist.destroy_process_group()


def last_checkpoint(folder: Path) -> Path:
    return sorted(folder.glob("step_*"))[-1]


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Same weights, optimizer, state and metrics, to the last bit."""
    for name in ("model.safetensors", "state/optimizer.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
    for name in ("state/train_state.json", "metrics.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name


def without_times(metrics: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in values.items() if name not in TIMES}
        for step, values in metrics.items()
    }


def assert_resumes_exactly(
    make_trainee: Callable[[], Trainee[Any]], folder: Path, interrupt_at: int
) -> None:
    """Interrupted and resumed equals uninterrupted: metrics, weights, optimizer, state."""
    uninterrupted = run_plain(make_trainee(), folder / "uninterrupted")
    try:
        run_plain(make_trainee(), folder / "resumed", interrupt_at=interrupt_at)
    except Interruption:
        pass
    else:
        raise AssertionError(f"step {interrupt_at} was not reached")
    resumed = run_plain(make_trainee(), folder / "resumed")
    assert min(resumed) <= interrupt_at < max(resumed), "steps after the checkpoint are repeated"
    expected = {step: uninterrupted[step] for step in resumed}
    assert without_times(resumed) == without_times(expected)
    assert_equal_checkpoints(
        last_checkpoint(folder / "resumed"), last_checkpoint(folder / "uninterrupted")
    )


def tiny_train_recipe(home: Path, codec: Encodec, codec_folder: Path) -> TrainRecipe:
    """24 steps of two tiny models on random codes."""
    write_dataset(str(home / "tokens"), codec)
    return resolve_recipe(
        TrainRecipe(
            data="tokens", run="test", codec=str(codec_folder), workers=2,
            model=ModelSize(width=16, n_heads=2, n_layers=2, dropout=0.1),
            steps={"ar": 24, "nar": 24}, optimization=Optimization(warmup=5),
            batching=Batching(max_tokens=300), prompt_seconds=0.3, validation_utterances=6,
            checkpoint_every=8, log_every=1, samples=1, keep_checkpoints=10,
            placement=Placement(accelerator="cpu"),
        )
    )  # fmt: skip


def write_tones(folder: Path, names: Sequence[str], noise: float = 0.0) -> Path:
    """Three seconds of gliding tones for each `{speaker}/{id}`."""
    generator = np.random.default_rng(0)
    seconds = np.arange(3 * 24_000) / 24_000
    for name in names:
        low, high = generator.uniform(100, 300, 2)
        phase = 2 * np.pi * np.cumsum(low + (high - low) * seconds / 3) / 24_000
        wave = sum(np.sin(k * phase) / k for k in range(1, 9)) * 0.2
        wave = wave + generator.normal(0, noise, len(wave)) if noise else wave
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio.wav_bytes(wave.astype(np.float32)))
    return folder


@dataclass(frozen=True)
class MeanOutput:
    loss: Tensor
    terms: Mapping[str, Tensor]


class MeanObjective(nn.Module):
    """The mean loss over the inputs of several ranks, with rank 0's terms."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *ranks: Inputs) -> MeanOutput:
        outputs = [self.objective(*inputs) for inputs in ranks]
        return MeanOutput(sum(x.loss for x in outputs) / len(outputs), outputs[0].terms)


class BothRanksTrainee(LanguageModelTrainee):
    """The slow twin of two ranks: one worker takes both ranks' batches in each step.

    Without dropout, whose draws depend on the rank.
    """

    def build_backend(self, worker: Worker, *, resumed: bool) -> Backend:
        model = super().build_backend(worker, resumed=resumed).model
        objective = MeanObjective(Objective(model))
        return DDPBackend(model, objective, self.optimization, worker.device)

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[Any]]:
        first, second = (
            super(BothRanksTrainee, self).batches(state, Worker(rank=rank, world_size=2))
            for rank in range(2)
        )
        for one, other in zip(first, second, strict=True):
            yield Planned(one.epoch, one.index, one.position, (one.data, other.data))

    def inputs(self, data: tuple[Batch, ...], step: int, worker: Worker) -> Inputs:
        return tuple(
            super(BothRanksTrainee, self).inputs(batch, step, Worker(rank=rank, world_size=2))
            for rank, batch in enumerate(data)
        )

    def metrics(self, record: StepRecord[Any]) -> dict[str, float]:
        return {}
