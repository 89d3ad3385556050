"""Training an EnCodec with the project's loop: learning, resume, export."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import TINY_CODEC
from helpers.training import assert_resumes_exactly, last_checkpoint, run_plain, write_tones

from valle.jobs.train_codec import CodecRecipe, EncodecTrainee, split
from valle.model.codec import encodec
from valle.model.codec.encodec_training import EncodecLossConfig
from valle.platform import checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> CodecRecipe:
    """Twelve steps on noisy tones, taught for the first five."""
    names = ("a/0", "a/1", "b/0", "b/1", "c/0", "c/1", "d/0")
    corpus = write_tones(tmp_path / "corpus", names, noise=0.01)
    return CodecRecipe(
        data=str(corpus), out=str(tmp_path / "out"), run="test", held_out_every=4,
        codec=TINY_CODEC, loss=EncodecLossConfig(teacher_steps=5), steps=12, batch_size=8,
        crop_seconds=0.2, warmup=4, log_every=1, checkpoint_every=4, threads=1,
    )  # fmt: skip


def test_trainee_learns_exports_and_logs(recipe: CodecRecipe, tmp_path: Path) -> None:
    metrics = run_plain(EncodecTrainee(recipe), tmp_path / "runs")
    assert metrics[12]["validation/mel"] < metrics[4]["validation/mel"]
    terms = {"teacher", "commitment", "mel", "waveform", "entries_1", "entries_8"}
    logged = {f"train/{name}" for name in terms}
    assert logged | {"train/gradient_norm", "train/learning_rate"} < set(metrics[12])
    log = (tmp_path / "out/training.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert set(lines[0]) == terms | {"step", "minutes", "validation_mel"}
    assert lines[2]["mel"] == round(metrics[12]["train/mel"], 4), "running averages"

    folder = last_checkpoint(tmp_path / "runs")
    weights = checkpoint.load_weights(folder)
    averages = [name for name in weights if name.endswith(("embed_avg", "cluster_size"))]
    assert len(averages) == 16, "of eight codebooks"
    assert {"teacher.mean", "teacher.scale"} < set(weights)
    assert checkpoint.load_state(folder).averages.keys() == terms
    assert json.loads((folder / "config.json").read_text())["kind"] == "encodec"
    exported = encodec.load(recipe.out)
    assert exported.identity.name == TINY_CODEC.name
    name = "decoder.model.0.conv.conv.bias"
    bias = exported.network.state_dict()[name]
    assert torch.equal(bias, weights[f"model.{name}"].half().float())


def test_trainee_resumed_equals_uninterrupted(recipe: CodecRecipe, tmp_path: Path) -> None:
    """To the last bit: teacher, moving averages, revived entries and averaged metrics included."""
    assert_resumes_exactly(partial(EncodecTrainee, recipe), tmp_path / "runs", interrupt_at=6)


def test_optimization_is_a_cosine_to_zero() -> None:
    optimization = CodecRecipe(data="x", out="y", learning_rate=1.0, warmup=10).optimization
    rates = [optimization.learning_rate_at(step, 100) for step in (0, 9, 50, 100)]
    assert rates == pytest.approx([0.1, 0.98, 0.5, 0.0], abs=1e-2)


def test_split_holds_out_speakers_and_every_nth_recording(recipe: CodecRecipe) -> None:
    training, validation = split(replace(recipe, held_out_speakers=("d",)))
    assert [path.parent.name for path in validation] == ["a", "c"]
    assert len(training) == 4 and not {"d"} & {path.parent.name for path in training}
    with pytest.raises(ValueError, match="data: 7 wav files below .* held_out_every"):
        split(replace(recipe, held_out_every=10))
