"""Progress bars that stay readable in a log file."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item] | None = None, *, total: int, label: str, unit: str, initial: int = 0
) -> "tqdm[Item]":
    """A tqdm bar: lively on a terminal, one line every 20 s elsewhere."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        items, total=total, desc=label, unit=unit, initial=initial, mininterval=interval,
        maxinterval=interval * 2,
    )  # fmt: skip
