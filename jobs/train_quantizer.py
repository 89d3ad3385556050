"""Trains nano 2's quantiser on vocoder features, on Ray Train: minutes on two CPU cores.

A step reconstructs random crops with a random number of codebooks, so that one run gives codecs of
two to eight. The first steps leave quantisation out; the codebooks are initialised by k-means on
the encoder's output after them. A run of the same name resumes from its last checkpoint. Metrics
go to MLflow; each checkpoint is exported to `out`, which `prepare` can use as a codec.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, groupby
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.jobs.export import relative_to_home
from valle.jobs.recipes import parse_arguments
from valle.jobs.training import ray_train
from valle.jobs.training.backends import Backend, DDPBackend, Inputs
from valle.jobs.training.export_log import append_line
from valle.jobs.training.optimizer import Optimization, build_codec_optimizer
from valle.jobs.training.sampler import Planned
from valle.jobs.training.trainee import StepRecord, Worker, WrittenCheckpoint
from valle.model.codec.quantizer import FEATURE_RATE, Quantizer, QuantizerConfig
from valle.model.codec.quantizer_training import QuantizerObjective
from valle.model.codec.weights import load_quantizer, save_quantizer
from valle.model.tokens import SAMPLE_RATE
from valle.model.vocoder.features import FeatureExtractor
from valle.model.vocoder.weights import WEIGHTS_FILE
from valle.platform import audio, storage, tracking
from valle.platform.checkpoint import CodecCheckpointMetadata, TrainState
from valle.platform.cluster import connect
from valle.platform.dataset import hash_listing
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location, resolve_paths
from valle.platform.resources import Placement

Features = NDArray[np.float32]
"""Vocoder features `[S, 20]` of a recording, 100 a second."""

VALIDATION_CROPS = 64


@dataclass(frozen=True, kw_only=True)
class QuantizerRecipe:
    """One training run of the quantiser."""

    corpora: tuple[str, ...] = field(metadata=location())
    """Folders or URIs of recordings, one folder per speaker: `{speaker}/{id}.wav`."""

    out: str = field(metadata=location())
    """Folder for the exported codec: weights, `config.json`, `recipe.json`, `training.jsonl`."""

    run: str
    """Name of the run, in `storage_path` and in MLflow; a run of the same name resumes."""

    storage_path: str = field(default="runs", metadata=location())
    """Folder or URI for checkpoints."""

    recordings_per_speaker: int = 60
    """Most recordings of a speaker that are read."""

    held_out_speakers: tuple[str, ...] = ()
    """Speakers, named by their folders, that are validated on and not trained on."""

    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Rates and sizes."""

    warm_start: str | None = field(default=None, metadata=location())
    """Folder of exported weights of the same sizes that a new run begins with. The mean and the
    deviation of the features stay theirs, and every step quantises. None: random weights."""

    steps: int = 3000
    """Optimizer steps."""

    unquantized_steps: int = field(default=400, metadata=formerly("unquantised_steps"))
    """Steps without quantisation at the start, part of `steps`."""

    batch_size: int = field(default=32, metadata=formerly("batch"))
    """Crops per step and worker."""

    crop_seconds: float = 2.0
    """Length of a crop; shorter recordings are not used."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; falls linearly to a hundredth of it."""

    commitment_weight: float = field(default=0.25, metadata=formerly("commitment"))
    """Weight of the distance between latents and codebook entries."""

    all_codebooks_share: float = field(default=0.7, metadata=formerly("all_codebooks"))
    """Share of the steps that use all codebooks; the others draw a number from two upwards."""

    pitch_weight: float = 6.0
    """Weight of the pitch's squared error; a cepstral coefficient has about 1."""

    voicing_weight: float = 2.0
    """Weight of the voicing's squared error."""

    log_every: int = 100
    """Steps between training metrics, each with the held-out errors."""

    checkpoint_every: int = field(default=1000, metadata=formerly("save_every"))
    """Steps between checkpoints, each with export."""

    keep_checkpoints: int = 2
    """Number of checkpoints to keep; older ones are deleted."""

    max_failures: int = 2
    """Lost workers after which the run resumes; one more ends it."""

    max_skipped_in_row: int = 10
    """Most batches in a row that may be skipped because their loss or gradient is not finite; one
    more stops the run. `skipped/` in the run's folder lists their items."""

    resume_anyway: str | None = None
    """A reason to resume although settings or data have changed in a way that is otherwise refused.
    Later checkpoints record the reason with the changes. None: refuse."""

    workers: int = 1
    """Data-parallel workers."""

    threads: int = 2
    """Torch threads per worker on a CPU, and the cores reserved for it unless
    `placement.cpus_per_worker` is set."""

    placement: Placement = field(default_factory=Placement, metadata=formerly("device"))
    """CPU or GPU, and each worker's share of one."""

    seed: int = 0
    """Seed of initial weights, crops and numbers of codebooks."""

    @property
    def optimization(self) -> Optimization:
        """AdamW with weight decay on every parameter, without warm-up."""
        return Optimization(
            learning_rate=self.learning_rate,
            warmup=1,
            schedule="linear_floor",
            final_fraction=0.01,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            clip=1.0,
        )


def list_recordings(recipe: QuantizerRecipe) -> list[tuple[str, str]]:
    """(URI, `{speaker}/{id}.wav`) of the recordings to read. Raises ValueError if there is none."""
    recordings = []
    for corpus in recipe.corpora:
        paths = sorted(storage.list_files(corpus, (".wav",)))
        for _, speaker_paths in groupby(paths, lambda path: path.split("/")[0]):
            first = list(speaker_paths)[: recipe.recordings_per_speaker]
            recordings += [(storage.join(corpus, path), path) for path in first]
    if not recordings:
        raise ValueError(f"corpora: no {{speaker}}/{{id}}.wav below {', '.join(recipe.corpora)}")
    return recordings


def read_features(recipe: QuantizerRecipe) -> dict[str, Features]:
    """Features of the corpora's recordings, by `{speaker}/{id}.wav`."""
    extractor = FeatureExtractor.load(WEIGHTS_FILE.parent)
    recordings = list_recordings(recipe)
    features = {}
    with progress_bar(total=len(recordings), label="features", unit="recording") as bar:
        for uri, path in recordings:
            wave = audio.read(storage.read_bytes(uri), max_seconds=600)
            features[path] = extractor.extract([wave], SAMPLE_RATE)[0]
            bar.update()
    return features


class FeatureCrops:
    """Random crops of recordings; every speaker is equally likely."""

    def __init__(self, recordings: Mapping[str, Features], recipe: QuantizerRecipe) -> None:
        self._length = round(recipe.crop_seconds * FEATURE_RATE)
        self._length -= self._length % recipe.quantizer.features_per_block
        self._recordings = recordings
        self._by_speaker: dict[str, list[str]] = {}
        for name, features in recordings.items():
            if len(features) >= self._length:
                self._by_speaker.setdefault(name.split("/")[0], []).append(name)
        self._speakers = sorted(self._by_speaker)
        if not self._speakers:
            raise ValueError(
                f"corpora: no recording is as long as crop_seconds ({recipe.crop_seconds:g}); "
                "lower it, or add longer recordings"
            )

    def draw(self, count: int, generator: np.random.Generator) -> Tensor:
        """Crops `[count, S, 20]`."""
        crops = [
            self._recordings[name][start : start + self._length]
            for name, start in self._positions(count, generator)
        ]
        return torch.from_numpy(np.stack(crops))

    def names(self, count: int, generator: np.random.Generator) -> list[str]:
        """The recordings that `draw` cuts its crops from."""
        return [name for name, _ in self._positions(count, generator)]

    def _positions(self, count: int, generator: np.random.Generator) -> Iterator[tuple[str, int]]:
        """Recording and first feature of each crop."""
        for _ in range(count):
            names = self._by_speaker[self._speakers[generator.integers(len(self._speakers))]]
            name = names[generator.integers(len(names))]
            length = len(self._recordings[name])
            yield name, int(generator.integers(length - self._length + 1))


@dataclass(frozen=True)
class FeatureBatch:
    """Crops of one step."""

    features: Tensor
    """`[B, S, 20]`"""

    n_codebooks: int | None
    """Codebooks to use, the same on every rank; None: no quantisation."""


class QuantizerTrainee:
    """nano 2's quantiser in the training loop."""

    name: str = "quantizer"
    smoothing: float | None = None

    def __init__(self, recipe: QuantizerRecipe) -> None:
        self._recipe = recipe
        self._started = monotonic()
        # the first weights follow from this: building the feature extractor draws numbers too
        torch.manual_seed(recipe.seed)
        held_out: dict[str, Features] = {}
        self._training: dict[str, Features] = {}
        for name, features in read_features(recipe).items():
            is_held_out = name.split("/")[0] in recipe.held_out_speakers
            (held_out if is_held_out else self._training)[name] = features
        self._crops = FeatureCrops(self._training, recipe)
        self._validation_crops: Tensor | None = None
        if held_out:
            crops = FeatureCrops(held_out, recipe)
            self._validation_crops = crops.draw(VALIDATION_CROPS, np.random.default_rng(1))
        self.steps = recipe.steps
        self.log_every, self.checkpoint_every = recipe.log_every, recipe.checkpoint_every
        self.max_skipped_in_row = recipe.max_skipped_in_row
        self.optimization = recipe.optimization

    def build_backend(self, worker: Worker, *, resumed: bool) -> Backend:
        recipe = self._recipe
        if resumed or recipe.warm_start is None:
            quantizer = Quantizer(recipe.quantizer)
            features = np.concatenate(list(self._training.values()))
            quantizer.mean.copy_(torch.from_numpy(features.mean(0))[:, None])
            quantizer.deviation.copy_(torch.from_numpy(features.std(0))[:, None])
        else:
            quantizer = load_warm_start(recipe.warm_start, recipe.quantizer)
        return DDPBackend(
            quantizer,
            self._objective(quantizer),
            recipe.optimization,
            worker.device,
            make_optimizer=build_codec_optimizer,
        )

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[FeatureBatch]]:
        """All ranks draw the crops of all and use their own, so that what is drawn next, the
        number of codebooks, is the same on every rank."""
        recipe = self._recipe
        maximum, size = recipe.quantizer.n_codebooks, recipe.batch_size
        for step in count(state.position):
            generator = np.random.default_rng([recipe.seed, step + 1])
            crops = self._crops.draw(size * worker.world_size, generator)
            n_codebooks: int | None = maximum
            if generator.random() >= recipe.all_codebooks_share:
                n_codebooks = int(generator.integers(min(2, maximum), maximum + 1))
            if recipe.warm_start is None and step < recipe.unquantized_steps:
                n_codebooks = None
            own = crops[worker.rank * size : (worker.rank + 1) * size]
            yield Planned(0, step, step + 1, FeatureBatch(own, n_codebooks))

    def items(self, planned: Planned[FeatureBatch], worker: Worker) -> list[str]:
        """`{speaker}/{id}.wav` of the recordings that the crops are of."""
        generator = np.random.default_rng([self._recipe.seed, planned.index + 1])
        size = self._recipe.batch_size
        names = self._crops.names(size * worker.world_size, generator)
        return names[worker.rank * size : (worker.rank + 1) * size]

    def inputs(self, data: FeatureBatch, step: int, worker: Worker) -> Inputs:
        return data.features.to(worker.device), data.n_codebooks

    def metrics(self, record: StepRecord[FeatureBatch]) -> dict[str, float]:
        """Number of codebooks and held-out errors, which also become a line of the training log."""
        n_codebooks = record.planned.data.n_codebooks
        line: dict[str, Any] = {
            "step": record.step,
            "codebooks": n_codebooks,
            "error": round(record.terms["error"], 4),
            "seconds": round(monotonic() - self._started),
        }
        errors = {} if n_codebooks is None else self._held_out_errors(record.model, record.worker)
        if errors:
            line["held_out"] = {number: round(error, 4) for number, error in errors.items()}
        append_line(self._recipe.out, line)
        return {"train/codebooks": n_codebooks or 0, **_validation_metrics(errors)}

    def metadata(self) -> CodecCheckpointMetadata:
        return CodecCheckpointMetadata(
            kind="quantizer",
            model=asdict(self._recipe.quantizer),
            code_version=tracking.code_version(),
            recipe=asdict(self._recipe),
            dataset=hash_listing((name, len(values)) for name, values in self._training.items()),
        )

    def validate(self, written: WrittenCheckpoint) -> dict[str, float]:
        """Held-out errors by number of codebooks, once there are codebooks."""
        assert isinstance(written.model, Quantizer), "build_backend() made it"
        if not all(book.inited for book in written.model.codebooks()):
            return {}
        return _validation_metrics(self._held_out_errors(written.model, written.worker))

    def export(self, written: WrittenCheckpoint, metrics: Mapping[str, float]) -> None:
        """The codec in `out`, and the recipe it was trained by."""
        assert isinstance(written.model, Quantizer), "build_backend() made it"
        save_quantizer(written.model, Path(self._recipe.out))
        recipe = relative_to_home(asdict(self._recipe))
        storage.write_json(storage.join(self._recipe.out, "recipe.json"), recipe)

    def _objective(self, quantizer: Quantizer) -> QuantizerObjective:
        return QuantizerObjective(
            quantizer,
            commitment_weight=self._recipe.commitment_weight,
            pitch_weight=self._recipe.pitch_weight,
            voicing_weight=self._recipe.voicing_weight,
        )

    def _held_out_errors(self, model: nn.Module, worker: Worker) -> dict[int, float]:
        """Reconstruction error on held-out speakers; empty if there are none."""
        assert isinstance(model, Quantizer), "build_backend() made it"
        if self._validation_crops is None:
            return {}
        objective = self._objective(model)
        return objective.errors_by_codebooks(self._validation_crops.to(worker.device))


def _validation_metrics(errors: Mapping[int, float]) -> dict[str, float]:
    return {f"validation/error_{number}_codebooks": error for number, error in errors.items()}


def load_warm_start(folder: str, config: QuantizerConfig) -> Quantizer:
    """The quantiser in `folder`, trainable. Raises ValueError if its sizes are not `config`."""
    quantizer = load_quantizer(Path(folder))
    if quantizer.config != config:
        raise ValueError(
            f"warm_start: {folder} holds {quantizer.config}, the recipe asks for {config}"
        )
    return quantizer.requires_grad_(True)


def fit(recipe: QuantizerRecipe) -> str:
    """Trains on the connected cluster; returns the URI of the last checkpoint.

    Raises ValueError before anything starts if the cluster can never hold the workers.
    """
    return ray_train.fit(
        recipe, partial(QuantizerTrainee, recipe), section="train_quantizer", name=recipe.run
    )


def resolve_recipe(recipe: QuantizerRecipe) -> QuantizerRecipe:
    """The recipe with absolute paths, its corpora and the weights of a warm start checked."""
    recipe = resolve_paths(recipe)
    list_recordings(recipe)  # fails for a missing corpus before Ray starts
    if recipe.warm_start is not None:
        load_warm_start(recipe.warm_start, recipe.quantizer)
    return recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train_quantizer --recipe nano2`."""
    recipe = resolve_recipe(
        parse_arguments(argv, "train_quantizer", QuantizerRecipe, __doc__ or "")
    )
    with exit_on_error(), connect():
        fit(recipe)
    print(f"quantizer: exported to {recipe.out}")


if __name__ == "__main__":
    main()
