"""Progress bars that stay readable in a log file."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    *, total: int, label: str, unit: str, initial: int = 0, enabled: bool = True
) -> "tqdm[Any]":
    """A tqdm bar to `update()`: lively on a terminal, one line every 20 s elsewhere.

    Of several workers on one task, only the first has its bar `enabled`.
    """
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total, desc=label, unit=unit, initial=initial, mininterval=interval,
        maxinterval=interval * 2, disable=not enabled,
    )  # fmt: skip
