import itertools

import numpy as np
import pytest

from valle.jobs.training.sampler import Batching, PromptSampler, batches, cap_per_speaker, plan

LENGTHS = np.random.default_rng(0).integers(100, 1600, 3000)


def test_plan_uses_every_utterance_once() -> None:
    used = np.concatenate(plan(LENGTHS, Batching(), seed=0, epoch=0))
    assert sorted(used) == list(range(len(LENGTHS)))


def test_plan_keeps_the_budget_and_pads_at_most_five_percent() -> None:
    batching = Batching(max_tokens=8000)
    batches = plan(LENGTHS, batching, seed=0, epoch=0)
    padded = sum(LENGTHS[b].max() * len(b) for b in batches)
    assert all(LENGTHS[b].max() * len(b) <= 8000 for b in batches)
    assert 1 - LENGTHS.sum() / padded <= 0.05


def test_plan_puts_too_long_an_utterance_alone() -> None:
    lengths = np.array([50, 60, 5000, 70])
    alone = [b for b in plan(lengths, Batching(max_tokens=200), seed=0, epoch=0) if 2 in b]
    assert [list(b) for b in alone] == [[2]]


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        return [int(i) for b in plan(LENGTHS, Batching(), seed=seed, epoch=epoch) for i in b]

    assert flat(1, 2) == flat(1, 2)
    assert flat(1, 2) != flat(1, 3)
    assert flat(1, 2) != flat(2, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_plan_is_shared_by_ranks_in_equal_parts(world_size: int) -> None:
    """Sharded equals single: the ranks' slices together are the plan, less a remainder."""
    batches = plan(LENGTHS, Batching(), seed=0, epoch=0, world_size=world_size)
    assert len(batches) % world_size == 0
    full = plan(LENGTHS, Batching(), seed=0, epoch=0)
    assert len(full) - len(batches) < world_size
    slices = [batches[rank::world_size] for rank in range(world_size)]
    assert len({len(part) for part in slices}) == 1


def test_plan_refuses_fewer_batches_than_workers() -> None:
    with pytest.raises(ValueError, match="too few for 8 workers; lower batching.max_tokens"):
        plan(np.array([100, 100]), Batching(), seed=0, epoch=0, world_size=8)


def test_cap_per_speaker_draws_others_in_each_epoch() -> None:
    speakers = np.array([0] * 500 + [1, 2] * 5 + [3])
    draws = [cap_per_speaker(speakers, 5, seed=0, epoch=epoch) for epoch in range(100)]
    for numbers in draws:
        assert len(set(numbers)) == len(numbers)
        assert np.bincount(speakers[numbers]).tolist() == [5, 5, 5, 1]
    assert len({n for numbers in draws for n in numbers if n < 500}) > 250  # of 5 a time
    assert (draws[3] == cap_per_speaker(speakers, 5, seed=0, epoch=3)).all()


@pytest.mark.parametrize("limit", [None, 30])
def test_batches_resumed_equal_uninterrupted(limit: int | None) -> None:
    speakers = np.repeat([0, 1, 2], [150, 40, 10])

    def take(epoch: int, position: int, count: int) -> list[tuple[int, int, list[int]]]:
        stream = batches(
            LENGTHS[:200], speakers, Batching(), utterances_per_speaker=limit, seed=0, epoch=epoch,
            position=position, rank=1, world_size=2,
        )  # fmt: skip
        return [
            (planned.epoch, planned.position, planned.data.tolist())
            for planned in itertools.islice(stream, count)
        ]

    uninterrupted = take(0, 0, 60)
    assert uninterrupted[-1][0] > 0  # crosses an epoch
    epoch, position, _ = uninterrupted[24]
    assert take(epoch, position, 35) == uninterrupted[25:]
    first = [speakers[n] for e, _, numbers in uninterrupted for n in numbers if e == 0]
    assert limit is None or np.bincount(first).max() <= limit


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1), (3, 3)])
def test_batches_of_another_number_of_workers_go_on_with_the_next(before: int, after: int) -> None:
    """Nothing of the epoch is repeated or left out, but a remainder smaller than a round."""
    speakers = np.zeros(400, np.int64)

    def rounds(world_size: int, position: int, count: int) -> tuple[list[int], int]:
        """Utterances of epoch 0 in `count` rounds of all ranks, and the position after them."""
        used: list[int] = []
        for rank in range(world_size):
            stream = batches(
                LENGTHS[:400], speakers, Batching(), utterances_per_speaker=None, seed=0, epoch=0,
                position=position, rank=rank, world_size=world_size,
            )  # fmt: skip
            taken = list(
                itertools.takewhile(lambda p: p.epoch == 0, itertools.islice(stream, count))
            )
            used += [n for planned in taken for n in planned.data.tolist()]
        return used, taken[-1].position

    whole = plan(LENGTHS[:400], Batching(), seed=0, epoch=0)
    first, position = rounds(before, 0, 7)
    assert position == 7 * before
    rest, end = rounds(after, position, 1000)
    assert sorted(first + rest) == sorted(n for b in whole[:end] for n in b.tolist())
    assert len(whole) - end < after


def test_prompt_sampler_draws_from_the_same_speaker() -> None:
    speakers = np.array([2, 0, 1, 0, 2, 2, 0])
    prompts = PromptSampler(speakers)
    generator = np.random.default_rng(0)
    for number, speaker in enumerate(speakers):
        drawn = {prompts.draw(number, generator) for _ in range(60)}
        others = {i for i, s in enumerate(speakers) if s == speaker and i != number}
        assert drawn == (others or {number})


def test_batching_refuses_a_tiny_budget() -> None:
    with pytest.raises(ValueError, match="max_tokens: 10 is too small"):
        Batching(max_tokens=10)
