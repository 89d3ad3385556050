"""Means and ratios over items, with 95 % bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A mean or ratio over items, and its 95 % bootstrap interval."""

    value: float
    low: float
    """2.5 % quantile over the resamples."""
    high: float
    """97.5 % quantile over the resamples."""


def bootstrap_mean(values: Sequence[float]) -> Interval | None:
    """Mean with its interval; None without values."""
    return bootstrap_ratio(values, np.ones(len(values))) if len(values) else None


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float] | NDArray[np.float64]
) -> Interval:
    """Sum of the numerators over the sum of the denominators, an entry an item, with its interval.

    The resamples are the same in every call with as many items.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    items = np.random.default_rng(0).integers(0, len(top), (RESAMPLES, len(top)))
    resampled = top[items].sum(1) / bottom[items].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))
