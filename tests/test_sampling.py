"""Sampling: settings of each row, repetition-aware sampling, and its random numbers."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from valle.model.sampling import (
    MAX_SEED,
    UNIFORMS_PER_TOKEN,
    Sampling,
    SamplingTensors,
    _mix,
    draw_uniforms,
    guide,
    sample,
    sample_rows,
    top_k_top_p_mask,
    validate_seed,
)

ROOT = Path(__file__).resolve().parent.parent
LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))
SEEDS = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**53 + 1, MAX_SEED - 1, MAX_SEED]


def mask(top_k: int = 0, top_p: float = 1.0) -> list[list[bool]]:
    settings = SamplingTensors.from_rows([Sampling(top_k=top_k, top_p=top_p)])
    ordered = LOGITS[:1].exp()
    return top_k_top_p_mask(ordered, settings.top_k, settings.top_p).tolist()


def test_top_k_keeps_the_k_largest() -> None:
    assert mask(top_k=2) == [[True, True, False, False]]
    assert mask(top_k=0) == mask(top_k=9) == [[True] * 4]


@pytest.mark.parametrize(
    ("p", "row"),
    [(0.4, [1, 0, 0, 0]), (0.5, [1, 0, 0, 0]), (0.6, [1, 1, 0, 0]), (0.8, [1, 1, 1, 0])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, row: list[int]) -> None:
    assert mask(top_p=p) == [[bool(x) for x in row]]


def test_top_p_counts_the_probability_left_by_top_k() -> None:
    # of the three most likely, 0.56 and 0.28 of the probability, the first alone reaches a half
    assert mask(top_k=3, top_p=0.55) == [[True, False, False, False]]


def test_top_p_below_float32_keeps_the_most_likely() -> None:
    tiny = SamplingTensors.from_rows([Sampling(top_p=1e-50)] * 2)  # zero in float32
    assert sample_rows(LOGITS, tiny, torch.rand(2, 2)).tolist() == [0, 3]


def test_guide_moves_away_from_the_unconditional_logits() -> None:
    unconditional = torch.zeros(1, 4)
    unmoved, moved = (guide(LOGITS[:1], unconditional, scale).softmax(-1) for scale in (1.0, 2.0))
    torch.testing.assert_close(unmoved, LOGITS[:1].exp())
    # against a flat distribution, a scale of 2 squares the probabilities
    torch.testing.assert_close(moved, LOGITS[:1].exp() ** 2 / (LOGITS[:1].exp() ** 2).sum())


def test_sample_rows_with_mixed_settings_equals_each_row_alone() -> None:
    settings = [
        Sampling(), Sampling(temperature=0.0), Sampling(top_k=2), Sampling(temperature=1.5),
        Sampling(top_p=0.6), Sampling(top_p=0.6, repetition_threshold=0.1),
        Sampling(top_p=0.6, repetition_threshold=0.4, repetition_window=3),
    ]  # fmt: skip
    seeds = torch.arange(len(settings))
    logits = torch.randn(len(settings), 50, generator=torch.Generator().manual_seed(5)) * 2
    recent = logits.topk(3).indices.repeat(1, 4)[:, :10]
    for position in range(20):
        uniforms = draw_uniforms(seeds, torch.full_like(seeds, position))
        batched = sample_rows(logits, SamplingTensors.from_rows(settings), uniforms, recent)
        for row, sampling in enumerate(settings):
            part = slice(row, row + 1)
            alone = sample(
                logits[part],
                sampling,
                seed=row,
                positions=torch.tensor([position]),
                history=recent[part],
            )
            assert alone == batched[part]


def test_sample_rows_at_the_largest_uniform_takes_the_last_class_with_weight() -> None:
    almost_one = torch.full((2, 1), 1 - 2**-24)
    tokens = sample_rows(LOGITS[:1], SamplingTensors.from_rows([Sampling(top_k=3)]), almost_one)
    assert tokens.tolist() == [2]


def test_sample_at_temperature_zero_is_greedy() -> None:
    tokens = sample(LOGITS, Sampling(temperature=0.0), seed=0, positions=torch.arange(2))
    assert tokens.tolist() == [0, 3]


def test_sample_frequencies_follow_the_distribution() -> None:
    positions = torch.arange(20_000)
    logits = LOGITS[:1].expand(len(positions), -1)
    tokens = sample(logits, Sampling(), seed=0, positions=positions)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(shares, LOGITS[0].exp(), atol=0.02, rtol=0)


def test_sample_depends_on_seed_codebook_and_position_only() -> None:
    positions = torch.arange(100)
    logits = LOGITS[:1].expand(len(positions), -1)
    tokens = sample(logits, Sampling(), seed=1, positions=positions)
    assert torch.equal(tokens, sample(logits, Sampling(), seed=1, positions=positions))
    # a token alone, later, or in another order is the same one
    reverse = sample(logits, Sampling(), seed=1, positions=positions.flip(0)).flip(0)
    assert torch.equal(tokens, reverse)
    assert not torch.equal(tokens, sample(logits, Sampling(), seed=2, positions=positions))
    other = sample(logits, Sampling(), seed=1, positions=positions, codebook=1)
    assert not torch.equal(tokens, other)


def test_repetition_aware_sampling_breaks_a_loop() -> None:
    """Nucleus alone always repeats token 0; a window full of it brings the other classes back."""
    positions = torch.arange(5_000)
    logits = LOGITS[:1].expand(len(positions), -1)
    history = torch.zeros(len(positions), 10, dtype=torch.long)
    narrow = Sampling(top_p=0.4, repetition_threshold=0.1)
    tokens = sample(logits, narrow, seed=0, positions=positions, history=history)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(shares, LOGITS[0].exp(), atol=0.03, rtol=0)
    fresh = torch.full_like(history, 3)
    assert (sample(logits, narrow, seed=0, positions=positions, history=fresh) == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"repetition_window": 0},
        {"guidance_scale": 0.5}, {"guidance_scale": float("inf")},
    ],
)  # fmt: skip
def test_sampling_error_names_the_field(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_outside_63_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed: {seed} is not in 0 to 2\*\*63 - 1"):
        sample(LOGITS, Sampling(temperature=0.0), seed=seed, positions=torch.arange(2))
    validate_seed(0)
    validate_seed(MAX_SEED)


def uniform_twin(seed: int, codebook: int, position: int, draw: int) -> float:
    """`draw_uniforms` in whole numbers modulo 2**64, one at a time."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    gamma = 0x9E3779B97F4A7C15
    counter = (codebook * 2**40 + position) * UNIFORMS_PER_TOKEN + draw
    return (mix((mix((seed + gamma) % 2**64) + counter * gamma) % 2**64) >> 40) / 2**24


def test_draw_uniforms_equals_its_twin() -> None:
    positions = torch.tensor([0, 1, 2, 74, 1500, 2**31, 2**40 - 1])
    for codebook in (0, 1, 7, 31):
        for seed in SEEDS:
            uniforms = draw_uniforms(torch.full_like(positions, seed), positions, codebook)
            assert uniforms.dtype == torch.float32
            assert uniforms.tolist() == [
                [uniform_twin(seed, codebook, position, draw) for position in positions.tolist()]
                for draw in range(UNIFORMS_PER_TOKEN)
            ]


def test_mix_is_splitmix64() -> None:
    """The twin's mixing function, and so the tensors', against published numbers: the first
    outputs of splitmix64 from the state 1234567 (Rosetta Code, "Pseudo-random numbers")."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = 1234567
    for output in expected:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        signed = state - 2**64 if state >= 2**63 else state
        assert _mix(torch.tensor([signed])).item() % 2**64 == output


def test_draw_uniforms_is_uniform_and_uncorrelated() -> None:
    """Consecutive seeds, positions, codebooks and draws: what speech is made of."""
    n_seeds, n_positions = 128, 256
    seeds = torch.arange(n_seeds).repeat_interleave(n_positions)
    positions = torch.arange(n_positions).repeat(n_seeds)
    # [codebooks, draws, seeds, positions]
    uniforms = torch.stack([draw_uniforms(seeds, positions, codebook) for codebook in range(8)])
    uniforms = uniforms.unflatten(2, (n_seeds, n_positions)).double()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    # all 524,288 numbers are different but for what 24 bits allow (the birthday bound)
    n = uniforms.numel()
    distinct = len(uniforms.flatten().unique())
    assert distinct == pytest.approx(2**24 * (1 - math.exp(-n / 2**24)), rel=0.001)
    # chi-square of 256 cells, by upper and by lower bits, within five standard deviations
    for digits in (uniforms * 256, uniforms * 2**24 % 256):
        counts = torch.bincount(digits.long().flatten(), minlength=256).double()
        statistic = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)
    # neighbours along each axis: a correlation of n independent pairs is N(0, 1 / n)
    centered = (uniforms - 0.5) * math.sqrt(12)
    for axis, length in enumerate(uniforms.shape):
        for lag in range(1, min(length, 4)):
            pairs = centered.narrow(axis, lag, length - lag), centered.narrow(axis, 0, length - lag)
            correlation = (pairs[0] * pairs[1]).mean()
            assert abs(correlation) < 5 / math.sqrt(pairs[0].numel()), (axis, lag)
    # pairs of neighbours fill the square: no lines, as a weak hash would draw
    for axis in range(1, 4):
        x, y = uniforms.narrow(axis, 0, 1), uniforms.narrow(axis, 1, 1)
        if axis > 1:
            x, y = uniforms.unfold(axis, 2, 2).unbind(-1)
        cells = (x * 16).long().flatten() * 16 + (y * 16).long().flatten()
        counts = torch.bincount(cells, minlength=256).double()
        statistic = ((counts - len(cells) / 256) ** 2 / (len(cells) / 256)).sum()
        assert abs(statistic - 255) < 5 * math.sqrt(2 * 255), axis


def test_draw_uniforms_of_extreme_seeds_differ() -> None:
    """Seeds that differ in one bit, the lowest or the highest, share no numbers."""
    positions = torch.arange(1000)
    draws = [draw_uniforms(torch.full_like(positions, s), positions).flatten() for s in SEEDS]
    for i, one in enumerate(draws):
        assert one.mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(one)))
        for other in draws[:i]:
            # by chance, a number in 2**24 is equal
            assert (one == other).sum() <= 1
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / math.sqrt(len(one))


COMPILED_EQUALS_EAGER = """
import torch
from valle.model.sampling import MAX_SEED, draw_uniforms

positions = torch.arange(37)
compiled = torch.compile(draw_uniforms, fullgraph=True)
for seed in (0, 1, 2**31, 2**53 + 1, MAX_SEED):
    arguments = torch.full_like(positions, seed), positions, 5
    assert torch.equal(compiled(*arguments), draw_uniforms(*arguments)), seed
"""


@pytest.mark.slow  # a minute of C++ compiler
def test_draw_uniforms_compiled_equals_eager() -> None:
    """In a process of its own: without jaxtyping's hook, and without what other tests compiled."""
    subprocess.run([sys.executable, "-c", COMPILED_EQUALS_EAGER], cwd=ROOT, check=True)
