"""Trains nano 2's quantiser on vocoder features: minutes on two CPU cores.

A plain loop without Ray: random crops of two seconds, squared error of the features, and a random
number of codebooks, so that one run gives codecs of two to eight. The first steps leave
quantisation out; the codebooks begin by k-means on what the encoder gives then.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.jobs.recipes import parse_arguments
from valle.model.codec.quantizer import FEATURE_RATE, Quantizer, QuantizerConfig
from valle.model.codec.weights import load_quantizer, save_quantizer
from valle.model.tokens import SAMPLE_RATE
from valle.model.vocoder.features import FeatureExtractor
from valle.model.vocoder.weights import WEIGHTS_FILE
from valle.platform import audio, storage
from valle.platform.progress import progress_bar
from valle.platform.recipe import RecipeError, exit_on_error, formerly, location

PITCH, VOICING = 18, 19
"""Places of pitch (octaves) and voicing (correlation less 0.5) among the features."""


@dataclass(frozen=True, kw_only=True)
class QuantizerRecipe:
    """What to learn from, and for how long."""

    corpora: tuple[str, ...] = field(metadata=location())
    """Folders or URIs of recordings, a folder a speaker: `{speaker}/{id}.wav`."""

    out: str = field(metadata=location())
    """Folder of the weights, `config.json` and `training.jsonl`."""

    recordings_per_speaker: int = 60
    """At most so many of each speaker are read."""

    held_out_speakers: tuple[str, ...] = ()
    """Speakers whose error is measured and who are not learnt from."""

    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Rates and sizes."""

    warm_start: str | None = field(default=None, metadata=location())
    """Folder of weights to begin with, of the same sizes; the features' mean and deviation are
    kept, and no step leaves quantisation out. None: from nothing."""

    steps: int = 3000
    """Optimizer steps."""

    unquantized_steps: int = field(default=400, metadata=formerly("unquantised_steps"))
    """Of those, the first, without quantisation."""

    batch_size: int = field(default=32, metadata=formerly("batch"))
    """Crops a step."""

    crop_seconds: float = 2.0
    """Length of a crop; shorter recordings are left out."""

    learning_rate: float = 1e-3
    """Peak of AdamW's; falls linearly to a hundredth."""

    commitment_weight: float = field(default=0.25, metadata=formerly("commitment"))
    """Weight of the distance between latents and codebook entries."""

    all_codebooks_share: float = field(default=0.7, metadata=formerly("all_codebooks"))
    """Share of the steps that use every codebook; the others draw two or more."""

    pitch_weight: float = 6.0
    """Weight of the pitch's squared error, beside cepstra of about 1."""

    voicing_weight: float = 2.0
    """Weight of the voicing's squared error."""

    log_every: int = 100
    """Steps between lines of `training.jsonl`."""

    save_every: int = 1000
    """Steps between weights written to `out`."""

    device: str = "cpu"
    """Where this process computes: cpu or cuda (not run on a GPU yet)."""

    threads: int = 2
    """Torch threads."""

    seed: int = 0
    """Crops and first weights."""


def read_features(recipe: QuantizerRecipe) -> dict[str, NDArray[np.float32]]:
    """Vocoder features `[S, 20]` of the corpora's recordings, by `{speaker}/{id}`."""
    extractor = FeatureExtractor.load(WEIGHTS_FILE.parent)
    files = [
        (storage.join(corpus, path), path)
        for corpus in recipe.corpora
        for path in sorted(storage.list_files(corpus, (".wav",)))
    ]
    features = {}
    with progress_bar(total=len(files), label="features", unit="recording") as bar:
        for _, group in groupby(files, lambda file: file[1].split("/")[0]):
            recordings = list(group)
            for number, (uri, path) in enumerate(recordings):
                if number < recipe.recordings_per_speaker:
                    wave = audio.read(storage.read_bytes(uri), max_seconds=600)
                    features[path] = extractor.extract([wave], SAMPLE_RATE)[0]
                bar.update()
    return features


class FeatureCrops:
    """Random crops of recordings, all speakers alike."""

    def __init__(self, recordings: dict[str, NDArray[np.float32]], recipe: QuantizerRecipe):
        self._length = round(recipe.crop_seconds * FEATURE_RATE)
        self._length -= self._length % recipe.quantizer.features_per_block
        self._by_speaker: dict[str, list[NDArray[np.float32]]] = {}
        for name, features in recordings.items():
            if len(features) >= self._length:
                self._by_speaker.setdefault(name.split("/")[0], []).append(features)
        self._speakers = sorted(self._by_speaker)
        if not self._speakers:
            raise ValueError(
                f"corpora: no recording is as long as crop_seconds ({recipe.crop_seconds:g})"
            )

    def draw(self, count: int, generator: np.random.Generator) -> Tensor:
        """`[count, S, 20]`."""
        crops = []
        for _ in range(count):
            recordings = self._by_speaker[self._speakers[generator.integers(len(self._speakers))]]
            features = recordings[generator.integers(len(recordings))]
            start = generator.integers(len(features) - self._length + 1)
            crops.append(features[start : start + self._length])
        return torch.from_numpy(np.stack(crops))


def error_weights(deviation: Tensor, recipe: QuantizerRecipe) -> Tensor:
    """`[20]`: of each normalised feature's squared error; loud cepstra weigh more."""
    weights = deviation.flatten() / deviation[:PITCH].mean()
    weights[PITCH], weights[VOICING] = recipe.pitch_weight, recipe.voicing_weight
    return weights


def reconstruction_error(
    restored: Tensor, features: Tensor, deviation: Tensor, weights: Tensor
) -> Tensor:
    """Weighted mean square of the normalised difference, a scalar.

    The pitch of a frame counts by how voiced the frame is: without a voice it is noise, and would
    fill the codebooks.
    """
    squared = ((restored - features) / deviation.flatten()).square() * weights
    voiced = 0.1 + 0.9 * torch.sigmoid(15 * features[..., VOICING])
    pitch = squared[..., PITCH] * voiced
    others = squared.sum(-1) - squared[..., PITCH]
    return ((others + pitch) / len(weights)).mean()


def train(recipe: QuantizerRecipe) -> dict[str, Any]:
    """Trains from nothing and writes `out`; returns the last line of the log."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "train_quantizer.device: cuda, but torch has no GPU here; this job computes where it "
            "is started, on no other node: run it on a GPU node, or set device=cpu"
        )
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    recordings = read_features(recipe)
    held_out = {n: f for n, f in recordings.items() if n.split("/")[0] in recipe.held_out_speakers}
    crops = FeatureCrops({n: f for n, f in recordings.items() if n not in held_out}, recipe)
    quantizer = _initialize(recipe, [f for n, f in recordings.items() if n not in held_out])
    quantizer.to(recipe.device)
    weights = error_weights(quantizer.deviation, recipe)
    optimizer = torch.optim.AdamW(quantizer.parameters(), recipe.learning_rate, betas=(0.9, 0.99))
    validation = None
    if held_out:
        validation = (
            FeatureCrops(held_out, recipe).draw(64, np.random.default_rng(1)).to(recipe.device)
        )

    lines: list[dict[str, Any]] = []
    started = time.perf_counter()
    with progress_bar(total=recipe.steps, label="quantizer", unit="step") as bar:
        for step, batch, n_codebooks in _plan(recipe, crops):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * max(0.01, 1 - step / recipe.steps)
            quantizer.train()
            batch = batch.to(recipe.device)
            restored, commitment = quantizer(batch, n_codebooks)
            error = reconstruction_error(restored, batch, quantizer.deviation, weights)
            loss = error + recipe.commitment_weight * commitment
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(quantizer.parameters(), 1.0)
            optimizer.step()
            bar.update()
            n_steps = step + 1
            if n_steps % recipe.log_every == 0 or n_steps == recipe.steps:
                line: dict[str, Any] = {
                    "step": n_steps, "codebooks": n_codebooks, "error": round(error.item(), 4),
                    "seconds": round(time.perf_counter() - started),
                }  # fmt: skip
                if validation is not None and n_codebooks is not None:
                    line["held_out"] = _validate(quantizer, validation, weights)
                lines.append(line)
            if n_steps % recipe.save_every == 0 or n_steps == recipe.steps:
                save_quantizer(quantizer, Path(recipe.out))
                log = "".join(json.dumps(line) + "\n" for line in lines)
                storage.write_bytes(storage.join(recipe.out, "training.jsonl"), log.encode())
    storage.write_json(storage.join(recipe.out, "recipe.json"), asdict(recipe))
    return lines[-1]


def _initialize(recipe: QuantizerRecipe, recordings: Sequence[NDArray[np.float32]]) -> Quantizer:
    """The quantiser before the first step. Raises ValueError for weights of other sizes."""
    if recipe.warm_start is None:
        quantizer = Quantizer(recipe.quantizer)
        features = np.concatenate(recordings)
        quantizer.mean.copy_(torch.from_numpy(features.mean(0))[:, None])
        quantizer.deviation.copy_(torch.from_numpy(features.std(0))[:, None])
        return quantizer
    quantizer = load_quantizer(Path(recipe.warm_start))
    if quantizer.config != recipe.quantizer:
        raise ValueError(
            f"warm_start: {recipe.warm_start} holds {quantizer.config}, the recipe asks for "
            f"{recipe.quantizer}"
        )
    return quantizer.requires_grad_(True)


def _plan(recipe: QuantizerRecipe, crops: FeatureCrops) -> Iterator[tuple[int, Tensor, int | None]]:
    """Step, batch `[B, S, 20]` and number of codebooks: functions of the seed and the step."""
    for step in range(recipe.steps):
        generator = _generator(recipe, step)
        batch = crops.draw(recipe.batch_size, generator)
        maximum = recipe.quantizer.n_codebooks
        uses_all = generator.random() < recipe.all_codebooks_share
        n_codebooks = maximum if uses_all else int(generator.integers(min(2, maximum), maximum + 1))
        unquantized = recipe.warm_start is None and step < recipe.unquantized_steps
        yield step, batch, None if unquantized else n_codebooks


def _generator(recipe: QuantizerRecipe, step: int) -> np.random.Generator:
    return np.random.default_rng([recipe.seed, step + 1])


@torch.no_grad()
def _validate(quantizer: Quantizer, batch: Tensor, weights: Tensor) -> dict[int, float]:
    """Error by number of codebooks, on speakers that were not learnt from."""
    quantizer.eval()
    errors = {}
    for count in sorted({2, 4, 6, quantizer.config.n_codebooks}):
        if count <= quantizer.config.n_codebooks:
            restored, _ = quantizer(batch, count)
            error = reconstruction_error(restored, batch, quantizer.deviation, weights)
            errors[count] = round(error.item(), 4)
    return errors


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train_quantizer --recipe nano2`."""
    recipe = parse_arguments(argv, "train_quantizer", QuantizerRecipe, __doc__ or "")
    with exit_on_error():
        print(json.dumps(train(recipe)))


if __name__ == "__main__":
    main()
