import pytest
import torch

from valle.model.sampling import (
    Sampling,
    SamplingTensors,
    draw_uniforms,
    guide,
    sample,
    sample_rows,
    top_k_top_p_mask,
)

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))


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
def test_nucleus_keeps_the_smallest_set_that_reaches_p(p: float, row: list[int]) -> None:
    assert mask(top_p=p) == [[bool(x) for x in row]]
    # of the three likeliest, 0.56 and 0.28 of the probability, the first alone reaches a half
    assert mask(top_k=3, top_p=0.55) == [[True, False, False, False]]


def test_guidance_moves_away_from_what_is_said_without_the_text() -> None:
    unconditional = torch.zeros(1, 4)
    unmoved, moved = (guide(LOGITS[:1], unconditional, scale).softmax(-1) for scale in (1.0, 2.0))
    torch.testing.assert_close(unmoved, LOGITS[:1].exp())
    # against a flat distribution, a scale of 2 squares the probabilities
    torch.testing.assert_close(moved, LOGITS[:1].exp() ** 2 / (LOGITS[:1].exp() ** 2).sum())


def test_rows_with_settings_of_their_own_draw_as_they_would_alone() -> None:
    settings = [
        Sampling(), Sampling(temperature=0.0), Sampling(top_k=2), Sampling(temperature=1.5),
        Sampling(top_p=0.6), Sampling(top_p=0.6, repetition_threshold=0.1),
        Sampling(top_p=0.6, repetition_threshold=0.4, repetition_window=3),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(len(settings), 50, generator=generator) * 2
    for _ in range(20):
        uniforms = draw_uniforms(generator, len(settings))
        recent = logits.topk(3).indices.repeat(1, 4)[:, :10]
        together = sample_rows(logits, SamplingTensors.from_rows(settings), uniforms, recent)
        for row, one in enumerate(settings):
            part = slice(row, row + 1)
            alone = sample_rows(
                logits[part], SamplingTensors.from_rows([one]), uniforms[:, part],
                recent[part, -one.repetition_window :],
            )  # fmt: skip
            assert alone == together[part]


def test_however_small_p_is_the_likeliest_is_kept() -> None:
    tiny = SamplingTensors.from_rows([Sampling(top_p=1e-50)] * 2)  # zero in float32
    assert sample_rows(LOGITS, tiny, torch.rand(2, 2)).tolist() == [0, 3]


def test_the_last_class_is_reached_and_never_passed() -> None:
    almost_one = torch.full((2, 1), 1 - 2**-24)
    tokens = sample_rows(LOGITS[:1], SamplingTensors.from_rows([Sampling(top_k=3)]), almost_one)
    assert tokens.tolist() == [2]


def test_temperature_zero_is_greedy() -> None:
    drawn = sample(LOGITS, Sampling(temperature=0.0), generator=torch.Generator())
    assert drawn.tolist() == [0, 3]


def test_frequencies_follow_the_distribution() -> None:
    many = LOGITS[:1].expand(20_000, -1)
    drawn = sample(many, Sampling(), generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, LOGITS[0].exp(), atol=0.02, rtol=0)


def test_same_seed_same_tokens() -> None:
    draws = [
        sample(LOGITS.repeat(50, 1), Sampling(), generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_repetition_aware_sampling_breaks_a_loop() -> None:
    """Nucleus alone would repeat token 0 for ever; a window full of it brings the rest back."""
    logits = LOGITS[:1].expand(5_000, -1)
    history = torch.zeros(5_000, 10, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    narrow = Sampling(top_p=0.4, repetition_threshold=0.1)
    drawn = sample(logits, narrow, generator=generator, history=history)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, LOGITS[0].exp(), atol=0.03, rtol=0)
    fresh = torch.full_like(history, 3)
    assert (sample(logits, narrow, generator=generator, history=fresh) == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"repetition_window": 0},
        {"guidance_scale": 0.5}, {"guidance_scale": float("inf")},
    ],
)  # fmt: skip
def test_bad_settings_name_the_field(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
