"""The AR and NAR models, VALL-E's two codec language models, in the training loop."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch

from valle.jobs.training import validation
from valle.jobs.training.augmentation import (
    draw_levels,
    drop_conditions,
    seed_step,
    truncate_responses,
)
from valle.jobs.training.backends import Backend, DDPBackend, DeepSpeedBackend, Inputs
from valle.jobs.training.loader import Loader
from valle.jobs.training.objective import Objective
from valle.jobs.training.recipe import TrainRecipe, warm_start_uri
from valle.jobs.training.sampler import Planned
from valle.jobs.training.trainee import StepRecord, Worker, WrittenCheckpoint
from valle.model.codec.interface import CodecIdentity
from valle.model.codec.loading import load_codec
from valle.model.config import Kind
from valle.model.sequence import Batch
from valle.platform import checkpoint, settings, tracking
from valle.platform.checkpoint import CheckpointMetadata, TrainState
from valle.platform.dataset import TokenDataset


def build_backend(
    recipe: TrainRecipe, kind: Kind, device: torch.device, codec: CodecIdentity | None = None
) -> Backend:
    """A fresh model, the same on every rank, in the recipe's backend.

    With the data's `codec`, a model that the recipe's `warm_start` names takes other weights; None
    for a run that resumes.
    """
    torch.manual_seed(recipe.seed)
    model = checkpoint.build_model(recipe.model.resolve(kind))
    if codec is not None and kind in recipe.warm_start:
        checkpoint.warm_start(model, warm_start_uri(recipe, kind), codec)
    if recipe.compile:
        model.transformer.compile(dynamic=True)
    objective, bf16 = Objective(model), recipe.precision == "bf16"
    if recipe.backend == "ddp":
        return DDPBackend(model, objective, recipe.optimization, device, bf16=bf16)
    return DeepSpeedBackend(
        model, objective, recipe.optimization, device, bf16=bf16, stage=recipe.zero_stage
    )


class LanguageModelTrainee:
    """One of the two models, trained on a token dataset."""

    smoothing: float | None = None

    def __init__(self, recipe: TrainRecipe, kind: Kind) -> None:
        self._recipe, self._kind = recipe, kind
        self._model = recipe.model.resolve(kind)
        self._loader = Loader(
            TokenDataset(recipe.data, settings.read().cache),
            seed=recipe.seed,
            prompt_seconds=recipe.prompt_seconds,
            validation_utterances=recipe.validation_utterances,
            min_prompt_seconds=recipe.min_prompt_seconds,
            utterances_per_speaker=recipe.utterances_per_speaker,
        )
        self._codec = self._loader.dataset.manifest.codec
        self.name: str = kind
        self.steps = recipe.steps[kind]
        self.log_every, self.checkpoint_every = recipe.log_every, recipe.checkpoint_every
        self.max_skipped_in_row = recipe.max_skipped_in_row
        self.optimization = recipe.optimization

    def build_backend(self, worker: Worker, *, resumed: bool) -> Backend:
        codec = None if resumed else self._codec
        return build_backend(self._recipe, self._kind, worker.device, codec)

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[Batch]]:
        return self._loader.batches(self._recipe.batching, state, worker.rank, worker.world_size)

    def items(self, planned: Planned[Batch], worker: Worker) -> list[str]:
        """Ids of the batch's utterances."""
        return self._loader.ids(self._recipe.batching, planned, worker.rank, worker.world_size)

    def inputs(self, data: Batch, step: int, worker: Worker) -> Inputs:
        """The augmented batch and the codebook that NAR predicts in each row."""
        recipe = self._recipe
        key = f"{recipe.seed}/{step}/{worker.rank}"
        seed_step(key)
        level = draw_levels(len(data.frames), self._codec.n_codebooks, key, recipe.level_emphasis)
        batch = drop_conditions(data, key, recipe.condition_dropout)
        if self._kind == "nar":
            batch = truncate_responses(
                batch, key, recipe.truncated_share, self._model.frames_per_phoneme
            )
        return batch.to(worker.device), level.to(worker.device)

    def metrics(self, record: StepRecord[Batch]) -> dict[str, float]:
        """Epoch, speed in tokens of all workers, and share of padding."""
        batch = record.planned.data
        tokens = batch.n_tokens * record.worker.world_size
        return {
            "train/epoch": record.planned.epoch,
            "train/tokens_per_second": tokens / record.seconds,
            "train/padding": 1 - batch.n_tokens / batch.n_padded,
        }

    def metadata(self) -> CheckpointMetadata:
        manifest = self._loader.dataset.manifest
        return checkpoint.new_metadata(
            self._model,
            self._codec,
            tracking.code_version(),
            asdict(self._recipe),
            dataset=manifest.content_hash(),
            text_version=manifest.text_version,
            languages=tuple(manifest.hours_by_language),
        )

    def validate(self, written: WrittenCheckpoint) -> dict[str, float]:
        """Held-out loss, samples and, where it is due, the quick check's word error rate.

        The model is read back from the folder, as any other job loads it.
        """
        recipe, device, step = self._recipe, written.worker.device, written.state.step
        model, _ = checkpoint.load(written.folder, str(device))
        metrics = validation.validate(model, self._loader, recipe.batching, device)
        codec = load_codec(recipe.codec, device=str(device), cache=settings.read().cache)
        if recipe.samples:
            samples = validation.generate_samples(
                model, self._loader, codec, recipe.samples, device
            )
            written.tracker.log_audio(samples, step)
        check = recipe.quick_check
        if check and (step == self.steps or step % check.every == 0):
            metrics |= validation.word_error_rate(model, codec, check)
        return metrics

    def export(self, written: WrittenCheckpoint, metrics: Mapping[str, float]) -> None:
        """Exports nothing: `publish` reads the checkpoints."""
