"""Which utterances form the next batch, and which recording prompts each.

The plan of an epoch is a pure function of (lengths, speakers, seed, epoch): every rank computes the
same one and takes its slice. Equal step counts on all ranks and exact resume follow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How utterances are grouped."""

    # not recipe.formerly(): the bare machine of `make gpu` lacks what that module imports
    max_tokens: int = field(default=4000, metadata={"formerly": ("tokens",)})
    """Padded positions of a batch (text + prompt + response) on one worker."""

    max_utterances: int = 64
    """Bound on the rows of a batch."""

    jitter: float = 0.05
    """Lengths are sorted with this much noise, so that neighbours change between epochs."""

    def __post_init__(self) -> None:
        if self.max_tokens < 100:
            raise ValueError(f"max_tokens: {self.max_tokens} is too small for any utterance")


def plan(
    lengths: Indices, batching: Batching, *, seed: int, epoch: int, world_size: int = 1
) -> list[Indices]:
    """Batches of one epoch: a multiple of `world_size`, alike in length inside, in random order.

    An utterance longer than the whole budget gets a batch of its own. When the last round would
    leave some ranks without a batch, its batches are left out; another epoch cuts differently.
    """
    generator = np.random.default_rng([seed, epoch])
    noise = generator.uniform(1 - batching.jitter, 1 + batching.jitter, len(lengths))
    batches = []
    start = 0
    order = np.argsort(lengths * noise, kind="stable")
    longest = 0
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
    n_batches = len(batches) // world_size * world_size
    if not n_batches:
        raise ValueError(
            f"{len(lengths)} utterances make {len(batches)} batches: too few for {world_size} "
            "workers; lower batching.max_tokens or the number of workers, or raise "
            "utterances_per_speaker where it is set"
        )
    return [batches[i] for i in generator.permutation(len(batches))[:n_batches]]


def cap_per_speaker(speakers: Indices, limit: int, *, seed: int, epoch: int) -> Indices:
    """Utterances of an epoch, at most so many of each speaker, drawn anew in every epoch."""
    generator = np.random.default_rng([seed, epoch, limit])
    order = generator.permutation(len(speakers))
    order = order[np.argsort(speakers[order], kind="stable")]
    by_speaker = speakers[order]
    position = np.arange(len(order)) - np.searchsorted(by_speaker, by_speaker)
    return np.sort(order[position < limit])


class PromptSampler:
    """Draws, for an utterance, another one by the same speaker."""

    def __init__(self, speakers: Indices) -> None:
        order = np.argsort(speakers, kind="stable")
        starts = np.searchsorted(speakers[order], np.arange(int(speakers.max()) + 2))
        self._order, self._starts, self._speakers = order, starts, speakers

    def draw(self, utterance: int, generator: np.random.Generator) -> int:
        """Number of the prompt's utterance; a speaker with only one prompts himself."""
        speaker = self._speakers[utterance]
        start, end = self._starts[speaker], self._starts[speaker + 1]
        if end - start == 1:
            return utterance
        prompt = int(self._order[generator.integers(start, end - 1)])
        return int(self._order[end - 1]) if prompt == utterance else prompt


def batches(
    lengths: Indices, speakers: Indices, batching: Batching, *,
    utterances_per_speaker: int | None, seed: int, epoch: int, batch: int, rank: int,
    world_size: int,
) -> Iterator[tuple[int, int, Indices]]:  # fmt: skip
    """Endless (epoch, batch, utterances) for one rank, from a resume position on; at most
    `utterances_per_speaker` of each in an epoch."""
    indices = np.arange(len(lengths))
    while True:
        if utterances_per_speaker is not None:
            indices = cap_per_speaker(speakers, utterances_per_speaker, seed=seed, epoch=epoch)
        planned = plan(lengths[indices], batching, seed=seed, epoch=epoch, world_size=world_size)
        rank_batches = planned[rank::world_size]
        for number in range(batch, len(rank_batches)):
            yield epoch, number, indices[rank_batches[number]]
        epoch, batch = epoch + 1, 0
