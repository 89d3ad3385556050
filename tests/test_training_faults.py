"""Bad batches, damaged checkpoints and wrong recipes in a training run, without Ray."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_CODEC
from helpers.training import (
    RecordingTracker,
    assert_equal_checkpoints,
    join_two_ranks,
    last_checkpoint,
    leave_ranks,
    run_plain,
    tiny_train_recipe,
    write_tones,
)
from torch import nn

from valle.jobs import train_codec
from valle.jobs.train_codec import CodecRecipe, EncodecTrainee
from valle.jobs.train_quantizer import QuantizerRecipe, QuantizerTrainee
from valle.jobs.training import loop
from valle.jobs.training.backends import Backend, DDPBackend, DeepSpeedBackend, Inputs
from valle.jobs.training.language_model import LanguageModelTrainee
from valle.jobs.training.objective import Loss, Objective
from valle.jobs.training.recipe import TrainRecipe
from valle.jobs.training.sampler import Planned
from valle.jobs.training.trainee import SkippedBatch, Trainee, Worker, WrittenCheckpoint
from valle.model.codec.encodec import Encodec
from valle.model.codec.encodec_training import EncodecLossConfig
from valle.model.codec.quantizer import QuantizerConfig
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState


class PoisonedObjective(nn.Module):
    """An objective whose loss or gradient is spoilt on demand."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.poison: str | None = None

    def forward(self, *inputs: Any) -> Loss:
        output = self.objective(*inputs)
        if self.poison is None:
            return output
        some = next(self.objective.parameters()).sum()
        added = {
            "nan loss": some * torch.nan,
            "infinite loss, finite gradient": torch.tensor(torch.inf),
            "finite loss, nan gradient": (some * 0).sqrt(),
        }[self.poison]
        return replace(output, loss=output.loss + added)


class PoisonedTrainee(LanguageModelTrainee):
    """Batches at some positions are spoilt on one rank, or left out of the plan on all."""

    def __init__(
        self, recipe: TrainRecipe, kind: str, positions: set[int], poison: str | None, rank: int = 0
    ) -> None:
        super().__init__(recipe, kind)
        self._positions, self._poison, self._rank = positions, poison, rank
        self._current = False

    def build_backend(self, worker: Worker, *, resumed: bool) -> Backend:
        torch.manual_seed(self._recipe.seed)
        model = checkpoint.build_model(self._model)
        self._objective = PoisonedObjective(Objective(model))
        if self._recipe.backend == "ddp":
            return DDPBackend(model, self._objective, self.optimization, worker.device)
        return DeepSpeedBackend(
            model, self._objective, self.optimization, worker.device,
            bf16=False, stage=self._recipe.zero_stage,
        )  # fmt: skip

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[Any]]:
        for planned in super().batches(state, worker):
            chosen = planned.epoch == 0 and planned.position in self._positions
            self._current = chosen and worker.rank == self._rank
            if not chosen or self._poison is not None:
                yield planned

    def inputs(self, data: Any, step: int, worker: Worker) -> Inputs:
        self._objective.poison = self._poison if self._current else None
        return super().inputs(data, step, worker)


@pytest.fixture
def recipe(home: Path, tiny_codec: Encodec, tiny_codec_folder: Path) -> TrainRecipe:
    recipe = tiny_train_recipe(home, tiny_codec, tiny_codec_folder)
    return replace(recipe, samples=0, steps={"ar": 8, "nar": 8}, checkpoint_every=4)


def assert_equal_but_for_the_count(spoilt: Path, clean: Path, skipped: int) -> None:
    """Two runs whose checkpoints differ in the number of skipped batches only."""
    path = last_checkpoint(spoilt) / "state/train_state.json"
    state = json.loads(path.read_text())
    assert state["skipped"] == skipped
    path.write_text(json.dumps({**state, "skipped": 0}))
    assert_equal_checkpoints(last_checkpoint(spoilt), last_checkpoint(clean))


@pytest.mark.parametrize(
    "poison", ["nan loss", "infinite loss, finite gradient", "finite loss, nan gradient"]
)
def test_train_skips_a_batch_as_if_it_were_not_in_the_plan(
    recipe: TrainRecipe, tmp_path: Path, poison: str
) -> None:
    kind = "ar" if poison == "nan loss" else "nar"
    metrics = run_plain(PoisonedTrainee(recipe, kind, {3, 6, 7}, poison), tmp_path / "spoilt")
    run_plain(PoisonedTrainee(recipe, kind, {3, 6, 7}, None), tmp_path / "clean")
    counts = [metrics[step]["train/skipped_batches"] for step in range(1, 9)]
    assert counts == [0, 1, 1, 3, 3, 3, 3, 3]
    assert_equal_but_for_the_count(tmp_path / "spoilt", tmp_path / "clean", 3)


def _run_backends(rank: int, recipe: TrainRecipe, folder: Path) -> None:
    """On one of two ranks: both backends, each with a bad batch on the second rank, and without."""
    join_two_ranks(rank, folder)
    for backend in ("ddp", "deepspeed"):
        for name, poison in (("spoilt", "infinite loss, finite gradient"), ("clean", None)):
            trainee = PoisonedTrainee(replace(recipe, backend=backend), "nar", {4}, poison, 1)
            run_plain(trainee, folder / backend / name, Worker(rank=rank, world_size=2))
    leave_ranks()


def test_train_two_ranks_skip_what_is_bad_on_one(recipe: TrainRecipe, tmp_path: Path) -> None:
    """The second rank's loss is infinite, its gradient finite: only the loss tells."""
    short = replace(recipe, steps={"nar": 4}, models=("nar",))
    torch.multiprocessing.spawn(_run_backends, (short, tmp_path), nprocs=2)
    for backend in ("ddp", "deepspeed"):
        spoilt, clean = (last_checkpoint(tmp_path / backend / n) for n in ("spoilt", "clean"))
        ours, theirs = (checkpoint.load_weights(path) for path in (spoilt, clean))
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
        assert checkpoint.load_state(spoilt).skipped == 1
        assert checkpoint.load_state(clean).skipped == 0


def test_train_stops_after_too_many_bad_batches(recipe: TrainRecipe, tmp_path: Path) -> None:
    """With a reason, and with the ids of what was skipped; the last checkpoint stays good."""
    short = replace(recipe, max_skipped_in_row=2)
    skipped: list[SkippedBatch] = []
    trainee = PoisonedTrainee(short, "ar", {2, 3, 6, 7, 8}, "nan loss")
    with pytest.raises(loop.TrainingStoppedError, match=r"3 batches in a row .*: 2\).* step 4"):
        run_plain(trainee, tmp_path, report_skipped=skipped.append)
    assert [(s.step, s.position) for s in skipped] == [(2, 2), (2, 3), (4, 6), (4, 7), (4, 8)]
    assert not list(tmp_path.glob("step_*"))


def test_items_are_those_of_the_batch(recipe: TrainRecipe) -> None:
    trainee = LanguageModelTrainee(recipe, "ar")
    texts = {u: len(trainee._loader.dataset[u].phonemes) for u in range(60)}
    number = {trainee._loader.dataset[u].id: u for u in range(60)}
    for rank in range(2):
        worker = Worker(rank=rank, world_size=2)
        stream = trainee.batches(TrainState(epoch=1, position=3), worker)
        for _ in range(30):
            planned = next(stream)
            ids = trainee.items(planned, worker)
            lengths = planned.data.phoneme_lengths.tolist()
            assert [texts[number[name]] for name in ids] == lengths


class SpoiltValidation(LanguageModelTrainee):
    """Validation gives NaN at some steps."""

    spoilt: frozenset[int] = frozenset()

    def validate(self, written: WrittenCheckpoint) -> dict[str, float]:
        metrics = super().validate(written)
        return metrics | (
            {"validation/loss": torch.nan} if written.state.step in self.spoilt else {}
        )


def test_train_never_hands_over_a_checkpoint_with_a_bad_validation(
    recipe: TrainRecipe, tmp_path: Path
) -> None:
    longer = replace(recipe, steps={"ar": 12}, models=("ar",), checkpoint_every=2)
    trainee = SpoiltValidation(longer, "ar")
    trainee.spoilt = {4, 8, 10}
    with pytest.raises(loop.TrainingStoppedError, match="validation at step 10 is not finite"):
        run_plain(trainee, tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == ["step_00000002", "step_00000006"]
    trainee.spoilt = {12}
    with pytest.raises(loop.TrainingStoppedError, match="validation at step 12"):
        run_plain(trainee, tmp_path)
    assert last_checkpoint(tmp_path).name == "step_00000010"


def test_train_never_hands_over_weights_that_are_not_finite(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a trainee's validation does not notice."""
    trainee = LanguageModelTrainee(recipe, "ar")
    monkeypatch.setattr(trainee, "validate", lambda written: {})
    trainee.steps = 1
    backend, state = loop.start(trainee, Worker(), None)
    backend.model.head.weight.data[0, 0] = torch.inf  # type: ignore[union-attr, operator]
    update = backend.update

    def take(learning_rate: float) -> Any:
        return replace(update(learning_rate), taken=True)

    monkeypatch.setattr(backend, "update", take)
    handed: list[Path | None] = []
    with pytest.raises(loop.TrainingStoppedError, match="step 1 is not finite, or a weight"):
        loop.train(
            trainee, backend, state, Worker(), RecordingTracker(),
            lambda step, metrics, folder: handed.append(folder),
        )  # fmt: skip
    assert handed == [None]


class Poisoned:
    """Waves or features of NaN in some batches of a codec's trainee, or those batches left out."""

    positions: frozenset[int] = frozenset()
    drop = False

    def batches(self, state: TrainState, worker: Worker) -> Iterator[Planned[Any]]:
        for planned in super().batches(state, worker):  # type: ignore[misc]
            self.current = planned.position in self.positions
            if not (self.current and self.drop):
                yield planned

    def inputs(self, data: Any, step: int, worker: Worker) -> Inputs:
        first, *others = super().inputs(data, step, worker)  # type: ignore[misc]
        return (first * torch.nan if self.current else first, *others)


class PoisonedEncodec(Poisoned, EncodecTrainee):
    pass


class PoisonedQuantizer(Poisoned, QuantizerTrainee):
    pass


def encodec_recipe(corpus: str, out: str) -> CodecRecipe:
    return CodecRecipe(
        data=corpus, out=out, run="test", held_out_every=4, codec=TINY_CODEC,
        loss=EncodecLossConfig(teacher_steps=3), steps=5, batch_size=4, crop_seconds=0.2, warmup=4,
        log_every=1, checkpoint_every=5, threads=1,
    )  # fmt: skip


def quantizer_recipe(corpus: str, out: str) -> QuantizerRecipe:
    return QuantizerRecipe(
        corpora=(corpus,), out=out, run="test", steps=10, unquantized_steps=3, batch_size=4,
        log_every=1, checkpoint_every=10, threads=1,
        quantizer=QuantizerConfig(n_codebooks=2, codebook_size=16, dimension=8, width=16, blocks=1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trainee", "recipe_of", "positions"),
    [(PoisonedEncodec, encodec_recipe, {2, 4}), (PoisonedQuantizer, quantizer_recipe, {4, 8, 9})],
    ids=["encodec", "quantizer"],
)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # of few crops
def test_codecs_skip_a_batch_with_its_moving_averages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainee: type[Any],
    recipe_of: Callable[[str, str], Any],
    positions: set[int],
) -> None:
    """Codebooks, k-means and revived entries included: position 4 initialises the quantizer's."""
    monkeypatch.setattr(train_codec, "INITIAL_CROPS", 200)
    corpus = write_tones(tmp_path / "corpus", ("a/0", "a/1", "b/0", "b/1", "c/0"), noise=0.01)
    skipped: list[SkippedBatch] = []
    for name in ("spoilt", "clean"):
        made: Trainee[Any] = trainee(recipe_of(str(corpus), str(tmp_path / "out")))
        made.positions, made.drop = positions, name == "clean"  # type: ignore[attr-defined]
        metrics = run_plain(made, tmp_path / name, report_skipped=skipped.append)
    assert "train/skipped_batches" in metrics[5]
    assert {s.position for s in skipped} == positions
    assert all(len(s.items) == 4 and s.items[0].endswith(".wav") for s in skipped)
    assert_equal_but_for_the_count(tmp_path / "spoilt", tmp_path / "clean", len(positions))
