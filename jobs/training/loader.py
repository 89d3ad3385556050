"""Batches of utterances with prompts, from the plan of an epoch."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from valle.jobs.training import sampler
from valle.jobs.training.sampler import Batching, Planned, PromptSampler
from valle.model.sequence import Batch, collate
from valle.platform.checkpoint import TrainState
from valle.platform.dataset import TokenDataset


class Loader:
    """Reads the utterances of a planned batch and gives each a prompt by the same speaker.

    About `validation_utterances` are held out, from training and as prompts. The longest prompt of
    a batch is drawn between `min_prompt_seconds` and `prompt_seconds`; None: always
    `prompt_seconds`. An epoch has at most `utterances_per_speaker` of each speaker; None: all.
    """

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
        self.dataset = dataset
        frame_rate = dataset.manifest.codec.frame_rate
        self.prompt_frames = int(prompt_seconds * frame_rate)
        self.min_prompt_frames = int((min_prompt_seconds or prompt_seconds) * frame_rate)
        self.seed = seed
        self._speakers = dataset.speakers()
        self._utterances_per_speaker = utterances_per_speaker
        self.lengths = dataset.frames() + dataset.n_phonemes() + self.prompt_frames
        self.training, self.validation = self._split(validation_utterances)
        # no prompt is a held-out utterance: the model would see its codes
        self._prompts = PromptSampler(self._speakers, self.training)

    def _split(self, n_validation: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and held-out indices: every n-th utterance is held out, so that each speaker is
        in both. Of fewer than ten one is held out, if there are two."""
        numbers = np.arange(len(self.dataset))
        if len(numbers) == 1:
            logging.getLogger(__name__).warning(
                "the dataset has a single utterance: validation is on the one that is trained on, "
                "and shows nothing but that it is learnt"
            )
            return numbers, numbers
        every = max(10, len(numbers) // max(1, n_validation))
        held_out = numbers % every == every - 1
        if not held_out.any():
            held_out[self._last_with_company()] = True
        return numbers[~held_out], numbers[held_out]

    def _last_with_company(self) -> int:
        """The last utterance whose speaker has another one; without such, the last."""
        counts = np.bincount(self._speakers)[self._speakers]
        together = np.flatnonzero(counts > 1)
        return int(together[-1]) if len(together) else len(self._speakers) - 1

    def batch(self, utterances: np.ndarray, key: Sequence[int]) -> Batch:
        """The batch of some utterances; prompts and their cuts are a function of `key`."""
        # one length of prompt for the batch
        generator = np.random.default_rng([self.seed, *key])
        longest = self.prompt_frames
        if self.min_prompt_frames < longest:
            longest = int(generator.integers(self.min_prompt_frames, longest + 1))
        # a random piece of another utterance by the same speaker as each prompt
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
    ) -> Iterator[Planned[Batch]]:
        """Endless batches of one rank, from the position in `state` on."""
        for planned in self._plan(batching, state.epoch, state.position, rank, world_size):
            key = [planned.epoch, planned.index, rank]
            batch = self.batch(self.training[planned.data], key)
            yield Planned(planned.epoch, planned.index, planned.position, batch)

    def ids(
        self, batching: Batching, planned: Planned[Batch], rank: int, world_size: int
    ) -> list[str]:
        """Ids of the utterances in one of the batches of `batches`."""
        start = planned.position - world_size
        utterances = next(self._plan(batching, planned.epoch, start, rank, world_size)).data
        return [self.dataset[int(number)].id for number in self.training[utterances]]

    def _plan(
        self, batching: Batching, epoch: int, position: int, rank: int, world_size: int
    ) -> Iterator[Planned[np.ndarray]]:
        return sampler.batches(
            self.lengths[self.training],
            self._speakers[self.training],
            batching,
            utterances_per_speaker=self._utterances_per_speaker,
            seed=self.seed,
            epoch=epoch,
            position=position,
            rank=rank,
            world_size=world_size,
        )
