"""Paired timing: variants of the same work, run alternately in one process."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from valle.platform.progress import progress_bar


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, label: str
) -> dict[str, list[float]]:
    """Seconds of each variant, one value a round.

    The variants alternate within a round, so that a machine that slows down for a while slows all
    of them, and ratios of the same round remain comparable.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with progress_bar(total=rounds * len(variants), label=label, unit="variant") as bar:
        for _ in range(rounds):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
                bar.update()
    return seconds


def median_ratio(values: Sequence[float], to: Sequence[float]) -> float:
    """Median of the ratios of values of the same round."""
    return statistics.median(a / b for a, b in zip(values, to, strict=True))
