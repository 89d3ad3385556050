"""From the plan to batches: prompts of the same speaker, cut to lengths that vary."""

from pathlib import Path

import numpy as np
import torch
from helpers.token_datasets import write_dataset

from valle.jobs.training.loader import Loader
from valle.model.codec.encodec import Codec
from valle.platform.dataset import TokenDataset


def loader(folder: Path, codec: Codec, shortest: float | None) -> Loader:
    write_dataset(str(folder / "tokens"), codec)
    opened = TokenDataset(str(folder / "tokens"), folder / "cache")
    return Loader(opened, prompt_seconds=0.25, shortest_prompt=shortest, held_out=6, seed=0)


def test_prompts_are_pieces_of_other_recordings_by_the_speaker(
    tmp_path: Path, tiny_codec: Codec
) -> None:
    made = loader(tmp_path, tiny_codec, None)
    chosen = np.array([0, 25, 59])
    batch = made.batch(chosen, [1, 2, 3])
    assert batch.prompt_frames.tolist() == [18, 18, 18]  # a quarter of a second
    speakers = made.dataset.speakers()
    for row, number in enumerate(chosen.tolist()):
        places = [
            other
            for other in range(len(made.dataset))
            if contains(made.dataset[other].codes, batch.prompt[row].numpy())
        ]
        assert len(places) == 1 and places != [number]
        assert speakers[places[0]] == speakers[number]
    again = made.batch(chosen, [1, 2, 3])
    assert torch.equal(batch.prompt, again.prompt)
    assert not torch.equal(batch.prompt, made.batch(chosen, [1, 2, 4]).prompt)


def test_lengths_of_prompts_vary_between_batches(tmp_path: Path, tiny_codec: Codec) -> None:
    made = loader(tmp_path, tiny_codec, 0.1)
    batches = [made.batch(np.array([0, 40]), [0, number]) for number in range(60)]
    lengths = {int(batch.prompt_frames.max()) for batch in batches}
    assert lengths == set(range(7, 19))


def contains(codes: np.ndarray, piece: np.ndarray) -> bool:
    """Whether `piece` `[Q, P]` stands somewhere in `codes` `[Q, T]`."""
    starts = range(codes.shape[1] - piece.shape[1] + 1)
    return any(np.array_equal(codes[:, s : s + piece.shape[1]], piece) for s in starts)
