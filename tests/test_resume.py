"""What must be the same when a run resumes, and what may change."""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.token_datasets import write_dataset
from helpers.training import (
    last_checkpoint,
    run_plain,
    tiny_train_recipe,
    write_tones,
)

from valle.jobs.train_codec import CodecRecipe, EncodecTrainee
from valle.jobs.train_quantizer import QuantizerRecipe
from valle.jobs.training import loop, resume
from valle.jobs.training.language_model import LanguageModelTrainee
from valle.jobs.training.recipe import TrainRecipe
from valle.jobs.training.resume import ResumeError
from valle.jobs.training.trainee import Worker
from valle.model.codec.encodec import Encodec
from valle.platform import checkpoint, storage


@pytest.fixture
def recipe(home: Path, tiny_codec: Encodec, tiny_codec_folder: Path) -> TrainRecipe:
    recipe = tiny_train_recipe(home, tiny_codec, tiny_codec_folder)
    return replace(
        recipe, samples=0, workers=1, steps={"ar": 4, "nar": 4}, models=("ar",), checkpoint_every=2
    )


@pytest.fixture
def run(recipe: TrainRecipe, tmp_path: Path) -> Path:
    """The checkpoint of a finished run of `recipe`."""
    run_plain(LanguageModelTrainee(recipe, "ar"), tmp_path / "run")
    return last_checkpoint(tmp_path / "run")


def start(recipe: TrainRecipe, folder: Path, kind: Any = "ar", workers: int = 1) -> Any:
    return loop.start(LanguageModelTrainee(recipe, kind), Worker(world_size=workers), folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_the_same_recipe_resumes_in_silence(
    recipe: TrainRecipe, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, state = start(recipe, run)
    assert state.step == 4 and state.resumed_anyway == ()
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"batching": {"max_tokens": 400}}, "batching.max_tokens: 300 -> 400"),
        ({"optimization": {"learning_rate": 1e-4}}, "optimization.learning_rate: 0.0005 -> 0.0001"),
        ({"optimization": {"schedule": "cosine"}}, "optimization.schedule: 'linear' -> 'cosine'"),
        ({"prompt_seconds": 0.5}, "prompt_seconds: 0.3 -> 0.5"),
        ({"validation_utterances": 3}, "validation_utterances: 6 -> 3"),
        ({"condition_dropout": 0.0}, "condition_dropout: 0.1 -> 0.0"),
        ({"precision": "bf16"}, "precision: 'fp32' -> 'bf16'"),
        ({"warm_start": {"ar": "nano"}}, "warm_start: None -> 'nano'"),
    ],
)
def test_changed_settings_are_refused_by_name(
    recipe: TrainRecipe, run: Path, changes: dict[str, Any], message: str
) -> None:
    """Unless there is a reason, which the next checkpoints record."""
    changed = recipe
    for name, value in changes.items():
        nested = isinstance(value, dict) and name != "warm_start"
        new = replace(getattr(recipe, name), **value) if nested else value
        changed = replace(changed, **{name: new})
    with pytest.raises(ResumeError, match=r"set resume_anyway=.*another name") as caught:
        start(changed, run)
    assert message in str(caught.value)
    _, state = start(replace(changed, resume_anyway="the old one was wrong"), run)
    assert state.resumed_anyway == (f"step 4: {message} (the old one was wrong)",)


def test_a_recorded_change_stays_in_later_checkpoints(recipe: TrainRecipe, run: Path) -> None:
    longer = replace(recipe, steps={"ar": 8}, seed=7, resume_anyway="another order")
    run_plain(LanguageModelTrainee(longer, "ar"), run.parent)
    newest = last_checkpoint(run.parent)
    state = checkpoint.load_state(newest)
    assert state.step == 8 and state.resumed_anyway == ("step 4: seed: 0 -> 7 (another order)",)
    _, state = start(replace(longer, resume_anyway=None), newest)  # is the run's own from now on
    assert state.resumed_anyway == ("step 4: seed: 0 -> 7 (another order)",)


@pytest.mark.parametrize("name", sorted(resume.FREE))
def test_free_fields_exist(name: str) -> None:
    recipes = (TrainRecipe, CodecRecipe, QuantizerRecipe)
    assert any(name in {f.name for f in dataclasses.fields(schema)} for schema in recipes)


def test_every_other_field_of_the_recipes_is_compared() -> None:
    """A field that a recipe gains is compared until it is named in FREE."""
    for schema in (TrainRecipe, CodecRecipe, QuantizerRecipe):
        names = {field.name for field in dataclasses.fields(schema)}
        values = dict.fromkeys(names, 1)
        compared = {name.split(".")[0] for name, _ in resume._flatten(values, "ar")}
        assert names - resume.FREE - resume.FIXED <= compared


def test_free_changes_are_taken_and_said(
    recipe: TrainRecipe, run: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_copy = home / "moved"
    (home / "tokens").rename(write_copy)
    changed = replace(
        recipe, data=str(write_copy), run="x", storage_path="y", checkpoint_every=7, log_every=3,
        samples=0, max_failures=9, max_skipped_in_row=1, keep_checkpoints=5, threads=2,
        steps={"ar": 9},
    )  # fmt: skip
    _, state = start(changed, run)
    assert state.step == 4
    assert [record.message for record in caplog.records] == [
        "steps: 4 -> 9; the learning rate from step 4 on is that of a run of 9 steps"
    ]


def test_another_number_of_workers_goes_on_with_the_next_batch(
    recipe: TrainRecipe, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one worker after four batches: two workers take the fifth and sixth."""
    trainee = LanguageModelTrainee(replace(recipe, workers=2), "ar")
    _, state = loop.start(trainee, Worker(world_size=2), run)
    assert (state.epoch, state.position) == (0, 4)
    assert "workers: 1 -> 2; the run goes on with the next batch" in caplog.text
    one = LanguageModelTrainee(recipe, "ar")
    stream = one.batches(state, Worker())
    expected = [one.items(next(stream), Worker()) for _ in range(2)]
    ranks = [Worker(rank=rank, world_size=2) for rank in range(2)]
    taken = [trainee.items(next(trainee.batches(state, rank)), rank) for rank in ranks]
    assert taken == expected


def test_other_data_is_refused(
    recipe: TrainRecipe, run: Path, home: Path, tiny_codec: Encodec
) -> None:
    write_dataset(str(home / "tokens"), tiny_codec, count=80)
    with pytest.raises(ResumeError, match="dataset: '[0-9a-f]{64}' -> '[0-9a-f]{64}'.*resume_any"):
        start(recipe, run)
    start(replace(recipe, resume_anyway="more speech"), run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="nar"), "run: its checkpoints hold a model of kind 'nar'"),
        (lambda c: c.update(kind="encodec"), "run: its checkpoints hold a model of kind 'encodec'"),
        (lambda c: c.update(format=9), "format: the checkpoint has format 9, of newer code"),
        (lambda c: c["model"].update(width=32), "model.width: the checkpoint has 32, this run 16"),
        (lambda c: c["model"].update(n_layers=3), "model.n_layers: the checkpoint has 3"),
        (lambda c: c["codec"].update(sha256="0"), "data: .* of another codec .sha256: '0'"),
        (lambda c: c["codec"].update(name="other"), "data: .* of another codec .name: 'other'"),
        (lambda c: c["codec"].update(frame_rate=50), "another codec .frame_rate: 50"),
        (lambda c: c.update(inventory=["x"]), "inventory: the checkpoint was trained with other"),
        (lambda c: c["recipe"].update(backend="deepspeed"), "backend: .* 'deepspeed', this run"),
    ],
)
def test_what_the_weights_would_not_survive_is_refused_for_any_reason(
    recipe: TrainRecipe, run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(run, change)
    with pytest.raises(ResumeError, match=message + ".*(another name|reads up to)"):
        start(replace(recipe, resume_anyway="because"), run)


@pytest.mark.parametrize(("name", "value"), [("workers", 2), ("zero_stage", 2)])
def test_deepspeed_resumes_with_its_own_layout_only(
    recipe: TrainRecipe, run: Path, name: str, value: int
) -> None:
    edit(run, lambda content: content["recipe"].update(backend="deepspeed", **{name: value}))
    present = LanguageModelTrainee(replace(recipe, backend="deepspeed"), "ar").metadata()
    with pytest.raises(ResumeError, match=f"{name}: the checkpoint was written with {value}, this"):
        resume.check(run, present, Worker())


def test_a_nar_model_of_the_first_format_is_not_resumed(
    recipe: TrainRecipe, tmp_path: Path
) -> None:
    run_plain(LanguageModelTrainee(recipe, "nar"), tmp_path)
    folder = last_checkpoint(tmp_path)
    edit(folder, lambda content: content.update(format=1))
    with pytest.raises(ResumeError, match="format: the checkpoint has format 1"):
        start(recipe, folder, "nar")


def test_text_of_another_version_is_refused(recipe: TrainRecipe, run: Path) -> None:
    edit(run, lambda content: content.update(text_version=1))
    present = LanguageModelTrainee(recipe, "ar").metadata()
    with pytest.raises(ResumeError, match="text_version: 1 -> 2"):
        resume.check(run, replace(present, text_version=2), Worker())
    assert resume.check(run, replace(present, text_version=1), Worker()) == ()


def test_a_checkpoint_that_does_not_say_resumes_with_one_warning(
    recipe: TrainRecipe, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On data of its time: what it does not say of the text is version 1."""

    def earlier(content: dict[str, Any]) -> None:
        del content["dataset"], content["text_version"]
        del content["recipe"]["truncated_share"], content["recipe"]["resume_anyway"]

    edit(run, earlier)
    with pytest.raises(ResumeError, match="text_version: 1 -> 2"):
        start(recipe, run)
    manifest = storage.read_json(storage.join(recipe.data, "dataset.json"))
    storage.write_json(storage.join(recipe.data, "dataset.json"), manifest | {"text_version": 1})
    caplog.clear()
    start(recipe, run)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "does not say its dataset" in record.message and "truncated_share" in record.message


def test_an_earlier_config_with_a_group_resumes(recipe: TrainRecipe, run: Path) -> None:
    def earlier(content: dict[str, Any]) -> None:
        content["format"] = 2
        content["model"]["group"] = content["model"].pop("group_size")

    edit(run, earlier)
    assert start(recipe, run)[1].step == 4
    edit(run, lambda content: content["model"].update(group=2))
    with pytest.raises(ResumeError, match="model.group_size: the checkpoint has 2, this run 1"):
        start(recipe, run)


def test_the_codecs_trainer_compares_too(tmp_path: Path) -> None:
    from helpers.tiny_models import TINY_CODEC

    corpus = write_tones(tmp_path / "corpus", ("a/0", "a/1", "b/0", "b/1", "c/0"), noise=0.01)
    codec = CodecRecipe(
        data=str(corpus), out=str(tmp_path / "out"), run="test", held_out_every=4,
        codec=TINY_CODEC, steps=4, batch_size=4, crop_seconds=0.2, checkpoint_every=4, threads=1,
    )  # fmt: skip
    trainee = EncodecTrainee(codec)
    folder = tmp_path / "step_00000004"
    checkpoint.save(folder, {"x": torch.zeros(1)}, trainee.metadata())
    checkpoint.save_state(folder, checkpoint.TrainState(step=4, position=4))
    for changed, message in (
        (replace(codec, batch_size=8), "batch_size: 4 -> 8"),
        (replace(codec, loss=replace(codec.loss, mel=2.0)), "loss.mel: 1.0 -> 2.0"),
        (replace(codec, held_out_speakers=("c",)), "held_out_speakers"),
        (replace(codec, codec=replace(TINY_CODEC, name="other")), "model.name: the checkpoint"),
    ):
        with pytest.raises(ResumeError, match=message):
            resume.check(folder, EncodecTrainee(changed).metadata(), Worker())
    write_tones(corpus, ("d/0",))
    with pytest.raises(ResumeError, match="dataset: "):
        resume.check(folder, EncodecTrainee(codec).metadata(), Worker())
