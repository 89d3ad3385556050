"""From the plan of an epoch to batches with prompts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from valle.jobs.training import sampler
from valle.jobs.training.sampler import Batching, PromptSampler
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
        validation_utterances: int,
        seed: int,
        min_prompt_seconds: float | None = None,
        utterances_per_speaker: int | None = None,
    ) -> None:
        """About `validation_utterances` are held out for validation. The longest prompt of a batch
        is drawn between `min_prompt_seconds` and `prompt_seconds`; None: it never varies. An epoch
        has at most `utterances_per_speaker` of each; None: all."""
        self.dataset = dataset
        frame_rate = dataset.manifest.codec.frame_rate
        self.prompt_frames = int(prompt_seconds * frame_rate)
        self.min_prompt_frames = int((min_prompt_seconds or prompt_seconds) * frame_rate)
        self.seed = seed
        self._speakers = dataset.speakers()
        self._utterances_per_speaker = utterances_per_speaker
        self._prompts = PromptSampler(self._speakers)
        self.lengths = dataset.frames() + dataset.n_phonemes() + self.prompt_frames
        self.training, self.validation = self._split(validation_utterances)

    def _split(self, n_validation: int) -> tuple[np.ndarray, np.ndarray]:
        """Held out: every n-th utterance, so that each speaker is in both parts."""
        numbers = np.arange(len(self.dataset))
        every = max(10, len(numbers) // max(1, n_validation))
        held_out = numbers % every == every - 1
        return numbers[~held_out], numbers[held_out]

    def batch(self, utterances: np.ndarray, key: Sequence[int]) -> Batch:
        """The batch of some utterances; `key` decides prompts and where they are cut."""
        generator = np.random.default_rng([self.seed, *key])
        longest = self.prompt_frames
        if self.min_prompt_frames < longest:
            longest = int(generator.integers(self.min_prompt_frames, longest + 1))
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
            utterances_per_speaker=self._utterances_per_speaker, seed=self.seed,
            epoch=state.epoch, batch=state.batch, rank=rank, world_size=world_size,
        )  # fmt: skip
        for epoch, number, indices in position:
            yield epoch, number, self.batch(self.training[indices], [epoch, number, rank])
