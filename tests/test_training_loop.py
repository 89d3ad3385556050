"""The training loop without Ray: two ranks, exact resume, what a checkpoint holds."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.training import (
    BothRanksTrainee,
    assert_resumes_exactly,
    last_checkpoint,
    run_plain,
    run_two_ranks,
    tiny_train_recipe,
)
from safetensors.torch import load_file

from valle.jobs.training import loop
from valle.jobs.training.export_log import append_line
from valle.jobs.training.language_model import LanguageModelTrainee
from valle.jobs.training.recipe import TrainRecipe
from valle.jobs.training.trainee import Worker
from valle.model.codec.encodec import Encodec
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState


@pytest.fixture
def recipe(home: Path, tiny_codec: Encodec, tiny_codec_folder: Path) -> TrainRecipe:
    return replace(tiny_train_recipe(home, tiny_codec, tiny_codec_folder), samples=0)


def test_loop_imports_neither_ray_nor_mlflow() -> None:
    code = (
        "import sys, valle.jobs.training.loop, valle.jobs.training.language_model; "
        "assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_train_two_ranks_equal_one_with_both_batches(
    recipe: TrainRecipe, tmp_path: Path, kind: str
) -> None:
    """Sharded equals single: DDP's average over two ranks is the gradient of the mean loss."""
    plain = replace(recipe, model=replace(recipe.model, dropout=0.0))
    one = run_plain(BothRanksTrainee(plain, kind), tmp_path / "one")
    two = run_two_ranks(partial(LanguageModelTrainee, plain, kind), tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 25))
    for name in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        expected = [metrics[name] for metrics in one.values()]
        assert [metrics[name] for metrics in two.values()] == pytest.approx(expected, rel=1e-4)
    expected_weights = checkpoint.load_weights(last_checkpoint(tmp_path / "one"))
    for name, value in checkpoint.load_weights(last_checkpoint(tmp_path / "two")).items():
        torch.testing.assert_close(value, expected_weights[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_train_resumed_equals_uninterrupted(recipe: TrainRecipe, tmp_path: Path, kind: str) -> None:
    """To the last bit, dropout included; the interruption falls between two checkpoints."""
    assert_resumes_exactly(partial(LanguageModelTrainee, recipe, kind), tmp_path, interrupt_at=13)


def test_train_a_finished_run_takes_no_step(recipe: TrainRecipe, tmp_path: Path) -> None:
    short = replace(recipe, steps={"ar": 3}, models=("ar",))
    assert set(run_plain(LanguageModelTrainee(short, "ar"), tmp_path)) == {1, 2, 3}
    assert run_plain(LanguageModelTrainee(short, "ar"), tmp_path) == {}


def test_checkpoint_holds_state_and_metrics(recipe: TrainRecipe, tmp_path: Path) -> None:
    short = replace(recipe, steps={"ar": 5}, models=("ar",), checkpoint_every=4)
    logged = run_plain(LanguageModelTrainee(short, "ar"), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000004", "step_00000005"]
    folder = last_checkpoint(tmp_path)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "COMPLETE", "config.json", "metrics.json", "model.safetensors",
        "state/optimizer.safetensors", "state/train_state.json",
    ]  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["validation/loss"] == logged[5]["validation/loss"]
    assert metrics.items() <= logged[5].items()
    assert checkpoint.load_state(folder).step == 5
    optimizer = load_file(folder / "state/optimizer.safetensors")
    assert {value.item() for name, value in optimizer.items() if name.endswith("/step")} == {5.0}


def test_load_state_of_an_earlier_checkpoint(tmp_path: Path) -> None:
    """Checkpoints written before averages were part of it."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/train_state.json").write_text('{"step": 7, "epoch": 1, "batch": 2}')
    assert checkpoint.load_state(tmp_path) == TrainState(7, 1, 2)
    for kind, position in (("ar", 6), ("encodec", 2)):  # of three workers; of the codecs, each
        config = {"kind": kind, "recipe": {"workers": 3}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert checkpoint.load_state(tmp_path) == TrainState(7, 1, position)


def test_start_refuses_a_checkpoint_of_an_earlier_format(
    recipe: TrainRecipe, tmp_path: Path
) -> None:
    """The codec's trainer once wrote a pickle."""
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="run: the last checkpoint .* give the run another name"):
        loop.start(LanguageModelTrainee(recipe, "ar"), Worker(), tmp_path)


def test_append_line_replaces_later_steps(tmp_path: Path) -> None:
    out = str(tmp_path)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0), (20, 2.5)):
        append_line(out, {"step": step, "loss": loss})
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [3.0, 2.5]
