"""Batches with prompts: of the same speaker, cut to varying lengths."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.token_datasets import write_dataset
from helpers.training import run_plain, tiny_train_recipe

from valle.jobs.training.language_model import LanguageModelTrainee
from valle.jobs.training.loader import Loader
from valle.model.codec.encodec import Encodec
from valle.model.config import Kind
from valle.platform.dataset import TokenDataset


def make_loader(folder: Path, codec: Encodec, min_seconds: float | None) -> Loader:
    write_dataset(str(folder / "tokens"), codec)
    dataset = TokenDataset(str(folder / "tokens"), folder / "cache")
    return Loader(
        dataset,
        prompt_seconds=0.25,
        min_prompt_seconds=min_seconds,
        validation_utterances=6,
        seed=0,
    )


def test_batch_prompts_are_pieces_of_other_utterances_by_the_speaker(
    tmp_path: Path, tiny_codec: Encodec
) -> None:
    loader = make_loader(tmp_path, tiny_codec, None)
    utterances = np.array([0, 25, 59])
    batch = loader.batch(utterances, [1, 2, 3])
    assert batch.prompt_frames.tolist() == [18, 18, 18]  # a quarter of a second
    speakers = loader.dataset.speakers()
    for row, number in enumerate(utterances.tolist()):
        places = [
            other
            for other in range(len(loader.dataset))
            if contains(loader.dataset[other].codes, batch.prompt[row].numpy())
        ]
        assert len(places) == 1 and places != [number]
        assert speakers[places[0]] == speakers[number]
    repeated = loader.batch(utterances, [1, 2, 3])
    assert torch.equal(batch.prompt, repeated.prompt)
    assert not torch.equal(batch.prompt, loader.batch(utterances, [1, 2, 4]).prompt)


def test_batch_prompt_lengths_vary_between_batches(tmp_path: Path, tiny_codec: Encodec) -> None:
    loader = make_loader(tmp_path, tiny_codec, 0.1)
    batches = [loader.batch(np.array([0, 40]), [0, number]) for number in range(60)]
    lengths = {int(batch.prompt_frames.max()) for batch in batches}
    assert lengths == set(range(7, 19))


def contains(codes: np.ndarray, piece: np.ndarray) -> bool:
    """Whether `piece` `[Q, P]` occurs in `codes` `[Q, T]`."""
    starts = range(codes.shape[1] - piece.shape[1] + 1)
    return any(np.array_equal(codes[:, s : s + piece.shape[1]], piece) for s in starts)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 25])
def test_split_holds_out_one_of_two(tmp_path: Path, tiny_codec: Encodec, count: int) -> None:
    write_dataset(str(tmp_path / "tokens"), tiny_codec, count)
    tokens = TokenDataset(str(tmp_path / "tokens"), tmp_path / "cache")
    loader = Loader(tokens, prompt_seconds=0.25, validation_utterances=6, seed=0)
    training, held_out = loader.training.tolist(), loader.validation.tolist()
    if count == 1:
        assert training == held_out == [0]
    else:
        assert sorted(training + held_out) == list(range(count))
        assert len(held_out) == max(1, count // 10)
    batch = loader.batch(loader.validation, [0, 0])
    assert len(batch.frames) == len(held_out)


def test_batch_prompts_are_never_held_out(tmp_path: Path, tiny_codec: Encodec) -> None:
    loader = make_loader(tmp_path, tiny_codec, None)
    held_out = set(loader.validation.tolist())
    assert len(held_out) == 6
    generator = np.random.default_rng(0)
    speakers = loader.dataset.speakers()
    for number in range(60):
        drawn = {loader._prompts.draw(number, generator) for _ in range(40)}
        assert not drawn & held_out and number not in drawn
        assert {int(speakers[other]) for other in drawn} == {int(speakers[number])}


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["ar", "nar"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_train_with_fewer_than_ten_utterances(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path, count: int, kind: Kind
) -> None:
    """The loop, with validation and a sample at its checkpoints."""
    recipe = tiny_train_recipe(home, tiny_codec, tiny_codec_folder)
    write_dataset(str(home / "few"), tiny_codec, count)
    recipe = replace(
        recipe, data=str(home / "few"), workers=1, steps={"ar": 4, "nar": 4}, checkpoint_every=2
    )
    metrics = run_plain(LanguageModelTrainee(recipe, kind), home / "run")
    assert {step for step in metrics if "validation/loss" in metrics[step]} == {2, 4}
    assert np.isfinite(metrics[4]["validation/loss"])
    assert len(list((home / "run").glob("step_*"))) == 2
