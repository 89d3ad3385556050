"""Ways to do the same thing, timed in turn: what the benchmarks of one process share."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from valle.platform.progress import progress


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, label: str
) -> dict[str, list[float]]:
    """Seconds that each way took, a figure a round: what slows the machine slows them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with progress(total=rounds * len(ways), label=label, unit="way") as bar:
        for _ in range(rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
                bar.update()
    return seconds


def ratio(values: Sequence[float], to: Sequence[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(values, to, strict=True))
