"""Batches with prompts: of the same speaker, cut to varying lengths."""

from pathlib import Path

import numpy as np
import torch
from helpers.token_datasets import write_dataset

from valle.jobs.training.loader import Loader
from valle.model.codec.encodec import Encodec
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
