"""Trains the AR and NAR models on a token dataset, on Ray Train.

Resumable: a run of the same name goes on from its last checkpoint, with the batches it had not
seen yet. Metrics, samples and parameters go to MLflow.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dacite
import torch

from valle.jobs.recipes import parse_arguments
from valle.jobs.training import validation
from valle.jobs.training.backends import Backend, DDPBackend, DeepSpeedBackend
from valle.jobs.training.loader import Loader
from valle.jobs.training.objective import (
    draw_levels,
    drop_conditions,
    seed_step,
    truncate_responses,
)
from valle.jobs.training.recipe import TrainRecipe, warm_start_uri
from valle.model.codec.interface import CodecIdentity
from valle.model.codec.loading import load_codec
from valle.model.config import Kind
from valle.platform import checkpoint, resources, settings, tracking
from valle.platform.capacity import Cluster
from valle.platform.checkpoint import TrainState
from valle.platform.cluster import connect
from valle.platform.dataset import TokenDataset, read_manifest
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, resolve_paths
from valle.platform.resources import Allocation

WORST_WER = 1e9
"""Word error rate of a checkpoint that no quick check has read: worse than any that was read."""


def build_backend(
    recipe: TrainRecipe, kind: Kind, device: torch.device, codec: CodecIdentity | None = None
) -> Backend:
    """A fresh model on a worker, the same on every rank; given the data's `codec`, a new run's
    model takes the weights of the recipe's `warm_start`."""
    torch.manual_seed(recipe.seed)
    model = checkpoint.build_model(recipe.model.resolve(kind))
    if codec is not None and kind in recipe.warm_start:
        checkpoint.warm_start(model, warm_start_uri(recipe, kind), codec)
    if recipe.compile:
        model.transformer.compile(dynamic=True)
    bf16 = recipe.precision == "bf16"
    if recipe.backend == "ddp":
        return DDPBackend(model, recipe.optimization, device, bf16)
    return DeepSpeedBackend(model, recipe.optimization, device, bf16, recipe.zero_stage)


def train(values: dict[str, Any]) -> None:
    """The loop of one worker. `values`: the recipe, the model's kind, the MLflow run."""
    import ray.train

    recipe = dacite.from_dict(TrainRecipe, values["recipe"], dacite.Config(cast=[tuple, float]))
    kind: Kind = values["kind"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = resources.train_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.threads)
    loader = Loader(
        TokenDataset(recipe.data, settings.read().cache), seed=recipe.seed,
        prompt_seconds=recipe.prompt_seconds, validation_utterances=recipe.validation_utterances,
        min_prompt_seconds=recipe.min_prompt_seconds,
        utterances_per_speaker=recipe.utterances_per_speaker,
    )  # fmt: skip
    ray_checkpoint = ray.train.get_checkpoint()
    manifest = loader.dataset.manifest
    backend = build_backend(recipe, kind, device, None if ray_checkpoint else manifest.codec)
    state = TrainState()
    if ray_checkpoint:
        with ray_checkpoint.as_directory() as folder:
            backend.load(Path(folder))
            state = checkpoint.load_state(Path(folder))
    total = recipe.steps[kind]
    run = tracking.worker_run(values["run_id"] if rank == 0 else None, values["tracking_uri"])
    bar = progress_bar(total=total, label=kind, unit="step", initial=state.step, enabled=rank == 0)
    n_codebooks = manifest.codec.n_codebooks

    for epoch, number, batch in loader.batches(recipe.batching, state, rank, world_size):
        if state.step >= total:
            break
        started = time.perf_counter()
        key = f"{recipe.seed}/{state.step}/{rank}"
        seed_step(key)
        backend.model.train()
        level = draw_levels(len(batch.frames), n_codebooks, key, recipe.level_emphasis)
        batch = drop_conditions(batch, key, recipe.condition_dropout)
        if kind == "nar":
            per_phoneme = recipe.model.resolve(kind).frames_per_phoneme
            batch = truncate_responses(batch, key, recipe.truncated_share, per_phoneme)
        learning_rate = recipe.optimization.learning_rate_at(state.step, total)
        loss, norm = backend.step(batch.to(device), level.to(device), learning_rate)
        state = TrainState(step=state.step + 1, epoch=epoch, batch=number + 1)
        bar.update()
        if state.step % recipe.log_every == 0 or state.step == total:
            seconds = time.perf_counter() - started
            run.log_metrics(
                {
                    "train/loss": loss.loss.item(),
                    "train/accuracy": float(loss.correct.sum() / loss.tokens.sum()),
                    "train/gradient_norm": norm,
                    "train/learning_rate": learning_rate,
                    "train/epoch": epoch,
                    "train/tokens_per_second": batch.n_tokens * world_size / seconds,
                    "train/padding": 1 - batch.n_tokens / batch.n_padded,
                },
                state.step,
            )
        if state.step % recipe.checkpoint_every == 0 or state.step == total:
            _report(backend, loader, state, recipe, kind, run, rank, device)
    bar.close()
    run.close()


def _report(
    backend: Backend,
    loader: Loader,
    state: TrainState,
    recipe: TrainRecipe,
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
            metadata = checkpoint.new_metadata(
                recipe.model.resolve(kind), manifest.codec, tracking.code_version(),
                asdict(recipe),
            )  # fmt: skip
            checkpoint.save(folder, weights, metadata)
            checkpoint.save_state(folder, state)
            metrics = _evaluate(folder, loader, state, recipe, run, device)
        writes = rank == 0 or backend.writes_on_every_rank
        if writes:
            backend.save(folder)
        # Ray compares every checkpoint by this number and keeps it as JSON, which has no NaN
        worst = {checkpoint.WORD_ERROR_RATE: WORST_WER}
        ray.train.report(
            {"step": state.step, **worst, **metrics},
            checkpoint=Checkpoint.from_directory(name) if writes else None,
            checkpoint_dir_name=f"step_{state.step:08d}",
        )


def _evaluate(
    folder: Path,
    loader: Loader,
    state: TrainState,
    recipe: TrainRecipe,
    run: tracking.WorkerRun,
    device: torch.device,
) -> dict[str, float]:
    """Validation and samples of a checkpoint just written, as anyone would load it."""
    model, metadata = checkpoint.load(folder, str(device))
    metrics = validation.validate(model, loader, recipe.batching, device)
    codec = load_codec(recipe.codec, device=str(device), cache=settings.read().cache)
    if recipe.samples:
        samples = validation.generate_samples(model, loader, codec, recipe.samples, device)
        run.log_audio(samples, state.step)
    check, last = recipe.quick_check, state.step == recipe.steps[metadata.kind]
    if check and (last or state.step % check.every == 0):
        metrics |= validation.word_error_rate(model, codec, check)
    run.log_metrics(metrics, state.step)
    checkpoint.save_metrics(folder, metrics)
    return metrics


def allocation_for(recipe: TrainRecipe, cluster: Cluster | None = None) -> Allocation:
    """A worker's share of the connected cluster, or of `cluster`."""
    return resources.resolve(
        recipe.placement, "train", cpus=recipe.threads, workers=recipe.workers, cluster=cluster
    )


def fit(recipe: TrainRecipe, kind: Kind) -> str:
    """Trains one model on the connected cluster; returns the URI of its last checkpoint.

    Raises ValueError before anything starts when the cluster will never hold the workers.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    allocation = allocation_for(recipe)
    scaling, processes = allocation.ray_train_configs(recipe.workers)
    name = f"{recipe.run}-{kind}"
    with tracking.driver_run(name, asdict(recipe)) as run_id:
        trainer = TorchTrainer(
            train,
            train_loop_config={
                "recipe": asdict(recipe),
                "kind": kind,
                "run_id": run_id,
                "tracking_uri": settings.read().tracking_uri,
            },
            scaling_config=scaling,
            torch_config=processes,
            run_config=RunConfig(
                name=name,
                storage_path=recipe.storage_path,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=recipe.keep_checkpoints,
                    checkpoint_score_attribute=(
                        checkpoint.WORD_ERROR_RATE if recipe.quick_check else None
                    ),
                    checkpoint_score_order="min",
                ),
                failure_config=FailureConfig(max_failures=recipe.max_failures),
            ),
        )
        result = trainer.fit()
    assert result.checkpoint is not None, "a finished run has reported its last step"
    return str(result.checkpoint.path)


def resolve_recipe(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with absolute paths, its data and the sources of a warm start checked."""
    recipe = resolve_paths(recipe)
    manifest = read_manifest(recipe.data)
    for kind in recipe.models:
        if kind in recipe.warm_start:
            checkpoint.find_best(warm_start_uri(recipe, kind))  # a missing source is noticed here
    if recipe.samples:
        codec = load_codec(recipe.codec, cache=settings.read().cache)
        codec.identity.check(manifest.codec, f"the dataset {recipe.data}")
    return recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train --recipe demo`."""
    recipe = parse_arguments(argv, "train", TrainRecipe, __doc__ or "")
    recipe = resolve_recipe(recipe)
    with exit_on_error(), connect():
        for kind in recipe.models:
            print(f"{kind}: checkpoint at {fit(recipe, kind)}")


if __name__ == "__main__":
    main()
