"""Progress bars, on a terminal and in a log file."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    *, total: int, label: str, unit: str, initial: int = 0, enabled: bool = True
) -> "tqdm[Any]":
    """A tqdm bar: refreshed five times a second on a terminal, every 20 s elsewhere.

    `initial` is where a resumed run starts. Workers other than the first pass `enabled=False`.
    """
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        initial=initial,
        mininterval=interval,
        maxinterval=interval * 2,
        disable=not enabled,
    )
