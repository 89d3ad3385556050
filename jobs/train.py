"""Trains the AR and NAR models on a token dataset, on Ray Train.

Resumable: a run of the same name goes on from its last checkpoint, with the batches it had not
seen yet. Metrics, samples and parameters go to MLflow.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dacite
import torch

from valle.jobs.training import validation
from valle.jobs.training.backends import DDP, Backend, DeepSpeed
from valle.jobs.training.loader import Loader
from valle.jobs.training.objective import (
    cut_responses,
    draw_levels,
    drop_conditions,
    seed_step,
)
from valle.jobs.training.recipe import TrainRecipe, warm_source
from valle.model.codec.interface import CodecIdentity
from valle.model.codec.loading import load_codec
from valle.model.config import Kind
from valle.platform import checkpoint, recipe, resources, settings, storage, tracking
from valle.platform.capacity import Cluster
from valle.platform.checkpoint import TrainState
from valle.platform.cluster import connect
from valle.platform.dataset import TokenDataset, read_manifest
from valle.platform.progress import progress
from valle.platform.resources import Share

UNMEASURED = 1e9
"""Word error rate of a checkpoint that no quick check has read: worse than any that was read."""


def build_backend(
    chosen: TrainRecipe, kind: Kind, device: torch.device, codec: CodecIdentity | None = None
) -> Backend:
    """A fresh model on a worker, the same on every rank; given the data's `codec`, a new run's
    model takes the weights of the recipe's `warm_start`."""
    torch.manual_seed(chosen.seed)
    model = checkpoint.create(kind, chosen.model.resolve())
    if codec is not None and kind in chosen.warm_start:
        checkpoint.warm_start(model, warm_source(chosen, kind), codec)
    if chosen.compile:
        model.transformer.compile(dynamic=True)
    bf16 = chosen.precision == "bf16"
    if chosen.backend == "ddp":
        return DDP(model, chosen.optimization, device, bf16)
    return DeepSpeed(model, chosen.optimization, device, bf16, chosen.zero_stage)


def train(values: dict[str, Any]) -> None:
    """The loop of one worker. `values`: the recipe, the model's kind, the MLflow run."""
    import ray.train

    chosen = dacite.from_dict(TrainRecipe, values["recipe"], dacite.Config(cast=[tuple, float]))
    kind: Kind = values["kind"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = resources.train_device()
    if device.type == "cpu":
        torch.set_num_threads(chosen.threads)
    loader = Loader(
        TokenDataset(chosen.data, settings.read().cache), seed=chosen.seed,
        prompt_seconds=chosen.prompt_seconds, held_out=chosen.validation_utterances,
        shortest_prompt=chosen.shortest_prompt,
        utterances_per_speaker=chosen.utterances_per_speaker,
    )  # fmt: skip
    found = ray.train.get_checkpoint()
    manifest = loader.dataset.manifest
    backend = build_backend(chosen, kind, device, None if found else manifest.codec)
    state = TrainState()
    if found:
        with found.as_directory() as folder:
            backend.load(Path(folder))
            state = checkpoint.load_state(Path(folder))
    total = chosen.steps[kind]
    run = tracking.worker_run(values["run_id"] if rank == 0 else None, values["tracking_uri"])
    bar = progress(total=total, label=kind, unit="step", initial=state.step, shown=rank == 0)
    n_codebooks = manifest.codec.n_codebooks

    for epoch, number, batch in loader.batches(chosen.batching, state, rank, world_size):
        if state.step >= total:
            break
        started = time.perf_counter()
        key = f"{chosen.seed}/{state.step}/{rank}"
        seed_step(key)
        backend.model.train()
        level = draw_levels(len(batch.frames), n_codebooks, key, chosen.level_emphasis)
        batch = drop_conditions(batch, key, chosen.condition_dropout)
        if kind == "nar":
            per_phoneme = chosen.model.resolve().frames_per_phoneme
            batch = cut_responses(batch, key, chosen.beginnings, per_phoneme)
        rate = chosen.optimization.rate(state.step, total)
        loss, norm = backend.step(batch.to(device), level.to(device), rate)
        state = TrainState(step=state.step + 1, epoch=epoch, batch=number + 1)
        bar.update()
        if state.step % chosen.log_every == 0 or state.step == total:
            seconds = time.perf_counter() - started
            run.metrics(
                {
                    "train/loss": loss.loss.item(),
                    "train/accuracy": float(loss.correct.sum() / loss.tokens.sum()),
                    "train/gradient_norm": norm,
                    "train/learning_rate": rate,
                    "train/epoch": epoch,
                    "train/tokens_per_second": batch.n_tokens * world_size / seconds,
                    "train/padding": 1 - batch.n_tokens / batch.n_padded,
                },
                state.step,
            )
        if state.step % chosen.checkpoint_every == 0 or state.step == total:
            _report(backend, loader, state, chosen, kind, run, rank, device)
    bar.close()
    run.close()


def _report(
    backend: Backend,
    loader: Loader,
    state: TrainState,
    chosen: TrainRecipe,
    kind: Kind,
    run: tracking.WorkerRun,
    rank: int,
    device: torch.device,
) -> None:
    """Writes the checkpoint, validates it (rank 0), hands it to Ray Train.

    `report` is a barrier and every rank calls it equally often.
    """
    import ray.train
    from ray.train import Checkpoint

    weights = backend.weights()  # on every rank: ZeRO-3 gathers
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if rank == 0:
            manifest = loader.dataset.manifest
            description = checkpoint.describe(
                kind, chosen.model.resolve(), manifest.codec, tracking.code_version(),
                asdict(chosen),
            )  # fmt: skip
            checkpoint.save(folder, weights, description)
            checkpoint.save_state(folder, state)
            metrics = _evaluate(folder, loader, state, chosen, run, device)
        mine = rank == 0 or backend.writes_on_every_rank
        if mine:
            backend.save(folder)
        # Ray compares every checkpoint by this number and keeps it as JSON, which has no NaN
        unmeasured = {checkpoint.WORD_ERROR_RATE: UNMEASURED}
        ray.train.report(
            {"step": state.step, **unmeasured, **metrics},
            checkpoint=Checkpoint.from_directory(name) if mine else None,
            checkpoint_dir_name=f"step_{state.step:08d}",
        )


def _evaluate(
    folder: Path,
    loader: Loader,
    state: TrainState,
    chosen: TrainRecipe,
    run: tracking.WorkerRun,
    device: torch.device,
) -> dict[str, float]:
    """Validation and samples of a checkpoint just written, as anyone would load it."""
    model, about = checkpoint.load(folder, str(device))
    metrics = validation.run(model, loader, chosen.batching, device)
    codec = load_codec(chosen.codec, device=str(device), cache=settings.read().cache)
    if chosen.samples:
        run.samples(validation.samples(model, loader, codec, chosen.samples, device), state.step)
    check, last = chosen.quick_check, state.step == chosen.steps[about.kind]
    if check and (last or state.step % check.every == 0):
        metrics |= validation.words(model, codec, check)
    run.metrics(metrics, state.step)
    checkpoint.save_metrics(folder, metrics)
    return metrics


def share_of(chosen: TrainRecipe, cluster: Cluster | None = None) -> Share:
    """A worker's share of the connected cluster, or of `cluster`."""
    return resources.resolve(
        chosen.placement, "train", cpus=chosen.threads, workers=chosen.workers, cluster=cluster
    )


def fit(chosen: TrainRecipe, kind: Kind) -> str:
    """Trains one model on the connected cluster; returns the URI of its last checkpoint.

    Raises ValueError before anything starts when the cluster will never hold the workers.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    share = share_of(chosen)
    scaling, processes = share.training(chosen.workers)
    name = f"{chosen.run}-{kind}"
    with tracking.driver_run(name, asdict(chosen)) as run_id:
        trainer = TorchTrainer(
            train,
            train_loop_config={
                "recipe": asdict(chosen),
                "kind": kind,
                "run_id": run_id,
                "tracking_uri": settings.read().tracking_uri,
            },
            scaling_config=scaling,
            torch_config=processes,
            run_config=RunConfig(
                name=name,
                storage_path=chosen.storage,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=chosen.keep_checkpoints,
                    checkpoint_score_attribute=(
                        checkpoint.WORD_ERROR_RATE if chosen.quick_check else None
                    ),
                    checkpoint_score_order="min",
                ),
                failure_config=FailureConfig(max_failures=chosen.max_failures),
            ),
        )
        result = trainer.fit()
    assert result.checkpoint is not None, "a finished run has reported its last step"
    return str(result.checkpoint.path)


def prepare_run(chosen: TrainRecipe) -> TrainRecipe:
    """The recipe with absolute paths (workers start in folders of their own), data checked."""
    chosen = replace(
        chosen, data=storage.absolute(chosen.data), storage=storage.absolute(chosen.storage)
    )
    manifest = read_manifest(chosen.data)
    for kind in chosen.models:
        if kind in chosen.warm_start:
            checkpoint.choose(warm_source(chosen, kind))  # a missing source is noticed here
    absolute = {
        kind: uri if uri == "nano" else storage.absolute(uri)
        for kind, uri in chosen.warm_start.items()
    }
    chosen = replace(chosen, warm_start=absolute)
    if chosen.samples:
        codec = load_codec(chosen.codec, cache=settings.read().cache)
        codec.identity.check(manifest.codec, f"the dataset {chosen.data}")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train --recipe demo`."""
    chosen = recipe.parse_arguments(argv, "train", TrainRecipe, __doc__ or "")
    chosen = prepare_run(chosen)
    with recipe.reported(), connect():
        for kind in chosen.models:
            print(f"{kind}: checkpoint at {fit(chosen, kind)}")


if __name__ == "__main__":
    main()
