"""Trains a narrow EnCodec on a folder of speech, on Ray Train.

A run of the same name resumes from its last checkpoint. Metrics go to MLflow. Each checkpoint is
exported to `out`, where `prepare` can use it as a codec.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from valle.jobs.recipes import parse_arguments
from valle.jobs.training import ray_train
from valle.jobs.training.backends import Backend, DDPBackend, Inputs
from valle.jobs.training.export_log import append_line
from valle.jobs.training.optimizer import Optimization, build_codec_optimizer
from valle.jobs.training.sampler import Planned
from valle.jobs.training.trainee import StepRecord, Worker, WrittenCheckpoint
from valle.model.codec import encodec
from valle.model.codec.encodec import EncodecConfig
from valle.model.codec.encodec_training import EncodecLossConfig, EncodecObjective
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.platform import storage, tracking
from valle.platform.checkpoint import CodecCheckpointMetadata, TrainState
from valle.platform.cluster import connect
from valle.platform.dataset import hash_listing
from valle.platform.recipe import exit_on_error, formerly, location
from valle.platform.resources import Placement

INITIAL_CROPS: Final = 800
"""Crops from which convolutions, teacher and codebooks are initialised."""

VALIDATION_BATCHES: Final = 4


@dataclass(frozen=True, kw_only=True)
class CodecRecipe:
    """One training run of an EnCodec."""

    data: str = field(metadata=location())
    """Local folder of 24 kHz wavs, one folder per speaker, as `corpus` writes it."""

    out: str = field(metadata=location())
    """Folder for the exported codec (`model.safetensors`, `config.json`)."""

    run: str = "codec"
    """Name of the run, in `storage_path` and in MLflow; a run of the same name resumes."""

    storage_path: str = field(default="runs", metadata=location())
    """Folder or URI for checkpoints."""

    held_out_speakers: tuple[str, ...] = ()
    """Speakers, named by their folders, that are not trained on."""

    held_out_every: int = 10
    """Every n-th recording of the other speakers is held out for validation."""

    codec: EncodecConfig = field(default_factory=EncodecConfig)
    """Size of the network."""

    loss: EncodecLossConfig = field(default_factory=EncodecLossConfig)
    """Weights of the loss terms, and the quantiser's moving averages."""

    steps: int = 20_000
    """Optimizer steps."""

    batch_size: int = field(default=8, metadata=formerly("batch"))
    """Crops per step and worker."""

    crop_seconds: float = 1.0
    """Length of a crop."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW: linear warm-up, then cosine to zero."""

    warmup: int = 200
    """Steps of linear warm-up."""

    clip: float = 1.0
    """Upper bound on the norm of the gradient."""

    checkpoint_every: int = 500
    """Steps between checkpoints, each with validation and export."""

    log_every: int = 20
    """Steps between training metrics."""

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

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU, and each worker's share of one."""

    seed: int = 0
    """Seed of initial weights, crops and revived codebook entries."""

    @property
    def optimization(self) -> Optimization:
        """AdamW without weight decay."""
        return Optimization(
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            schedule="cosine",
            final_fraction=0.0,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            clip=self.clip,
        )


class AudioCrops:
    """Random crops of a list of wav files; a batch is a function of its seed."""

    def __init__(self, files: Sequence[Path], seconds: float) -> None:
        import soundfile

        self._files = files
        self._frames = [soundfile.info(file).frames for file in files]
        self._length = int(seconds * SAMPLE_RATE)

    def content_hash(self) -> str:
        """SHA-256 of the recordings' names and lengths."""
        names = [f"{file.parent.name}/{file.name}" for file in self._files]
        return hash_listing(zip(names, self._frames, strict=True))

    def files(self, size: int, seed: str) -> list[Path]:
        """The recordings of `batch`."""
        return [self._files[index] for index in self._draw(size, random.Random(seed))]

    def _draw(self, size: int, rng: random.Random) -> list[int]:
        return rng.choices(range(len(self._files)), self._frames, k=size)

    def batch(self, size: int, seed: str) -> Tensor:
        """Crops `[size, samples]` at a random volume.

        A recording is drawn in proportion to its length; a short one is padded with zeros.
        """
        import soundfile

        rng = random.Random(seed)
        waves = torch.zeros(size, self._length)
        for row, index in enumerate(self._draw(size, rng)):
            start = rng.randint(0, max(0, self._frames[index] - self._length))
            crop, _ = soundfile.read(
                self._files[index], frames=self._length, start=start, dtype="float32"
            )
            waves[row, : len(crop)] = torch.from_numpy(crop) * rng.uniform(0.6, 1.0)
        return waves


def split(recipe: CodecRecipe) -> tuple[list[Path], list[Path]]:
    """Training and validation files. Raises ValueError if there are too few."""
    root = Path(recipe.data)
    files = [
        root / name
        for name in storage.list_files(str(root), (".wav",))
        if name.split("/")[0] not in recipe.held_out_speakers
    ]
    if len(files) < recipe.held_out_every:
        raise ValueError(
            f"data: {len(files)} wav files below {root}, fewer than held_out_every "
            f"({recipe.held_out_every}); give a folder of recordings, or lower held_out_every"
        )
    validation = files[:: recipe.held_out_every]
    return sorted(set(files) - set(validation)), validation


class EncodecTrainee:
    """An EnCodec in the training loop. A batch is `[B, samples]`."""

    name: str = "codec"
    smoothing: float | None = 0.99

    def __init__(self, recipe: CodecRecipe) -> None:
        self._recipe = recipe
        training, validation = split(recipe)
        self._crops = AudioCrops(training, recipe.crop_seconds)
        self._validation_crops = AudioCrops(validation, recipe.crop_seconds)
        self._started = time.monotonic()
        self.steps = recipe.steps
        self.log_every, self.checkpoint_every = recipe.log_every, recipe.checkpoint_every
        self.max_skipped_in_row = recipe.max_skipped_in_row
        self.optimization = recipe.optimization

    def build_backend(self, worker: Worker, *, resumed: bool) -> Backend:
        """The objective is what a checkpoint holds: the codec with the teacher's statistics."""
        recipe = self._recipe
        torch.manual_seed(recipe.seed)
        objective = EncodecObjective(encodec.build(recipe.codec), recipe.loss).to(worker.device)
        if not resumed:
            waves = self._crops.batch(INITIAL_CROPS, f"{recipe.seed}/init").to(worker.device)
            crops_per_step = recipe.workers * recipe.batch_size
            vectors_per_step = crops_per_step * int(recipe.crop_seconds * FRAME_RATE)
            objective.initialize(waves, vectors_per_step, recipe.seed)
        return DDPBackend(
            objective,
            objective,
            recipe.optimization,
            worker.device,
            sync_buffers=False,  # the objective adds up the codebooks' averages over the workers
            make_optimizer=build_codec_optimizer,
        )

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[Tensor]]:
        for number in count(state.position):
            crops = self._crops.batch(self._recipe.batch_size, self._key(number, worker))
            yield Planned(0, number, number + 1, crops)

    def items(self, planned: Planned[Tensor], worker: Worker) -> list[str]:
        """Paths of the recordings that the crops are of."""
        key = self._key(planned.index, worker)
        return [str(path) for path in self._crops.files(self._recipe.batch_size, key)]

    def _key(self, number: int, worker: Worker) -> str:
        return f"{self._recipe.seed}/{number}/{worker.rank}"

    def inputs(self, data: Tensor, step: int, worker: Worker) -> Inputs:
        """Waves, step, and the generator that revives codebook entries, the same on every rank."""
        key = f"{self._recipe.seed}/{step}"
        generator = torch.Generator().manual_seed(random.Random(key).getrandbits(31))
        return data.to(worker.device), step, generator

    def metrics(self, record: StepRecord[Tensor]) -> dict[str, float]:
        """Seconds of audio of all workers, per second."""
        samples = record.planned.data.numel() * record.worker.world_size
        return {"train/audio_seconds_per_second": samples / SAMPLE_RATE / record.seconds}

    def metadata(self) -> CodecCheckpointMetadata:
        return CodecCheckpointMetadata(
            kind="encodec",
            model=asdict(self._recipe.codec),
            code_version=tracking.code_version(),
            recipe=asdict(self._recipe),
            dataset=self._crops.content_hash(),
        )

    def validate(self, written: WrittenCheckpoint) -> dict[str, float]:
        assert isinstance(written.model, EncodecObjective), "build_backend() made it"
        return {"validation/mel": mel_distance(written.model, self._validation_crops, self._recipe)}

    def export(self, written: WrittenCheckpoint, metrics: Mapping[str, float]) -> None:
        """The codec in `out`, and a line of its training log there."""
        assert isinstance(written.model, EncodecObjective), "build_backend() made it"
        encodec.save(written.model.model, self._recipe.codec, Path(self._recipe.out))
        line: dict[str, float] = {k: round(v, 4) for k, v in written.state.averages.items()}
        line["step"] = written.state.step
        line["minutes"] = round((time.monotonic() - self._started) / 60, 1)
        line["validation_mel"] = round(metrics["validation/mel"], 4)
        append_line(self._recipe.out, line)


@torch.no_grad()
def mel_distance(objective: EncodecObjective, crops: AudioCrops, recipe: CodecRecipe) -> float:
    """Mel distance of crops to their reconstruction from codes, averaged over a few batches."""
    model, total = objective.model, 0.0
    for number in range(VALIDATION_BATCHES):
        waves = crops.batch(recipe.batch_size, f"validation/{number}")
        z = model.encoder(waves[:, None].to(next(model.parameters()).device))
        z = model.quantizer.vq.decode(model.quantizer.vq.encode(z))
        total += objective.mel(model.decoder(z)[:, 0], waves.to(z.device)).item()
    return total / VALIDATION_BATCHES


def fit(recipe: CodecRecipe) -> str:
    """Trains on the connected cluster; returns the URI of the last checkpoint.

    Raises ValueError before anything starts if the cluster can never hold the workers.
    """
    return ray_train.fit(
        recipe, partial(EncodecTrainee, recipe), section="train_codec", name=recipe.run
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train_codec --recipe codec`."""
    recipe = parse_arguments(argv, "train_codec", CodecRecipe, __doc__ or "")
    split(recipe)  # fails for a missing corpus before Ray starts
    with exit_on_error(), connect():
        fit(recipe)
    print(f"codec: exported to {recipe.out}")


if __name__ == "__main__":
    main()
