import pytest
import torch

from valle.model.sampling import Sampling, nucleus, sample, top_k

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))


def kept(logits: torch.Tensor) -> list[list[bool]]:
    return torch.isfinite(logits).tolist()


def test_top_k_keeps_the_k_largest() -> None:
    assert kept(top_k(LOGITS, 2)) == [[True, True, False, False], [False, False, True, True]]
    assert torch.equal(top_k(LOGITS, 0), LOGITS)
    assert torch.equal(top_k(LOGITS, 9), LOGITS)


@pytest.mark.parametrize(
    ("p", "first_row"),
    [(0.4, [1, 0, 0, 0]), (0.5, [1, 0, 0, 0]), (0.6, [1, 1, 0, 0]), (0.8, [1, 1, 1, 0])],
)
def test_nucleus_keeps_the_smallest_set_that_reaches_p(p: float, first_row: list[int]) -> None:
    rows = kept(nucleus(LOGITS, p))
    assert rows[0] == [bool(x) for x in first_row]
    assert rows[1] == rows[0][::-1]


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
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"repetition_window": 0}],
)
def test_bad_settings_name_the_field(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
