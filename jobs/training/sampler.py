"""The batch plan of an epoch, and the prompt of each utterance.

The plan is a pure function of (lengths, speakers, seed, epoch): every rank computes the same plan
and takes its slice. So all ranks take the same number of steps, and a resumed run continues with
the next batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Data = TypeVar("Data")


@dataclass(frozen=True)
class Planned(Generic[Data]):
    """A batch, or what it is made of, with its position in the plan of one rank."""

    epoch: int

    index: int
    """Number of the batch within the epoch, counted from 0."""

    position: int
    """Position in the epoch's data after this batch: `TrainState.position`."""

    data: Data


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Limits on the size of a batch."""

    # not recipe.formerly(): the bare machine of `make gpu` lacks what that module imports
    max_tokens: int = field(default=4000, metadata={"formerly": ("tokens",)})
    """Most positions (text, prompt and response, with padding) in a batch of one worker."""

    max_utterances: int = 64
    """Most utterances in a batch."""

    jitter: float = 0.05
    """Relative noise on lengths before utterances are sorted by length, so that batches have other
    members in each epoch."""

    def __post_init__(self) -> None:
        if self.max_tokens < 100:
            raise ValueError(
                f"max_tokens: {self.max_tokens} is too small for any utterance; set 100 or more"
            )


def plan(
    lengths: Indices, batching: Batching, *, seed: int, epoch: int, world_size: int = 1
) -> list[Indices]:
    """Batches of one epoch in random order, each of utterances of similar length.

    The number of batches is a multiple of `world_size`; the rest is dropped, and differs between
    epochs. An utterance longer than `max_tokens` is a batch of its own. Raises ValueError if there
    are fewer batches than workers.
    """
    # sort by length, with noise
    generator = np.random.default_rng([seed, epoch])
    noise = generator.uniform(1 - batching.jitter, 1 + batching.jitter, len(lengths))
    order = np.argsort(lengths * noise, kind="stable")
    # cut where the padded size would exceed the limits
    batches = []
    start = longest = 0
    sizes = lengths[order].tolist()
    for position, size in enumerate(sizes):
        longest = max(longest, size)
        count = position - start
        if count and (
            longest * (count + 1) > batching.max_tokens or count == batching.max_utterances
        ):
            batches.append(order[start:position])
            start, longest = position, size
    if len(order):
        batches.append(order[start:])
    # the same number of batches for every rank
    n_batches = len(batches) // world_size * world_size
    if not n_batches:
        raise ValueError(
            f"{len(lengths)} utterances make {len(batches)} batches: too few for {world_size} "
            "workers; lower batching.max_tokens or the number of workers, or raise "
            "utterances_per_speaker where it is set"
        )
    return [batches[i] for i in generator.permutation(len(batches))[:n_batches]]


def cap_per_speaker(speakers: Indices, limit: int, *, seed: int, epoch: int) -> Indices:
    """Utterances of an epoch: a random `limit` of each speaker, others in each epoch."""
    generator = np.random.default_rng([seed, epoch, limit])
    order = generator.permutation(len(speakers))
    order = order[np.argsort(speakers[order], kind="stable")]
    by_speaker = speakers[order]
    position = np.arange(len(order)) - np.searchsorted(by_speaker, by_speaker)
    return np.sort(order[position < limit])


class PromptSampler:
    """Draws another utterance by the same speaker, among those at `positions`."""

    def __init__(self, speakers: Indices, positions: Indices | None = None) -> None:
        """`speakers` of all utterances; `positions`: those that may be prompts, None: all."""
        candidates = np.arange(len(speakers)) if positions is None else np.sort(positions)
        order = candidates[np.argsort(speakers[candidates], kind="stable")]
        starts = np.searchsorted(speakers[order], np.arange(int(speakers.max()) + 2))
        self._order, self._starts, self._speakers = order, starts, speakers
        self._is_candidate = np.zeros(len(speakers), bool)
        self._is_candidate[candidates] = True

    def draw(self, utterance: int, generator: np.random.Generator) -> int:
        """Index of the prompt's utterance; the utterance itself if its speaker has no other."""
        speaker = self._speakers[utterance]
        start, end = self._starts[speaker], self._starts[speaker + 1]
        if not self._is_candidate[utterance]:
            return int(self._order[generator.integers(start, end)]) if end > start else utterance
        if end - start == 1:
            return utterance
        prompt = int(self._order[generator.integers(start, end - 1)])
        return int(self._order[end - 1]) if prompt == utterance else prompt


def batches(
    lengths: Indices,
    speakers: Indices,
    batching: Batching,
    *,
    utterances_per_speaker: int | None,
    seed: int,
    epoch: int,
    position: int,
    rank: int,
    world_size: int,
) -> Iterator[Planned[Indices]]:
    """Endless batches of utterance indices for one rank.

    They begin after the first `position` batches of `epoch`, which all workers together have used.
    The order of an epoch's batches does not depend on the number of workers: with another number a
    run goes on with the next batch. An epoch has at most `utterances_per_speaker` of each speaker;
    None: all.
    """
    indices = np.arange(len(lengths))
    while True:
        if utterances_per_speaker is not None:
            indices = cap_per_speaker(speakers, utterances_per_speaker, seed=seed, epoch=epoch)
        planned = plan(lengths[indices], batching, seed=seed, epoch=epoch, world_size=world_size)
        if position % world_size:  # of another number of workers, whose plan had another end
            planned = plan(lengths[indices], batching, seed=seed, epoch=epoch)
        for start in range(position, len(planned) - world_size + 1, world_size):
            number = start // world_size
            yield Planned(epoch, number, start + world_size, indices[planned[start + rank]])
        epoch, position = epoch + 1, 0
