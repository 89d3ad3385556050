"""From the plan of an epoch to batches with prompts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from valle.jobs.training import sampler
from valle.jobs.training.sampler import Batching, Prompts
from valle.model.sequence import Batch, collate
from valle.platform.checkpoint import TrainState
from valle.platform.dataset import TokenDataset


class Loader:
    """Turns the plan's utterance numbers into batches with prompts."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        prompt_seconds: float,
        held_out: int,
        seed: int,
        shortest_prompt: float | None = None,
        utterances_per_speaker: int | None = None,
    ) -> None:
        """`held_out` utterances, about, are kept for validation. The longest prompt of a batch
        is drawn between `shortest_prompt` and `prompt_seconds`; None: it never varies. An epoch
        has at most `utterances_per_speaker` of each; None: all."""
        self.dataset = dataset
        frame_rate = dataset.manifest.codec.frame_rate
        self.prompt_frames = int(prompt_seconds * frame_rate)
        self.shortest_prompt_frames = int((shortest_prompt or prompt_seconds) * frame_rate)
        self.seed = seed
        self._speakers, self._at_most = dataset.speakers(), utterances_per_speaker
        self._prompts = Prompts(self._speakers)
        self.lengths = dataset.frames() + dataset.n_phonemes() + self.prompt_frames
        self.training, self.validation = self._split(held_out)

    def _split(self, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Held out: every n-th utterance, so that each speaker is in both parts."""
        numbers = np.arange(len(self.dataset))
        every = max(10, len(numbers) // max(1, wanted))
        held_out = numbers % every == every - 1
        return numbers[~held_out], numbers[held_out]

    def batch(self, utterances: np.ndarray, key: Sequence[int]) -> Batch:
        """The batch of some utterances; `key` decides prompts and where they are cut."""
        generator = np.random.default_rng([self.seed, *key])
        longest = self.prompt_frames
        if self.shortest_prompt_frames < longest:
            longest = int(generator.integers(self.shortest_prompt_frames, longest + 1))
        items = [self.dataset[int(number)] for number in utterances]
        prompts = []
        for number in utterances:
            codes = self.dataset[self._prompts.draw(int(number), generator)].codes
            start = int(generator.integers(0, max(1, codes.shape[1] - longest + 1)))
            prompts.append(torch.from_numpy(codes[:, start : start + longest].copy()))
        return collate(
            [torch.from_numpy(item.phonemes.copy()) for item in items],
            prompts,
            [torch.from_numpy(item.codes.copy()) for item in items],
        )

    def batches(
        self, batching: Batching, state: TrainState, rank: int, world_size: int
    ) -> Iterator[tuple[int, int, Batch]]:
        """Endless (epoch, batch number, batch) of one rank, from the position in `state` on."""
        position = sampler.batches(
            self.lengths[self.training], self._speakers[self.training], batching,
            at_most=self._at_most, seed=self.seed, epoch=state.epoch, batch=state.batch, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        for epoch, number, chosen in position:
            yield epoch, number, self.batch(self.training[chosen], [epoch, number, rank])
