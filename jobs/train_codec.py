"""Trains a narrow EnCodec on a folder of speech, on Ray Train.

Resumable: the same run goes on from its last checkpoint. At the end (and at each checkpoint) the
codec is exported to `out`, ready for `prepare`.
"""

import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import dacite
import torch
from torch import Tensor

from valle.jobs.recipes import parse_arguments
from valle.model.codec import encodec
from valle.model.codec.encodec import EncodecConfig
from valle.model.codec.encodec_training import EncodecLossConfig, EncodecObjective
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE
from valle.platform import resources, storage
from valle.platform.capacity import Cluster
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.platform.recipe import exit_on_error, formerly, location
from valle.platform.resources import Allocation, Placement

INITIAL_CROPS: Final = 800
"""Crops from which convolutions, features and codebooks get their first values."""


@dataclass(frozen=True, kw_only=True)
class CodecRecipe:
    """One training run of a codec."""

    data: str = field(metadata=location())
    """Local folder of 24 kHz wavs, one folder per speaker (what `corpus` makes)."""

    out: str = field(metadata=location())
    """Folder for the exported codec (`model.safetensors`, `config.json`)."""

    run: str = "codec"
    """Name of the run; the same name resumes it."""

    held_out_speakers: tuple[str, ...] = ()
    """Folders never trained on."""

    held_out_every: int = 10
    """Of the other speakers, each n-th recording is kept for validation."""

    codec: EncodecConfig = field(default_factory=EncodecConfig)
    """Size of the network."""

    loss: EncodecLossConfig = field(default_factory=EncodecLossConfig)
    """Loss terms and quantiser."""

    steps: int = 20_000
    """Optimizer steps in all."""

    batch_size: int = field(default=8, metadata=formerly("batch"))
    """Crops per step and worker."""

    crop_seconds: float = 1.0
    """Length of a crop."""

    learning_rate: float = 1e-3
    """Peak of AdamW's rate: linear warm-up, then cosine to zero."""

    warmup: int = 200
    """Steps of warm-up."""

    clip: float = 1.0
    """Bound on the gradient's norm."""

    checkpoint_every: int = 500
    """Steps between checkpoints, validation and export."""

    workers: int = 1
    """Data-parallel workers."""

    threads: int = 2
    """Torch threads per worker on a CPU, and the cores that are set aside for it where
    `placement.cpus_per_worker` does not say."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU, and how much of one each worker takes."""

    seed: int = 0
    """Crops, revival of codebook entries, initial weights."""


class AudioCrops:
    """Random crops from a list of wav files, the same for the same (seed, step, rank)."""

    def __init__(self, files: Sequence[Path], seconds: float) -> None:
        import soundfile

        self._files = files
        self._frames = [soundfile.info(file).frames for file in files]
        self._length = int(seconds * SAMPLE_RATE)

    def batch(self, size: int, seed: str) -> Tensor:
        """`[size, samples]`; long recordings are drawn more often, short ones padded."""
        import soundfile

        rng = random.Random(seed)
        waves = torch.zeros(size, self._length)
        for row, index in enumerate(rng.choices(range(len(self._files)), self._frames, k=size)):
            start = rng.randint(0, max(0, self._frames[index] - self._length))
            crop, _ = soundfile.read(
                self._files[index], frames=self._length, start=start, dtype="float32"
            )
            waves[row, : len(crop)] = torch.from_numpy(crop) * rng.uniform(0.6, 1.0)
        return waves


def split(recipe: CodecRecipe) -> tuple[list[Path], list[Path]]:
    """Training and validation files."""
    root = Path(recipe.data)
    files = [
        root / name
        for name in storage.list_files(str(root), (".wav",))
        if name.split("/")[0] not in recipe.held_out_speakers
    ]
    if len(files) < recipe.held_out_every:
        raise ValueError(f"data: only {len(files)} wav files below {root}")
    validation = files[:: recipe.held_out_every]
    return sorted(set(files) - set(validation)), validation


def learning_rate(recipe: CodecRecipe, step: int) -> float:
    """Linear warm-up, cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    progress = min(1.0, step / recipe.steps)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def train(values: dict[str, Any]) -> None:
    """The loop of one worker; `values` is the recipe as a dictionary."""
    import ray.train
    from torch.nn.parallel import DistributedDataParallel

    recipe = dacite.from_dict(CodecRecipe, values, dacite.Config(cast=[tuple, float]))
    rank = ray.train.get_context().get_world_rank()
    device = resources.train_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    training, validation = split(recipe)
    crops, validation_crops = (
        AudioCrops(files, recipe.crop_seconds) for files in (training, validation)
    )

    objective = EncodecObjective(encodec.build(recipe.codec), recipe.loss).to(device)
    start = 0
    optimizer = torch.optim.AdamW(
        objective.model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=device, weights_only=True)
        objective.load_state_dict(state["trainee"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    else:
        sample = crops.batch(INITIAL_CROPS, f"{recipe.seed}/init").to(device)
        per_step = recipe.workers * recipe.batch_size * int(recipe.crop_seconds * FRAME_RATE)
        objective.initialize(sample, per_step, recipe.seed)
    # DDP averages gradients; codebooks are buffers, kept equal by the quantiser itself
    module = (
        DistributedDataParallel(objective, forward_sync_buffers=False)
        if ray.train.get_context().get_world_size() > 1
        else objective
    )

    bar = progress_bar(
        total=recipe.steps, label="codec", unit="step", initial=start, enabled=rank == 0
    )
    averages: dict[str, float] = {}
    started = time.monotonic()
    for step in range(start, recipe.steps):
        key = f"{recipe.seed}/{step}"
        waves = crops.batch(recipe.batch_size, f"{key}/{rank}").to(device)
        generator = torch.Generator().manual_seed(random.Random(key).getrandbits(31))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, terms = module(waves, step, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.model.parameters(), recipe.clip)
        optimizer.step()

        for name, value in terms.items():
            averages[name] = 0.99 * averages.get(name, value.item()) + 0.01 * value.item()
        bar.update()
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            metrics = {name: round(value, 4) for name, value in averages.items()}
            metrics |= {"step": step + 1, "minutes": round((time.monotonic() - started) / 60, 1)}
            metrics["validation_mel"] = round(validate(objective, validation_crops, recipe), 4)
            _report(objective, optimizer, recipe, metrics, rank)


@torch.no_grad()
def validate(objective: EncodecObjective, crops: AudioCrops, recipe: CodecRecipe) -> float:
    """Mel distance through the quantiser on crops never trained on."""
    model = objective.model
    total = 0.0
    for number in range(4):
        waves = crops.batch(recipe.batch_size, f"validation/{number}")
        z = model.encoder(waves[:, None].to(next(model.parameters()).device))
        z = model.quantizer.vq.decode(model.quantizer.vq.encode(z))
        total += objective.mel(model.decoder(z)[:, 0], waves.to(z.device)).item()
    return total / 4


def _report(
    objective: EncodecObjective,
    optimizer: torch.optim.Optimizer,
    recipe: CodecRecipe,
    metrics: dict[str, Any],
    rank: int,
) -> None:
    """Checkpoint (rank 0 writes), export, and one line of JSON in the training log."""
    import ray.train
    from ray.train import Checkpoint

    if rank > 0:
        ray.train.report(metrics)
        return
    out = Path(recipe.out)
    encodec.save(objective.model, recipe.codec, out)
    with (out / "training.jsonl").open("a") as log:
        log.write(json.dumps(metrics) + "\n")
    folder = tempfile.mkdtemp()
    state = {
        "trainee": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": metrics["step"],
    }
    torch.save(state, Path(folder) / "state.pt")
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
    shutil.rmtree(folder, ignore_errors=True)


def allocation_for(recipe: CodecRecipe, cluster: Cluster | None = None) -> Allocation:
    """A worker's share of the connected cluster, or of `cluster`."""
    return resources.resolve(
        recipe.placement,
        "train_codec",
        cpus=recipe.threads,
        workers=recipe.workers,
        cluster=cluster,
    )


def fit(recipe: CodecRecipe) -> None:
    """Runs the training on the connected cluster.

    Raises ValueError before anything starts when the cluster will never hold the workers.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    allocation = allocation_for(recipe)
    scaling, processes = allocation.ray_train_configs(recipe.workers)
    trainer = TorchTrainer(
        train,
        train_loop_config=asdict(recipe),
        scaling_config=scaling,
        torch_config=processes,
        run_config=RunConfig(
            name=recipe.run,
            storage_path=storage.absolute("runs"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train_codec --recipe codec`."""
    recipe = parse_arguments(argv, "train_codec", CodecRecipe, __doc__ or "")
    split(recipe)  # a missing corpus is better noticed before Ray starts
    with exit_on_error(), connect():
        fit(recipe)
    print(f"codec: exported to {recipe.out}")


if __name__ == "__main__":
    main()
